"""sparse_ensemble_kd on every backend, where it differs from ensemble_kd: the bucket, its error, indices, bad input.

What both ops share is in test_ensemble_kd.py.
"""

import itertools

import pytest
import torch
from cases import DTYPES, INF, fusions, kept, readings, sizes, sparse, tensors
from numerics import check, evaluate, exact, refused
from torch.nn import functional as F

from eekd import ensemble_kd, sparse_ensemble_kd
from eekd.ops import reference

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
        columns,
        z,
        y,
        temperature=tau,
        alpha=0.0,
        fusion=fusion,
        attention_objective=attention_objective,
        reduction="sum",
        **attention,
    )
    ce = F.cross_entropy(s, x["labels"], reduction="sum")
    return alpha * ce + (1 - alpha) * loss, weights, attention_loss


@readings
def test_equals_the_columns_of_the_contract(backend, device, fusion, objective):
    x = tensors(9, 4, 12, 5, attention="query", dtype=torch.float64, device=device, temperature=3.0)
    options = {"temperature": 3.0, "alpha": 0.3, "fusion": fusion, "attention_objective": objective}
    got, expected = evaluate(sparse_ensemble_kd, x, reduction="sum", **options), evaluate(by_columns, x, **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("student, snapshots", list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("tail", [torch.float32, torch.float64], ids=str)
def test_a_tail_of_either_dtype(backend, device, student, snapshots, tail):
    x = tensors(9, 3, 100, 20, device=device)
    dtypes = {"student_logits": student, "snapshot_logits": snapshots, "snapshot_tail": tail}
    check(x | {name: x[name].to(dtype) for name, dtype in dtypes.items()})


@readings
@sizes((9, 3, 100, 20), (9, 3, 100, 60), (3, 3, 1500, 60))
def test_a_tail_of_no_probability_has_a_logarithm(backend, device, size, fusion, objective):
    x = tensors(*size, device=device, temperature=1.0)
    x["student_logits"].scatter_add_(1, x["indices"], torch.full_like(x["indices"], 1000.0, dtype=torch.float32))
    options = {"temperature": 1.0, "fusion": fusion, "attention_objective": objective, "reduction": "none"}
    got, truth = evaluate(sparse_ensemble_kd, x, **options), exact(x, **options)
    for name, value in got.items():  # with "kl", log-ratios of 1000 cancel in the gradient of the scores
        bound = (1e-3 if objective == "kl" else 1e-6) * truth[name].abs().max()
        torch.testing.assert_close(value.double(), truth[name].double(), rtol=0, atol=float(bound))
    assert (got["loss"] > 10).all()
    x["snapshot_tail"] -= 1000  # and where the snapshots say so too, it has no part in the loss
    got = check(x, **options)
    assert (got["attention_loss"][1::2] > 900).all() and got["attention_loss"].isfinite().all()


@readings
@pytest.mark.parametrize("classes", [100, 1100])
def test_padded_vocabulary_inside_and_outside(backend, device, classes, fusion, objective):
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
    x = tensors(8, 3, classes, k, device=device)
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
    x = tensors(9, 4, 50, 20, device=device)
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


NANS = (0x7FC00000, -0x400000, -1, 0x7F800001)


@pytest.mark.parametrize("who", ["student inside", "student outside", "snapshot_logits", "snapshot_tail"])
@pytest.mark.parametrize("bits", NANS, ids=hex)
@fusions
def test_a_nan_inside_or_outside_is_never_a_finite_loss(backend, device, who, bits, fusion):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for (classes, k), masked in itertools.product(((30, 10), (1000, 40), (2500, 40)), (False, True)):
        x = tensors(3, 2, classes, k, device=device)
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
    ("labels", "one hot", TYPE, "labels.* floating", lambda y: F.one_hot(y, C)),
    ("scores", "(M, B)", VALUE, "scores", lambda e: e.t()),
]


@pytest.mark.bad_input
@pytest.mark.parametrize("name, what, exception, says, bad", BAD, ids=[f"{case[0]}, {case[1]}" for case in BAD])
def test_a_bad_tensor(name, what, exception, says, bad):
    x = tensors(B, M, C, K)
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
    sentence = refused(ValueError, "", **tensors(B, M, C, K), **{name: value})
    assert sentence == f"{name} must be {wanted}, got {value!r}"


@pytest.mark.bad_input
@pytest.mark.parametrize("k, column", [(5, 0), (5, 4), (50, 33)])
@pytest.mark.parametrize("value", [100, -1, 2**40, -(2**62)])
def test_an_index_out_of_range_names_its_place(k, column, value):
    x = tensors(B, M, 100, k)
    x["indices"][2, column] = x["indices"][3, 1] = value
    sentence = refused(RuntimeError, "not a class below 100", **x)
    assert sentence.startswith(f"indices[2, {column}] is {value},")


@pytest.mark.bad_input
def test_the_first_of_many_indices_out_of_range_is_named_on_any_threads(threads):
    threads(4)
    x = tensors(200, M, 1000, 10)
    x["indices"][77:] = 1000
    for _ in range(20):
        assert refused(RuntimeError, "not a class", **x).startswith("indices[77, 0] is 1000,")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["labels", "indices"])
def test_out_of_range_is_an_error_on_every_backend(backend, device, name):
    if device != "cpu":
        pytest.skip("an assertion on the device ends its context")
    x = tensors(B, M, C, K)
    expected = sparse_ensemble_kd(**x).loss
    for value in (C, -1):
        wrong = x[name].clone()
        wrong[1] = value
        for alpha in (0.0, 0.5, 1.0):
            with pytest.raises((RuntimeError, IndexError)):
                sparse_ensemble_kd(**x | {name: wrong}, alpha=alpha)
    assert torch.equal(sparse_ensemble_kd(**x).loss, expected)  # nothing is left behind
