"""The checks of the ops' arguments: each mistake is one sentence that names the argument."""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

MAX_SNAPSHOTS = 64
FUSIONS, OBJECTIVES, REDUCTIONS = ("probability", "logit"), ("label", "kl"), ("none", "mean", "sum")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked_options(temperature, alpha, fusion, attention_objective, reduction, ignore_index) -> tuple:
    """The options; numbers of other kinds, NumPy's among them, as those of Python."""
    words = fusion, attention_objective, reduction
    if not _right(temperature, alpha, *words, ignore_index):
        temperature, alpha, ignore_index = as_number(temperature), as_number(alpha), as_number(ignore_index)
        if not _right(temperature, alpha, *words, ignore_index):
            _refuse_options(temperature, alpha, *words, ignore_index)
    return temperature, alpha, *words, ignore_index


def _right(temperature, alpha, fusion, attention_objective, reduction, ignore_index) -> bool:
    return (
        isinstance(temperature, (float, int))
        and isinstance(alpha, (float, int))
        and isinstance(ignore_index, int)
        and 0 < temperature < float("inf")
        and 0 <= alpha <= 1
        and fusion in FUSIONS
        and attention_objective in OBJECTIVES
        and reduction in REDUCTIONS
    )


def as_number(value):
    """A number of any library, or an array of one without dimensions, as one of Python's; anything else as it is.

    A tensor stays one: its value might be on another device, and its gradient would be lost.
    """
    if not isinstance(value, (Real, Tensor)) and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


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
        ("reduction", reduction, ("mean", "sum", "none")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def check_tensor(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as student_logits is, got {x.device}")


def check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")


def checked_student(student) -> Tensor:
    if not isinstance(student, Tensor):
        raise TypeError(f"student_logits must be a tensor, got {type(student).__name__}")
    if student.dim() != 2 or student.shape[1] == 0:
        raise ValueError(f"student_logits must be (B, C) or (B, T, C) with C >= 1, got shape {tuple(student.shape)}")
    check_floating("student_logits", student)
    return unit_stride(student)


def checked_snapshots(snapshots, rows: int, columns: int, device, of_all: bool) -> tuple[tuple[Tensor, ...], int]:
    """One tensor (M, rows, columns) or M of (rows, columns), and M; `of_all`: the columns are all classes."""
    shape = (rows, columns)
    if isinstance(snapshots, Tensor):
        if snapshots.dim() != 3:
            size = "C" if of_all else "K"
            raise ValueError(f"snapshot_logits must be (M, B, {size}), got shape {tuple(snapshots.shape)}")
        count = snapshots.shape[0]
        shape, snapshots = (count, *shape), (snapshots,)
    elif isinstance(snapshots, (list, tuple)):
        count, snapshots = len(snapshots), tuple(snapshots)
    else:
        raise TypeError(f"snapshot_logits must be a tensor or a list of tensors, got {type(snapshots).__name__}")
    if not 1 <= count <= MAX_SNAPSHOTS:
        raise ValueError(f"snapshot_logits must hold 1 to {MAX_SNAPSHOTS} snapshots, got {count}")
    for z in snapshots:
        check_tensor("snapshot_logits", z, shape, device)
        check_floating("snapshot_logits", z)
        if z.dtype != snapshots[0].dtype:
            raise TypeError(f"snapshot_logits must share one dtype, got {snapshots[0].dtype} and {z.dtype}")
        if z.requires_grad and torch.is_grad_enabled():
            raise ValueError("snapshot_logits must not require gradients, for snapshots are frozen; detach them")
        if not z.is_contiguous() and z.stride(-1) != 1 and columns > 1:
            raise ValueError(f"snapshot_logits must be contiguous over classes, got strides {z.stride()}")
    return snapshots, count


def checked_indices(indices, student: Tensor) -> Tensor:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
    rows, classes = student.shape
    if indices.dim() != 2 or not 1 <= indices.shape[1] <= classes:
        raise ValueError(f"indices must be (B, K) with 1 <= K <= C = {classes}, got shape {tuple(indices.shape)}")
    check_tensor("indices", indices, (rows, indices.shape[1]), student.device)
    return unit_stride(indices.long())


def checked_tail(tail, student: Tensor, snapshot: Tensor, count: int) -> Tensor:
    check_tensor("snapshot_tail", tail, (count, student.shape[0]), student.device)
    if tail.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"snapshot_tail must be float32 or float64, got {tail.dtype}")
    if tail.requires_grad and torch.is_grad_enabled():
        raise ValueError("snapshot_tail must not require gradients, for snapshots are frozen; detach it")
    return tail.to(torch.float64 if torch.float64 in (student.dtype, snapshot.dtype) else torch.float32)


def checked_labels(labels, rows: int, device: torch.device) -> Tensor:
    if is_soft(labels):
        raise TypeError(f"labels must be integer class indices, got {labels.dtype}")
    check_tensor("labels", labels, (rows,), device)
    if labels.dtype is torch.int64:
        return labels.contiguous()
    if labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer class indices, got {labels.dtype}")
    return labels.long().contiguous()


def is_soft(labels) -> bool:
    """Whether labels are weights of all classes, and not the index of one."""
    return isinstance(labels, Tensor) and labels.is_floating_point()


def checked_hard_or_soft_labels(labels, rows: int, classes: int, device: torch.device) -> Tensor:
    """Class indices (rows), or soft labels (rows, classes) of any strides."""
    if isinstance(labels, Tensor) and labels.dtype is torch.int64 and labels.dim() == 1:  # as most are
        check_tensor("labels", labels, (rows,), device)
        return labels.contiguous()
    soft = is_soft(labels)
    if isinstance(labels, Tensor) and (labels.dim() == 2) != soft:
        wanted = f"integer class indices ({rows},) or floating-point weights ({rows}, {classes})"
        raise TypeError(f"labels must be {wanted}, got {labels.dtype} of shape {tuple(labels.shape)}")
    if not soft:
        return checked_labels(labels, rows, device)
    check_tensor("labels", labels, (rows, classes), device)
    check_floating("labels", labels)
    if labels.requires_grad and torch.is_grad_enabled():
        raise ValueError("labels must not require gradients, for they are targets; detach them")
    return labels


_BESIDE_ROWS = {  # what stands before and after the rows
    "snapshot_logits": ("M", "C"), "snapshot_tail": ("M", ""), "indices": ("", "K"), "labels": ("", ""),
    "scores": ("", "M"), "query": ("", "D"), "keys": ("M", "D"),
    "student_features": ("", "D"), "snapshot_features": ("M", "D"),
}  # fmt: skip


def in_one_dimension(rows: Sequence[int], columns: str = "C", **arguments) -> list:
    """Arguments (*before, *rows, *after) as (*before, B, *after), views where their strides allow one."""

    def flat(name, x, before, after):
        if not isinstance(x, Tensor):
            return x  # for others to refuse
        first, last = len(before), len(before) + len(rows)
        if x.dim() != last + len(after) or x.shape[first:last] != rows:
            wanted = ", ".join((*before, *map(str, rows), *after))
            raise ValueError(f"{name} must have shape ({wanted}), got {tuple(x.shape)}")
        return x.flatten(first, last - 1)

    found = []
    for name, x in arguments.items():
        before, after = _BESIDE_ROWS[name]
        if name == "snapshot_logits":
            after = columns
        elif name == "labels" and is_soft(x):
            after = "C"
        several = name == "snapshot_logits" and isinstance(x, (list, tuple))
        found.append([flat(name, z, "", after) for z in x] if several else flat(name, x, before, after))
    return found


def checked_attention(query, keys, rows: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if query is None or keys is None:
        raise ValueError(f"query and keys must both be given, got only {'keys' if query is None else 'query'}")
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a tensor, got {type(query).__name__}")
    if query.dim() != 2 or query.shape[1] == 0:
        raise ValueError(f"query must be (B, D) with D >= 1, got shape {tuple(query.shape)}")
    width = query.shape[1]
    check_tensor("query", query, (rows, width), device)
    check_tensor("keys", keys, (count, rows, width), device)
    check_floating("query", query)
    check_floating("keys", keys)
    return unit_stride(query), unit_stride(keys)


def checked_scores(scores, rows: int, count: int, device: torch.device) -> Tensor:
    check_tensor("scores", scores, (rows, count), device)
    check_floating("scores", scores)
    return unit_stride(scores)


def unit_stride(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def are_probabilities(logits: Tensor) -> bool:
    """Whether rows (..., C) are what a softmax gives: no number is negative, and each row sums to 1.

    Rows of zeros and ones alone are not: they are what people write by hand.
    """
    z = logits.detach().float()
    known = z.numel() and z.ndim > 1 and z.min() >= 0 and (z.sum(-1) - 1).abs().max() < 1e-2
    return bool(known and ((z > 0) & (z < 1)).any())
