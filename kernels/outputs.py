"""What the forward ops of all backends return. Knows torch alone: neither Triton nor eekd."""

import torch
from torch import Tensor


def allocate(*args) -> list[Tensor | None]:
    """loss, attention_loss, weights, d_student, d_scores, d_query, d_keys of a call of a forward op, not yet filled.

    `args` are those of the op. The losses are () or, for reduction 0, (B), float64 where a logit is, else float32;
    weights (B, M) float32; the gradients as what they are of, None where they are not wanted. All are contiguous.
    """
    student, snapshots = args[:2]
    scores, query, keys = args[-11:-8]
    reduction, _, wants_student, wants_attention = args[-4:]
    first = snapshots[0]
    count = first.shape[0] if first.dim() == 3 else len(snapshots)
    shape = () if reduction else student.shape[:1]
    dtype = torch.float64 if torch.float64 in (student.dtype, first.dtype) else torch.float32
    loss, attention_loss = (student.new_empty(shape, dtype=dtype) for _ in range(2))
    weights = student.new_empty((student.shape[0], count), dtype=torch.float32)
    of = student if wants_student else None, *((scores, query, keys) if wants_attention else (None, None, None))
    gradients = (x if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in of)
    return [loss, attention_loss, weights, *gradients]


def wanted(outputs: list[Tensor | None]) -> list[Tensor]:
    """What the op returns: the outputs without those that are not wanted."""
    return [x for x in outputs if x is not None]
