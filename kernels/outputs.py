"""What the forward ops of all backends take and return. Knows torch alone: neither Triton nor eekd."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """The arguments of ensemble_kd_fwd, in their order; sparse_ensemble_kd_fwd has `tail` and `indices` too."""

    student: Tensor
    snapshots: Sequence[Tensor]
    labels: Tensor | None
    scores: Tensor | None
    query: Tensor | None
    keys: Tensor | None
    temperature: float
    alpha: float
    logit_fusion: bool
    kl_objective: bool
    reduction: int
    ignore_index: int
    wants_student: bool
    wants_attention: bool
    tail: Tensor | None = None
    indices: Tensor | None = None

    @property
    def soft(self) -> bool:
        return self.labels is not None and self.labels.dim() == 2

    @property
    def stacked(self) -> bool:
        """Whether the snapshots are one tensor (M, B, C)."""
        return self.snapshots[0].dim() == 3

    @property
    def count(self) -> int:
        """M."""
        return self.snapshots[0].shape[0] if self.stacked else len(self.snapshots)


def call_of(*args) -> Call:
    """The arguments of either op, which the sparse one has tail and indices among, after the snapshots."""
    return Call(*args) if len(args) == 14 else Call(*args[:2], *args[4:], *args[2:4])


def allocate(call: Call) -> list[Tensor | None]:
    """loss, attention_loss, weights, d_student, d_scores, d_query, d_keys of a call of a forward op, not yet filled.

    The losses are () or, for reduction 0, (B), float64 where a logit is, else float32; weights (B, M) float32; the
    gradients as what they are of, None where they are not wanted. All are contiguous.
    """
    student = call.student
    shape = () if call.reduction else student.shape[:1]
    dtype = torch.float64 if torch.float64 in (student.dtype, call.snapshots[0].dtype) else torch.float32
    loss, attention_loss = (student.new_empty(shape, dtype=dtype) for _ in range(2))
    weights = student.new_empty((student.shape[0], call.count), dtype=torch.float32)
    attention = (call.scores, call.query, call.keys) if call.wants_attention else (None, None, None)
    of = student if call.wants_student else None, *attention
    gradients = (x if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in of)
    return [loss, attention_loss, weights, *gradients]


def wanted(outputs: list[Tensor | None]) -> list[Tensor]:
    """What the op returns: the outputs without those that are not wanted."""
    return [x for x in outputs if x is not None]
