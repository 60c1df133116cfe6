"""What ensemble_kd and sparse_ensemble_kd are tried on: shapes, each with its reason, their tensors and readings.

Three numbers, (rows, snapshots, classes), are a size of ensemble_kd; a fourth, K, makes it one of sparse_ensemble_kd.
"""

import itertools
import mmap

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eekd import ensemble_kd, sparse_ensemble_kd

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ATTENTIONS = ("uniform", "scores", "query")
FUSIONS = ("probability", "logit")
OBJECTIVES = ("label", "kl")
READINGS = list(itertools.product(FUSIONS, OBJECTIVES))

readings = pytest.mark.parametrize("fusion, objective", READINGS)
fusions = pytest.mark.parametrize("fusion", FUSIONS)


def sizes(*sizes: tuple[int, ...]):
    """Runs a test on every size; "sparse" is in the names of those of sparse_ensemble_kd."""
    ids = ["sparse" * (len(size) > 3) + "x".join(map(str, size)) for size in sizes]
    return pytest.mark.parametrize("size", sizes, ids=ids)


SIZES = {
    (65, 5, 1): "one class: every softmax is 1",
    (65, 5, 2): "two classes",
    (65, 5, 7): "less than a vector, rows unaligned",
    (65, 5, 10): "CIFAR-10",
    (65, 5, 100): "CIFAR-100",
    (9, 5, 127): "one short of whole vectors",
    (9, 5, 128): "whole vectors, whatever their width",
    (9, 5, 129): "one more than whole vectors",
    (9, 5, 1000): "ImageNet",
    (9, 5, 1001): "ImageNet with a background class: odd strides",
    (5, 5, 1023): "one short of a tile",
    (5, 5, 1024): "a tile",
    (5, 5, 1025): "a tile and one column",
    (5, 3, 5000): "several tiles and a rest",
    (1, 2, 262144): "the largest vocabulary, and fewer rows than threads",
    (9, 1, 100): "plain knowledge distillation",
    (9, 2, 100): "the least that is an ensemble",
    (9, 17, 100): "more snapshots than a vector has lanes",
    (9, 64, 100): "the most snapshots",
    (2, 64, 1500): "the most snapshots, in tiles",
    (0, 5, 100): "an empty batch",
    (1, 5, 100): "a single row",
    (65, 1, 1, 1): "nothing is left out",
    (65, 5, 2, 1): "a class inside and one outside",
    (65, 5, 10, 1): "the least that is kept",
    (65, 2, 100, 2): "as many snapshots as columns",
    (65, 5, 100, 31): "the last that goes a row per lane",
    (65, 5, 100, 32): "the first that does not",
    (9, 17, 101, 33): "odd strides",
    (9, 64, 100, 20): "the most snapshots",
    (9, 5, 1000, 50): "ImageNet",
    (9, 1, 1023, 100): "one snapshot, one short of a tile",
    (9, 2, 1024, 1024): "a tile of student and columns, and one column more",
    (5, 5, 1025, 100): "a tile and one column",
    (33, 2, 2500, 15): "rows in lanes, in tiles",
    (3, 3, 5000, 1000): "several tiles, and of columns almost one",
    (2, 2, 3000, 3000): "several tiles of columns",
    (1, 2, 128256, 100): "a large vocabulary",
    (0, 5, 100, 10): "an empty batch",
    (1, 5, 100, 10): "a single row",
}


def kd(**x):
    """The op whose arguments these are."""
    return (sparse_ensemble_kd if "indices" in x else ensemble_kd)(**x)


def tensors(
    rows: int,
    snapshots: int,
    classes: int,
    k: int | None = None,
    *,
    temperature: float = 5.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "scores",
    width: int = 6,
    labels: bool = True,
    soft: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The tensor arguments of an op, by name; the temperature is that of a tail. Soft labels are (B, C)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(device, dtype)

    x = {"student_logits": normal(rows, classes, scale=2), "snapshot_logits": normal(snapshots, rows, classes, scale=3)}
    if labels:
        x["labels"] = torch.randint(classes, (rows,), generator=generator).to(device)
    if attention == "scores":
        x["scores"] = normal(rows, snapshots)
    elif attention == "query":
        x["query"] = normal(rows, width)
        x["keys"] = normal(snapshots, rows, width)
    x = sparse(x, k, temperature=temperature)
    if soft:
        x["labels"] = softened(x["labels"], classes).to(dtype)
    return x


def softened(labels: Tensor, classes: int) -> Tensor:
    """Soft labels (B, C): by turns of mixup, of label smoothing, one-hot, of another sum than 1, and all 0."""
    hot = torch.nn.functional.one_hot(labels, classes).float()
    kinds = 0.7 * hot + 0.3 * hot.roll(1, 0), 0.9 * hot + 0.1 / classes, hot, 1.5 * hot.roll(1, 1) + 0.1, 0 * hot
    turn = torch.arange(len(labels), device=labels.device) % len(kinds)
    return sum(kind * (turn == number)[:, None] for number, kind in enumerate(kinds))


def sparse(x: dict[str, Tensor], k: int | None = None, *, temperature: float = 5.0, seed: int = 0) -> dict[str, Tensor]:
    """The arguments of sparse_ensemble_kd that keep k classes of each row of x, the labels of even rows among them.

    Soft labels are of any class. Without k, x as it is.
    """
    if k is None:
        return x
    z = x["snapshot_logits"]
    order = torch.rand(z.shape[1:], generator=torch.Generator().manual_seed(seed))
    if "labels" in x and x["labels"].dim() == 1:
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


def rows_first(name: str, value: Tensor) -> Tensor:
    """A view of an argument or a result in which rows are the first dimension."""
    return value.transpose(0, 1) if value.dim() == 3 or name == "snapshot_tail" else value


def part(x: dict[str, Tensor], rows) -> dict[str, Tensor]:
    """These rows of every tensor."""
    return {name: rows_first(name, rows_first(name, value)[rows]) for name, value in x.items()}


def spread(t: Tensor) -> Tensor:
    """The same numbers as every other row of a wider tensor, some columns in, NaN (or -100) around them."""
    around = torch.nan if t.is_floating_point() else -100
    wide = t.new_full((*t.shape[:-2], 2 * t.shape[-2] + 1, t.shape[-1] + 21), around)
    inside = wide[..., 1 : 2 * t.shape[-2] + 1 : 2, 5 : 5 + t.shape[-1]]
    return inside.copy_(t)


def far(x: Tensor) -> Tensor:
    """The same numbers, a row every 2^30 elements of memory that is committed where it is written."""
    rows, stride = x.shape[-2], 2**30 + 8
    strides, numel = (rows * stride, stride, 1)[3 - x.dim() :], x[..., 0].numel() * stride
    if x.is_cuda:
        return x.new_empty(numel).as_strided(x.shape, strides).copy_(x)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # NORESERVE
    storage = mmap.mmap(-1, x.itemsize * numel, flags=flags)
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
