"""Top-k logits: what is kept, how well the rest is known at any temperature, and the losses and weights made of it."""

import math

import pytest
import torch

from eekd import EEKDLoss, TopKLogits, ensemble_kd, sparse_ensemble_kd, top_k_logits
from eekd.method import weightings
from eekd.method.weightings import log_weights

WEIGHTINGS = weightings.names()
bad_input = pytest.mark.bad_input
TEMPERATURES = (1, 1.2, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16, 20)
INDEPENDENT, SHARED, GUMBEL, STUDENT, SKEW = "independent", "shared", "high tail", "both tails", "low tail"


def logits_of(kind, classes, rows=16, snapshots=3, seed=0, deviation=3.0):
    """Logits (M, B, C) float64 and labels that stand out among them."""
    g = torch.Generator().manual_seed(seed)
    shape = snapshots, rows, classes
    z = torch.randn(shape, generator=g, dtype=torch.float64)
    u = torch.rand(shape, generator=g, dtype=torch.float64).clamp(1e-9)
    z = {
        INDEPENDENT: lambda: deviation * z,
        SHARED: lambda: deviation * (0.6 * z + 0.8 * z[:1]),
        GUMBEL: lambda: -2 * (-u.log()).log(),
        SKEW: lambda: 2 * u.log(),
        STUDENT: lambda: z / torch.randn(3, *shape, generator=g, dtype=torch.float64).square().mean(0).sqrt(),
    }[kind]()
    labels = torch.randint(classes, (rows,), generator=g)
    z[:, torch.arange(rows), labels] += 8 * torch.rand(snapshots, rows, generator=g, dtype=torch.float64)
    return z, labels


def left_out(z, kept):
    """The logits that were not kept, -inf in the place of those that were."""
    return z.scatter(2, kept.indices.expand(len(z), *kept.indices.shape), -torch.inf)


def error(z, kept, temperature):
    """Of the tail, times τ, in halves of a unit in the last place of the largest logit left out in float16."""
    out = left_out(z, kept)
    unit = 2**-11 * out.masked_fill(out == -torch.inf, 0).abs().amax(2)
    return (temperature * (kept.tail(temperature) - (out / temperature).logsumexp(2)).abs() / unit).max().item()


# ---- what is kept ----


def test_the_classes_are_those_of_the_mean_and_the_labels(device):
    z, labels = (x.to(device) for x in logits_of(INDEPENDENT, 50))
    labels[0] = -100
    kept = top_k_logits(z, 7, labels)
    likely = (z / 2).softmax(2).mean(0)
    for b, (ids, label) in enumerate(zip(kept.indices.tolist(), labels.tolist(), strict=True)):
        assert ids == sorted(set(ids)) and (label in ids or b == 0)
        best = likely[b].argsort(descending=True).tolist()
        assert set(ids) == set(best[:7]) or set(ids) == {label, *best[:6]}
        assert torch.equal(kept.logits[:, b], z[:, b, ids])
    assert kept.logits.dtype == z.dtype and kept.indices.dtype == torch.int64 and len(kept) == 3
    assert torch.equal(top_k_logits(z, 7).indices, (likely.topk(7).indices.sort().values))


def test_some_of_the_snapshots():
    z, labels = logits_of(INDEPENDENT, 20)
    kept = top_k_logits(z, 4, labels)
    for which in (slice(-1, None), [0, 2], torch.tensor([2, 1])):
        some = kept[which]
        assert torch.equal(some.logits, kept.logits[which]) and torch.equal(some.tail(3), kept.tail(3)[which])
        assert some.indices is kept.indices and some.classes == 20


# ---- the others, at any temperature ----


@pytest.mark.parametrize("kind, classes, k", [
    *((kind, 1000, 50) for kind in (INDEPENDENT, SHARED, GUMBEL, STUDENT, SKEW)),
    (INDEPENDENT, 100, 5), (GUMBEL, 100, 5), (INDEPENDENT, 14, 1), (SHARED, 10, 3), (GUMBEL, 20_000, 50),
])  # fmt: skip
def test_the_tail_is_known_better_than_float16_logits_are(kind, classes, k):
    rows = 4 if classes > 1000 else 16
    z, labels = logits_of(kind, classes, rows)
    kept = top_k_logits(z, k, labels)
    assert max(error(z, kept, t) for t in TEMPERATURES) < 1
    assert error(z, kept, 2.5) < 0.01
    assert error(z, kept, 0.5) < 25
    assert (kept.tail(1e5) - math.log(classes - k)).abs().max() < 0.01


@pytest.mark.parametrize("left", range(8))
def test_a_few_classes_left_out_are_known_exactly(left):
    z, labels = logits_of(SHARED, 12)
    kept = top_k_logits(z, 12 - left, labels)
    assert kept.atoms.shape == (3, 16, 2, min(left, 6))
    for temperature in (0.1, 0.3, 1, 5, 100):
        want = (left_out(z, kept) / temperature).logsumexp(2)
        if left < 7:
            torch.testing.assert_close(kept.tail(temperature).double(), want, rtol=1e-5, atol=1e-5)
        assert kept.tail(temperature).shape == (3, 16)


@pytest.mark.parametrize("values", [[0.0], [3.0, -5.0], [1.0, 1.0 + 1e-7, -1e4], [-torch.inf, 2.0, -1.0], [-torch.inf]])
def test_equal_and_masked_logits(values):
    """Fewer different logits than atoms: what is left of the quadrature must not be made of rounding."""
    tail = torch.tensor(values, dtype=torch.float64).repeat(40)
    z = torch.cat((torch.full((3,), 50.0), tail)).expand(2, 5, -1).clone()
    kept = top_k_logits(z, 3)
    for temperature in (0.5, 1, 2.5, 7, 20):
        want = (tail / temperature).logsumexp(0).expand(2, 5).float()
        torch.testing.assert_close(kept.tail(temperature), want, rtol=1e-5, atol=1e-5)


# ---- weights and losses ----

OPTIONS = dict(student_dim=5, snapshot_dim=6, temperature=4.0, alpha=0.3)


def batch(classes=30, rows=16, dtype=torch.float32, deviation=3.0):
    z, labels = logits_of(SHARED, classes, rows, deviation=deviation)
    torch.manual_seed(0)
    features = torch.rand(rows, 5), torch.rand(3, rows, 6)
    return (3 * torch.randn(rows, classes)).requires_grad_(), z.to(dtype), labels, *features


@pytest.mark.parametrize("fusion", ["probability", "logit"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_with_all_classes_it_is_the_dense_loss(weighting, fusion, device):
    torch.manual_seed(1)
    loss = EEKDLoss(weighting, fusion=fusion, **OPTIONS).to(device)
    x = [t.to(device).detach() for t in batch()]
    got = []
    for z in (x[1], top_k_logits(x[1], 30, x[2])):
        student = x[0].clone().requires_grad_()
        total, measured = loss(student, z, *x[2:])
        got.append((total, measured, torch.autograd.grad(total, [student, *loss.parameters()])))
    torch.testing.assert_close(got[0], got[1])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_is_that_of_the_op(weighting):
    student, z, labels, *features = batch()
    kept, loss = top_k_logits(z, 6, labels), EEKDLoss(weighting, **OPTIONS)
    total, measured = loss(student, kept, labels, *features)
    if weighting == "attention":
        query, keys = loss.attention(*features)
        by = {"query": query, "keys": keys}
    else:
        by = {"scores": log_weights(weighting, kept, labels)}
    options = {name: loss.options[name] for name in ("temperature", "alpha")}
    want = sparse_ensemble_kd(student, kept.logits, kept.tail(4.0), kept.indices, labels, **by, **options)
    torch.testing.assert_close(measured["loss"], want.loss.detach())
    torch.testing.assert_close(total, want.loss + want.attention_loss if weighting == "attention" else want.loss)
    dense, _ = EEKDLoss(weighting, **OPTIONS)(student, z, labels, *features)
    assert total.isfinite() and dense.isfinite()


def test_weights_from_top_k():
    """Confidence needs the label and the tail at τ = 1 only; in the entropy the tail is one class."""
    _, z, labels, *_ = batch(dtype=torch.float64)
    kept = top_k_logits(z, 6, labels)
    for weighting in set(WEIGHTINGS) - {"attention", "uniform", "entropy"}:
        torch.testing.assert_close(
            log_weights(weighting, kept, labels), log_weights(weighting, z, labels), rtol=1e-4, atol=1e-4
        )
    p = torch.cat((kept.logits, (left_out(z, kept)).logsumexp(2, keepdim=True)), 2).softmax(2)
    h = torch.special.entr(p).sum(2).t()
    torch.testing.assert_close(
        log_weights("entropy", kept).exp().double(), 1 - h / h.sum(1, keepdim=True), rtol=1e-3, atol=1e-4
    )
    labels[0] = (set(range(30)) - set(kept.indices[0].tolist())).pop()  # a label outside is the bucket's
    labels[1] = -100
    assert log_weights("confidence", kept, labels).isfinite().all()
    ce = -p[:, 0, -1].log()
    torch.testing.assert_close(
        log_weights("confidence", kept, labels)[0].double(), (1 - ce.softmax(0)).log(), rtol=1e-4, atol=1e-4
    )


def test_no_more_than_the_bound_is_lost():
    """0 <= dense - top-k = (1 - α) τ² p_K KL(p of the tail || q of the tail), by the tail as it is known here."""
    student, z, labels, *_ = batch(dtype=torch.float64)
    student = student.detach().double()
    for k in (3, 10, 25):
        kept = top_k_logits(z, k, labels)
        for temperature in (1.0, 4.0, 20.0):
            options = dict(temperature=temperature, alpha=0.0, reduction="none")
            dense = ensemble_kd(student, z, labels, **options).loss
            sparse = sparse_ensemble_kd(student, kept.logits, kept.tail(temperature), kept.indices, labels, **options)
            p, q = (z / temperature).softmax(2).mean(0), (student / temperature).softmax(1)
            p, q = (x.scatter(1, kept.indices, 0) for x in (p, q))
            share = p.sum(1)
            p, q = p / share[:, None], q / q.sum(1, keepdim=True)
            lost = temperature**2 * share * torch.where(p > 0, p * (p / q).log(), 0).sum(1)
            torch.testing.assert_close(dense - sparse.loss, lost, rtol=1e-3, atol=1e-3)


def test_compiles_into_one_graph():
    student, z, labels, *features = batch()
    kept, loss = top_k_logits(z, 6, labels), EEKDLoss(**OPTIONS)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    want, got = (f(student, kept[1:], labels, features[0], features[1][1:]) for f in (loss, compiled))
    torch.testing.assert_close(want, got)


# ---- what does not fit ----


@bad_input
@pytest.mark.parametrize("logits, k, labels, wanted", [
    (torch.zeros(2, 5), 1, None, r"logits must be floating-point of shape \(M, B, C\), got torch.float32 of shape"),
    (torch.zeros(2, 3, 5).long(), 1, None, "logits must be floating-point"),
    ([torch.zeros(3, 5)], 1, None, "logits must be floating-point of shape .* got list"),
    (torch.zeros(2, 3, 5), 0, None, "k must be from 1 to 5, the number of classes, got 0"),
    (torch.zeros(2, 3, 5), 6, None, "k must be from 1 to 5, the number of classes, got 6"),
    (torch.zeros(2, 3, 5), 2.0, None, "k must be from 1 to 5, the number of classes, got 2.0"),
    (torch.zeros(2, 3, 5), 1, torch.zeros(4), r"labels must have shape \(3,\), got \(4,\)"),
    (torch.full((2, 3, 5), torch.nan), 1, None, "logits must be below infinity and not NaN"),
    (torch.full((2, 3, 5), torch.inf), 1, None, "logits must be below infinity and not NaN"),
])  # fmt: skip
def test_bad_arguments(logits, k, labels, wanted):
    with pytest.raises((TypeError, ValueError), match=f"^{wanted}"):
        top_k_logits(logits, k, labels)


@bad_input
def test_bad_uses():
    student, z, labels, *_ = batch()
    kept = top_k_logits(z, 6, labels)
    assert isinstance(kept, TopKLogits)
    for which in (0, (slice(1), slice(2))):
        with pytest.raises(TypeError, match="the index must be a slice, a list or a tensor, got"):
            kept[which]
    for classes in (29, 31):
        with pytest.raises(ValueError, match=r"student_logits must have shape \(B, 30\), got \(16, " + str(classes)):
            EEKDLoss("uniform")(torch.zeros(16, classes), kept, labels)
    with pytest.raises(ValueError, match=r"labels must have shape \(16,\) for weighting 'confidence', got None"):
        EEKDLoss("confidence")(student, kept)
    with pytest.raises(ValueError, match=r"indices must have shape \(5, 6\), got \(16, 6\)"):
        EEKDLoss("uniform")(student[:5], kept, labels[:5])
