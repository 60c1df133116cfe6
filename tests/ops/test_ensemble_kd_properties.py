"""What holds for every call of ensemble_kd and sparse_ensemble_kd."""

import torch
import torch._dynamo.testing
from cases import ATTENTIONS, DTYPES, FUSIONS, INF, OBJECTIVES, kd, sparse, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import check, double, evaluate


@st.composite
def calls(draw):
    """A call: tensors and options."""
    few = draw(st.booleans())  # of the classes are kept
    rows, snapshots = draw(st.integers(0, 20 if few else 6)), draw(st.integers(1, 7))
    classes = draw(st.one_of(st.integers(1, 60), st.integers(1020, 1030), st.integers(2040, 2060)))
    k = draw(st.one_of(st.integers(1, min(classes, 40)), st.integers(max(1, classes - 3), classes))) if few else None
    labels = draw(st.booleans())
    x = tensors(
        rows,
        snapshots,
        classes,
        dtype=draw(st.sampled_from(DTYPES)),
        attention=draw(st.sampled_from(ATTENTIONS)),
        width=draw(st.integers(1, 20)),
        labels=labels,
        seed=draw(st.integers(0, 2**20)),
    )
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
    return sparse(x, k, temperature=options["temperature"]), options


fuzz = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
    (count, rows, columns), classes = x["snapshot_logits"].shape, x["student_logits"].shape[1]
    b, m, c, j = (torch.randperm(n, generator=generator).to(device) for n in (rows, count, classes, columns))
    if "indices" not in x:
        j = c

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
    got, expected = evaluate(kd, y, **options), evaluate(kd, x, **options)
    for name in got:
        torch.testing.assert_close(got[name], permuted(name, expected[name]), rtol=1e-6, atol=1e-9)


@fuzz
@given(call=calls())
def test_what_holds_for_every_call(backend, device, call):
    x, options = call
    x = {k: v.to(device) for k, v in double(x).items()}
    none, total, mean = (evaluate(kd, x, **options | {"reduction": r}) for r in ("none", "sum", "mean"))
    counted = x["labels"] != -100 if "labels" in x else torch.ones_like(none["loss"], dtype=torch.bool)
    count = counted.sum().clamp(min=1)
    close = {"rtol": 1e-9, "atol": 1e-10}
    # The tail is float32 but for fp64 logits, whose KL may fall below 0 by its rounding.
    assert (none["loss"] >= (-1e-4 if "indices" in x else -1e-9)).all() and (none["attention_loss"] >= -1e-9).all()
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
