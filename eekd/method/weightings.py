"""Fixed weights for snapshots: their logarithms, row by row."""

import torch
from torch import Tensor
from torch.nn import functional as F

from eekd.method.topk import TopKLogits

WEIGHTINGS = ("attention", "uniform", "last", "linear_increase", "linear_decrease", "entropy", "confidence")
PER_ROW = ("entropy", "confidence")


@torch.no_grad()
def log_weights(
    weighting: str, snapshot_logits: Tensor | list[Tensor] | TopKLogits, labels: Tensor | None = None
) -> Tensor | None:
    """Logarithm of fixed weights, up to a constant for each row: the `scores` (B, M) of `ensemble_kd`.

        uniform           1, returned as None
        last              1 for the final snapshot, else 0: plain distillation
        linear_increase   m = 1 … M
        linear_decrease   M + 1 - m
        entropy           1 - H(p_m) / Σ_j H(p_j)                EBKD (Kwon et al., ICASSP 2020)
        confidence        1 - softmax_m(CE(p_m, y))              CA-MKD (Zhang et al., ICASSP 2022)

    with p_m = softmax(z_m), at temperature 1. A single snapshot always has weight 1.

    snapshot_logits (M, B, C), a list of M (B, C), or TopKLogits; labels (B,), which only "confidence" reads. In
    H the classes that TopKLogits leave out count as one, which lowers it. Raises ValueError for other shapes or
    weightings.
    """
    if weighting == "uniform" or len(snapshot_logits) < 2:
        return None
    if isinstance(snapshot_logits, TopKLogits):
        z = snapshot_logits
        snapshot_logits = torch.cat((z.logits, z.tail(1)[..., None]), 2) if weighting in PER_ROW else z.logits
        if weighting == "confidence" and labels is not None and labels.shape == z.indices.shape[:1]:
            found = F.pad(z.indices == labels[:, None], (0, 1), value=True)  # else the classes left out
            labels = found.to(torch.uint8).argmax(1)
    snapshots, first = len(snapshot_logits), snapshot_logits[0]
    if first.ndim != 2:
        raise ValueError(f"snapshot_logits must hold M tensors of shape (B, C), got {tuple(first.shape)}")
    rows, classes = first.shape
    if weighting == "confidence" and (labels is None or labels.shape != (rows,)):
        got = None if labels is None else tuple(labels.shape)
        raise ValueError(f"labels must have shape ({rows},) for weighting 'confidence', got {got}")
    if weighting == "entropy":
        # float32 and one snapshot at a time: no copy of (M, B, C), whatever its strides
        probabilities = (F.softmax(z, 1, dtype=torch.float32) for z in snapshot_logits)
        entropy = torch.stack([torch.special.entr(p).sum(1) for p in probabilities], 1)
        total = entropy.sum(1, keepdim=True).clamp(min=torch.finfo(entropy.dtype).tiny)
        return (1 - entropy / total).log()
    if weighting == "confidence":
        # clamped: an ignored row is not used, and a label out of range is for ensemble_kd to refuse
        y = labels.long().clamp(0, classes - 1)[:, None]
        likelihoods = (F.log_softmax(z, 1, dtype=torch.float32) for z in snapshot_logits)
        ce = torch.cat([-log_p.gather(1, y) for log_p in likelihoods], 1)
        return (1 - ce.softmax(1)).log()
    m = torch.arange(1, snapshots + 1, device=first.device)
    if weighting == "last":
        weights = m == snapshots
    elif weighting == "linear_increase":
        weights = m
    elif weighting == "linear_decrease":
        weights = snapshots + 1 - m
    else:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS[1:])}, got {weighting!r}")
    return weights.float().log().expand(rows, snapshots)
