"""The shapes an op is tried on, each with its reason, the tensors of a shape, and the calls an op makes."""

import mmap
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Shape(NamedTuple):
    rows: int
    snapshots: int
    classes: int
    reason: str


SHAPES = (
    Shape(65, 5, 1, "one class: every softmax is 1"),
    Shape(65, 5, 2, "two classes"),
    Shape(65, 5, 7, "less than a vector, rows unaligned"),
    Shape(65, 5, 10, "CIFAR-10"),
    Shape(65, 5, 100, "CIFAR-100"),
    Shape(9, 5, 127, "one short of whole vectors"),
    Shape(9, 5, 128, "whole vectors, whatever their width"),
    Shape(9, 5, 129, "one more than whole vectors"),
    Shape(9, 5, 1000, "ImageNet"),
    Shape(9, 5, 1001, "ImageNet with a background class: odd strides"),
    Shape(5, 5, 1023, "one short of a tile"),
    Shape(5, 5, 1024, "a tile"),
    Shape(5, 5, 1025, "a tile and one column"),
    Shape(5, 3, 5000, "several tiles and a rest"),
    Shape(1, 2, 262144, "the largest vocabulary, and fewer rows than threads"),
    Shape(9, 1, 100, "plain knowledge distillation"),
    Shape(9, 2, 100, "the least that is an ensemble"),
    Shape(9, 17, 100, "more snapshots than a vector has lanes"),
    Shape(9, 64, 100, "the most snapshots"),
    Shape(2, 64, 1500, "the most snapshots, in tiles"),
    Shape(0, 5, 100, "an empty batch"),
    Shape(1, 5, 100, "a single row"),
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ATTENTIONS = ("uniform", "scores", "query")


def tensors(
    rows: int,
    snapshots: int,
    classes: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "scores",
    width: int = 6,
    labels: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The tensor arguments of ensemble_kd, by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(device, dtype)

    x = {
        "student_logits": normal(rows, classes, scale=2),
        "snapshot_logits": normal(snapshots, rows, classes, scale=3),
    }
    if labels:
        x["labels"] = torch.randint(classes, (rows,), generator=generator).to(device)
    if attention == "scores":
        x["scores"] = normal(rows, snapshots)
    elif attention == "query":
        x["query"] = normal(rows, width)
        x["keys"] = normal(snapshots, rows, width)
    return x


def sparse(x: dict[str, Tensor], k: int, *, temperature: float = 5.0, seed: int = 0) -> dict[str, Tensor]:
    """The arguments of sparse_ensemble_kd that keep k classes of each row of x: the labels of even rows among them."""
    z = x["snapshot_logits"]
    order = torch.rand(z.shape[1:], generator=torch.Generator().manual_seed(seed))
    if "labels" in x:
        rows = torch.arange(len(order))
        order[rows, x["labels"].cpu().clamp(min=0)] = 2.0 - 3 * (rows % 2)
    indices = order.argsort(1, descending=True)[:, :k].to(z.device)
    indices = indices.gather(1, order[:, :k].to(z.device).argsort(1))  # in any order
    return x | kept(z, indices, temperature)


def kept(z: Tensor, indices: Tensor, temperature: float) -> dict[str, Tensor]:
    """The logits at the indices and the tail of the others, by name."""
    everywhere = indices.expand(len(z), -1, -1)
    tail = (z.double() / temperature).scatter(2, everywhere, -torch.inf).logsumexp(2)
    tail = tail.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    return {"snapshot_logits": z.gather(2, everywhere), "snapshot_tail": tail, "indices": indices}


def spread(t: Tensor) -> Tensor:
    """The same numbers as every other row of a wider tensor, some columns in, NaN (or -100) around them."""
    around = torch.nan if t.is_floating_point() else -100
    wide = t.new_full((*t.shape[:-2], 2 * t.shape[-2] + 1, t.shape[-1] + 21), around)
    inside = wide[..., 1 : 2 * t.shape[-2] + 1 : 2, 5 : 5 + t.shape[-1]]
    return inside.copy_(t)


def far(x: Tensor) -> Tensor:
    """The same numbers, a row every 2^30 elements of memory that is committed where it is written."""
    rows, stride = x.shape[-2], 2**30 + 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # NORESERVE
    storage = mmap.mmap(-1, x.itemsize * x[..., 0].numel() * stride, flags=flags)
    strides = (rows * stride, stride, 1)[3 - x.dim() :]
    return torch.frombuffer(storage, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


class Calls(TorchDispatchMode):
    """Records the calls of eekd's own ops as (name, arguments by name), and the names of all others."""

    def __init__(self):
        super().__init__()
        self.own, self.others = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("eekd", "eekd_triton"):
            names = [argument.name for argument in func._schema.arguments]
            self.own.append((func.__name__.split(".")[0], dict(zip(names, args, strict=False)) | (kwargs or {})))
        else:
            self.others.append(str(func))
        return func(*args, **(kwargs or {}))
