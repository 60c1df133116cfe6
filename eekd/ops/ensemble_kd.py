"""M snapshots and a student, by their logits, become a loss and the weights of the snapshots."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eekd.ops import reference
from eekd.ops.backend import backend_for, namespace

MAX_SNAPSHOTS = 64
FUSIONS, OBJECTIVES, REDUCTIONS = ("probability", "logit"), ("label", "kl"), ("mean", "sum", "none")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class EnsembleKD(NamedTuple):
    """What `ensemble_kd` returns; backpropagate `loss + attention_loss`."""

    loss: Tensor
    weights: Tensor
    attention_loss: Tensor


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

    `attention_objective` says what trains the attention. "label": p is detached in `loss`, and `attention_loss`
    carries the gradient, so the weights follow the likelihood of the true label. "kl", the paper read literally:
    p is not detached in `loss`, and `attention_loss` carries no gradient. Backpropagate their sum either way.

    Args:
        student_logits: (B, C), float64, float32, bfloat16 or float16.
        snapshot_logits: (M, B, C) of any strides with contiguous classes (a transposed (B, M, C) too), or M tensors
            (B, C), which are not stacked; 1 <= M <= 64. Their dtype may differ from the student's. No gradient.
        labels: (B) integers, or None for pure distillation: the loss is τ² KL, whatever α.
        scores: (B, M) attention scores; log-weights, -inf among them, give any fixed weights. A snapshot of weight 0
            is not read.
        query: (B, D), with keys instead of scores; the dot products of the two are not scaled further.
        keys: (M, B, D), one for each snapshot and row.
        temperature: τ > 0.
        alpha: α in [0, 1].
        fusion: "probability" or "logit".
        attention_objective: "label" or "kl".
        reduction: "mean" over the rows that are not ignored (0 where none is left), "sum", or "none" for (B).
        ignore_index: the label of rows that count for nothing: loss, weights and gradients 0, logits not read.

    Returns:
        `loss` and `attention_loss` (0 without labels), float32, or float64 where a logit is; `weights` (B, M) float32,
        without gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: a label that is neither a class nor `ignore_index` (on a GPU, which cannot raise without waiting,
            the loss of its row is NaN), or a backend that is not available.

    Columns that are -inf in all snapshots and the student (a padded vocabulary) add nothing. A row all of -inf has no
    softmax and gives NaN, as in torch. Second derivatives are refused.

    Source: arXiv 2202.12488, sections 3.2 and 3.3, where `attention_objective="kl"` is the reading of the paper.
    """
    return distil(
        None,
        None,
        student_logits,
        snapshot_logits,
        labels,
        scores,
        query,
        keys,
        temperature,
        alpha,
        fusion,
        attention_objective,
        reduction,
        ignore_index,
    )


def distil(
    tail,
    indices,
    student_logits,
    snapshot_logits,
    labels,
    scores,
    query,
    keys,
    temperature,
    alpha,
    fusion,
    attention_objective,
    reduction,
    ignore_index,
):
    """`ensemble_kd`, or, with tail and indices, `sparse_ensemble_kd`: checks the arguments and calls the backend."""
    sparse = indices is not None
    stacked = isinstance(snapshot_logits, Tensor)
    if not stacked and not isinstance(snapshot_logits, (list, tuple)):
        raise TypeError(f"snapshot_logits must be a tensor or a list of tensors, got {type(snapshot_logits).__name__}")
    snapshots = (snapshot_logits,) if stacked else tuple(snapshot_logits)
    student_logits = _checked_student(student_logits)
    columns = student_logits.shape[1]
    if sparse:
        indices = _checked_indices(indices, student_logits)
        columns = indices.shape[1]
    count = _check_snapshots(snapshots, stacked, student_logits, columns)
    if sparse:
        tail = _checked_tail(tail, student_logits, snapshots[0], count)
    if labels is not None:
        labels = _checked_labels(labels, student_logits)
    if query is not None or keys is not None:
        if scores is not None:
            raise ValueError("give attention as scores, or as query and keys, not both")
        query, keys = _checked_attention(query, keys, student_logits, count)
    elif scores is not None:
        scores = _checked_scores(scores, student_logits, count)
    if not (
        isinstance(temperature, (float, int))
        and isinstance(alpha, (float, int))
        and isinstance(ignore_index, int)
        and 0 < temperature < float("inf")
        and 0 <= alpha <= 1
        and fusion in FUSIONS
        and attention_objective in OBJECTIVES
        and reduction in REDUCTIONS
    ):
        _refuse_options(temperature, alpha, fusion, attention_objective, reduction, ignore_index)

    grad = torch.is_grad_enabled()
    attention = scores if query is None else query
    attends = grad and attention is not None and (attention.requires_grad or (keys is not None and keys.requires_grad))
    if attends and labels is None and attention_objective == "label":
        raise ValueError('attention_objective="label" needs labels to train the attention; give labels or use "kl"')
    if backend_for(student_logits.device) == "reference":
        formula = partial(reference.sparse_ensemble_kd, snapshot_tail=tail, indices=indices)
        return EnsembleKD(
            *(formula if sparse else reference.ensemble_kd)(
                student_logits,
                snapshot_logits if stacked else snapshots,
                labels=labels,
                scores=scores,
                query=query,
                keys=keys,
                temperature=temperature,
                alpha=alpha,
                fusion=fusion,
                attention_objective=attention_objective,
                reduction=reduction,
                ignore_index=ignore_index,
            )
        )
    kl_objective = attention_objective == "kl"
    options = (float(temperature), float(alpha), fusion == "logit", kl_objective, reduction, ignore_index)
    if attends or (grad and student_logits.requires_grad):
        outputs = _EnsembleKD.apply(student_logits, scores, query, keys, (labels, tail, indices, *options, snapshots))
    else:
        outputs = _forward(
            student_logits, scores, query, keys, labels, tail, indices, *options, snapshots, False, False
        )[:3]
    return EnsembleKD(*outputs)


def _forward(
    student,
    scores,
    query,
    keys,
    labels,
    tail,
    indices,
    temperature,
    alpha,
    logit_fusion,
    kl_objective,
    reduction,
    ignore_index,
    snapshots,
    wants_student,
    wants_attention,
):
    rows, device, first = student.shape[0], student.device, snapshots[0]
    count = first.shape[0] if first.dim() == 3 else len(snapshots)
    shape = (rows,) if reduction == "none" else ()
    dtype = _result_dtype(student, first)
    loss = torch.empty(shape, dtype=dtype, device=device)
    attention_loss = torch.empty(shape, dtype=dtype, device=device)
    weights = torch.empty((rows, count), dtype=torch.float32, device=device)
    d_student = torch.empty_like(student, memory_format=torch.contiguous_format) if wants_student else None
    d_scores = d_query = d_keys = None
    if wants_attention and query is not None:
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_keys = torch.empty_like(keys, memory_format=torch.contiguous_format)
    elif wants_attention:
        d_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    ops = namespace(device)
    forward, sparse = (ops.ensemble_kd_fwd, ()) if indices is None else (ops.sparse_ensemble_kd_fwd, (tail, indices))
    forward(
        student,
        snapshots,
        *sparse,
        labels,
        scores,
        query,
        keys,
        temperature,
        alpha,
        logit_fusion,
        kl_objective,
        reduction == "mean",
        ignore_index,
        loss,
        attention_loss,
        weights,
        d_student,
        d_scores,
        d_query,
        d_keys,
    )
    return loss, weights, attention_loss, d_student, d_scores, d_query, d_keys


for _name in ("ensemble_kd_fwd", "sparse_ensemble_kd_fwd", "ensemble_kd_bwd"):
    torch.library.register_fake(f"eekd::{_name}")(lambda *args: None)


class _EnsembleKD(torch.autograd.Function):
    """The gradients for an upstream gradient of 1 are written by the forward; the backward scales them."""

    @staticmethod
    def forward(ctx, student, scores, query, keys, constants):
        # What gets no gradient is one argument, for autograd looks at each.
        labels, tail, indices, *options, reduction, ignore_index, snapshots = constants
        wants_student, *wants = ctx.needs_input_grad[:4]
        wants_attention, kl_objective = any(wants), options[3]
        # In fp16 the gradients of a mean underflow before a loss scale can save them: those of the sum are written.
        count = None
        if reduction == "mean" and torch.float16 in [x.dtype for x in (student, scores, query, keys) if x is not None]:
            reduction = "sum"
            count = student.new_full((), student.shape[0], dtype=torch.long)
            count = (count if labels is None else (labels != ignore_index).sum()).clamp(min=1)
        loss, weights, attention_loss, *units = _forward(
            student,
            scores,
            query,
            keys,
            labels,
            tail,
            indices,
            *options,
            reduction,
            ignore_index,
            snapshots,
            wants_student,
            wants_attention,
        )
        if count is not None:
            loss, attention_loss = loss / count, attention_loss / count
        ctx.save_for_backward(count, *units)
        ctx.kl_objective = kl_objective
        # The backend that wrote the gradients scales them, on the device; the native one on CPU leaves it to torch.
        ctx.ops = None
        if not torch.compiler.is_compiling() and (student.is_cuda or backend_for(student.device) == "triton"):
            ctx.ops = namespace(student.device)
        constant = [weights]
        if not wants_student and not (wants_attention and kl_objective):
            constant.append(loss)
        if kl_objective or not wants_attention:
            constant.append(attention_loss)
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return loss, weights, attention_loss

    @staticmethod
    def backward(ctx, d_loss, _, d_attention_loss):
        compiling = torch.compiler.is_compiling()
        if not compiling and torch.is_grad_enabled():
            raise RuntimeError("ensemble_kd has no second derivative; backpropagate without create_graph=True")
        count, d_student, *d_attention = ctx.saved_tensors
        if ctx.kl_objective:
            d_attention_loss = d_loss
        if d_loss is None:
            d_student = None
        if d_attention_loss is None:
            d_attention = (None, None, None)
        if ctx.ops is None or compiling:
            d_student = _scaled(d_student, d_loss, count)
            d_attention = [_scaled(unit, d_attention_loss, count) for unit in d_attention]
        else:
            if _keeps_graph():  # in place, unless the graph is kept for another backward
                d_student, *d_attention = [x if x is None else x.clone() for x in (d_student, *d_attention)]
            if not d_student is d_attention[0] is d_attention[1] is None:
                ctx.ops.ensemble_kd_bwd(d_loss, d_attention_loss, count, d_student, *d_attention)
        return d_student, *d_attention, None


# Private, and so allowed to go: then every graph counts as kept.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(unit: Tensor | None, grad: Tensor, count: Tensor | None) -> Tensor | None:
    if unit is None:
        return None
    if count is not None:
        grad = grad / count
    if grad.is_cpu and not grad.dim():
        # Reading a CPU scalar costs less than a pass over the gradient; elsewhere it would stall the device.
        if not torch.compiler.is_compiling() and grad.item() == 1:
            return unit
        return unit * grad
    # One factor per row of (…, B, n), or one for all, which a GPU would round to 16 bits if it had no dimension.
    factor = grad[:, None] if grad.dim() else grad[None, None]
    return torch.mul(unit, factor, out=torch.empty_like(unit))


def _refuse_options(temperature, alpha, fusion, attention_objective, reduction, ignore_index) -> None:
    for name, value in (("temperature", temperature), ("alpha", alpha)):
        if not isinstance(value, (float, int)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    for name, value, choices in (
        ("fusion", fusion, FUSIONS),
        ("attention_objective", attention_objective, OBJECTIVES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def _check_tensor(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as student_logits is, got {x.device}")


def _check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")


def _checked_student(student) -> Tensor:
    if not isinstance(student, Tensor):
        raise TypeError(f"student_logits must be a tensor, got {type(student).__name__}")
    if student.dim() != 2 or student.shape[1] == 0:
        raise ValueError(f"student_logits must be (B, C) with C >= 1, got shape {tuple(student.shape)}")
    _check_floating("student_logits", student)
    return _unit_stride(student)


def _check_snapshots(snapshots, stacked: bool, student: Tensor, columns: int) -> int:
    """How many snapshots there are of (B, columns)."""
    shape, device = (student.shape[0], columns), student.device
    count = len(snapshots)
    if stacked:
        if snapshots[0].dim() != 3:
            size = "C" if columns == student.shape[1] else "K"
            raise ValueError(f"snapshot_logits must be (M, B, {size}), got shape {tuple(snapshots[0].shape)}")
        count = snapshots[0].shape[0]
        shape = (count, *shape)
    if not 1 <= count <= MAX_SNAPSHOTS:
        raise ValueError(f"snapshot_logits must hold 1 to {MAX_SNAPSHOTS} snapshots, got {count}")
    for z in snapshots:
        _check_tensor("snapshot_logits", z, shape, device)
        _check_floating("snapshot_logits", z)
        if z.dtype != snapshots[0].dtype:
            raise TypeError(f"snapshot_logits must share one dtype, got {snapshots[0].dtype} and {z.dtype}")
        if z.requires_grad and torch.is_grad_enabled():
            raise ValueError("snapshot_logits must not require gradients, for snapshots are frozen; detach them")
        if z.stride(-1) != 1 and z.shape[-1] > 1:
            raise ValueError(f"snapshot_logits must be contiguous over classes, got strides {z.stride()}")
    return count


def _checked_indices(indices, student: Tensor) -> Tensor:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
    rows, classes = student.shape
    if indices.dim() != 2 or not 1 <= indices.shape[1] <= classes:
        raise ValueError(f"indices must be (B, K) with 1 <= K <= C = {classes}, got shape {tuple(indices.shape)}")
    _check_tensor("indices", indices, (rows, indices.shape[1]), student.device)
    return _unit_stride(indices.long())


def _checked_tail(tail, student: Tensor, snapshot: Tensor, count: int) -> Tensor:
    _check_tensor("snapshot_tail", tail, (count, student.shape[0]), student.device)
    if tail.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"snapshot_tail must be float32 or float64, got {tail.dtype}")
    if tail.requires_grad and torch.is_grad_enabled():
        raise ValueError("snapshot_tail must not require gradients, for snapshots are frozen; detach it")
    return tail.to(_result_dtype(student, snapshot))


def _result_dtype(student: Tensor, snapshot: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, snapshot.dtype) else torch.float32


def _checked_labels(labels, student: Tensor) -> Tensor:
    _check_tensor("labels", labels, student.shape[:1], student.device)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer class indices, got {labels.dtype}")
    return labels if labels.dtype == torch.int64 and labels.is_contiguous() else labels.long().contiguous()


def _checked_attention(query, keys, student: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if query is None or keys is None:
        raise ValueError(f"query and keys go together, got only {'keys' if query is None else 'query'}")
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a tensor, got {type(query).__name__}")
    if query.dim() != 2 or query.shape[1] == 0:
        raise ValueError(f"query must be (B, D) with D >= 1, got shape {tuple(query.shape)}")
    rows, width = student.shape[0], query.shape[1]
    _check_tensor("query", query, (rows, width), student.device)
    _check_tensor("keys", keys, (count, rows, width), student.device)
    _check_floating("query", query)
    _check_floating("keys", keys)
    return _unit_stride(query), _unit_stride(keys)


def _checked_scores(scores, student: Tensor, count: int) -> Tensor:
    _check_tensor("scores", scores, (student.shape[0], count), student.device)
    _check_floating("scores", scores)
    return _unit_stride(scores)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
