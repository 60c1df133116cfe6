"""M snapshots and a student, by their logits, become a loss and the weights of the snapshots."""

from collections.abc import Sequence

from torch import Tensor

from eekd.ops.fused import EnsembleKD, distil


def ensemble_kd(
    student_logits: Tensor,
    snapshot_logits: Tensor | Sequence[Tensor],
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
    """Distils the attention-weighted ensemble of M snapshots into a student, in one pass with all gradients.

    Per row, with logits s and z_m, label y and temperature τ:

        e_m = scores_m  or  query . keys_m  or  0        w = softmax(e)
        p   = Σ_m w_m softmax(z_m / τ)                    fusion="probability"
        p   = softmax(Σ_m w_m z_m / τ)                    fusion="logit"
        q   = softmax(s / τ)
        loss           = α CE(s, y) + (1 - α) τ² KL(p || q)      d/ds = α (softmax(s) - 1_y) + (1 - α) τ (q - p)
        attention_loss = -log p_y

    With soft labels y (B, C), of mixup, CutMix or label smoothing, where a term of y_c = 0 is 0:

        CE = -Σ_c y_c log softmax(s)_c       d CE/ds = Σ_c y_c · softmax(s) - y       attention_loss = -Σ_c y_c log p_c

    `attention_objective` says what trains the attention. "label": p is detached in `loss`, and `attention_loss`
    carries the gradient, so the weights maximise the likelihood of the label. "kl", the paper read literally: p is not
    detached in `loss`, and `attention_loss` carries no gradient. Backpropagate their sum in both cases.

    Args:
        student_logits: (B, C), float64, float32, bfloat16 or float16. In every argument and result B may be several
            dimensions, such as (B, T): they are flattened, without a copy if the strides allow it.
        snapshot_logits: (M, B, C) with contiguous classes and any other strides (also a transposed (B, M, C)), or M
            tensors (B, C), which are not stacked; 1 <= M <= 64. Their dtype may differ from the student's. No gradient.
        labels: (B) integers; or (B, C) soft labels of one of these dtypes, with y_c >= 0, which is not checked, and any
            sum; or None for pure distillation: the loss is then τ² KL, for any α. No gradient.
        scores: (B, M) attention scores. For fixed weights give their logarithms, which may be -inf. A snapshot of
            weight 0 is not read.
        query: (B, D), with keys instead of scores; their dot products are not scaled further.
        keys: (M, B, D), one for each snapshot and row.
        temperature: τ > 0, a number of Python or NumPy, as alpha is.
        alpha: α in [0, 1].
        fusion: "probability" or "logit".
        attention_objective: "label" or "kl".
        reduction: "mean" over the rows that are not ignored (0 where none is left), "sum", or "none" for (B).
        ignore_index: the label of rows that do not count: their loss, weights and gradients are 0, their logits are not
            read. With soft labels every row counts, also one that is all 0, as in torch.

    Returns:
        `loss` and `attention_loss` (0 without labels), float32, or float64 where a logit is; `weights` (B, M) float32,
        without gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: a label that is neither a class nor `ignore_index`, or a backend that is not available. On a GPU
            such a label makes the loss of its row NaN instead, because raising would have to wait for the GPU.

    Columns that are -inf in all snapshots and the student (a padded vocabulary) add nothing. If such a column is a
    label, the loss is inf, and the attention of the row gets no gradient from it. A row of only -inf gives NaN, as in
    torch. Second derivatives are refused.

    Source: arXiv 2202.12488, sections 3.2 and 3.3; `attention_objective="kl"` is their literal reading.
    """
    attention = scores, query, keys
    options = temperature, alpha, fusion, attention_objective, reduction, ignore_index
    return distil(student_logits, snapshot_logits, None, None, labels, attention, options)
