"""What both ops share: the arguments are checked once, a backend is called, and autograd learns the gradients."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eekd.ops import checks, reference
from eekd.ops.backend import backend_for, namespace


class EnsembleKD(NamedTuple):
    """What `ensemble_kd` returns; backpropagate `loss + attention_loss`."""

    loss: Tensor
    weights: Tensor
    attention_loss: Tensor


def distil(student_logits, snapshot_logits, tail, indices, labels, attention, options) -> EnsembleKD:
    """`ensemble_kd`, or, with tail and indices, `sparse_ensemble_kd`.

    `attention` is scores, query and keys; `options` is temperature, alpha, fusion, attention_objective, reduction and
    ignore_index.
    """
    if isinstance(student_logits, Tensor) and student_logits.dim() > 2:
        return _distil_in_one_dimension(student_logits, snapshot_logits, tail, indices, labels, attention, options)
    student = checks.checked_student(student_logits)
    (rows, columns), device = student.shape, student.device
    if indices is not None:
        indices = checks.checked_indices(indices, student)
        columns = indices.shape[1]
    snapshots, count = checks.checked_snapshots(snapshot_logits, rows, columns, device, indices is None)
    if indices is not None:
        tail = checks.checked_tail(tail, student, snapshots[0], count)
    if labels is not None:
        labels = checks.checked_hard_or_soft_labels(labels, rows, student.shape[1], device)
        if labels.dim() == 2:
            labels = checks.unit_stride(labels)
    scores, query, keys = attention
    if query is not None or keys is not None:
        if scores is not None:
            raise ValueError("attention must be scores, or query and keys, got both")
        query, keys = checks.checked_attention(query, keys, rows, count, device)
    elif scores is not None:
        scores = checks.checked_scores(scores, rows, count, device)
    options = checks.checked_options(*options)

    temperature, alpha, fusion, objective, reduction, ignore_index = options
    kl_objective = objective == "kl"
    wants_student = wants_attention = False
    if torch.is_grad_enabled():
        wants_student = student.requires_grad
        if query is not None:
            wants_attention = query.requires_grad or keys.requires_grad
        elif scores is not None:
            wants_attention = scores.requires_grad
    if wants_attention and labels is None and not kl_objective:
        raise ValueError('labels must be given for attention_objective="label", got None; give labels or use "kl"')
    backend = backend_for(device)
    if backend == "reference":
        z = snapshots[0] if isinstance(snapshot_logits, Tensor) else list(snapshots)
        formula = reference.ensemble_kd
        if indices is not None:
            formula = partial(reference.sparse_ensemble_kd, snapshot_tail=tail, indices=indices)
        return EnsembleKD(
            *formula(
                student,
                z,
                labels=labels,
                scores=scores,
                query=query,
                keys=keys,
                temperature=temperature,
                alpha=alpha,
                fusion=fusion,
                attention_objective=objective,
                reduction=reduction,
                ignore_index=ignore_index,
            )
        )
    ops = namespace(device, backend)
    if indices is None:
        forward, inputs = ops.ensemble_kd_fwd, (student, snapshots, labels, scores, query, keys)
    else:
        forward, inputs = ops.sparse_ensemble_kd_fwd, (student, snapshots, tail, indices, labels, scores, query, keys)
    numbers = float(temperature), float(alpha), fusion == "logit", kl_objective
    if not (wants_student or wants_attention):
        loss, attention_loss, weights = forward(*inputs, *numbers, _CODES[reduction], ignore_index, False, False)
        return EnsembleKD(loss, weights, attention_loss)
    # The backend that wrote the gradients scales them, on the device; the native one on CPU leaves it to torch.
    scale = None
    if (device.type != "cpu" or backend == "triton") and not torch.compiler.is_compiling():
        scale = ops.ensemble_kd_bwd
    call = forward, scale, inputs, numbers, reduction, ignore_index, wants_student, wants_attention
    return EnsembleKD(*_EnsembleKD.apply(student, scores, query, keys, call))


def _distil_in_one_dimension(student, snapshots, tail, indices, labels, attention, options) -> EnsembleKD:
    """`distil` of rows in any number of dimensions, student_logits (..., C): as (B, C), and back."""
    rows, (scores, query, keys) = student.shape[:-1], attention
    named = dict(snapshot_logits=snapshots, snapshot_tail=tail, indices=indices, labels=labels)
    snapshots, tail, indices, labels, *attention = checks.in_one_dimension(
        rows, "C" if indices is None else "K", **named, scores=scores, query=query, keys=keys
    )
    student = student.flatten(0, -2)
    loss, weights, attention_loss = distil(student, snapshots, tail, indices, labels, attention, options)
    if loss.dim():
        loss, attention_loss = loss.unflatten(0, rows), attention_loss.unflatten(0, rows)
    return EnsembleKD(loss, weights.unflatten(0, rows), attention_loss)


_CODES = {"none": 0, "mean": 1, "sum": 2}  # as in torch's own schemas


def _fake_forward(*args) -> list[Tensor]:
    from eekd.kernels.outputs import allocate, call_of, wanted

    return wanted(allocate(call_of(*args)))


torch.library.register_fake("eekd::ensemble_kd_fwd")(_fake_forward)
torch.library.register_fake("eekd::sparse_ensemble_kd_fwd")(_fake_forward)
torch.library.register_fake("eekd::ensemble_kd_bwd")(lambda *args: None)


def _any_half(student, scores, query, keys) -> bool:
    half = torch.float16
    if student.dtype is half:
        return True
    if query is not None:
        return query.dtype is half or keys.dtype is half
    return scores is not None and scores.dtype is half


class _EnsembleKD(torch.autograd.Function):
    """The gradients for an upstream gradient of 1 are written by the forward; the backward scales them."""

    @staticmethod
    def forward(ctx, student, scores, query, keys, call):
        # What gets no gradient is one argument, for autograd looks at each.
        forward, scale, inputs, numbers, reduction, ignore_index, wants_student, wants_attention = call
        # In fp16 the gradients of a mean underflow before a loss scale can save them: those of the sum are written.
        count = None
        if reduction == "mean" and _any_half(student, scores, query, keys):
            reduction, labels = "sum", inputs[-4]
            every = labels is None or checks.is_soft(labels)
            if scale is None and not torch.compiler.is_compiling():  # on a CPU a number costs least
                count = max(1, len(student) if every else int((labels != ignore_index).sum()))
            else:
                count = student.new_full((), student.shape[0], dtype=torch.long)
                count = (count if every else (labels != ignore_index).sum()).clamp(min=1)
        loss, attention_loss, weights, *gradients = forward(
            *inputs, *numbers, _CODES[reduction], ignore_index, wants_student, wants_attention
        )
        if count is not None:
            loss, attention_loss = loss / count, attention_loss / count
        d_student = gradients.pop(0) if wants_student else None
        if not wants_attention:
            gradients = None, None, None
        elif query is None:
            gradients = *gradients, None, None
        else:
            gradients = None, *gradients
        ctx.number = count if isinstance(count, int) else None
        ctx.save_for_backward(None if isinstance(count, int) else count, d_student, *gradients)
        kl_objective = numbers[-1]
        ctx.scale, ctx.kl_objective = scale, kl_objective
        constant = [weights]
        if not (wants_student or kl_objective):
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
        count, d_student, d_scores, d_query, d_keys = ctx.saved_tensors
        count = ctx.number if count is None else count
        if ctx.kl_objective:
            d_attention_loss = d_loss
        if d_loss is None:
            d_student = None
        if d_attention_loss is None:
            d_scores = d_query = d_keys = None
        if ctx.scale is None or compiling:
            attention = [(x, d_attention_loss) for x in (d_scores, d_query, d_keys)]
            pairs = (d_student, d_loss), *attention
            scaled = [None if x is None or d is None else _scaled(x, d, count, compiling) for x, d in pairs]
            return *scaled, None
        gradients = d_student, d_scores, d_query, d_keys
        if _keeps_graph():  # in place, unless the graph is kept for another backward
            gradients = [None if x is None else x.clone() for x in gradients]
        if any(x is not None for x in gradients):
            ctx.scale(d_loss, d_attention_loss, count, *gradients)
        return *gradients, None


# Private, and so allowed to go: then every graph counts as kept.
_autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_keeps_graph = getattr(_autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(unit: Tensor, grad: Tensor, count: Tensor | int | None, compiling: bool) -> Tensor:
    if isinstance(count, Tensor):
        grad, count = grad / count, None
    if not compiling and grad.is_cpu and not grad.dim():
        # Reading a CPU scalar costs less than a pass over the gradient; elsewhere it would stall the device.
        factor = grad.item() if count is None else grad.item() / count
        return unit if factor == 1 else unit * factor
    # One factor per row of (…, B, n), or one for all, which a GPU would round to 16 bits if it had no dimension.
    factor = grad[:, None] if grad.dim() else grad[None, None]
    return torch.mul(unit, factor, out=torch.empty_like(unit))
