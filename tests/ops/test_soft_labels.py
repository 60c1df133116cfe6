"""Soft labels (B, C), as of mixup, CutMix and label smoothing, on every backend; and rows in several dimensions."""

import numpy
import pytest
import torch
from cases import (
    DTYPES,
    INF,
    NAN,
    READINGS,
    SIZES,
    Calls,
    fusions,
    kd,
    readings,
    sizes,
    softened,
    sparse,
    spread,
    tensors,
)
from compiled import assert_compiled_agrees, compiled
from numerics import (
    assert_equals_formulas,
    assert_same_bits,
    assert_same_bits_in_threads,
    check,
    check_by_differences,
    evaluate,
    exact,
)
from torch.nn import functional as F

from eekd import EEKDLoss, ensemble_kd, sparse_ensemble_kd, top_k_logits

# Of all classes, or of K whose number is less than a vector, or not.
dense_or_sparse = pytest.mark.parametrize("k", [None, 3, 40], ids=["dense", "sparse3", "sparse40"])


def some_of(classes, k):
    return k and min(k, classes)


def formulas(x, temperature, alpha, fusion, objective):
    """What soft labels y give in fp64: outputs and gradients of their sums, as written in `ensemble_kd`."""
    s, z, y, tau = x["student_logits"], x["snapshot_logits"], x["labels"], temperature
    w = x["scores"].softmax(1)
    wm, total = w.t()[:, :, None], y.sum(1, keepdim=True)
    p_m = (z / tau).softmax(2)
    t = (wm * z).sum(0) / tau
    p = (wm * p_m).sum(0) if fusion == "probability" else t.softmax(1)
    q, r = (s / tau).softmax(1), p.log() - (s / tau).log_softmax(1)
    kl = (p * r).sum(1)
    out = {
        "loss": (alpha * -(y * s.log_softmax(1)).sum(1) + (1 - alpha) * tau**2 * kl).sum(),
        "attention_loss": -(y * p.log()).sum(),
        "weights": w.float(),
        "d_student_logits": alpha * (total * s.softmax(1) - y) + (1 - alpha) * tau * (q - p),
    }
    if objective == "label":
        out["d_scores"] = (
            w * total - w * (p_m * (y / p)).sum(2).t()
            if fusion == "probability"
            else centred(w, (total[:, 0] * (p * z).sum(2) - (y * z).sum(2)).t() / tau)
        )
    return out


def centred(w, g):
    return w * (g - (w * g).sum(1, keepdim=True))


@readings
def test_equals_the_formulas_of_soft_labels(backend, device, fusion, objective):
    x = tensors(10, 4, 12, dtype=torch.float64, soft=True)
    assert_equals_formulas(x, device, formulas(x, 3.0, 0.3, fusion, objective), fusion, objective)


@sizes((10, 3, 7), (10, 3, 1000), (5, 3, 2500), (10, 3, 7, 2), (10, 3, 1000, 40), (5, 3, 2500, 40))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_alpha_of_one_is_the_cross_entropy_of_torch(backend, device, size, reduction):
    x = tensors(*size, device=device, soft=True)
    s = x["student_logits"].clone().requires_grad_()
    expected = F.cross_entropy(s, x["labels"], reduction=reduction)
    out = evaluate(kd, x, alpha=1, reduction=reduction)
    torch.testing.assert_close(out["loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["d_student_logits"], torch.autograd.grad(expected.sum(), s)[0], rtol=1e-4, atol=1e-6)


@sizes((65, 5, 10), (9, 17, 100), (9, 5, 129), (5, 3, 5000), (1, 2, 20000), (65, 5, 10, 3), (5, 3, 2500, 200))
@readings
def test_a_one_hot_row_is_its_hard_label(backend, device, size, fusion, objective):
    hard = tensors(*size, device=device)
    soft = hard | {"labels": F.one_hot(hard["labels"], size[2]).float()}
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "none"}
    a, b = evaluate(kd, soft, **options), evaluate(kd, hard, **options)
    for name in a:
        largest = b[name].abs().max().item()
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=2e-6 * max(1, largest))


@sizes(*SIZES)
@readings
def test_soft_labels_of_every_shape(backend, device, size, fusion, objective):
    check(tensors(*size, device=device, soft=True), fusion=fusion, attention_objective=objective)


@sizes((10, 5, 100), (3, 3, 1500), (10, 5, 100, 20), (3, 3, 1500, 140))
@pytest.mark.parametrize("labels", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@readings
def test_soft_labels_of_every_dtype(backend, device, size, labels, dtype, fusion, objective):
    x = tensors(*size, device=device, dtype=dtype, attention="query", soft=True)
    x["labels"] = x["labels"].to(labels)
    check(x, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@sizes(*(size for size in SIZES if size[0] and size[2] <= 2500))
def test_soft_labels_on_every_instruction_set(isa, dtype, size):
    x = tensors(*size, dtype=dtype, soft=True)
    for fusion, objective in READINGS:
        check(x, fusion=fusion, attention_objective=objective)


@sizes((10, 4, 100), (4, 4, 1100), (10, 4, 100, 20), (4, 4, 1100, 140))
@pytest.mark.parametrize("temperature", [0.25, 1, 2.5, 20])
@pytest.mark.parametrize("alpha", [0, 0.1, 1])
@fusions
def test_temperature_and_alpha_of_soft_labels(backend, device, size, temperature, alpha, fusion):
    check(tensors(*size, device=device, soft=True), temperature=temperature, alpha=alpha, fusion=fusion)


@sizes((2049, 2, 3), (20003, 2, 3), (2049, 2, 3, 2))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_rows_of_soft_labels(backend, device, size, reduction):
    check(tensors(*size, device=device, soft=True), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@dense_or_sparse
def test_a_row_of_no_label_is_a_row(backend, device, k, reduction):
    x = tensors(4, 3, 10, some_of(10, k), device=device, soft=True)
    x["labels"][1] = 0
    x["labels"][2] = -100  # the ignored label is one of hard labels
    got = check(x, reduction=reduction)
    if reduction == "none":
        assert got["attention_loss"][1] == 0 and (got["d_scores"][1] == 0).all() and got["loss"][1] > 0
        assert got["loss"][2] != 0
    torch.testing.assert_close(evaluate(kd, x)["loss"], evaluate(kd, x, reduction="none")["loss"].mean())


@sizes((10, 4, 100), (4, 4, 1100), (10, 4, 100, 30), (4, 4, 1100, 140))
@readings
def test_padded_vocabulary_of_soft_labels(backend, device, size, fusion, objective):
    x = tensors(*size[:3], device=device, soft=True)
    padding = torch.arange(size[2], device=device) % 7 == 3
    padding[900:] = True
    x["student_logits"][:, padding] = x["snapshot_logits"][:, :, padding] = -INF
    x["labels"][:, padding] = 0
    x = sparse(x, *size[3:])
    padded = check(x, fusion=fusion, attention_objective=objective)
    assert padded["loss"].isfinite() and (padded["d_student_logits"][:, padding] == 0).all()


@pytest.mark.parametrize("classes", [10, 1500])
@readings
def test_weight_on_a_masked_column(backend, device, classes, fusion, objective):
    x = tensors(4, 3, classes, device=device, soft=True)
    x["labels"][:] = softened(torch.tensor([0, 1]), classes)[1].to(device)  # weight on every class
    x["student_logits"][0, 5] = x["snapshot_logits"][:, 1, 5] = -INF
    x["snapshot_logits"][1, 2, 5] = -INF  # in one snapshot alone
    got = check(x, fusion=fusion, attention_objective=objective, reduction="none")
    masked = [False, True, fusion == "logit", False]
    assert got["loss"][3].isfinite() and got["attention_loss"].isinf().tolist() == masked
    if objective == "label":
        assert (got["d_scores"][1] == 0).all() and got["d_scores"].isfinite().all()


@pytest.mark.parametrize("classes, k", [(10, 4), (100, 40), (1500, 40), (1500, 140)])
@readings
def test_sparse_weight_on_masked_columns(backend, device, classes, k, fusion, objective):
    x = tensors(6, 3, classes, k, device=device, soft=True)
    x["labels"][:] = softened(torch.tensor([0, 1]), classes)[1].to(device)  # weight on every class
    inside, outside = x["indices"][:, 1], torch.zeros(6, classes, device=device).scatter(1, x["indices"], 1).argmin(1)
    x["student_logits"][0, inside[0]] = x["student_logits"][1, outside[1]] = -INF
    x["snapshot_logits"][:, 2, 1] = x["snapshot_tail"][:, 3] = -INF
    x["snapshot_logits"][1, 4, 1] = x["snapshot_tail"][2, 4] = -INF  # in one snapshot alone
    got = check(x, fusion=fusion, attention_objective=objective, reduction="none")
    if objective == "label":
        assert got["loss"].isinf().tolist() == [True, True] + [False] * 4
        masked = [False, False, True, True, fusion == "logit", False]
        assert got["attention_loss"].isinf().tolist() == masked and got["d_scores"].isfinite().all()


@pytest.mark.parametrize("classes", [10, 100, 1500])
@dense_or_sparse
@readings
def test_soft_labels_of_no_probability_in_fp32(backend, device, classes, k, fusion, objective):
    x = tensors(9, 4, classes, device=device, soft=True)
    at = torch.arange(9, device=device)
    for m, depth in enumerate((1000, 1001, 900, 5000)):
        x["snapshot_logits"][m, at, (7 * at + m // 2) % classes] -= depth
        x["snapshot_logits"][m, at, 3 * at % classes] -= 800
    x["labels"] = x["labels"] + 0.01
    x = sparse(x, some_of(classes, k), temperature=1.0)
    if k:
        x["snapshot_tail"][:, 1::2] -= 1000
    check(x, temperature=1.0, fusion=fusion, attention_objective=objective, reduction="none")


@pytest.mark.parametrize("classes", [100, 1500])
@dense_or_sparse
@fusions
def test_soft_labels_of_logits_of_ten_thousand(backend, device, classes, k, fusion):
    x = tensors(9, 4, classes, device=device, soft=True)
    for name in ("student_logits", "snapshot_logits"):
        x[name] = torch.where(x[name] > 0, 1e4, -1e4) + x[name]
    x = sparse(x, k)
    options = {"fusion": fusion, "reduction": "none"}
    got, truth = evaluate(kd, x, **options), exact(x, **options)
    for name, value in got.items():
        torch.testing.assert_close(value.double(), truth[name].double(), rtol=1e-3, atol=2e-3 * truth[name].abs().max())


@pytest.mark.parametrize("classes", [13, 1030])
@dense_or_sparse
@readings
def test_any_layout_of_soft_labels(backend, device, classes, k, fusion, objective):
    x = tensors(6, 3, classes, some_of(classes, k), device=device, soft=True)
    options = {"fusion": fusion, "attention_objective": objective}
    expected, y = evaluate(kd, x, **options), x["labels"]
    for labels in (spread(y), y.t().contiguous().t(), torch.stack((y, y), 1)[:, 0], y.repeat_interleave(2, 1)[:, ::2]):
        got = evaluate(kd, x | {"labels": labels}, **options)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    one = x | {"labels": y[:1].expand(6, -1)}
    got, expected = (evaluate(kd, one | {"labels": v}, **options) for v in (one["labels"], one["labels"].contiguous()))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [10, 1000, 2500])
@dense_or_sparse
@fusions
def test_a_nan_among_soft_labels_is_never_a_finite_loss(backend, device, classes, k, fusion):
    k = some_of(classes, k)
    for column in (0, 3, -1):
        x = tensors(3, 2, classes, k, device=device, soft=True)
        x["labels"][1, column] = NAN
        out = evaluate(kd, x, fusion=fusion, reduction="none")
        assert out["loss"].isnan().tolist() == [False, True, False]
        assert out["attention_loss"].isnan().tolist() == [False, True, False]
        x = tensors(3, 2, classes, k, device=device, soft=True)
        x["snapshot_logits"][1, 1, column % 3] = NAN
        out = evaluate(kd, x, fusion=fusion, reduction="none")
        assert out["loss"].isnan().tolist() == out["attention_loss"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("classes", [10, 1500])
@dense_or_sparse
@readings
def test_soft_labels_do_not_read_snapshots_of_no_weight(backend, device, classes, k, fusion, objective):
    x = tensors(5, 3, classes, some_of(classes, k), device=device, soft=True)
    x["scores"][:, 1] = x["scores"][2, 0] = -INF
    without = evaluate(kd, x, fusion=fusion, attention_objective=objective)
    x["snapshot_logits"][1] = x["snapshot_logits"][0, 2] = NAN
    if k:
        x["snapshot_tail"][1] = x["snapshot_tail"][0, 2] = NAN
    assert_same_bits(evaluate(kd, x, fusion=fusion, attention_objective=objective), without)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@dense_or_sparse
@readings
def test_gradcheck_of_soft_labels(backend, device, reduction, k, fusion, objective):
    x = tensors(5, 2, 4, some_of(4, k), device=device, dtype=torch.float64, attention="query", width=1, soft=True)
    student, attention = ["student_logits"], ["query", "keys"]
    options = {"fusion": fusion, "attention_objective": objective, "reduction": reduction, "alpha": 0.3}
    checks = {"loss": student, "attention_loss": attention} if objective == "label" else {"loss": student + attention}
    check_by_differences(x, checks, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@dense_or_sparse
@readings
def test_upstream_gradients_of_soft_labels(backend, device, dtype, reduction, k, fusion, objective):
    for attention in ("scores", "query"):
        x = tensors(10, 3, 100, k, device=device, dtype=dtype, attention=attention, soft=True)
        upstream = (0.37, -2.5)
        if reduction == "none":
            upstream = tuple(g * torch.arange(10.0, device=device) for g in upstream)
        check(x, upstream=upstream, reduction=reduction, fusion=fusion, attention_objective=objective)


@sizes((64, 3, 1000), (3, 3, 5000), (1, 2, 100000), (64, 3, 1000, 50), (3, 3, 5000, 200))
@readings
def test_threads_do_not_change_the_bits_of_soft_labels(kernels, threads, size, fusion, objective):
    x = tensors(*size, soft=True)
    assert_same_bits_in_threads(threads, x, fusion=fusion, attention_objective=objective)


@dense_or_sparse
@readings
def test_soft_labels_compile_whole(backend, device, k, fusion, objective):
    step, fast, _ = compiled(dynamic=True)
    for rows in (5, 9):
        x = tensors(rows, 3, 20, some_of(20, k), device=device, soft=True)
        assert_compiled_agrees(step, fast, x, fusion=fusion, attention_objective=objective)
        assert_compiled_agrees(step, fast, x | {"student_logits": x["student_logits"].half()}, fusion=fusion)


@dense_or_sparse
@fusions
def test_opcheck_of_soft_labels(device, k, fusion):
    x = tensors(4, 3, 5, some_of(5, k), device=device, soft=True)
    options = 5.0, 0.5, fusion == "logit", False, 1, -100, True, True
    few = (x["snapshot_tail"], x["indices"]) if k else ()
    op = torch.ops.eekd.sparse_ensemble_kd_fwd if k else torch.ops.eekd.ensemble_kd_fwd
    given = x["student_logits"], [x["snapshot_logits"]], *few, x["labels"], x["scores"], None, None
    torch.library.opcheck(op.default, (*given, *options))
    meta = kd(**{name: value.to("meta") for name, value in x.items()}, reduction="none")
    for a, b in zip(meta, kd(**x, reduction="none"), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


# Rows in several dimensions

BY_ROW = {"snapshot_logits": 1, "keys": 1}  # the dimension of rows, where it is not the first


def reshaped(x, shape):
    return {name: value.unflatten(BY_ROW.get(name, 0), shape) for name, value in x.items()}


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (12, 1)])
@pytest.mark.parametrize("attention", ["uniform", "scores", "query"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_in_several_dimensions(backend, device, shape, attention, soft, reduction):
    x = tensors(12, 3, 10, device=device, attention=attention, soft=soft)
    if not soft:
        x["labels"][5] = -100
    flat, got = evaluate(kd, x, reduction=reduction), evaluate(kd, reshaped(x, shape), reduction=reduction)
    assert got["weights"].shape == (*shape, 3) and got["d_student_logits"].shape == (*shape, 10)
    assert got["loss"].shape == (shape if reduction == "none" else ())
    for name in flat:
        torch.testing.assert_close(got[name].reshape(flat[name].shape), flat[name], rtol=1e-6, atol=1e-7)


def test_rows_in_several_dimensions_are_not_copied(kernels, device):
    x = reshaped(tensors(12, 3, 10, device=device, attention="query"), (3, 4))
    x["snapshot_logits"] = list(x["snapshot_logits"])
    with Calls() as calls:
        kd(**x)
    ((_, given),) = calls.own
    assert not [name for name in calls.others if "view" not in name], calls.others
    for name in ("student_logits", "labels", "query", "keys"):
        assert given[name.removesuffix("_logits")].data_ptr() == x[name].data_ptr()


def test_sparse_rows_in_several_dimensions(backend, device):
    x = tensors(12, 3, 30, 8, device=device)
    y = reshaped({name: value for name, value in x.items() if name != "snapshot_tail"}, (3, 4))
    y["snapshot_tail"] = x["snapshot_tail"].unflatten(1, (3, 4))
    for a, b in zip(kd(**y), kd(**x), strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b)


@pytest.mark.parametrize(
    "name, says",
    [
        ("snapshot_logits", r"snapshot_logits must have shape \(M, 3, 4, C\), got \(3, 12, 10\)"),
        ("labels", r"labels must have shape \(3, 4\), got \(12,\)"),
        ("query", r"query must have shape \(3, 4, D\), got \(12, 6\)"),
        ("keys", r"keys must have shape \(M, 3, 4, D\), got \(3, 12, 6\)"),
    ],
)
def test_rows_that_are_not_those_of_the_student(name, says):
    x = tensors(12, 3, 10, attention="query")
    with pytest.raises(ValueError, match=says):
        ensemble_kd(**reshaped(x, (3, 4)) | {name: x[name]})


# The ops of few classes, and of heads


@readings
def test_sparse_soft_labels_of_all_classes_are_ensemble_kd(backend, device, fusion, objective):
    dense = tensors(10, 3, 30, device=device, soft=True)
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "none"}
    got, expected = evaluate(sparse_ensemble_kd, sparse(dense, 30), **options), evaluate(ensemble_kd, dense, **options)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


@dense_or_sparse
def test_kernels_compute_soft_labels(kernels, device, k):
    with Calls() as calls:
        kd(**tensors(5, 3, 50, k, device=device, soft=True))
    assert [name for name, _ in calls.own] == ["sparse_ensemble_kd_fwd" if k else "ensemble_kd_fwd"]


# What is refused, and numbers


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "labels, exception, says",
    [
        (lambda y: y[:3], ValueError, r"labels must have shape \(4, 5\), got \(3, 5\)"),
        (lambda y: y[:, :4], ValueError, r"labels must have shape \(4, 5\), got \(4, 4\)"),
        (lambda y: y.t(), ValueError, r"labels must have shape \(4, 5\), got \(5, 4\)"),
        (lambda y: y[:, 0], TypeError, "integer class indices .* or floating-point weights .* torch.float32 of shape"),
        (lambda y: y.long(), TypeError, "integer class indices .* or floating-point weights .* torch.int64 of shape"),
        (lambda y: y > 0, TypeError, "integer class indices .* or floating-point weights .* torch.bool of shape"),
        (lambda y: y.to(torch.float8_e4m3fn), TypeError, "labels must be float64, float32, bfloat16 or float16"),
        (lambda y: y.clone().requires_grad_(), ValueError, "labels must not require gradients, .* detach"),
        (lambda y: y.to("meta"), ValueError, "labels must be on cpu .* got meta"),
        (lambda y: y[None], TypeError, "labels must be integer class indices"),
    ],
)
def test_soft_labels_that_are_refused(labels, exception, says):
    x = tensors(4, 3, 5, soft=True)
    with pytest.raises(exception, match=says):
        ensemble_kd(**x | {"labels": labels(x["labels"])})


def test_soft_labels_may_require_gradients_where_none_are_computed():
    x = tensors(4, 3, 5, soft=True)
    with torch.no_grad():
        ensemble_kd(**x | {"labels": x["labels"].clone().requires_grad_()})


NUMBERS = [numpy.float64, numpy.float32, numpy.float16, numpy.array]


@pytest.mark.parametrize("of", NUMBERS, ids=lambda of: of.__name__)
def test_numbers_of_numpy(of):
    x = tensors(4, 3, 5)
    x["labels"][1] = 2
    expected = ensemble_kd(**x, temperature=4.0, alpha=0.25, ignore_index=2)
    got = ensemble_kd(**x, temperature=of(4.0), alpha=of(0.25), ignore_index=numpy.int32(2))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(ensemble_kd(**x, temperature=numpy.int64(4), alpha=0.25, ignore_index=2).loss, expected.loss)
    loss = EEKDLoss("uniform", temperature=of(4.0), alpha=of(0.25), ignore_index=numpy.int64(2))
    assert type(loss.options["temperature"]) is type(loss.options["alpha"]) is float
    assert type(loss.options["ignore_index"]) is int
    x.pop("scores")
    assert torch.equal(loss(**x)[0], ensemble_kd(**x, temperature=4.0, alpha=0.25, ignore_index=2).loss)


# EEKDLoss


@pytest.mark.parametrize("weighting", ["uniform", "entropy", "confidence", "attention"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_loss_of_rows_in_several_dimensions(weighting, soft):
    x = {k: v for k, v in tensors(12, 3, 10, soft=soft).items() if k != "scores"}
    loss = EEKDLoss(weighting, student_dim=5, snapshot_dim=6)
    if weighting == "attention":
        torch.nn.init.normal_(loss.attention.student.weight)
        x |= {"student_features": torch.randn(12, 5), "snapshot_features": torch.randn(3, 12, 6)}
    expected, of_rows = loss(**x)
    shaped = {k: v.unflatten(1 if k.startswith("snapshot") else 0, (3, 4)) for k, v in x.items()}
    for z in (shaped["snapshot_logits"], list(shaped["snapshot_logits"])):
        got, measured = loss(**shaped | {"snapshot_logits": z})
        torch.testing.assert_close(got, expected)
        for name in measured:
            torch.testing.assert_close(measured[name], of_rows[name])


@pytest.mark.parametrize("weighting", ["uniform", "confidence"])
@pytest.mark.parametrize("k", [4, 10])
def test_the_loss_of_soft_labels_and_few_classes(weighting, k):
    x = {k: v for k, v in tensors(12, 3, 10, soft=True).items() if k != "scores"}
    kept = EEKDLoss(weighting)(**x | {"snapshot_logits": top_k_logits(x["snapshot_logits"], k)})
    dense = EEKDLoss(weighting)(**x)
    assert kept[0].isfinite()
    if k == 10:
        torch.testing.assert_close(kept[0], dense[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept[1]["weights"], dense[1]["weights"], rtol=1e-4, atol=1e-5)


def test_confidence_of_one_hot_labels_is_that_of_hard_ones():
    x = {k: v for k, v in tensors(12, 3, 10).items() if k != "scores"}
    _, hard = EEKDLoss("confidence")(**x)
    _, soft = EEKDLoss("confidence")(**x | {"labels": F.one_hot(x["labels"], 10).float()})
    torch.testing.assert_close(soft["weights"], hard["weights"])


@pytest.mark.parametrize("weighting", ["uniform", "attention"])
def test_the_loss_refuses_a_single_class(weighting):
    loss = EEKDLoss(weighting, student_dim=2, snapshot_dim=2)
    for shape in ((4, 1), (4, 3, 1)):
        with pytest.raises(ValueError, match=r"student_logits must have 2 classes or more, got 1.*\(0, z\)"):
            loss(torch.randn(shape), torch.randn(2, *shape), torch.zeros(shape[:-1], dtype=torch.long))
    ensemble_kd(torch.randn(4, 1), torch.randn(2, 4, 1), torch.zeros(4, dtype=torch.long))


def test_training_with_mixup_fits_its_labels():
    """A student that sees mixed labels alone ends at their likelihood, of snapshots that know nothing."""
    torch.manual_seed(0)
    target = torch.rand(4, 6).softmax(1)
    logits = torch.zeros(4, 6, requires_grad=True)
    optimiser = torch.optim.Adam([logits], 0.1)
    for _ in range(300):
        optimiser.zero_grad()
        EEKDLoss("uniform", alpha=1.0)(logits, torch.zeros(2, 4, 6), target)[0].backward()
        optimiser.step()
    torch.testing.assert_close(logits.softmax(1).detach(), target, rtol=1e-3, atol=1e-3)
