"""ensemble_kd on every backend: its numbers, its gradients, what it reads, and how it behaves as a torch op."""

import itertools
import threading

import pytest
import torch
import torch._dynamo.testing
from cases import ATTENTIONS, DTYPES, SHAPES, Calls, far, spread, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import DIFFERENTIABLE, assert_accurate, assert_same_bits, double, evaluate
from torch.nn import functional as F

from eekd import ensemble_kd, reference, use_backend
from eekd.kernels.timing import peak_extra_bytes

NAN, INF = float("nan"), float("inf")
FUSIONS = ("probability", "logit")
OBJECTIVES = ("label", "kl")
READINGS = list(itertools.product(FUSIONS, OBJECTIVES))

readings = pytest.mark.parametrize("fusion, objective", READINGS)
fusions = pytest.mark.parametrize("fusion", FUSIONS)


def check(x, **options):
    got = evaluate(ensemble_kd, x, **options)
    assert_accurate(got, x, **options)
    return got


# Numbers


def formulas(x, temperature, alpha, fusion, objective):
    """method.md sections 1 to 2b, written out for one batch of fp64 tensors: outputs and gradients of their sums."""
    s, z, y, tau = x["student_logits"], x["snapshot_logits"], x["labels"], temperature
    w = torch.einsum("bd,mbd->bm", x["query"], x["keys"]).softmax(1)
    wm, rows = w.t()[:, :, None], torch.arange(len(s))
    p_m = (z / tau).softmax(2)
    t = (wm * z).sum(0) / tau
    p = (wm * p_m).sum(0) if fusion == "probability" else t.softmax(1)
    q, r = (s / tau).softmax(1), p.log() - (s / tau).log_softmax(1)
    kl = (p * r).sum(1)
    hard = s.softmax(1)
    out = {
        "loss": (-alpha * hard[rows, y].log() + (1 - alpha) * tau**2 * kl).sum(),
        "attention_loss": -p[rows, y].log().sum(),
        "weights": w.float(),
        "d_student_logits": alpha * (hard - F.one_hot(y, s.shape[1])) + (1 - alpha) * tau * (q - p),
    }
    mean = (p * z).sum(2)
    if fusion == "probability":
        g = tau**2 * (p_m * r).sum(2) if objective == "kl" else -p_m[:, rows, y] / p[rows, y]
    elif objective == "kl":
        delta = t.logsumexp(1) - (s / tau).logsumexp(1)
        g = tau * ((p * (t - s / tau) * z).sum(2) - (delta + kl) * mean)
    else:
        g = -(z[:, rows, y] - mean) / tau
    g = g.t() * (1 - alpha if objective == "kl" else 1)
    d_e = w * (g - (w * g).sum(1, keepdim=True))
    out["d_query"] = torch.einsum("bm,mbd->bd", d_e, x["keys"])
    out["d_keys"] = torch.einsum("bm,bd->mbd", d_e, x["query"])
    return out


@readings
def test_equals_the_formulas_of_the_method(backend, device, fusion, objective):
    x = tensors(9, 4, 12, attention="query", dtype=torch.float64)
    expected = formulas(x, 3.0, 0.3, fusion, objective)
    x = {name: value.to(device) for name, value in x.items()}
    options = {"temperature": 3.0, "alpha": 0.3, "fusion": fusion, "attention_objective": objective}
    got = evaluate(ensemble_kd, x, reduction="sum", **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.rows}x{s.snapshots}x{s.classes}")
@readings
def test_every_shape(backend, device, shape, fusion, objective):
    check(tensors(*shape[:3], device=device), fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("size", [(9, 5, 100), (3, 3, 1500)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "pure"])
@readings
def test_every_dtype_and_kind_of_attention(backend, device, size, dtype, attention, labels, fusion, objective):
    x = tensors(*size, device=device, dtype=dtype, attention=attention, labels=labels)
    check(x, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("student, snapshots", list(itertools.permutations(DTYPES, 2)))
@fusions
def test_student_and_snapshots_of_different_dtypes(backend, device, student, snapshots, fusion):
    x = tensors(9, 3, 100, device=device, attention="query")
    x["student_logits"] = x["student_logits"].to(student)
    x["snapshot_logits"] = x["snapshot_logits"].to(snapshots)
    x["query"], x["keys"] = x["query"].to(snapshots), x["keys"].to(student)
    check(x, fusion=fusion)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@readings
def test_half_precision_is_fp32_arithmetic_rounded_once(backend, device, dtype, fusion, objective):
    x = tensors(65, 3, 100, device=device, dtype=dtype, attention="query")
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "sum"}
    half = evaluate(ensemble_kd, x, **options)
    full = evaluate(ensemble_kd, {k: v.float() if v.is_floating_point() else v for k, v in x.items()}, **options)
    assert_same_bits(half, {k: v.to(half[k].dtype) for k, v in full.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.rows and s.classes <= 1500], ids=lambda s: str(s[:3]))
def test_every_instruction_set(isa, dtype, shape):
    x = tensors(*shape[:3], dtype=dtype)
    for fusion, objective in READINGS:
        check(x, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("temperature", [0.25, 1, 2.5, 20])
@pytest.mark.parametrize("alpha", [0, 0.1, 1])
@readings
def test_temperature_and_alpha(backend, device, temperature, alpha, fusion, objective):
    x = tensors(9, 4, 100, device=device)
    check(x, temperature=temperature, alpha=alpha, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("width", [1, 8, 127, 1024, 1500])
def test_every_embedding_width(backend, device, width):
    x = tensors(5, 4, 10, device=device, attention="query", width=width)
    x["query"] = x["query"] / width**0.5
    check(x)


@readings
def test_logits_of_ten_thousand(backend, device, fusion, objective):
    x = tensors(9, 4, 100, device=device)
    for name in ("student_logits", "snapshot_logits"):
        x[name] = torch.where(x[name] > 0, 1e4, -1e4) + x[name]
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "none"}
    got, truth = evaluate(ensemble_kd, x, **options), evaluate(reference.ensemble_kd, double(x), **options)
    for name, value in got.items():  # no closer: the KL is a small difference of numbers of this size
        torch.testing.assert_close(value.double(), truth[name].double(), rtol=1e-3, atol=2e-3 * truth[name].abs().max())


@readings
@pytest.mark.parametrize("rise", [30, 300, 3000])
def test_rows_that_rise_or_fall_far_from_their_start(backend, device, rise, fusion, objective):
    x = tensors(4, 3, 1500, device=device)
    slope = torch.linspace(0, rise, 1500, device=device)
    slope = torch.stack((slope, -slope, slope.flip(0), slope.roll(1000)))
    x["student_logits"], x["snapshot_logits"] = x["student_logits"] + slope, x["snapshot_logits"] + slope
    check(x, fusion=fusion, attention_objective=objective, reduction="none")


@readings
def test_scores_far_apart(backend, device, fusion, objective):
    x = tensors(9, 4, 100, device=device)
    x["scores"] = 1e4 * x["scores"]
    check(x, fusion=fusion, attention_objective=objective, reduction="none")


@pytest.mark.parametrize("classes", [7, 100])
@readings
def test_scores_far_below_zero(backend, device, classes, fusion, objective):
    x = tensors(9, 5, classes, device=device)
    x["scores"] -= 300
    check(x, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("classes", [7, 100])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_weight_next_to_no_probability(backend, device, classes, fusion):
    x = tensors(9, 1, classes, device=device, attention="uniform")
    x["snapshot_logits"][0, torch.arange(9), x["labels"]] = -2000  # p_y is 0 in fp32, and its logarithm is not
    expected = ensemble_kd(**x, fusion=fusion)
    unread = torch.full_like(x["snapshot_logits"], torch.nan)
    x["snapshot_logits"] = torch.cat([x["snapshot_logits"], unread])
    got = ensemble_kd(**x, scores=torch.tensor([[0.0, -200.0]], device=device).repeat(9, 1), fusion=fusion)
    torch.testing.assert_close(got.attention_loss, expected.attention_loss)
    torch.testing.assert_close(got.loss, expected.loss)


@readings
def test_a_label_of_no_probability_in_fp32(backend, device, fusion, objective):
    x = tensors(9, 4, 10, device=device)
    x["snapshot_logits"][:, torch.arange(9), x["labels"]] -= 1000
    got = check(x, temperature=1.0, fusion=fusion, attention_objective=objective, reduction="none")
    assert (got["attention_loss"] > 900).all()


@readings
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "pure"])
@pytest.mark.parametrize("first", [900, 1030])  # the second tile is masked altogether, or but for a few columns
def test_padded_vocabulary(backend, device, fusion, objective, labels, first):
    x = tensors(9, 4, 1100, device=device, labels=labels)
    padding = torch.arange(1100, device=device) % 7 == 3
    padding[first:] = True
    x["student_logits"][:, padding] = x["snapshot_logits"][:, :, padding] = -INF
    if labels:
        x["labels"][:] = 4
    padded = check(x, fusion=fusion, attention_objective=objective)
    assert (padded["d_student_logits"][:, padding] == 0).all()
    x["student_logits"], x["snapshot_logits"] = x["student_logits"][:, ~padding], x["snapshot_logits"][:, :, ~padding]
    if labels:
        x["labels"] -= 1
    torch.testing.assert_close(evaluate(ensemble_kd, x, fusion=fusion)["loss"], padded["loss"])


@readings
def test_columns_masked_in_some_snapshots(backend, device, fusion, objective):
    x = tensors(9, 4, 50, device=device)
    x["snapshot_logits"][torch.rand(4, 9, 50, generator=torch.Generator().manual_seed(1)) < 0.3] = -INF
    x["snapshot_logits"][:, torch.arange(9), x["labels"]] = 0.5
    check(x, fusion=fusion, attention_objective=objective, reduction="none")


@readings
def test_a_label_on_a_masked_column(backend, device, fusion, objective):
    x = tensors(4, 3, 10, device=device)
    x["student_logits"][0, x["labels"][0]] = -INF
    x["snapshot_logits"][:, 1, x["labels"][1]] = -INF
    got = check(x, fusion=fusion, attention_objective=objective, reduction="none")
    assert got["loss"].isinf().tolist() == [True, False, False, False]
    assert got["attention_loss"].isinf().tolist() == [False, True, False, False]
    assert got["d_student_logits"].isfinite().all()
    if objective == "label":
        assert (got["d_scores"][1] == 0).all() and got["d_scores"].isfinite().all()


@pytest.mark.parametrize("who", ["student_logits", "snapshot_logits", "scores"])
@fusions
def test_a_row_of_nothing_but_masked_has_no_softmax(backend, device, who, fusion):
    x = tensors(3, 2, 10, device=device)
    x[who].view(-1, 3, x[who].shape[-1])[:, 1] = -INF
    got = evaluate(ensemble_kd, x, fusion=fusion, reduction="none")
    assert got["loss"].isnan().tolist() == [False, True, False]
    fine = {name: value[:, [0, 2]] if value.dim() == 3 else value[[0, 2]] for name, value in x.items()}
    fine = evaluate(ensemble_kd, fine, fusion=fusion, reduction="none")
    for name, value in got.items():  # not to the bit: the rows lie elsewhere
        torch.testing.assert_close(value[[0, 2]], fine[name], rtol=1e-5, atol=1e-6)


# Memory


def layouts(x):
    """The same numbers in other memory, NaN wherever nothing must be read."""
    s, z = x["student_logits"], x["snapshot_logits"]
    rows_first = z.transpose(0, 1).contiguous().transpose(0, 1)
    columns_first = s.t().contiguous().t()
    yield "rows apart", x | {"student_logits": spread(s), "snapshot_logits": spread(z)}
    yield "(B, M, C) memory", x | {"snapshot_logits": rows_first}
    yield "(B, M, C) memory, rows apart", x | {"snapshot_logits": spread(z.transpose(0, 1)).transpose(0, 1)}
    yield "a list", x | {"snapshot_logits": list(z)}
    yield "a tuple with strides of their own", x | {"snapshot_logits": (spread(z[0]), *rows_first[1:])}
    yield "student by columns", x | {"student_logits": columns_first}
    if "scores" in x:
        yield "scores apart", x | {"scores": spread(x["scores"])}
        yield "scores by columns", x | {"scores": x["scores"].t().contiguous().t()}
    if "query" in x:
        yield "query and keys apart", x | {"query": spread(x["query"]), "keys": spread(x["keys"])}
        yield "keys by rows", x | {"keys": x["keys"].transpose(0, 1).contiguous().transpose(0, 1)}
        yield "keys by columns", x | {"keys": x["keys"].transpose(1, 2).contiguous().transpose(1, 2)}
    if "labels" in x:
        yield "labels apart", x | {"labels": spread(x["labels"][:, None].double())[:, 0].nan_to_num(777).long()}
        yield "labels in 8 bits", x | {"labels": x["labels"].to(torch.uint8)}
        yield "labels strided", x | {"labels": x["labels"].repeat_interleave(2)[::2]}


@pytest.mark.parametrize("attention", ["scores", "query"])
@pytest.mark.parametrize("classes", [13, 1030])
@readings
def test_any_layout_gives_the_same_bits(backend, device, attention, classes, fusion, objective):
    x = tensors(6, 3, classes, device=device, attention=attention)
    x["labels"] %= 128
    options = {"fusion": fusion, "attention_objective": objective}
    expected = evaluate(ensemble_kd, x, **options)
    for layout, y in layouts(x):
        with pytest.MonkeyPatch.context() as patch:
            if backend != "reference":
                patch.setattr(torch, "stack", lambda *_: pytest.fail("snapshots were stacked"))
            got = evaluate(ensemble_kd, y, **options)
        for name in expected:
            if backend in ("reference", "triton"):  # where columns lie decides the order in which these two sum
                torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(got[name], expected[name]), f"{layout}: {name}"


@fusions
def test_expanded_tensors_are_repeated_values(backend, device, fusion):
    x = tensors(6, 3, 40, device=device)
    x["student_logits"] = x["student_logits"][:1].expand(6, -1)
    x["snapshot_logits"] = x["snapshot_logits"][:1, :1].expand(3, 6, -1)
    for scores in (x["scores"][:1].expand(6, 3), x["scores"][:, :1].expand(6, 3)):
        x["scores"] = scores
        got = check(x, fusion=fusion)
        assert_same_bits(got, evaluate(ensemble_kd, {k: v.contiguous() for k, v in x.items()}, fusion=fusion))


@readings
def test_ignored_rows_count_for_nothing_and_are_not_read(backend, device, fusion, objective):
    options = {"fusion": fusion, "attention_objective": objective}
    for attention, classes, reduction in itertools.product(ATTENTIONS, (10, 1500), ("mean", "sum", "none")):
        x = tensors(7, 3, classes, device=device, attention=attention)
        ignored = torch.tensor([1, 0, 0, 1, 0, 1, 0], dtype=torch.bool, device=device)
        kept = {k: v[:, ~ignored] if v.dim() == 3 else v[~ignored] for k, v in x.items()}
        for value in x.values():
            value.view(-1, 7, *value.shape[value.dim() - (value.dim() > 1) :])[:, ignored] = (
                NAN if value.is_floating_point() else -100
            )
        got = evaluate(ensemble_kd, x, reduction=reduction, **options)
        expected = evaluate(ensemble_kd, kept, reduction=reduction, **options)
        for name, value in got.items():
            if value.dim():
                axis = int(value.dim() == 3)
                assert (value.transpose(0, axis)[ignored] == 0).all(), name
                value = value.transpose(0, axis)[~ignored].transpose(0, axis)
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_any_integer_may_be_the_ignored_label(backend, device):
    x = tensors(30, 3, 4, device=device)
    got = check(x, ignore_index=2, reduction="none")
    assert torch.equal(got["loss"] == 0, x["labels"] == 2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_but_ignored_rows(backend, device, reduction):
    x = tensors(3, 2, 10, device=device)
    x["labels"][:] = -100
    for name, value in evaluate(ensemble_kd, x, reduction=reduction).items():
        assert (value == 0).all(), name


@readings
def test_snapshots_of_no_weight_are_not_read(backend, device, fusion, objective):
    for classes in (10, 1500):
        x = tensors(4, 3, classes, device=device)
        x["scores"][:, 1] = -INF
        x["scores"][2, 0] = -INF
        without = evaluate(ensemble_kd, x, fusion=fusion, attention_objective=objective)
        x["snapshot_logits"][1] = NAN
        x["snapshot_logits"][0, 2] = NAN
        got = evaluate(ensemble_kd, x, fusion=fusion, attention_objective=objective)
        assert_same_bits(got, without)
        assert (got["d_scores"][:, 1] == 0).all() and (got["weights"][:, 1] == 0).all()
        check({k: v[:, [0, 2]] if k == "scores" else v[[0, 2]] if k == "snapshot_logits" else v for k, v in x.items()})


NANS = {"quiet": 0x7FC00000, "negative": -0x400000, "payload": 0x7FC00001, "all ones": -1, "signalling": 0x7F800001}


@pytest.mark.parametrize("who", ["student_logits", "snapshot_logits"])
@pytest.mark.parametrize("bits", NANS.values(), ids=NANS)
@fusions
def test_a_nan_that_is_read_is_never_a_finite_loss(backend, device, who, bits, fusion):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for classes, column, rest in itertools.product((10, 1000, 2500), (0, 3, -1), (None, -INF)):
        x = tensors(3, 2, classes, device=device)
        row = x[who].view(-1, 3, classes)[-1, 1]
        if rest is not None:
            row[classes // 2 :] = rest
        row[column] = nan
        out = evaluate(ensemble_kd, x, fusion=fusion, reduction="none")
        assert out["loss"].isnan().tolist() == [False, True, False], (classes, column, rest)
        assert out["d_student_logits"][1].isnan().any() and not out["d_student_logits"][0].isnan().any()
        if who == "snapshot_logits":
            assert out["attention_loss"].isnan().tolist() == [False, True, False], (classes, column, rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@fusions
def test_every_instruction_set_keeps_nans(isa, dtype, fusion):
    ints, patterns = {
        torch.float32: (torch.int32, NANS.values()),
        torch.bfloat16: (torch.int16, (0x7FC0, 0x7F81, -1)),
        torch.float16: (torch.int16, (0x7E00, 0x7C01, -1)),
    }[dtype]
    for bits, who, column in itertools.product(patterns, ("student_logits", "snapshot_logits"), (0, 60, -1)):
        x = tensors(2, 2, 100, dtype=dtype)
        x[who].view(-1, 2, 100)[-1, 0, column] = torch.tensor(bits, dtype=ints).view(dtype)
        loss = evaluate(ensemble_kd, x, fusion=fusion, reduction="none")["loss"]
        assert loss.isnan().tolist() == [True, False], (hex(bits), who, column)


@pytest.mark.parametrize("who", ["scores", "query", "keys"])
@fusions
def test_a_nan_in_the_attention_is_never_a_finite_loss(backend, device, who, fusion):
    x = tensors(3, 2, 10, device=device, attention="scores" if who == "scores" else "query")
    x[who].view(-1, 3, x[who].shape[-1])[-1, 1, 0] = NAN
    out = evaluate(ensemble_kd, x, fusion=fusion, reduction="none")
    assert out["loss"].isnan().tolist() == out["attention_loss"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("attention", ["scores", "query"])
def test_offsets_beyond_32_bits(backend, attention):
    x = tensors(3, 2, 10, dtype=torch.float16, attention=attention)
    y = {name: value if name == "labels" else far(value) for name, value in x.items()}
    assert_same_bits(evaluate(ensemble_kd, y), evaluate(ensemble_kd, x))


@fusions
def test_memory_is_the_gradient_and_a_few_tiles(device, threads, fusion):
    if device != "cpu":
        pytest.skip("reads the resident set of the process")
    threads(2)
    rows, snapshots, classes = 32, 8, 65536
    x = tensors(rows, snapshots, classes)
    x["student_logits"].requires_grad_()
    x["scores"].requires_grad_()

    def run():
        x["student_logits"].grad = x["scores"].grad = None
        out = ensemble_kd(**x, fusion=fusion)
        return out.loss + out.attention_loss

    run().backward()
    x["student_logits"].grad = None
    extra = peak_extra_bytes(run, torch.device("cpu"))
    if extra is None:
        pytest.skip("no /proc/self/clear_refs here")
    gradient = 4 * rows * classes
    assert extra < gradient + 2 * 4 * classes + 2**20, f"{extra / gradient:.2f} times the gradient"


# Identities of method.md


@fusions
def test_one_snapshot_is_plain_distillation(backend, device, fusion):
    x = tensors(9, 1, 100, device=device, attention="uniform")
    s, z, y, tau, alpha = x["student_logits"], x["snapshot_logits"][0], x["labels"], 4.0, 0.3
    s = s.requires_grad_()
    kl = F.kl_div((s / tau).log_softmax(1), (z / tau).softmax(1), reduction="batchmean")
    expected = alpha * F.cross_entropy(s, y) + (1 - alpha) * tau**2 * kl
    out = evaluate(ensemble_kd, x, temperature=tau, alpha=alpha, fusion=fusion)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["d_student_logits"], torch.autograd.grad(expected, s)[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(out["attention_loss"], F.cross_entropy(z / tau, y), rtol=1e-5, atol=1e-6)
    assert (out["weights"] == 1).all()


@readings
def test_equal_scores_are_the_mean(backend, device, fusion, objective):
    x = tensors(9, 5, 100, device=device)
    options = {"fusion": fusion, "attention_objective": objective, "wrt": ("student_logits",)}
    uniform = evaluate(ensemble_kd, {k: v for k, v in x.items() if k != "scores"}, **options)
    equal = evaluate(ensemble_kd, x | {"scores": torch.full((9, 5), 3.7, device=device)}, **options)
    for name in uniform:
        torch.testing.assert_close(equal[name], uniform[name], rtol=1e-5, atol=1e-6)
    assert torch.allclose(uniform["weights"], torch.tensor(0.2, device=device))


@fusions
def test_fixed_weights_are_given_as_their_logarithms(backend, device, fusion):
    x = tensors(4, 3, 20, device=device)
    log_weights = torch.tensor([0.5, 0.0, 0.5], device=device).log().expand(4, 3)
    out = evaluate(ensemble_kd, x | {"scores": log_weights}, fusion=fusion, wrt=("student_logits",))
    halves = {k: v[[0, 2]] if k == "snapshot_logits" else v for k, v in x.items() if k != "scores"}
    torch.testing.assert_close(out["loss"], evaluate(ensemble_kd, halves, fusion=fusion)["loss"])
    assert out["weights"].tolist() == [[0.5, 0.0, 0.5]] * 4


@readings
@pytest.mark.parametrize("classes", [10, 1500])
def test_a_student_equal_to_the_snapshots_has_nothing_to_learn(backend, device, fusion, objective, classes):
    x = tensors(9, 3, classes, device=device, labels=False)
    x["snapshot_logits"] = x["student_logits"].expand(3, -1, -1)
    out = evaluate(ensemble_kd, x, fusion=fusion, attention_objective=objective, reduction="none")
    assert out["loss"].abs().max() < 2e-5
    assert all(value.abs().max() < 1e-4 for name, value in out.items() if name.startswith("d_"))


def test_the_fusions_agree_where_the_snapshots_do(backend, device):
    x = tensors(9, 4, 100, device=device)
    x["snapshot_logits"] = x["snapshot_logits"][:1].expand(4, -1, -1)
    a, b = (evaluate(ensemble_kd, x, fusion=fusion, reduction="none") for fusion in FUSIONS)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_the_student_gradient_is_the_mean_of_the_gradients_towards_each_snapshot(backend, device):
    x = tensors(9, 4, 100, device=device, labels=False)
    w = x["scores"].softmax(1)
    towards = [
        evaluate(ensemble_kd, {"student_logits": x["student_logits"], "snapshot_logits": z[None]}, reduction="sum")
        for z in x["snapshot_logits"]
    ]
    expected = sum(w[:, m, None] * out["d_student_logits"] for m, out in enumerate(towards))
    got = evaluate(ensemble_kd, x, reduction="sum")["d_student_logits"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@readings
@pytest.mark.parametrize("classes", [10, 1500])
def test_a_constant_added_to_a_row_changes_nothing(backend, device, fusion, objective, classes):
    x = tensors(9, 4, classes, device=device, dtype=torch.float64)
    shifted = {k: v + 50 * torch.randn_like(v[..., :1]) if v.is_floating_point() else v for k, v in x.items()}
    options = {"fusion": fusion, "attention_objective": objective}
    a, b = (evaluate(ensemble_kd, y, **options) for y in (x, shifted))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-10)


def test_without_labels_alpha_means_nothing(backend, device):
    x = tensors(9, 4, 100, device=device, labels=False)
    outs = [evaluate(ensemble_kd, x, alpha=alpha, attention_objective="kl") for alpha in (0, 0.5, 1)]
    assert outs[0]["loss"] > 0 and outs[0]["attention_loss"] == 0
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


# Gradients


@pytest.mark.parametrize("attention", ["scores", "query"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@readings
def test_gradcheck(backend, device, attention, reduction, fusion, objective):
    x = tensors(4, 3, 6, device=device, dtype=torch.float64, attention=attention, width=2)
    x["labels"][1] = -100
    student = ["student_logits"]
    attention = [name for name in ("scores", "query", "keys") if name in x]
    options = {"fusion": fusion, "attention_objective": objective, "reduction": reduction, "alpha": 0.3}
    # With "label" the target is a constant to `loss`, which finite differences cannot know: one output each.
    checks = {"loss": student, "attention_loss": attention} if objective == "label" else {"loss": student + attention}
    for output, names in checks.items():
        leaves = [x[name].clone().requires_grad_() for name in names]

        def f(*leaves, names=names, output=output):
            return getattr(ensemble_kd(**x | dict(zip(names, leaves, strict=True)), **options), output)

        assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@readings
def test_upstream_gradients_scale(backend, device, dtype, reduction, fusion, objective):
    for attention in ("scores", "query"):
        x = tensors(9, 3, 100, device=device, dtype=dtype, attention=attention)
        x["labels"][4] = -100
        upstream = (0.37, -2.5)
        if reduction == "none":
            upstream = tuple(g * torch.arange(9.0, device=device) for g in upstream)
        check(x, upstream=upstream, reduction=reduction, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_scale_saves_the_small_gradients_of_fp16(backend, device, reduction):
    x = tensors(1024, 1, 1000, device=device, dtype=torch.float16)
    options = {"reduction": reduction, "upstream": (2.0**14, 2.0**14) if reduction == "mean" else (8.0, 8.0)}
    got = evaluate(ensemble_kd, x, **options)["d_student_logits"].double()
    truth = evaluate(reference.ensemble_kd, double(x), **options)["d_student_logits"]
    others = F.one_hot(x["labels"], 1000) == 0  # the columns of the labels have large gradients
    assert (got - truth)[others].norm() < 1e-3 * truth[others].norm()


@readings
def test_each_output_alone(backend, device, fusion, objective):
    x = tensors(9, 3, 20, device=device)
    student, scores = x["student_logits"].requires_grad_(), x["scores"].requires_grad_()
    out = ensemble_kd(**x, fusion=fusion, attention_objective=objective)
    moved_by = {
        name: [
            grad is not None
            for grad in torch.autograd.grad(getattr(out, name), (student, scores), retain_graph=True, allow_unused=True)
        ]
        for name in ("loss", "attention_loss")
        if getattr(out, name).requires_grad
    }
    if objective == "kl":
        assert moved_by == {"loss": [True, True]}
    else:
        assert moved_by == {"loss": [True, False], "attention_loss": [False, True]}
    assert not out.weights.requires_grad


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("student", [True, False])
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_only_what_can_be_trained_requires_a_gradient(backend, device, objective, student, scores, labels):
    if scores and not labels and objective == "label":
        pytest.skip("an error, tested as such")
    x = tensors(4, 3, 5, device=device, labels=labels)
    x["student_logits"].requires_grad_(student)
    x["scores"].requires_grad_(scores)
    out = ensemble_kd(**x, attention_objective=objective)
    assert out.loss.requires_grad == (student or (scores and objective == "kl"))
    assert out.attention_loss.requires_grad == (scores and objective == "label")


def test_backward_again_and_again(backend, device):
    x = tensors(9, 3, 20, device=device)
    leaves = x["student_logits"].requires_grad_(), x["scores"].requires_grad_()
    out = ensemble_kd(**x)
    total = out.loss + out.attention_loss
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for times in (1, 2, 3):
        total.backward(retain_graph=True)
        for leaf, grad in zip(leaves, kept, strict=True):
            torch.testing.assert_close(leaf.grad, times * grad)
    for leaf in leaves:  # as an optimiser's clipping does
        leaf.grad.zero_()
    total.backward()
    for leaf, grad in zip(leaves, kept, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("of", ["loss", "attention_loss"])
def test_the_second_derivative_is_refused(kernels, device, of):
    x = tensors(4, 3, 5, device=device)
    leaf = x["student_logits" if of == "loss" else "scores"].requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative.*create_graph"):
        torch.autograd.grad(getattr(ensemble_kd(**x), of), leaf, create_graph=True)


GRADIENTS = ("d_student", "d_scores", "d_query", "d_keys")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("student", [True, False])
@pytest.mark.parametrize("attends", [True, False])
@readings
def test_gradients_not_asked_for_are_not_computed(kernels, device, attention, student, attends, fusion, objective):
    x = tensors(4, 3, 5, device=device, attention=attention)
    x["student_logits"].requires_grad_(student)
    names = [name for name in ("scores", "query", "keys") if name in x]
    for name in names:
        x[name].requires_grad_(attends)
    for asked in (True, False):
        with Calls() as calls, torch.set_grad_enabled(asked):
            ensemble_kd(**x, fusion=fusion, attention_objective=objective)
        ((_, args),) = calls.own
        written = {name for name in GRADIENTS if args.get(name) is not None}
        expected = {"d_student"} if student else set()
        expected |= {f"d_{name}" for name in names} if attends else set()
        assert written == (expected if asked else set())


def launches(kernels, device):
    """Whether the backward is a launch that scales in place; the native kernels leave it to torch on CPU."""
    return kernels == "triton" or device != "cpu"


def test_backward_scales_and_nothing_else(kernels, device):
    x = tensors(4, 3, 5, device=device)
    x["student_logits"].requires_grad_()
    for scale, most in ((1.0, 0), (3.0, 1)):
        loss, upstream = ensemble_kd(**x).loss, torch.tensor(scale, device=device)
        with Calls() as calls:
            (grad,) = torch.autograd.grad(loss, x["student_logits"], upstream)
        if launches(kernels, device):
            ((name, args),) = calls.own
            assert name == "ensemble_kd_bwd" and args["d_student"].data_ptr() == grad.data_ptr()
            most = 0
        else:
            assert not calls.own
        work = [name for name in calls.others if "detach" not in name and "_local_scalar_dense" not in name]
        assert len(work) <= most, work


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("attention", ["scores", "query"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_graph_that_is_kept_keeps_its_gradients(kernels, device, dtype, reduction, attention, objective):
    x = tensors(9, 3, 20, device=device, dtype=dtype, attention=attention)
    leaves = [x[name].requires_grad_() for name in DIFFERENTIABLE if name in x]
    out = ensemble_kd(**x, reduction=reduction, attention_objective=objective)
    total = (torch.arange(out.loss.numel(), device=device) + 3) * (out.loss + 2 * out.attention_loss)
    total = total.sum()
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    with Calls() as calls:
        third = torch.autograd.grad(total, leaves)
    assert len(calls.own) == launches(kernels, device)  # one launch for all gradients
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and len({t.data_ptr() for t in (a, b, c)}) == 3


def test_a_loss_without_a_gradient_gives_none(kernels, device):
    x = tensors(9, 3, 20, device=device)
    student, scores = x["student_logits"].requires_grad_(), x["scores"].requires_grad_()
    for name, moved in (("loss", [True, False]), ("attention_loss", [False, True])):
        grads = torch.autograd.grad(3 * getattr(ensemble_kd(**x), name), (student, scores), allow_unused=True)
        assert [grad is not None for grad in grads] == moved


# Bits


@readings
def test_the_same_inputs_give_the_same_bits(backend, device, fusion, objective):
    options = {"fusion": fusion, "attention_objective": objective}
    for classes in (1500, 1001):  # the rows of 1001 begin at any element
        x = tensors(5, 3, classes, device=device, attention="query")
        first = evaluate(ensemble_kd, x, **options)
        for _ in range(3):
            x = {name: value.clone() for name, value in x.items()}
            assert_same_bits(evaluate(ensemble_kd, x, **options), first)


@pytest.mark.parametrize("size", [(64, 3, 1000), (3, 3, 5000), (1, 2, 100000)], ids=str)
@readings
def test_threads_do_not_change_the_bits(kernels, threads, size, fusion, objective):
    x = tensors(*size)
    outs = []
    for count in (1, 2, 4):
        threads(count)
        outs.append(evaluate(ensemble_kd, x, fusion=fusion, attention_objective=objective))
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@readings
def test_few_rows_with_many_columns_are_the_same_rows(kernels, device, threads, dtype, fusion, objective):
    threads(4)
    x = tensors(8, 3, 5000, device=device, dtype=dtype, attention="query")
    x["labels"][1] = -100
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "none"}
    many = evaluate(ensemble_kd, x, **options)
    few = evaluate(ensemble_kd, {k: v[:, :2] if v.dim() == 3 else v[:2] for k, v in x.items()}, **options)
    assert_same_bits(few, {k: v[:, :2] if v.dim() == 3 else v[:2] for k, v in many.items()})


def test_callers_in_several_threads(backend, device):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter runs in one thread")
    xs = [tensors(20, 3, classes, device=device) for classes in (10, 1000, 3000)] * 2
    expected = [evaluate(ensemble_kd, x) for x in xs]
    got = [None] * len(xs)

    def work(i):
        for _ in range(20):
            got[i] = evaluate(ensemble_kd, xs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b) if backend != "reference" else torch.testing.assert_close(a, b)


# A citizen of torch


def op_arguments(x, *, fusion="probability", objective="label", reduction="mean", grads=()):
    """Arguments of torch.ops.eekd.ensemble_kd_fwd, which fills its outputs."""
    s, z = x["student_logits"], x["snapshot_logits"]
    stacked = isinstance(z, torch.Tensor)
    count = len(z)
    shape = (s.shape[0],) if reduction == "none" else ()
    outputs = {"d_student": s, "d_scores": x.get("scores"), "d_query": x.get("query"), "d_keys": x.get("keys")}
    return (
        s, [z] if stacked else z, x.get("labels"), x.get("scores"), x.get("query"), x.get("keys"),
        5.0, 0.5, fusion == "logit", objective == "kl", reduction == "mean", -100,
        s.new_zeros(shape), s.new_zeros(shape), s.new_zeros(s.shape[0], count),
        *(torch.zeros_like(of) if name in grads else None for name, of in outputs.items()),
    )  # fmt: skip


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("whole", [True, False], ids=["stacked", "list"])
def test_opcheck(device, attention, whole):
    x = tensors(4, 3, 5, device=device, attention=attention, labels=whole)
    if not whole:
        x["snapshot_logits"] = list(x["snapshot_logits"])
    grads = {"uniform": (), "scores": ("d_scores",), "query": ("d_query", "d_keys")}[attention]
    options = {"objective": "kl", "reduction": "mean" if whole else "none", "grads": ("d_student", *grads)}
    torch.library.opcheck(torch.ops.eekd.ensemble_kd_fwd.default, op_arguments(x, **options))


def test_meta_tensors_have_the_shapes_and_dtypes():
    x = tensors(4, 3, 5, dtype=torch.bfloat16)
    expected = ensemble_kd(**x, reduction="none")
    got = ensemble_kd(**{name: value.to("meta") for name, value in x.items()}, reduction="none")
    for a, b in zip(got, expected, strict=True):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype


def compiled(compiler="aot_eager", dynamic=None):
    """A training step's loss, compiled without graph breaks, and the counter of its compilations."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)

    def step(**arguments):
        out = ensemble_kd(**arguments)
        return 2 * out.loss + out.attention_loss, out.weights, out.attention_loss

    return step, torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic), counter


def assert_compiled_agrees(step, fast, x, **options):
    a, b = evaluate(step, x, **options), evaluate(fast, x, **options)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@readings
def test_compiles_whole_and_once_for_every_size(kernels, device, fusion, objective):
    step, fast, counter = compiled(dynamic=True)
    frames = set()
    for rows, snapshots, classes, width in ((7, 3, 20, 4), (9, 4, 30, 5), (12, 2, 10, 6)):
        x = tensors(rows, snapshots, classes, device=device, attention="query", width=width)
        assert_compiled_agrees(step, fast, x, fusion=fusion, attention_objective=objective)
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_compiles_again_only_until_a_size_is_a_variable(kernels, device):
    step, fast, counter = compiled()
    frames = []
    for rows, classes in ((7, 20), (9, 20), (12, 30), (5, 30), (33, 25)):
        assert_compiled_agrees(step, fast, tensors(rows, 3, classes, device=device))
        frames.append(counter.frame_count)
    assert frames[2] == frames[4] and frames[2] <= frames[0] + 2  # B becomes a variable, then C


def test_compiles_every_kind_of_argument(kernels, device):
    step, fast, _ = compiled()
    x = tensors(5, 3, 10, device=device)
    ignoring = x | {"labels": x["labels"].index_fill(0, torch.tensor([1], device=device), -100)}
    for y, options in (
        (x | {"snapshot_logits": list(x["snapshot_logits"])}, {}),
        ({k: v for k, v in x.items() if k not in ("labels", "scores")}, {}),
        (ignoring, {"reduction": "none", "upstream": (torch.arange(5.0, device=device), 1.0)}),
        ({k: v.half() if k.endswith("logits") else v for k, v in x.items()}, {}),
        (tensors(0, 3, 10, device=device), {}),
    ):
        assert_compiled_agrees(step, fast, y, **options)


def test_another_backend_is_another_graph(kernels, device):
    step, fast, counter = compiled()
    x = tensors(5, 3, 10, device=device)
    assert_compiled_agrees(step, fast, x)
    with use_backend("reference"):
        assert_compiled_agrees(step, fast, x)
    assert counter.frame_count == 2


def test_inductor(kernels, device):
    step, fast, _ = compiled("inductor", dynamic=True)
    for rows in (6, 11):
        assert_compiled_agrees(step, fast, tensors(rows, 3, 20, device=device))


@fusions
def test_autocast_changes_nothing_but_what_the_model_returns(backend, device, fusion):
    x = tensors(9, 3, 20, device=device, attention="query")
    model = torch.nn.Linear(20, 20, device=device)
    with torch.autocast(device, torch.bfloat16):
        inside = evaluate(ensemble_kd, x, fusion=fusion)
        logits = model(x["student_logits"])
        loss = ensemble_kd(**x | {"student_logits": logits}, fusion=fusion).loss
    assert_same_bits(inside, evaluate(ensemble_kd, x, fusion=fusion))
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32 and model.weight.grad.abs().sum() > 0


def test_inference_mode_and_no_grad(backend, device):
    x = tensors(9, 3, 20, device=device)
    expected = ensemble_kd(**x)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = ensemble_kd(**x | {"student_logits": x["student_logits"].clone().requires_grad_()})
        assert not out.loss.requires_grad and torch.equal(out.loss, expected.loss)


def test_arguments_are_not_modified(backend, device):
    x = tensors(9, 3, 20, device=device, attention="query")
    before = {k: v.clone() for k, v in x.items()}
    evaluate(ensemble_kd, x)
    assert_same_bits(x, before)


# Properties


@st.composite
def calls(draw):
    """A call: tensors and options."""
    rows, snapshots = draw(st.integers(0, 6)), draw(st.integers(1, 7))
    classes = draw(st.one_of(st.integers(1, 40), st.integers(1020, 1030)))
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
    options = {
        "temperature": draw(st.floats(0.5, 20)),
        "alpha": draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        "fusion": draw(st.sampled_from(FUSIONS)),
        "attention_objective": draw(st.sampled_from(OBJECTIVES)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    return x, options


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
def test_rows_snapshots_and_classes_may_be_permuted(backend, device, call, seed):
    x, options = call
    x, options = {k: v.to(device) for k, v in double(x).items()}, options | {"reduction": "none"}
    generator = torch.Generator().manual_seed(seed)
    count, rows, classes = x["snapshot_logits"].shape
    b, m, c = (torch.randperm(n, generator=generator).to(device) for n in (rows, count, classes))

    def permuted(name, value):
        match name.removeprefix("d_"):
            case "student_logits":
                return value[b][:, c]
            case "snapshot_logits":
                return value[m][:, b][:, :, c]
            case "keys":
                return value[m][:, b]
            case "scores" | "weights":
                return value[b][:, m]
        return value[b]

    y = {name: permuted(name, value) for name, value in x.items()}
    if "labels" in y:
        y["labels"] = torch.where(y["labels"] < 0, y["labels"], c.argsort()[y["labels"].clamp(min=0)])
    got, expected = evaluate(ensemble_kd, y, **options), evaluate(ensemble_kd, x, **options)
    for name in got:
        torch.testing.assert_close(got[name], permuted(name, expected[name]), rtol=1e-6, atol=1e-9)


@fuzz
@given(call=calls())
def test_what_holds_for_every_call(backend, device, call):
    x, options = call
    x = {k: v.to(device) for k, v in double(x).items()}
    none, total, mean = (evaluate(ensemble_kd, x, **options | {"reduction": r}) for r in ("none", "sum", "mean"))
    kept = x["labels"] != -100 if "labels" in x else torch.ones(len(none["loss"]), dtype=torch.bool, device=device)
    count = kept.sum().clamp(min=1)
    close = {"rtol": 1e-9, "atol": 1e-10}
    assert (none["loss"] >= -1e-9).all() and (none["attention_loss"] >= -1e-9).all()
    torch.testing.assert_close(none["weights"].sum(1), kept.float(), rtol=1e-5, atol=1e-6)
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
