"""`ensemble_kd` of snapshots known at K classes of each row, the rest of their classes in one bucket."""

from collections.abc import Sequence

from torch import Tensor

from eekd.ops.fused import EnsembleKD, distil


def sparse_ensemble_kd(
    student_logits: Tensor,
    snapshot_logits: Tensor | Sequence[Tensor],
    snapshot_tail: Tensor,
    indices: Tensor,
    labels: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    query: Tensor | None = None,
    keys: Tensor | None = None,
    temperature: float = 5.0,
    alpha: float = 0.5,
    fusion: str = "probability",
    attention_objective: str = "label",
    reduction: str = "mean",
    ignore_index: int = -100,
) -> EnsembleKD:
    """Distils snapshots with logits at K of the C classes, and one tail for the other classes.

    The classes outside `indices` form one more column, the bucket K. With c_j = indices_j and out: c not in indices,

        Z_mj = z_mj,    Z_mK = τ tail_m                           tail_m = log Σ_out exp(z_mc / τ)
        S_j  = s_cj,    S_K  = τ log Σ_out exp(s_c / τ)

    weights, KL, attention_loss and their gradients are those of `ensemble_kd` for the K + 1 columns S and Z. The CE is
    that of all C logits s. With p and q of the columns, and the gradient of the CE added,

        d/ds_c = (1 - α) τ (q_j - p_j) for c = c_j      d/ds_c = (1 - α) τ (q_K - p_K) exp((s_c - S_K) / τ) otherwise

    The error against all C logits, with p and q of the classes: With probability fusion the loss is lower by
    (1 - α) τ² p_K KL(p_c / p_K || q_c / q_K), and never higher. The gradients of the K classes are exact; those of the
    others differ by at most 2 (1 - α) τ p_K in the L1 norm. With logit fusion Σ_m w_m tail_m is an upper bound of the
    mixture's tail, so each p_j is lower, by at most the factor 1 - p_K. K = C is exact.

    Args:
        student_logits: (B, C), float64, float32, bfloat16 or float16.
        snapshot_logits: (M, B, K), 1 <= K <= C, or M tensors (B, K): the logits at `indices`. Otherwise as in
            `ensemble_kd`.
        snapshot_tail: (M, B) float32 or float64, tail_m above at the same τ; -inf if K = C. No gradient.
        indices: (B, K) int64 or int32, the same for all snapshots. The classes of a row must be distinct, which is not
            checked.
        labels: (B) integers, (B, C) soft labels of all classes, or None. In attention_loss a label outside the row's
            `indices`, or its part of a soft label, counts as the bucket's.
        scores: (B, M) attention scores.
        query: (B, D), with keys instead of scores.
        keys: (M, B, D).
        temperature: τ > 0.
        alpha: α in [0, 1].
        fusion: "probability" or "logit".
        attention_objective: "label" or "kl".
        reduction: "mean", "sum" or "none".
        ignore_index: the label of rows that do not count; their indices are not read either.

    Returns:
        `loss`, `weights`, `attention_loss` as `ensemble_kd`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: an index that is not a class, a label that is neither a class nor `ignore_index` (on a GPU the
            loss of its row is NaN instead), or a backend that is not available.

    Source: arXiv 2202.12488, sections 3.2 and 3.3, of K + 1 columns.
    """
    if indices is None:
        raise TypeError("indices must be a tensor, got NoneType")
    attention = scores, query, keys
    options = temperature, alpha, fusion, attention_objective, reduction, ignore_index
    return distil(student_logits, snapshot_logits, snapshot_tail, indices, labels, attention, options)
