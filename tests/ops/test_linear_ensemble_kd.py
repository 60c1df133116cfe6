"""linear_ensemble_kd against its formula: values, gradients, dtypes, chunks, memory, bad input."""

import itertools
import sys

import pytest
import torch

from eekd import ensemble_kd, linear_ensemble_kd, use_backend
from eekd.ops import reference
from eekd.ops.linear_ensemble_kd import _chunk

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ULP = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LEAVES = ("student_hidden", "student_weight", "student_bias", "scores")


def inputs(n=13, h=6, widths=(5, 7, 4), v=11, *, shared=False, dtype=torch.float64, device="cpu", seed=0, **parts):
    """Arguments by name; `parts` leaves some out, or asks for labels that are ignored, or soft."""
    torch.manual_seed(seed)

    def make(*shape, scale=1.0):
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(device, dtype)

    count = len(widths)
    labels = torch.rand(n, v).softmax(1) if parts.get("soft") else torch.randint(v, (n,))
    x = {
        "student_hidden": make(n, h),
        "student_weight": make(v, h),
        "snapshot_hidden": [make(n, w) for w in widths],
        "snapshot_weights": make(v, widths[0]) if shared else [make(v, w) for w in widths],
        "labels": labels.to(device),
        "student_bias": make(v),
        "snapshot_biases": make(v) if shared else [make(v) for _ in widths],
        "scores": make(n, count),
    }
    if parts.get("ignored", True) and not parts.get("soft"):
        x["labels"][1::4] = -100
    return {name: value for name, value in x.items() if parts.get(name, True)}


def evaluate(op, x, upstream=(1.0, 1.0), **options):
    names = [name for name in LEAVES if name in x]
    if "labels" not in x and options.get("attention_objective", "label") == "label" and "scores" in names:
        names.remove("scores")
    leaves = {name: x[name].detach().requires_grad_() for name in names}
    loss, weights, attention_loss = op(**{**x, **leaves}, **options)
    total = (loss * upstream[0]).sum() + (attention_loss * upstream[1]).sum()
    grads = torch.autograd.grad(total, leaves.values(), allow_unused=True, materialize_grads=True)
    found = {"loss": loss.detach(), "weights": weights, "attention_loss": attention_loss.detach()}
    return found | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def wide(x):
    def widen(value):
        if isinstance(value, list):
            return [widen(each) for each in value]
        return value.double() if value.is_floating_point() else value

    return {name: widen(value) for name, value in x.items()}


def check(x, **options):
    """Twice the error of the formula in the dtypes given, and a unit in the last place of the largest value."""
    got = evaluate(linear_ensemble_kd, x, **options)
    options.pop("memory_budget", None)
    truth = evaluate(reference.linear_ensemble_kd, wide(x), **options)
    plain = evaluate(reference.linear_ensemble_kd, x, **options)
    for name, value in got.items():
        assert value.shape == truth[name].shape and value.dtype == plain[name].dtype, name
        error, own = ((y.double() - truth[name]).abs().max() for y in (value, plain[name]))
        bound = 2 * own + ULP[value.dtype] * max(1, truth[name].abs().max())
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"
    return got


READINGS = list(itertools.product(("probability", "logit"), ("label", "kl")))
readings = pytest.mark.parametrize(("fusion", "objective"), READINGS)


@readings
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_equals_the_formula(backend, device, fusion, objective, shared, reduction, soft):
    widths = (5, 5, 5) if shared else (5, 7, 4)
    x = inputs(widths=widths, shared=shared, device=device, soft=soft)
    options = {"fusion": fusion, "attention_objective": objective, "reduction": reduction, "temperature": 2.0}
    upstream = (1.3, 0.7) if reduction != "none" else tuple(torch.rand(2, 13, dtype=torch.float64, device=device))
    check(x, upstream=upstream, alpha=0.3, **options)


@readings
@pytest.mark.parametrize("left_out", [
    ("labels",), ("scores",), ("student_bias", "snapshot_biases"), ("labels", "scores"), ("snapshot_biases",),
])  # fmt: skip
def test_without_what_is_optional(fusion, objective, left_out):
    for shared in (False, True):
        x = inputs(widths=(5, 5), shared=shared, **dict.fromkeys(left_out, False))
        check(x, fusion=fusion, attention_objective=objective)


@readings
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shared", [False, True])
def test_scaled_and_capped_logits(fusion, objective, softcap, shared):
    x = inputs(widths=(5, 5, 5), shared=shared)
    check(x, fusion=fusion, attention_objective=objective, softcap=softcap, logit_scale=0.5)


@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_any_mixture_of_dtypes(student, weight, shared):
    x = inputs(widths=(5, 5), shared=shared, dtype=torch.float32)
    x["student_hidden"], x["student_weight"] = x["student_hidden"].to(student), x["student_weight"].to(weight)
    x["snapshot_hidden"] = [value.to(weight) for value in x["snapshot_hidden"]]
    heads = x["snapshot_weights"]
    x["snapshot_weights"] = heads.to(student) if shared else [value.to(student) for value in heads]
    for fusion in ("probability", "logit"):
        check(x, fusion=fusion)


def test_logits_are_not_rounded_to_16_bits():
    """What peers did: logits rounded to bf16 put gradients off by percents."""
    x = inputs(64, 32, (32,), 50, dtype=torch.bfloat16, ignored=False)
    got, truth = (evaluate(op, y) for op, y in ((linear_ensemble_kd, x), (reference.linear_ensemble_kd, wide(x))))
    assert abs(got["loss"] - truth["loss"]) < 1e-5 * truth["loss"]


@readings
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("scores", [False, True], ids=["uniform", "scores"])
def test_chunks_give_the_same_as_one(fusion, objective, shared, dtype, soft, scores):
    x = inputs(70, 6, (5, 5, 5), 40, shared=shared, dtype=dtype, soft=soft, scores=scores)
    options = {"fusion": fusion, "attention_objective": objective}
    small, whole = (check(x, memory_budget=budget, **options) for budget in (1, 1 << 30))
    for name, value in small.items():
        rounding = 8 * torch.finfo(value.dtype).eps
        largest = max(value.abs().max().item(), 1 / 70)  # a gradient is a difference of probabilities over the rows
        torch.testing.assert_close(value, whole[name], rtol=rounding, atol=rounding * largest, msg=name)


def test_a_chunk_is_a_matter_of_the_budget_not_of_the_rows():
    assert 60 <= _chunk(10**6, 1000, 64000, "cpu") <= 64 and 60 <= _chunk(10**9, 1000, 64000, "cpu") <= 64
    assert _chunk(10**6, 1000, 1, "cpu") == 16 and _chunk(5, 1000, 10**9, "cpu") == 5
    assert _chunk(0, 1000, None, "cpu") == 1 and _chunk(1280, 1000, None, "cpu") == 128
    assert _chunk(10**6, 1 << 20, None, "cuda") <= 1024


def test_vocabularies_of_other_sizes_are_cut_to_the_smallest():
    x = inputs()
    longer = torch.cat([x["student_weight"], torch.full((4, 6), torch.nan, dtype=torch.float64)])
    bias = torch.cat([x["student_bias"], torch.full((4,), torch.nan, dtype=torch.float64)])
    got = evaluate(linear_ensemble_kd, {**x, "student_weight": longer, "student_bias": bias})
    want = evaluate(linear_ensemble_kd, x)
    assert torch.equal(got["loss"], want["loss"])
    assert torch.equal(got["d_student_weight"][:11], want["d_student_weight"])
    assert not got["d_student_weight"][11:].any() and not got["d_student_bias"][11:].any()


def test_rows_that_are_ignored_are_not_read():
    x = inputs()
    want = evaluate(linear_ensemble_kd, x)
    for name in ("student_hidden", "scores"):
        x[name][1::4] = torch.nan
    for value in x["snapshot_hidden"]:
        value[1::4] = torch.inf
    got = evaluate(linear_ensemble_kd, x)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    x["labels"][:] = -100
    got = evaluate(linear_ensemble_kd, x)
    assert not any(value.any() for value in got.values())


@readings
@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_weight_0_is_not_read(fusion, objective, shared):
    x = inputs(widths=(5, 5, 5), shared=shared)
    x["scores"][:, 1] = -torch.inf
    want = evaluate(linear_ensemble_kd, x, fusion=fusion, attention_objective=objective)
    x["snapshot_hidden"][1][:] = torch.nan
    got = evaluate(linear_ensemble_kd, x, fusion=fusion, attention_objective=objective)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_the_denominator_is_that_of_a_whole_batch():
    x = inputs(ignored=False)
    whole = evaluate(linear_ensemble_kd, x)
    for denominator in (13.0, torch.tensor(13)):
        parts = []
        for rows in (slice(0, 5), slice(5, 13)):
            part = {name: value[rows] for name, value in x.items() if name in ("student_hidden", "labels", "scores")}
            part["snapshot_hidden"] = [value[rows] for value in x["snapshot_hidden"]]
            parts.append(evaluate(linear_ensemble_kd, {**x, **part}, denominator=denominator))
        for name in ("loss", "attention_loss", "d_student_weight", "d_student_bias"):
            torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], msg=name)


@readings
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(fusion, objective, shared):
    x = inputs(5, 3, (4, 4), 6, shared=shared)

    def call(*leaves):
        loss, _, attention_loss = linear_ensemble_kd(
            **{**x, **dict(zip(LEAVES[:3], leaves, strict=False))}, fusion=fusion, attention_objective=objective
        )
        return loss

    leaves = [x[name].requires_grad_() for name in LEAVES[:3]]
    assert torch.autograd.gradcheck(call, leaves, check_undefined_grad=False)


def test_opcheck_and_a_whole_graph():
    x = inputs(dtype=torch.float32)
    leaves = [x[name].requires_grad_() for name in LEAVES]
    more = (11, 1.0, 0.5, False, False, "mean", -100, 1.0, None, None, [True] * 4)
    lists = x["snapshot_hidden"], x["snapshot_weights"], x["snapshot_biases"]
    args = (*leaves, *lists, x["labels"], None, None, None, *more)
    torch.library.opcheck(torch.ops.eekd.linear_ensemble_kd_fwd.default, args, test_utils=(
        "test_schema", "test_faketensor", "test_autograd_registration"))  # fmt: skip

    def total(**arguments):
        loss, _, attention_loss = linear_ensemble_kd(**arguments)
        return loss + attention_loss

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(total(**x), leaves)
    for got, one in zip(torch.autograd.grad(compiled(**x), leaves), want, strict=True):
        torch.testing.assert_close(got, one)


def test_it_is_ensemble_kd_of_the_logits():
    x = inputs(dtype=torch.float32, student_bias=False, snapshot_biases=False)
    logits = [h @ w.t() for h, w in zip(x["snapshot_hidden"], x["snapshot_weights"], strict=True)]
    s = x["student_hidden"] @ x["student_weight"].t()
    want = ensemble_kd(s, logits, x["labels"], scores=x["scores"], temperature=1.0)
    for got, one in zip(linear_ensemble_kd(**x), want, strict=True):
        torch.testing.assert_close(got, one)


def test_no_gradients_are_computed_where_none_are_wanted(monkeypatch):
    x = inputs(dtype=torch.float32)
    x["student_weight"].requires_grad_()
    with torch.no_grad():
        loss, _, _ = linear_ensemble_kd(**x)
    assert not loss.requires_grad
    asked = []
    op = torch.ops.eekd.linear_ensemble_kd_fwd
    output = op(x["student_hidden"], x["student_weight"].detach(), None, None, x["snapshot_hidden"],
                x["snapshot_weights"], [], x["labels"], None, None, None, 11, 1.0, 0.5, False, False, "mean", -100, 1.0,
                None, None, [False] * 4)  # fmt: skip
    asked += [value.numel() for value in output[3:]]
    assert asked == [0, 0, 0, 0]


def test_a_loss_scale_saves_small_gradients_of_fp16():
    x = inputs(dtype=torch.float16, ignored=False)
    x["student_hidden"] *= 1e-3
    scale = 2.0**14
    got = evaluate(linear_ensemble_kd, x, upstream=(scale * 2.0**-20,) * 2)["d_student_weight"]
    truth = evaluate(reference.linear_ensemble_kd, wide(x), upstream=(scale * 2.0**-20,) * 2)["d_student_weight"]
    assert (got.double() - truth).abs().max() <= 2 * torch.finfo(torch.float16).smallest_normal * 2**-9


def test_the_same_inputs_give_the_same_bits():
    x = inputs(70, 16, (12, 12), 100, dtype=torch.float32)
    one, two = (evaluate(linear_ensemble_kd, x) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_logits_of_all_rows_are_never_in_memory(monkeypatch):
    x, largest = inputs(400, 8, (8, 8), 500, dtype=torch.float32), []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: largest.append(empty(*a, **k).numel()) or empty(*a, **k))
    evaluate(linear_ensemble_kd, x, memory_budget=4 * 500 * 4 * 32)
    assert max(largest) <= 3 * 32 * 500


def test_a_gradient_of_16_bits_from_few_rows_needs_no_wide_sum(monkeypatch):
    monkeypatch.setattr(sys.modules["eekd.ops.linear_ensemble_kd"], "TILE", 64)
    x = inputs(40, 256, (8, 8), 500, dtype=torch.bfloat16, ignored=False)
    check(x, memory_budget=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        evaluate(linear_ensemble_kd, x, memory_budget=1)
    largest = max(event.cpu_memory_usage for event in profile.events() if not event.cpu_children)
    assert largest == x["student_weight"].nbytes  # the gradient itself


@pytest.mark.parametrize("labels", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [1, None])
@readings
def test_soft_labels_of_any_dtype_and_strides(fusion, objective, budget, labels):
    x = inputs(40, 6, (5, 5), 11, soft=True, dtype=torch.float32)
    x["labels"] = x["labels"].to(labels).t().contiguous().t()
    x["labels"][3:6] = torch.nn.functional.one_hot(torch.arange(3), 11)
    check(x, fusion=fusion, attention_objective=objective, memory_budget=budget)


def test_soft_labels_of_no_probability_in_fp32():
    x = inputs(40, 6, (5, 5), 11, soft=True, dtype=torch.float32, scores=False)
    x["snapshot_biases"] = [torch.arange(11.0) * -40] * 2
    got = check(x, memory_budget=1)  # snapshots mixed one after another
    assert got["loss"].isfinite() and got["attention_loss"] > 100


@pytest.mark.parametrize("scores", [False, True], ids=["uniform", "scores"])
@pytest.mark.parametrize("fusion", ["probability", "logit"])
def test_soft_labels_are_never_copied_whole(fusion, scores):
    x = inputs(400, 8, (8, 8), 500, dtype=torch.float32, soft=True, scores=scores)
    x["labels"] = x["labels"].double().t().contiguous().t()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        evaluate(linear_ensemble_kd, x, memory_budget=4 * 500 * 4 * 32, fusion=fusion)
    assert 0 < max(event.cpu_memory_usage for event in profile.events() if not event.cpu_children) < 400 * 500 * 4


@pytest.mark.bad_input
@pytest.mark.parametrize(("change", "error", "said"), [
    ({"student_hidden": torch.zeros(13)}, ValueError, "student_hidden must be a tensor of 2 dimensions"),
    ({"student_hidden": [1]}, TypeError, "student_hidden must be a tensor of 2 dimensions, got list"),
    ({"student_weight": torch.zeros(11, 5)}, ValueError, r"student_weight must be \(V, 6\)"),
    ({"student_hidden": torch.zeros(13, 6, dtype=torch.int64)}, TypeError, "student_hidden must be float64"),
    ({"snapshot_hidden": torch.zeros(13, 5)}, ValueError, "snapshot_hidden must be 3-dimensional, or a list"),
    ({"snapshot_hidden": []}, ValueError, "snapshot_hidden must hold 1 to 64 snapshots, got 0"),
    ({"snapshot_hidden": [torch.zeros(12, 5)] * 3}, ValueError, r"snapshot_hidden must be \(13, H_m\)"),
    ({"snapshot_weights": [torch.zeros(11, 5)] * 2}, ValueError, "a head for each of 3 snapshots, or one, got 2"),
    ({"snapshot_weights": [torch.zeros(11, 5)] * 3}, ValueError, r"snapshot_weights must be \(V, 7\) for snapshot 1"),
    ({"snapshot_weights": [torch.zeros(0, w) for w in (5, 7, 4)], "snapshot_biases": None}, ValueError, "at least one"),
    ({"snapshot_biases": [torch.zeros(11)] * 2}, ValueError, "a bias for each of 3 snapshots"),
    ({"student_bias": torch.zeros(10)}, ValueError, r"student_bias must have shape \(11,\)"),
    ({"scores": torch.zeros(13, 2)}, ValueError, r"scores must have shape \(13, 3\), got \(13, 2\)"),
    ({"labels": torch.zeros(12, dtype=torch.int64)}, ValueError, "labels must have shape"),
    ({"labels": torch.full((13,), 11)}, RuntimeError, "label"),
    ({"labels": torch.zeros(13, 12)}, ValueError, r"labels must have shape \(13, 11\), got \(13, 12\)"),
    ({"labels": torch.zeros(13)}, TypeError, r"indices \(13,\) or floating-point weights \(13, 11\), got"),
    ({"temperature": 0}, ValueError, "temperature must be a positive number"),
    ({"softcap": -1.0}, ValueError, "softcap must be a positive number or None, got -1.0"),
    ({"logit_scale": 0}, ValueError, "logit_scale must be a number other than 0, got 0"),
    ({"denominator": 0}, ValueError, "denominator must be a positive number, got 0"),
    ({"denominator": 5, "reduction": "sum"}, ValueError, 'denominator must be None unless reduction is "mean"'),
    ({"memory_budget": 0}, ValueError, "memory_budget must be a positive number of bytes or None, got 0"),
    ({"reduction": "average"}, ValueError, "reduction must be"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(change, error, said):
    with pytest.raises(error, match=said):
        linear_ensemble_kd(**{**inputs(), **change})


@pytest.mark.bad_input
def test_frozen_snapshots_and_no_second_derivative():
    x = inputs()
    with pytest.raises(ValueError, match=r"snapshot_hidden\[0\] must not require gradients"):
        linear_ensemble_kd(**{**x, "snapshot_hidden": [h.requires_grad_() for h in x["snapshot_hidden"]]})
    x = inputs(labels=False)
    x["scores"].requires_grad_()
    with pytest.raises(ValueError, match="labels must be given"):
        linear_ensemble_kd(**x)
    x = inputs()
    loss = linear_ensemble_kd(**{**x, "student_hidden": x["student_hidden"].requires_grad_()}).loss
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, x["student_hidden"], create_graph=True)
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
        linear_ensemble_kd(**inputs())
