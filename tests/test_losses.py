"""EEKDLoss against the method's formulas, written out here in float64."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from eekd.method import weightings
from eekd.method.losses import EEKDLoss
from eekd.method.weightings import log_weights

B, M, C, DS, DT = 7, 4, 10, 5, 6
WEIGHTINGS = weightings.names()
FIXED = [name for name in WEIGHTINGS if name != "attention"]
SIZES = {"student_dim": DS, "snapshot_dim": DT}


def batch(device="cpu", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tensors = {
        "student_logits": 3 * torch.randn(B, C),
        "snapshot_logits": 3 * torch.randn(M, B, C),
        "labels": torch.randint(C, (B,)),
        "student_features": torch.rand(B, DS),
        "snapshot_features": torch.rand(M, B, DT),
    }
    return {k: t.to(device, t.dtype if k == "labels" else dtype) for k, t in tensors.items()}


def expected_weights(weighting, z, y):
    """method.md's table, one row and one snapshot at a time: (B, M)."""
    m = torch.arange(1, M + 1, dtype=torch.float64)
    rows = []
    for b in range(B):
        p = [z[i, b].double().softmax(0) for i in range(M)]
        entropy = torch.stack([-(q * q.log()).sum() for q in p])
        ce = torch.stack([-q[y[b]].log() for q in p])
        rows.append(
            {
                "uniform": torch.ones(M, dtype=torch.float64),
                "last": F.one_hot(torch.tensor(M - 1), M).double(),
                "linear_increase": m,
                "linear_decrease": M + 1 - m,
                "entropy": 1 - entropy / entropy.sum(),
                "confidence": (1 - ce.softmax(0)) / (M - 1),
            }[weighting]
        )
    rows = torch.stack(rows)
    return rows / rows.sum(1, keepdim=True)


def expected_loss(s, z, y, w, temperature, alpha, fusion="probability"):
    """Loss and attention loss of section 1 for weights w (B, M), averaged over rows."""
    s, z = s.double(), z.double()
    if fusion == "probability":
        p = torch.einsum("bm,mbc->bc", w, (z / temperature).softmax(2))
    else:
        p = torch.einsum("bm,mbc->bc", w, z / temperature).softmax(1)
    kl = (p * (p.log() - (s / temperature).log_softmax(1))).sum(1).mean()
    loss = alpha * F.cross_entropy(s, y) + (1 - alpha) * temperature**2 * kl
    return loss, -p.gather(1, y[:, None]).log().mean()


@pytest.mark.parametrize("weighting", FIXED)
@pytest.mark.parametrize("fusion", ["probability", "logit"])
def test_fixed_weightings_are_their_formula(device, weighting, fusion):
    x = batch(device)
    s = x["student_logits"].requires_grad_()
    loss, measured = EEKDLoss(weighting, temperature=4.0, alpha=0.1, fusion=fusion)(**x)
    (grad,) = torch.autograd.grad(loss, s)

    s, z, y = s.detach().cpu().double().requires_grad_(), x["snapshot_logits"].cpu(), x["labels"].cpu()
    w = expected_weights(weighting, z, y)
    expected, attention_loss = expected_loss(s, z, y, w, 4.0, 0.1, fusion)
    (expected_grad,) = torch.autograd.grad(expected, s)

    def close(a, b):
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-4, atol=1e-6)

    close(loss, expected)
    close(grad, expected_grad)
    close(measured["loss"], expected)
    close(measured["attention_loss"], attention_loss)
    close(measured["weights"], w.mean(0))
    close(measured["weight_entropy"], torch.special.entr(w).sum(1).mean())


def attended(loss, x):
    """The attention's weights (B, M) by its formula, with their graph."""
    query, keys = loss.attention(x["student_features"], x["snapshot_features"])
    return torch.einsum("bd,mbd->bm", query.double(), keys.double()).softmax(1)


@pytest.mark.parametrize("objective", ["label", "kl"])
@pytest.mark.parametrize("fusion", ["probability", "logit"])
def test_attention_learns_by_the_objective(device, objective, fusion):
    x = batch(device)
    x["student_logits"].requires_grad_()
    loss = EEKDLoss(**SIZES, attention_objective=objective, fusion=fusion).to(device)
    torch.nn.init.normal_(loss.attention.student.weight)
    inputs = [x["student_logits"], *loss.parameters()]
    total, measured = loss(**x)
    grads = torch.autograd.grad(total, inputs)

    s, z, y = x["student_logits"], x["snapshot_logits"], x["labels"]
    w = attended(loss, x)
    kd, attention_loss = expected_loss(s, z, y, w, 5.0, 0.5, fusion)
    if objective == "label":
        kd, _ = expected_loss(s, z, y, w.detach(), 5.0, 0.5, fusion)
    expected = kd + attention_loss if objective == "label" else kd
    expected_grads = torch.autograd.grad(expected, inputs)

    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(measured["loss"].double(), kd, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measured["attention_loss"].double(), attention_loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measured["weights"].double(), w.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["label", "kl"])
@pytest.mark.parametrize("detach", [True, False])
def test_detach_query_keeps_the_attention_out_of_the_student(device, objective, detach):
    x = batch(device)
    x["student_features"].requires_grad_()
    loss = EEKDLoss(**SIZES, attention_objective=objective, detach_query=detach).to(device)
    loss(**x)[0].backward()
    assert (x["student_features"].grad is None) == detach
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())


def test_label_objective_finds_the_snapshot_that_is_right(device):
    """One snapshot knows the label, the others are confident and wrong; its weight goes towards 1."""
    x = batch(device)
    said = (x["labels"] + torch.arange(M, device=device)[:, None]) % C
    x["snapshot_logits"] = 6 * F.one_hot(said, C).float()
    loss = EEKDLoss(**SIZES).to(device)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        total, measured = loss(**x)
        total.backward()
        optimiser.step()
    assert measured["weights"][0] > 0.9 and measured["weight_entropy"] < 0.5


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_single_snapshot_is_plain_distillation(device, weighting):
    x = batch(device)
    s, y = x["student_logits"], x["labels"]
    for name in ("snapshot_logits", "snapshot_features"):
        x[name] = x[name][:1]
    loss, measured = EEKDLoss(weighting, **SIZES).to(device)(**x)
    kl = F.kl_div((s / 5).log_softmax(1), (x["snapshot_logits"][0] / 5).softmax(1), reduction="batchmean")
    torch.testing.assert_close(measured["loss"], 0.5 * F.cross_entropy(s, y) + 0.5 * 25 * kl)
    torch.testing.assert_close(measured["weights"], torch.ones(1, device=device))
    assert loss.isfinite()


class Ops(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_nothing_is_measured_before_it_is_read(device):
    with Ops() as ops:
        _, measured = EEKDLoss("uniform")(**batch(device))
        assert not {"special_entr", "sum", "div"} & {*ops.names}
        weights = measured["weights"]
        assert "special_entr" in ops.names
        before = len(ops.names)
        assert measured["weights"] is weights and "weight_entropy" in measured and len(measured) == 4
        assert len(ops.names) == before
    everything = measured | {"accuracy": weights}
    assert [*everything] == [*measured, "accuracy"] and dict(type(measured)(everything)) == dict(measured)
    with pytest.raises(KeyError, match="accuracy"):
        measured["accuracy"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_measurements_are_detached_and_stay_on_the_device(device, weighting):
    x = batch(device)
    x["student_logits"].requires_grad_()
    loss = EEKDLoss(weighting, **SIZES).to(device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        total, measured = loss(**x)
        total.backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert list(measured) == ["loss", "attention_loss", "weights", "weight_entropy"]
    assert all(not t.requires_grad and t.device == total.device for t in measured.values())
    assert measured["weights"].shape == (M,) and abs(measured["weights"].sum().item() - 1) < 1e-5
    assert -1e-6 <= measured["weight_entropy"].item() <= math.log(M) + 1e-5


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_compiles_into_one_graph(device, weighting):
    """A host sync would break the graph."""
    x = batch(device)
    x["student_logits"].requires_grad_()
    loss = EEKDLoss(weighting, **SIZES).to(device)
    inputs = [x["student_logits"], *loss.parameters()]
    results = []
    for f in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        total, measured = f(**x)
        results.append((total, measured, torch.autograd.grad(total, inputs)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_ignored_rows_count_for_nothing(device, weighting):
    x = batch(device)
    loss = EEKDLoss(weighting, **SIZES).to(device)
    kept = {k: t[:, :4] if k.startswith("snapshot") else t[:4] for k, t in x.items()}
    x["labels"][4:] = -100
    torch.testing.assert_close(loss(**x), loss(**kept))
    x["labels"][:] = -100
    total, measured = loss(**x)
    assert total == 0 and not any(t.any() for t in measured.values())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_list_of_snapshots_and_transposed_memory_are_the_same(device, weighting):
    x = batch(device)
    loss = EEKDLoss(weighting, **SIZES).to(device)
    z = x["snapshot_logits"]
    expected = loss(**x)
    torch.testing.assert_close(loss(**{**x, "snapshot_logits": list(z)}), expected)
    by_row = z.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(loss(**{**x, "snapshot_logits": by_row}), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_any_floating_dtype(device, weighting, dtype):
    loss = EEKDLoss(weighting, **SIZES).to(device)
    total, _ = loss(**batch(device, dtype))
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(total.float(), loss(**batch(device))[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_without_rows(device, weighting):
    x = {k: t[:, :0] if k.startswith("snapshot") else t[:0] for k, t in batch(device).items()}
    total, measured = EEKDLoss(weighting, **SIZES).to(device)(**x)
    assert total == 0 and all(t.isfinite().all() for t in measured.values())


@pytest.mark.parametrize("weighting", ["entropy", "confidence"])
def test_certain_snapshots_and_masked_columns_stay_finite(weighting):
    z = torch.zeros(3, 2, 4)
    z[:, :, 0] = 1e4  # every snapshot certain: all entropies 0
    z[:, :, 3] = -torch.inf
    w = log_weights(weighting, z, torch.zeros(2, dtype=torch.long)).softmax(1)
    torch.testing.assert_close(w, torch.full((2, 3), 1 / 3))


def test_distillation_without_labels(device):
    x = batch(device)
    x["labels"] = None
    loss, _ = EEKDLoss("uniform", alpha=0.9)(**x)
    torch.testing.assert_close(loss, EEKDLoss("uniform", alpha=0.0)(**batch(device))[0])


def test_only_attention_has_parameters():
    assert sum(p.numel() for p in EEKDLoss(**SIZES, embed_dim=3).parameters()) == 3 * (DS + DT)
    assert not any(list(EEKDLoss(w).parameters()) for w in FIXED)


def test_options_are_shown():
    assert "weighting='last', temperature=2.0" in repr(EEKDLoss("last", temperature=2.0))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, value",
    [
        ("weighting", "atention"),
        ("weighting", None),
        ("fusion", "mean"),
        ("fusion", None),
        ("attention_objective", "ce"),
        ("temperature", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "5"),
        ("temperature", None),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", float("nan")),
        ("alpha", None),
        ("student_dim", 0),
        ("student_dim", None),
        ("snapshot_dim", None),
        ("embed_dim", 0),
        ("scale", 0),
    ],
)
def test_impossible_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}"):
        EEKDLoss(**{**SIZES, name: value})


@pytest.mark.bad_input
@pytest.mark.parametrize("missing", ["student_features", "snapshot_features"])
def test_attention_without_features_is_refused(missing):
    x = batch()
    del x[missing]
    with pytest.raises(ValueError, match=f"^{missing} must be given"):
        EEKDLoss(**SIZES)(**x)


@pytest.mark.bad_input
@pytest.mark.parametrize("labels", [None, torch.zeros(B + 1).long(), torch.zeros(B, 1).long()])
def test_confidence_needs_a_label_for_each_row(labels):
    with pytest.raises(ValueError, match=r"^labels must have shape \(7,\) for weighting 'confidence', got"):
        EEKDLoss("confidence")(**{**batch(), "labels": labels})


@pytest.mark.bad_input
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("label", [C, -1])
def test_labels_out_of_range_are_refused(weighting, label):
    x = batch()
    x["labels"][2] = label
    with pytest.raises((RuntimeError, ValueError, IndexError), match="label"):
        EEKDLoss(weighting, **SIZES)(**x)


@pytest.mark.bad_input
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", [(B, C), (M, B, C + 1), (M, B + 1, C), (0, B, C), (M, 1, B, C)])
def test_snapshot_logits_of_other_shapes_are_refused(weighting, shape):
    with pytest.raises(ValueError, match="snapshot_logits|labels"):
        EEKDLoss(weighting, **SIZES)(**{**batch(), "snapshot_logits": torch.zeros(shape)})


@pytest.mark.bad_input
@pytest.mark.parametrize("weighting, last", [("attention", "confidence"), ("median", "NAME"), (None, "NAME")])
def test_log_weights_knows_fixed_weightings_only(weighting, last):
    with pytest.raises(ValueError, match=f"^weighting must be one of last, uniform, .*{last}, got {weighting!r}"):
        log_weights(weighting, torch.zeros(M, B, C))
