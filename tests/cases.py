"""The shapes an op is tried on, each with its reason, and the tensors of a shape."""

from typing import NamedTuple

import torch
from torch import Tensor


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
