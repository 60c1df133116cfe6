"""ensemble_kd on every backend, and all in which sparse_ensemble_kd is like it: its numbers.

What it reads, its gradients, how it behaves as a torch op, and properties of any call are in the files beside.
"""

import itertools

import pytest
import torch
import torch._dynamo.testing
from cases import (
    ATTENTIONS,
    DTYPES,
    FUSIONS,
    INF,
    READINGS,
    SIZES,
    fusions,
    kd,
    part,
    readings,
    rows_first,
    sizes,
    sparse,
    tensors,
)
from numerics import assert_equals_formulas, assert_rounded_once, assert_same_bits, check, evaluate, exact
from torch.nn import functional as F

from eekd import ensemble_kd

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
    assert_equals_formulas(x, device, formulas(x, 3.0, 0.3, fusion, objective), fusion, objective)


@sizes(*SIZES)
@readings
def test_every_shape(backend, device, size, fusion, objective):
    check(tensors(*size, device=device), fusion=fusion, attention_objective=objective)


@sizes((9, 5, 100), (3, 3, 1500), (9, 5, 100, 20), (3, 3, 1500, 40))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "pure"])
@readings
def test_every_dtype_and_kind_of_attention(backend, device, size, dtype, attention, labels, fusion, objective):
    x = tensors(*size, device=device, dtype=dtype, attention=attention, labels=labels)
    check(x, fusion=fusion, attention_objective=objective)


@sizes((9, 3, 100), (9, 3, 100, 20))
@pytest.mark.parametrize("student, snapshots", list(itertools.permutations(DTYPES, 2)))
@fusions
def test_student_and_snapshots_of_different_dtypes(backend, device, size, student, snapshots, fusion):
    x = tensors(*size, device=device, attention="query")
    x["student_logits"] = x["student_logits"].to(student)
    x["snapshot_logits"] = x["snapshot_logits"].to(snapshots)
    x["query"], x["keys"] = x["query"].to(snapshots), x["keys"].to(student)
    check(x, fusion=fusion)


@sizes((65, 3, 100), (65, 3, 100, 40))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@readings
def test_half_precision_is_fp32_arithmetic_rounded_once(backend, device, size, dtype, fusion, objective):
    x = tensors(*size, device=device, dtype=dtype, attention="query")
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "sum"}
    half = evaluate(kd, x, **options)
    full = evaluate(kd, {k: v.float() if v.is_floating_point() else v for k, v in x.items()}, **options)
    if device == "cpu":
        assert_same_bits(half, {k: v.to(half[k].dtype) for k, v in full.items()})
    for name, value in half.items():  # a GPU's threads hold other columns in 16 bits, and sum in another order
        assert_rounded_once(name, value, full[name])


@pytest.mark.parametrize("rows", [2049, 70003])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_rows(backend, device, rows, reduction):
    x = tensors(rows, 2, 3, device=device)
    x["labels"][torch.arange(rows, device=device) % 5 == 2] = -100
    check(x, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@sizes(*(size for size in SIZES if size[0] and size[2] <= 2500))
def test_every_instruction_set(isa, dtype, size):
    x = tensors(*size, dtype=dtype)
    for fusion, objective in READINGS:
        check(x, fusion=fusion, attention_objective=objective)


@sizes((9, 4, 100), (9, 4, 100, 30))
@pytest.mark.parametrize("temperature", [0.25, 1, 2.5, 20])
@pytest.mark.parametrize("alpha", [0, 0.1, 1])
@readings
def test_temperature_and_alpha(backend, device, size, temperature, alpha, fusion, objective):
    x = tensors(*size, device=device, temperature=temperature)
    check(x, temperature=temperature, alpha=alpha, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("width", [1, 8, 127, 1024, 1500])
def test_every_embedding_width(backend, device, width):
    x = tensors(5, 4, 10, device=device, attention="query", width=width)
    x["query"] = x["query"] / width**0.5
    check(x)


@sizes((9, 4, 100), (9, 4, 100, 20), (9, 4, 100, 60))
@readings
def test_logits_of_ten_thousand(backend, device, size, fusion, objective):
    x = tensors(*size[:3], device=device)
    for name in ("student_logits", "snapshot_logits"):
        x[name] = torch.where(x[name] > 0, 1e4, -1e4) + x[name]
    x = sparse(x, *size[3:])
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "none"}
    got, truth = evaluate(kd, x, **options), exact(x, **options)
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


@sizes((3, 2, 10), (3, 2, 40, 10))
@pytest.mark.parametrize("who", ["student_logits", "snapshot_logits", "scores"])
@fusions
def test_a_row_of_nothing_but_masked_has_no_softmax(backend, device, size, who, fusion):
    x = tensors(*size, device=device)
    for name in (who, "snapshot_tail") if who == "snapshot_logits" and "indices" in x else (who,):
        rows_first(name, x[name])[1] = -INF
    got = evaluate(kd, x, fusion=fusion, reduction="none")
    assert got["loss"].isnan().tolist() == [False, True, False]
    fine = evaluate(kd, part(x, [0, 2]), fusion=fusion, reduction="none")
    for name, value in part(got, [0, 2]).items():  # not to the bit: the rows lie elsewhere
        torch.testing.assert_close(value, fine[name], rtol=1e-5, atol=1e-6)


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
