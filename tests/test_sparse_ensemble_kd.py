"""sparse_ensemble_kd on every backend: its numbers, its error against ensemble_kd, what it reads, and bad input."""

import itertools
import re
import threading

import pytest
import torch
import torch._dynamo.testing
from cases import ATTENTIONS, DTYPES, Calls, far, kept, sparse, spread, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_accurate, assert_same_bits, double, evaluate
from torch.nn import functional as F

from eekd import ensemble_kd, reference, sparse_ensemble_kd

NAN, INF = float("nan"), float("inf")
FUSIONS = ("probability", "logit")
OBJECTIVES = ("label", "kl")
READINGS = list(itertools.product(FUSIONS, OBJECTIVES))

readings = pytest.mark.parametrize("fusion, objective", READINGS)
fusions = pytest.mark.parametrize("fusion", FUSIONS)

# rows, snapshots, classes, K
SHAPES = (
    (65, 1, 1, 1),  # nothing is left out
    (65, 5, 2, 1),
    (65, 5, 10, 1),
    (65, 2, 100, 2),
    (65, 5, 100, 31),  # the last that goes a row per lane
    (65, 5, 100, 32),
    (9, 17, 101, 33),  # odd strides
    (9, 64, 100, 20),  # the most snapshots
    (9, 5, 1000, 50),
    (9, 1, 1023, 100),
    (9, 2, 1024, 1024),  # a tile of student and columns, and one column more
    (5, 5, 1025, 100),  # a tile and one column
    (33, 2, 2500, 15),  # rows in lanes, in tiles
    (3, 3, 5000, 1000),
    (2, 2, 3000, 3000),
    (1, 2, 128256, 100),
    (0, 5, 100, 10),
    (1, 5, 100, 10),
)


def check(x, **options):
    got = evaluate(sparse_ensemble_kd, x, **options)
    assert_accurate(got, x, formula=reference.sparse_ensemble_kd, **options)
    return got


def part(x, rows):
    """The rows of every tensor."""
    return {k: v[:, rows] if v.dim() == 3 or k == "snapshot_tail" else v[rows] for k, v in x.items()}


# Numbers


def by_columns(temperature, alpha, fusion, attention_objective, **x):
    """The contract, written out: ensemble_kd of K + 1 columns that autograd makes of all, and the CE of all."""
    s, tau, index = x["student_logits"], temperature, x["indices"]
    left = torch.ones_like(s, dtype=torch.bool).scatter(1, index, False)
    rest = torch.stack([tau * (row[keep] / tau).logsumexp(0) for row, keep in zip(s, left, strict=True)])
    columns = torch.cat([s.gather(1, index), rest[:, None]], 1)
    z = torch.cat([x["snapshot_logits"], tau * x["snapshot_tail"][:, :, None]], 2)
    at = [(*row, y).index(y) for row, y in zip(index.tolist(), x["labels"].tolist(), strict=True)]
    attention = {name: x[name] for name in ("scores", "query", "keys") if name in x}
    y = torch.tensor(at, device=s.device)
    loss, weights, attention_loss = reference.ensemble_kd(
        columns, z, y, temperature=tau, alpha=0.0, fusion=fusion, attention_objective=attention_objective,
        reduction="sum", **attention,
    )  # fmt: skip
    ce = F.cross_entropy(s, x["labels"], reduction="sum")
    return alpha * ce + (1 - alpha) * loss, weights, attention_loss


@readings
def test_equals_the_columns_of_the_contract(backend, device, fusion, objective):
    x = sparse(tensors(9, 4, 12, attention="query", dtype=torch.float64, device=device), 5, temperature=3.0)
    options = {"temperature": 3.0, "alpha": 0.3, "fusion": fusion, "attention_objective": objective}
    got, expected = evaluate(sparse_ensemble_kd, x, reduction="sum", **options), evaluate(by_columns, x, **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@readings
def test_every_shape(backend, device, shape, fusion, objective):
    check(sparse(tensors(*shape[:3], device=device), shape[3]), fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("size", [(9, 5, 100, 20), (3, 3, 1500, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "pure"])
@readings
def test_every_dtype_and_kind_of_attention(backend, device, size, dtype, attention, labels, fusion, objective):
    x = tensors(*size[:3], device=device, dtype=dtype, attention=attention, labels=labels)
    check(sparse(x, size[3]), fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("student, snapshots", list(itertools.permutations(DTYPES, 2)))
def test_student_and_snapshots_of_different_dtypes(backend, device, student, snapshots):
    x = tensors(9, 3, 100, device=device, attention="query")
    x["student_logits"] = x["student_logits"].to(student)
    x["snapshot_logits"] = x["snapshot_logits"].to(snapshots)
    x["query"], x["keys"] = x["query"].to(snapshots), x["keys"].to(student)
    x = sparse(x, 20)
    check(x)
    for dtype in (torch.float32, torch.float64):  # of the tail, whatever the logits are
        y = x | {"snapshot_tail": x["snapshot_tail"].float().to(dtype)}
        check(y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@readings
def test_half_precision_is_fp32_arithmetic_rounded_once(backend, device, dtype, fusion, objective):
    x = sparse(tensors(65, 3, 100, device=device, dtype=dtype, attention="query"), 40)
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "sum"}
    half = evaluate(sparse_ensemble_kd, x, **options)
    full = evaluate(sparse_ensemble_kd, {k: v.float() if v.is_floating_point() else v for k, v in x.items()}, **options)
    assert_same_bits(half, {k: v.to(half[k].dtype) for k, v in full.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] and s[2] <= 2500], ids=str)
def test_every_instruction_set(isa, dtype, shape):
    x = sparse(tensors(*shape[:3], dtype=dtype), shape[3])
    for fusion, objective in (("probability", "label"), ("logit", "kl")):
        check(x, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("temperature", [0.25, 1, 20])
@pytest.mark.parametrize("alpha", [0, 0.1, 1])
@readings
def test_temperature_and_alpha(backend, device, temperature, alpha, fusion, objective):
    x = sparse(tensors(9, 4, 100, device=device), 30, temperature=temperature)
    check(x, temperature=temperature, alpha=alpha, fusion=fusion, attention_objective=objective)


@readings
@pytest.mark.parametrize("k", [20, 60])
def test_logits_of_ten_thousand(backend, device, k, fusion, objective):
    x = tensors(9, 4, 100, device=device)
    for name in ("student_logits", "snapshot_logits"):
        x[name] = torch.where(x[name] > 0, 1e4, -1e4) + x[name]
    x = sparse(x, k)
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "none"}
    got = evaluate(sparse_ensemble_kd, x, **options)
    truth = evaluate(reference.sparse_ensemble_kd, double(x), **options)
    for name, value in got.items():  # no closer: the KL is a small difference of numbers of this size
        torch.testing.assert_close(value.double(), truth[name].double(), rtol=1e-3, atol=2e-3 * truth[name].abs().max())


@readings
@pytest.mark.parametrize("size", [(9, 100, 20), (9, 100, 60), (3, 1500, 60)], ids=str)
def test_a_tail_of_no_probability_has_a_logarithm(backend, device, size, fusion, objective):
    rows, classes, k = size
    x = sparse(tensors(rows, 3, classes, device=device), k, temperature=1.0)
    x["student_logits"].scatter_add_(1, x["indices"], torch.full_like(x["indices"], 1000.0, dtype=torch.float32))
    options = {"temperature": 1.0, "fusion": fusion, "attention_objective": objective, "reduction": "none"}
    got = evaluate(sparse_ensemble_kd, x, **options)
    truth = evaluate(reference.sparse_ensemble_kd, double(x), **options)
    for name, value in got.items():  # with "kl", log-ratios of 1000 cancel in the gradient of the scores
        bound = (1e-3 if objective == "kl" else 1e-6) * truth[name].abs().max()
        torch.testing.assert_close(value.double(), truth[name].double(), rtol=0, atol=float(bound))
    assert (got["loss"] > 10).all()
    x["snapshot_tail"] -= 1000  # and where the snapshots say so too, it has no part in the loss
    got = check(x, **options)
    assert (got["attention_loss"][1::2] > 900).all() and got["attention_loss"].isfinite().all()


@readings
@pytest.mark.parametrize("classes", [100, 1100])
def test_padded_vocabulary(backend, device, classes, fusion, objective):
    x = tensors(9, 4, classes, device=device)
    padding = torch.arange(classes, device=device) % 7 == 3
    padding[classes - 80 :] = True
    x["student_logits"][:, padding] = x["snapshot_logits"][:, :, padding] = -INF
    x["labels"][:] = 4
    x = sparse(x, 30)  # -inf columns inside and outside
    got = check(x, fusion=fusion, attention_objective=objective)
    assert (got["d_student_logits"][:, padding] == 0).all()


@readings
@pytest.mark.parametrize("classes, k", [(20, 8), (100, 50), (1500, 50)])
def test_nothing_but_masked_outside(backend, device, classes, k, fusion, objective):
    x = sparse(tensors(8, 3, classes, device=device), k)
    outside = torch.ones_like(x["student_logits"], dtype=torch.bool).scatter(1, x["indices"], False)
    x["student_logits"][outside] = -INF
    x["labels"] = x["indices"][:, 1]
    x["snapshot_tail"][:] = -INF
    options = {"fusion": fusion, "attention_objective": objective}
    got = check(x, **options)
    assert (got["d_student_logits"][outside] == 0).all()
    inside = {name: x[name] for name in ("snapshot_logits", "scores")}
    inside |= {"student_logits": x["student_logits"].gather(1, x["indices"]), "labels": torch.full_like(x["labels"], 1)}
    expected = evaluate(ensemble_kd, inside, **options)
    expected["d_student_logits"] = torch.zeros_like(got["d_student_logits"]).scatter(
        1, x["indices"], expected["d_student_logits"]
    )
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


@readings
def test_a_tail_that_only_some_snapshots_or_the_student_have(backend, device, fusion, objective):
    x = sparse(tensors(9, 4, 50, device=device), 20)
    x["snapshot_tail"][0] = x["snapshot_tail"][1, 2:5] = x["snapshot_tail"][:, 6] = -INF
    check(x, fusion=fusion, attention_objective=objective, reduction="none")
    outside = torch.ones_like(x["student_logits"], dtype=torch.bool).scatter(1, x["indices"], False)
    x["student_logits"][0, outside[0]] = x["student_logits"][6, outside[6]] = -INF
    x["labels"][:] = x["indices"][:, 3]
    if fusion == "logit":
        x["snapshot_tail"][0] = x["snapshot_tail"][2]  # the mixture has a tail, which the student of row 0 has not
    got = check(x, fusion=fusion, reduction="none")
    assert got["loss"].isinf().tolist() == [row == 0 for row in range(9)]
    assert got["d_student_logits"].isfinite().all()


@fusions
@pytest.mark.parametrize("who", ["student_logits", "snapshot_logits", "scores"])
def test_a_row_of_nothing_but_masked_has_no_softmax(backend, device, who, fusion):
    x = sparse(tensors(3, 2, 40, device=device), 10)
    x[who].view(-1, 3, x[who].shape[-1])[:, 1] = -INF
    if who == "snapshot_logits":
        x["snapshot_tail"][:, 1] = -INF
    assert evaluate(sparse_ensemble_kd, x, fusion=fusion, reduction="none")["loss"].isnan().tolist() == [0, 1, 0]


# Against ensemble_kd


@pytest.mark.parametrize("classes", [7, 100, 1500])
@readings
def test_all_classes_in_any_order_are_ensemble_kd(backend, device, classes, fusion, objective):
    x = tensors(9, 3, classes, device=device, attention="query")
    y = sparse(x, classes)
    assert (y["snapshot_tail"] == -INF).all() and (y["indices"][0].diff() < 0).any()
    options = {"fusion": fusion, "attention_objective": objective}
    got, expected = evaluate(sparse_ensemble_kd, y, **options), evaluate(ensemble_kd, x, **options)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


def outside(x, temperature):
    """p_K, and log p and log q of the classes within the tail (-inf inside indices), of weights and logits in full."""

    def within(log):
        rest = log.scatter(1, x["indices"], -INF)
        return rest.logsumexp(1), rest.log_softmax(1)

    w = x["scores"].log_softmax(1).t()[:, :, None]
    log_p = (w + (x["whole"] / temperature).log_softmax(2)).logsumexp(0)
    tail, log_p = within(log_p)
    return tail.exp(), log_p, within((x["student_logits"] / temperature).log_softmax(1))[1]


def pair(x, k, **options):
    """sparse_ensemble_kd of the best k classes, ensemble_kd of all, and what the first left out."""
    tau = options["temperature"]
    top = x["snapshot_logits"].mean(0)
    top[torch.arange(len(top)), x["labels"]] = INF  # the bank always keeps the label's
    indices = top.topk(k, 1).indices
    got = evaluate(sparse_ensemble_kd, x | kept(x["snapshot_logits"], indices, tau), reduction="none", **options)
    full = evaluate(ensemble_kd, x, reduction="none", **options)
    return got, full, outside(x | {"indices": indices, "whole": x["snapshot_logits"]}, tau), indices


@pytest.mark.parametrize("temperature, alpha", [(1.0, 0.0), (5.0, 0.3)])
@pytest.mark.parametrize("k", [1, 5, 40, 99])
def test_the_error_of_probability_fusion_is_the_divergence_within_the_tail(backend, device, k, temperature, alpha):
    x = tensors(30, 4, 100, device=device, dtype=torch.float64)
    got, full, (p_k, log_p, log_q), indices = pair(x, k, temperature=temperature, alpha=alpha)
    scale = (1 - alpha) * temperature**2 * p_k
    finite = log_p > -INF
    ratio = torch.where(finite, log_p - log_q, 0)
    error = full["loss"] - got["loss"]
    torch.testing.assert_close(error, scale * (log_p.exp() * ratio).sum(1), rtol=1e-8, atol=1e-10)
    assert (error >= -1e-10).all() and (error <= scale * ratio.max(1).values + 1e-10).all()
    gradient = got["d_student_logits"] - full["d_student_logits"]
    assert (gradient.abs().sum(1) <= 2 * (1 - alpha) * temperature * p_k + 1e-10).all()
    assert gradient.gather(1, indices).abs().max() < 1e-12
    for name in ("attention_loss", "d_scores", "weights"):  # the label's column is there
        torch.testing.assert_close(got[name], full[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 40, 99])
def test_the_error_of_logit_fusion(backend, device, k):
    x = tensors(30, 4, 100, device=device, dtype=torch.float64)
    z, weights = x["snapshot_logits"], x["scores"].softmax(1).t()[:, :, None]
    options = {"temperature": 2.0, "fusion": "logit"}
    got, full, _, indices = pair(x, k, **options)
    bucket = (weights[:, :, 0] * kept(z, indices, 2.0)["snapshot_tail"]).sum(0)
    mixture = (weights * z).sum(0) / 2
    exact = mixture.scatter(1, indices, -INF).logsumexp(1)
    assert (bucket >= exact - 1e-12).all()  # Hölder
    p_k = (bucket - torch.logaddexp(bucket, mixture.gather(1, indices).logsumexp(1))).exp()
    lowered = (full["attention_loss"] - got["attention_loss"]).exp()  # p_y of the sparse over p_y
    assert (lowered <= 1 + 1e-12).all() and (lowered >= 1 - p_k - 1e-12).all()

    # Tails that differ by constants mix without an error.
    shift = torch.randn(4, 30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    left = torch.ones_like(z[0], dtype=torch.bool).scatter(1, indices, False)
    x["snapshot_logits"] = torch.where(left, z[:1] + shift, z)
    got, full = (
        evaluate(op, y, reduction="none", **options)
        for op, y in ((sparse_ensemble_kd, x | kept(x["snapshot_logits"], indices, 2.0)), (ensemble_kd, x))
    )
    for name in ("attention_loss", "weights"):
        torch.testing.assert_close(got[name], full[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        got["d_student_logits"].gather(1, indices), full["d_student_logits"].gather(1, indices), rtol=1e-9, atol=1e-12
    )


@fusions
def test_a_label_outside_counts_as_the_bucket(backend, device, fusion):
    x = tensors(20, 3, 60, device=device, dtype=torch.float64)
    y = sparse(x, 25)
    inside = (y["indices"] == x["labels"][:, None]).any(1)
    assert inside.tolist() == [True, False] * 10
    got = evaluate(sparse_ensemble_kd, y, fusion=fusion, reduction="none", alpha=1.0)
    torch.testing.assert_close(got["loss"], F.cross_entropy(x["student_logits"], x["labels"], reduction="none"))
    if fusion == "probability":
        tail = outside(y | {"whole": x["snapshot_logits"]}, 5.0)[0]
        torch.testing.assert_close(got["attention_loss"][~inside], -tail.log()[~inside])


# Memory


def layouts(x):
    """The same numbers in other memory, NaN or an index out of range wherever nothing must be read."""
    z = x["snapshot_logits"]
    rows_first = z.transpose(0, 1).contiguous().transpose(0, 1)
    names = ("student_logits", "snapshot_logits", "snapshot_tail", "indices")
    yield "rows apart", x | {name: spread(x[name]) for name in names}
    yield "(B, M) memory", x | {"snapshot_logits": rows_first, "snapshot_tail": x["snapshot_tail"].t().contiguous().t()}
    yield "a list", x | {"snapshot_logits": [spread(z[0]), *rows_first[1:]]}
    yield "student by columns", x | {"student_logits": x["student_logits"].t().contiguous().t()}
    yield "indices by columns", x | {"indices": x["indices"].t().contiguous().t()}
    yield "indices in 32 bits", x | {"indices": x["indices"].int()}
    yield "indices in 32 bits, apart", x | {"indices": spread(x["indices"].int())}


@pytest.mark.parametrize("classes, k", [(40, 13), (60, 50), (1030, 50), (1030, 1027)])
@readings
def test_any_layout_gives_the_same_bits(backend, device, classes, k, fusion, objective):
    x = sparse(tensors(6, 3, classes, device=device), k)
    options = {"fusion": fusion, "attention_objective": objective}
    expected = evaluate(sparse_ensemble_kd, x, **options)
    for layout, y in layouts(x):
        got = evaluate(sparse_ensemble_kd, y, **options)
        for name in expected:
            if backend in ("reference", "triton"):  # where columns lie decides the order in which these two sum
                torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(got[name], expected[name]), f"{layout}: {name}"


@fusions
def test_expanded_tensors_are_repeated_values(backend, device, fusion):
    x = sparse(tensors(6, 3, 60, device=device, labels=False), 10)
    x = {name: value[:1].expand(6, -1) if name in ("student_logits", "indices") else value for name, value in x.items()}
    for name in ("snapshot_logits", "snapshot_tail"):
        x[name] = x[name][:, :1].expand_as(x[name])
    got = check(x, fusion=fusion)
    assert_same_bits(got, evaluate(sparse_ensemble_kd, {k: v.contiguous() for k, v in x.items()}, fusion=fusion))


@readings
def test_ignored_rows_count_for_nothing_and_are_not_read(backend, device, fusion, objective):
    options = {"fusion": fusion, "attention_objective": objective}
    for attention, (classes, k), reduction in itertools.product(
        ATTENTIONS, ((30, 8), (100, 50), (1500, 8), (1500, 50)), ("mean", "none")
    ):
        x = sparse(tensors(7, 3, classes, device=device, attention=attention), k)
        ignored = torch.tensor([1, 0, 0, 1, 0, 1, 0], dtype=torch.bool, device=device)
        without = part(x, ~ignored)
        for name, value in x.items():
            rows = value.transpose(0, 1) if value.dim() == 3 or name == "snapshot_tail" else value
            rows[ignored] = NAN if value.is_floating_point() else 2**40 if name == "indices" else -100
        got = evaluate(sparse_ensemble_kd, x, reduction=reduction, **options)
        expected = evaluate(sparse_ensemble_kd, without, reduction=reduction, **options)
        for name, value in got.items():
            if value.dim():
                axis = int(value.dim() == 3)
                assert (value.transpose(0, axis)[ignored] == 0).all(), name
                value = value.transpose(0, axis)[~ignored].transpose(0, axis)
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", [3, 40])
def test_the_ignored_label_may_be_the_number_of_a_column(backend, device, k):
    x = sparse(tensors(60, 3, 50, device=device), k)
    for ignored in (0, 2, k):
        x["labels"][:10] = ignored
        got = check(x, ignore_index=ignored, reduction="none")
        assert torch.equal(got["loss"] == 0, x["labels"] == ignored)


@readings
def test_snapshots_of_no_weight_are_not_read(backend, device, fusion, objective):
    for classes, k in ((50, 10), (1500, 40)):
        x = sparse(tensors(4, 3, classes, device=device), k)
        x["scores"][:, 1] = x["scores"][2, 0] = -INF
        without = evaluate(sparse_ensemble_kd, x, fusion=fusion, attention_objective=objective)
        for name in ("snapshot_logits", "snapshot_tail"):
            x[name][1] = x[name][0, 2] = NAN
        got = evaluate(sparse_ensemble_kd, x, fusion=fusion, attention_objective=objective)
        assert_same_bits(got, without)
        assert (got["d_scores"][:, 1] == 0).all() and (got["weights"][:, 1] == 0).all()


NANS = (0x7FC00000, -0x400000, -1, 0x7F800001)


@pytest.mark.parametrize("who", ["student inside", "student outside", "snapshot_logits", "snapshot_tail"])
@pytest.mark.parametrize("bits", NANS, ids=hex)
@fusions
def test_a_nan_that_is_read_is_never_a_finite_loss(backend, device, who, bits, fusion):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for (classes, k), masked in itertools.product(((30, 10), (1000, 40), (2500, 40)), (False, True)):
        x = sparse(tensors(3, 2, classes, device=device), k)
        student, index = x["student_logits"][1], x["indices"][1]
        left = torch.ones_like(student, dtype=torch.bool).scatter(0, index, False).nonzero()[:, 0]
        if masked:
            student[left] = -INF
        if who.startswith("student"):
            student[index[3] if who == "student inside" else left[-2]] = nan
        else:
            x[who].view(2, 3, -1)[-1, 1, -1] = nan
        out = evaluate(sparse_ensemble_kd, x, fusion=fusion, reduction="none", alpha=0.0)
        assert out["loss"].isnan().tolist() == [False, True, False], (classes, masked)
        assert out["d_student_logits"][1].isnan().any() and not out["d_student_logits"][0].isnan().any()
        if who.startswith("snapshot"):
            assert out["attention_loss"].isnan().tolist() == [False, True, False], (classes, masked)


@pytest.mark.parametrize("attention", ["scores", "query"])
def test_offsets_beyond_32_bits(backend, attention):
    x = sparse(tensors(3, 2, 32, dtype=torch.float16, attention=attention), 16)  # rows of whole vectors either way
    y = {name: value if name == "labels" else far(value) for name, value in x.items()}
    assert_same_bits(evaluate(sparse_ensemble_kd, y), evaluate(sparse_ensemble_kd, x))


# Gradients


@pytest.mark.parametrize("attention", ["scores", "query"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@readings
def test_gradcheck(backend, device, attention, reduction, fusion, objective):
    x = sparse(tensors(4, 3, 6, device=device, dtype=torch.float64, attention=attention, width=2), 3)
    x["labels"][1] = -100
    student = ["student_logits"]
    attention = [name for name in ("scores", "query", "keys") if name in x]
    options = {"fusion": fusion, "attention_objective": objective, "reduction": reduction, "alpha": 0.3}
    # With "label" the target is a constant to `loss`, which finite differences cannot know: one output each.
    checks = {"loss": student, "attention_loss": attention} if objective == "label" else {"loss": student + attention}
    for output, names in checks.items():
        leaves = [x[name].clone().requires_grad_() for name in names]

        def f(*leaves, names=names, output=output):
            return getattr(sparse_ensemble_kd(**x | dict(zip(names, leaves, strict=True)), **options), output)

        assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@readings
def test_upstream_gradients_scale(backend, device, dtype, reduction, fusion, objective):
    x = sparse(tensors(9, 3, 100, device=device, dtype=dtype, attention="query"), 30)
    x["labels"][4] = -100
    upstream = (0.37, -2.5)
    if reduction == "none":
        upstream = tuple(g * torch.arange(9.0, device=device) for g in upstream)
    check(x, upstream=upstream, reduction=reduction, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("attention", ATTENTIONS)
@readings
def test_gradients_not_asked_for_are_not_computed(kernels, device, attention, fusion, objective):
    x = sparse(tensors(4, 3, 20, device=device, attention=attention), 5)
    names = [name for name in ("scores", "query", "keys") if name in x]
    for student, attends in itertools.product((True, False), repeat=2):
        x["student_logits"].requires_grad_(student)
        for name in names:
            x[name].requires_grad_(attends)
        with Calls() as calls:
            out = sparse_ensemble_kd(**x, fusion=fusion, attention_objective=objective)
        ((op, args),) = calls.own
        written = {name for name in ("d_student", "d_scores", "d_query", "d_keys") if args.get(name) is not None}
        expected = {"d_student"} if student else set()
        expected |= {f"d_{name}" for name in names} if attends else set()
        assert op == "sparse_ensemble_kd_fwd" and written == expected
        assert out.loss.requires_grad == (student or (attends and bool(names) and objective == "kl"))


def test_the_second_derivative_is_refused(kernels, device):
    x = sparse(tensors(4, 3, 20, device=device), 5)
    leaf = x["student_logits"].requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative.*create_graph"):
        torch.autograd.grad(sparse_ensemble_kd(**x).loss, leaf, create_graph=True)


# Bits


@readings
def test_the_same_inputs_give_the_same_bits(backend, device, fusion, objective):
    options = {"fusion": fusion, "attention_objective": objective}
    for classes, k in ((1500, 50), (1001, 20)):
        x = sparse(tensors(5, 3, classes, device=device, attention="query"), k)
        first = evaluate(sparse_ensemble_kd, x, **options)
        for _ in range(2):
            x = {name: value.clone() for name, value in x.items()}
            assert_same_bits(evaluate(sparse_ensemble_kd, x, **options), first)


@pytest.mark.parametrize("size", [(129, 3, 1000, 20), (67, 3, 5000, 60), (1, 2, 100000, 60)], ids=str)
@readings
def test_threads_do_not_change_the_bits(kernels, threads, size, fusion, objective):
    x = sparse(tensors(*size[:3]), size[3])
    outs = []
    for count in (1, 2, 4):
        threads(count)
        outs.append(evaluate(sparse_ensemble_kd, x, fusion=fusion, attention_objective=objective))
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


@pytest.mark.parametrize("k", [10, 60])
@readings
def test_a_few_rows_are_the_same_rows(kernels, device, k, fusion, objective):
    x = sparse(tensors(40, 3, 1100, device=device, attention="query"), k)
    x["labels"][1] = -100
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "none"}
    many = evaluate(sparse_ensemble_kd, x, **options)
    few = evaluate(sparse_ensemble_kd, part(x, slice(0, 3)), **options)
    assert_same_bits(few, part(many, slice(0, 3)))


def test_callers_in_several_threads(backend, device):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter runs in one thread")
    xs = [sparse(tensors(20, 3, c, device=device), k) for c, k in ((40, 10), (1000, 50), (3000, 10))] * 2
    expected = [evaluate(sparse_ensemble_kd, x) for x in xs]
    got = [None] * len(xs)

    def work(i):
        for _ in range(20):
            got[i] = evaluate(sparse_ensemble_kd, xs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b) if backend != "reference" else torch.testing.assert_close(a, b)


# A citizen of torch


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("whole", [True, False], ids=["stacked", "list"])
def test_opcheck(device, attention, whole):
    x = sparse(tensors(4, 3, 20, device=device, attention=attention, labels=whole), 5)
    s, z = x["student_logits"], x["snapshot_logits"]
    shape = () if whole else (4,)
    gradients = (s, x.get("scores"), x.get("query"), x.get("keys"))
    torch.library.opcheck(
        torch.ops.eekd.sparse_ensemble_kd_fwd.default,
        (
            s, [z] if whole else list(z), x["snapshot_tail"], x["indices"],
            *(x.get(name) for name in ("labels", "scores", "query", "keys")),
            5.0, 0.5, False, True, whole, -100, s.new_zeros(shape), s.new_zeros(shape), s.new_zeros(4, 3),
            *(None if of is None else torch.zeros_like(of) for of in gradients),
        ),
    )  # fmt: skip


def test_meta_tensors_have_the_shapes_and_dtypes():
    x = sparse(tensors(4, 3, 20, dtype=torch.bfloat16), 5)
    expected = sparse_ensemble_kd(**x, reduction="none")
    got = sparse_ensemble_kd(**{name: value.to("meta") for name, value in x.items()}, reduction="none")
    for a, b in zip(got, expected, strict=True):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype


def step(**arguments):
    out = sparse_ensemble_kd(**arguments)
    return 2 * out.loss + out.attention_loss, out.weights, out.attention_loss


@readings
def test_compiles_whole_and_once_for_every_size(kernels, device, fusion, objective):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for rows, snapshots, classes, k, width in ((7, 3, 20, 5, 4), (9, 4, 30, 8, 5), (12, 2, 50, 40, 6)):
        x = sparse(tensors(rows, snapshots, classes, device=device, attention="query", width=width), k)
        options = {"fusion": fusion, "attention_objective": objective}
        a, b = evaluate(step, x, **options), evaluate(fast, x, **options)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_inductor(kernels, device):
    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (6, 11):
        x = sparse(tensors(rows, 3, 20, device=device), 5)
        x["indices"] = x["indices"].int()
        a, b = evaluate(step, x), evaluate(fast, x)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_arguments_are_not_modified(backend, device):
    x = sparse(tensors(9, 3, 60, device=device, attention="query"), 20)
    before = {k: v.clone() for k, v in x.items()}
    evaluate(sparse_ensemble_kd, x)
    assert_same_bits(x, before)


# Properties


@st.composite
def calls(draw):
    """A call: tensors and options."""
    rows, snapshots = draw(st.integers(0, 20)), draw(st.integers(1, 7))
    classes = draw(st.one_of(st.integers(1, 60), st.integers(1020, 1030), st.integers(2040, 2060)))
    k = draw(st.one_of(st.integers(1, min(classes, 40)), st.integers(max(1, classes - 3), classes)))
    labels = draw(st.booleans())
    x = tensors(
        rows, snapshots, classes,
        dtype=draw(st.sampled_from(DTYPES)), attention=draw(st.sampled_from(ATTENTIONS)),
        width=draw(st.integers(1, 20)), labels=labels, seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip
    for name in ("student_logits", "snapshot_logits", "scores"):
        if name in x:
            x[name] = x[name] * draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    if labels:
        x["labels"][torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=torch.bool)] = -100
    if classes > 2 and draw(st.booleans()):  # a padded vocabulary, no label on it
        x["student_logits"][:, classes // 2 + 1] = x["snapshot_logits"][:, :, classes // 2 + 1] = -INF
        if labels:
            x["labels"][x["labels"] == classes // 2 + 1] = 0
    temperature = draw(st.floats(0.5, 20))
    options = {
        "temperature": temperature,
        "alpha": draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        "fusion": draw(st.sampled_from(FUSIONS)),
        "attention_objective": draw(st.sampled_from(OBJECTIVES)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    return sparse(x, k, temperature=temperature), options


fuzz = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(call=calls())
def test_any_call_is_accurate(backend, device, call):
    x, options = call
    check({k: v.to(device) for k, v in x.items()}, **options)


@fuzz
@given(call=calls(), seed=st.integers(0, 100))
def test_rows_snapshots_classes_and_columns_may_be_permuted(backend, device, call, seed):
    x, options = call
    x, options = {k: v.to(device) for k, v in double(x).items()}, options | {"reduction": "none"}
    generator = torch.Generator().manual_seed(seed)
    (count, rows, k), classes = x["snapshot_logits"].shape, x["student_logits"].shape[1]
    b, m, c, j = (torch.randperm(n, generator=generator).to(device) for n in (rows, count, classes, k))

    def permuted(name, value):
        match name.removeprefix("d_"):
            case "student_logits":
                return value[b][:, c]
            case "snapshot_logits":
                return value[m][:, b][:, :, j]
            case "snapshot_tail" | "keys":
                return value[m][:, b]
            case "indices":
                return c.argsort()[value[b][:, j]]
            case "scores" | "weights":
                return value[b][:, m]
        return value[b]

    y = {name: permuted(name, value) for name, value in x.items()}
    if "labels" in y:
        y["labels"] = torch.where(y["labels"] < 0, y["labels"], c.argsort()[y["labels"].clamp(min=0)])
    got, expected = evaluate(sparse_ensemble_kd, y, **options), evaluate(sparse_ensemble_kd, x, **options)
    for name in got:
        torch.testing.assert_close(got[name], permuted(name, expected[name]), rtol=1e-6, atol=1e-9)


@fuzz
@given(call=calls())
def test_what_holds_for_every_call(backend, device, call):
    x, options = call
    x = {k: v.to(device) for k, v in double(x).items()}
    none, total, mean = (evaluate(sparse_ensemble_kd, x, **options | {"reduction": r}) for r in ("none", "sum", "mean"))
    counted = x["labels"] != -100 if "labels" in x else torch.ones_like(none["loss"], dtype=torch.bool)
    count = counted.sum().clamp(min=1)
    close = {"rtol": 1e-9, "atol": 1e-10}
    # The tail is float32 but for fp64 logits, whose KL may fall below 0 by its rounding.
    assert (none["loss"] >= -1e-4).all() and (none["attention_loss"] >= -1e-9).all()
    torch.testing.assert_close(none["weights"].sum(1), counted.float(), rtol=1e-5, atol=1e-6)
    for name in ("loss", "attention_loss"):
        torch.testing.assert_close(total[name], none[name].sum(), **close)
        torch.testing.assert_close(mean[name], none[name].sum() / count, **close)
    for name in none:
        if name.startswith("d_"):
            torch.testing.assert_close(total[name], none[name], **close)
            torch.testing.assert_close(mean[name], none[name] / count, **close)
    for name in ("d_student_logits", "d_scores"):  # softmax does not see a constant
        if name in none:
            torch.testing.assert_close(none[name].sum(1), torch.zeros_like(none[name][:, 0]), rtol=0, atol=1e-7)


# Bad input

B, M, C, K = 4, 3, 9, 5
VALUE, TYPE = ValueError, TypeError
BAD = [
    ("student_logits", "no classes", VALUE, "student_logits", lambda s: s[:, :0]),
    ("student_logits", "fewer classes than K", VALUE, "indices.* K <= C = 4", lambda s: s[:, :4]),
    ("snapshot_logits", "of all classes", VALUE, "snapshot_logits.* 5.*, got .*9", lambda z: torch.zeros(M, B, C)),
    ("snapshot_logits", "(B, M, K)", VALUE, "snapshot_logits", lambda z: z.transpose(0, 1)),
    ("snapshot_logits", "2 dimensions", VALUE, r"snapshot_logits.* \(M, B, K\)", lambda z: z[0]),
    ("snapshot_logits", "a list of none", VALUE, "snapshot_logits.* 1 to 64", lambda z: []),
    ("snapshot_logits", "with gradient", VALUE, "snapshot_logits.* detach", lambda z: z.clone().requires_grad_()),
    ("snapshot_logits", "None", TYPE, "snapshot_logits", lambda z: None),
    ("snapshot_tail", "None", TYPE, "snapshot_tail", lambda t: None),
    ("snapshot_tail", "a list", TYPE, "snapshot_tail", lambda t: t.tolist()),
    ("snapshot_tail", "(B, M)", VALUE, "snapshot_tail", lambda t: t.t()),
    ("snapshot_tail", "(M, B, 1)", VALUE, "snapshot_tail", lambda t: t[:, :, None]),
    ("snapshot_tail", "another snapshot", VALUE, "snapshot_tail", lambda t: t[:2]),
    ("snapshot_tail", "half", TYPE, "snapshot_tail.* float32 or float64", lambda t: t.half()),
    ("snapshot_tail", "int64", TYPE, "snapshot_tail", lambda t: t.long()),
    ("snapshot_tail", "on meta alone", VALUE, "snapshot_tail.* meta", lambda t: t.to("meta")),
    ("snapshot_tail", "with gradient", VALUE, "snapshot_tail.* detach", lambda t: t.clone().requires_grad_()),
    ("indices", "None", TYPE, "indices", lambda i: None),
    ("indices", "a list", TYPE, "indices", lambda i: i.tolist()),
    ("indices", "float", TYPE, "indices.* int64 or int32", lambda i: i.float()),
    ("indices", "uint8", TYPE, "indices.* int64 or int32", lambda i: i.to(torch.uint8)),
    ("indices", "bool", TYPE, "indices.* int64 or int32", lambda i: i > 3),
    ("indices", "1 dimension", VALUE, "indices", lambda i: i[0]),
    ("indices", "per snapshot", VALUE, "indices", lambda i: i.expand(M, -1, -1)),
    ("indices", "none of them", VALUE, "indices.* 1 <= K", lambda i: i[:, :0]),
    ("indices", "more than C", VALUE, "indices.* K <= C = 9", lambda i: i.repeat(1, 2)),
    ("indices", "another row", VALUE, "indices", lambda i: i[:3]),
    ("indices", "on meta alone", VALUE, "indices.* meta", lambda i: i.to("meta")),
    ("labels", "float", TYPE, "labels.* integer", lambda y: y.float()),
    ("labels", "one hot", VALUE, "labels", lambda y: F.one_hot(y, C)),
    ("scores", "(M, B)", VALUE, "scores", lambda e: e.t()),
]


def refused(exception, says, **arguments):
    with pytest.raises(exception) as caught:
        sparse_ensemble_kd(**arguments)
    sentence = str(caught.value)
    assert re.search(says, sentence) and "\n" not in sentence and len(sentence) < 200
    return sentence


@pytest.mark.bad_input
@pytest.mark.parametrize("name, what, exception, says, bad", BAD, ids=[f"{case[0]}, {case[1]}" for case in BAD])
def test_a_bad_tensor(name, what, exception, says, bad):
    x = sparse(tensors(B, M, C), K)
    sentence = refused(exception, says, **x | {name: bad(x[name])})
    assert ", got " in sentence or "must not require" in sentence  # what it was; and before it, what is wanted


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("temperature", 0, "a positive number"),
        ("alpha", 2, "between 0 and 1"),
        ("fusion", "mean", "'probability' or 'logit'"),
        ("attention_objective", None, "'label' or 'kl'"),
        ("reduction", "batchmean", "'mean' or 'sum' or 'none'"),
    ],
)
def test_a_bad_option(name, value, wanted):
    sentence = refused(ValueError, "", **sparse(tensors(B, M, C), K), **{name: value})
    assert sentence == f"{name} must be {wanted}, got {value!r}"


@pytest.mark.bad_input
@pytest.mark.parametrize("k, column", [(5, 0), (5, 4), (50, 33)])
@pytest.mark.parametrize("value", [100, -1, 2**40, -(2**62)])
def test_an_index_out_of_range_names_its_place(k, column, value):
    x = sparse(tensors(B, M, 100), k)
    x["indices"][2, column] = x["indices"][3, 1] = value
    sentence = refused(RuntimeError, "not a class below 100", **x)
    assert sentence.startswith(f"indices[2, {column}] is {value},")


@pytest.mark.bad_input
def test_the_first_of_many_indices_out_of_range_is_named_on_any_threads(threads):
    threads(4)
    x = sparse(tensors(200, M, 1000), 10)
    x["indices"][77:] = 1000
    for _ in range(20):
        assert refused(RuntimeError, "not a class", **x).startswith("indices[77, 0] is 1000,")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["labels", "indices"])
def test_out_of_range_is_an_error_on_every_backend(backend, device, name):
    if device != "cpu":
        pytest.skip("an assertion on the device ends its context")
    x = sparse(tensors(B, M, C), K)
    expected = sparse_ensemble_kd(**x).loss
    for value in (C, -1):
        wrong = x[name].clone()
        wrong[1] = value
        for alpha in (0.0, 0.5, 1.0):
            with pytest.raises((RuntimeError, IndexError)):
                sparse_ensemble_kd(**x | {name: wrong}, alpha=alpha)
    assert torch.equal(sparse_ensemble_kd(**x).loss, expected)  # nothing is left behind
