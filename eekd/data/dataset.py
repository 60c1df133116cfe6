"""A dataset: splits for training, validation and test that do not overlap, and what normalises them."""

import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import SPLIT, random_bits
from .encoded import Encoded
from .sources import Part, find

_TEST_FRACTION = 0.2  # of a dataset that comes in one piece
_TEST_ZOOM = 7 / 8  # what ImageNet's recipes show of a test image: the central 224 of 256 pixels
_SAMPLED = 1024  # images that stand for a split too large to read whole

# What the published recipes normalise with: RepDistiller's for CIFAR-100, the usual figures for CIFAR-10.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


@dataclass(frozen=True, eq=False)
class Split:
    """Samples, and the statistics that normalise them.

    images     (N, C, S, S) uint8, or as many `Encoded` images
    labels     (N,) int64
    mean, std  one number per channel, for images scaled to [0, 1]
    """

    images: Tensor | Encoded
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A dataset: its class names, the augmentation that suits it, and splits that do not overlap."""

    name: str
    classes: tuple[str, ...]
    augment: str
    train: Split
    val: Split
    test: Split

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train.images.shape[3]

    @property
    def mean(self) -> tuple[float, ...]:
        return self.train.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.train.std

    @property
    def preprocessing(self) -> dict:
        """How an image becomes a network's input when it is tested, as JSON values.

        The centred square of `zoom` times the shorter side is resized bilinearly to image_size x image_size, in
        `channels` (1: grey, 3: RGB), scaled to [0, 1], less `mean`, over `std`.
        """
        zoom = getattr(self.test.images, "zoom", _TEST_ZOOM if self.augment == "imagenet" else 1.0)
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "zoom": zoom,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, normalisation, labels and content of train, val and test, in their order.

        Of a split that stays encoded, 1024 evenly spaced images stand for all.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            digest.update(str((*split.images.shape, split.mean, split.std)).encode())
            digest.update(split.labels.numpy())
            if isinstance(split.images, Tensor):
                digest.update(split.images.numpy())
            else:
                for i in _evenly(len(split)):
                    digest.update(hashlib.sha256(split.images.read(i)[0]).digest())
        return digest.hexdigest()


def load(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    train_limit: int | None = None,
    image_size: int | None = None,
    memory_budget: int = 1 << 30,
) -> ImageData:
    """A dataset by name (glyphs, digits, fashion-mnist, cifar10, cifar100), path, or Hugging Face id (owner/name).

    A path is a folder of train/CLASS/*.png, val/CLASS/*.png and perhaps test/, or a parquet file, or a folder
    of parquet. `root` is the folder that holds a named dataset's files, or that a relative path starts from.
    Without it, fashion-mnist is Debian's package dataset-fashion-mnist where that is installed; otherwise it
    and CIFAR come from Hugging Face.

    A dataset with both a validation and a test split keeps them. Of one with only val/ or only test/, that is
    the test split; of one with neither, a fifth is. In both cases validation is `val_fraction` of the
    training data, held out by `seed`. `train_limit` keeps that many images for training. All draws are
    stratified.

    Image files become squares of `image_size`, by default their own size if square and at most 64, else 224:
    in one uint8 tensor where a split takes at most `memory_budget` bytes, otherwise decoded when needed.

    Raises FileNotFoundError where there is nothing to read, ValueError for a damaged file or an impossible
    argument, ImportError where an optional package is missing.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name is {name!r}, wanted the name or path of a dataset")
    if not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction!r}, wanted a number from 0 to below 1")
    check_int("seed", seed)
    for argument, value in (("train_limit", train_limit), ("image_size", image_size)):
        if value is not None:
            check_int(argument, value, 1)
    root = None if root is None else Path(root).expanduser()
    if root and not root.exists():
        raise FileNotFoundError(f"root is {root}, which does not exist")

    parts, classes, augment = find(name, root, image_size)
    if len(classes) < 2:
        raise ValueError(f"{name} has the classes {', '.join(classes)}, wanted at least two")
    whole, labels = parts["train"], parts["train"][1]
    keep = torch.arange(len(labels))
    if len(parts) == 1:
        held = stratified(labels, round(_TEST_FRACTION * len(labels)), seed=0)
        parts["test"], keep = _subset(whole, keep[held]), keep[~held]
    elif len(parts) == 2:
        parts["test"] = parts.pop("val", None) or parts["test"]
    if "val" not in parts:
        held = stratified(labels[keep], round(val_fraction * len(keep)), seed)
        parts["val"], keep = _subset(whole, keep[held]), keep[~held]
    if train_limit is not None:
        if not len(classes) <= train_limit <= len(keep):
            raise ValueError(f"train_limit is {train_limit}, wanted {len(classes)} (classes) to {len(keep)}")
        keep = keep[stratified(labels[keep], train_limit, seed)]
    if not len(keep):
        raise ValueError(f"val_fraction is {val_fraction}, which leaves no image for training")
    parts["train"] = _subset(whole, keep)

    if augment == "imagenet":
        parts["val"][0].zoom = parts["test"][0].zoom = _TEST_ZOOM
    parts = {part: (_settle(images, image_size, memory_budget), y) for part, (images, y) in parts.items()}
    mean, std = _STATISTICS.get(name) or statistics(parts["train"][0])
    splits = {part: Split(images, y, mean, std) for part, (images, y) in parts.items()}
    return ImageData(name, tuple(classes), augment, **splits)


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """A mask (N,) over labels (N,) that draws `count` samples, of each class its share.

    The samples, ordered by class and within a class by a hash of (seed, sample), are taken at even intervals.
    """
    n = len(labels)
    order = random_bits(seed, 0, SPLIT, torch.arange(n)).argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    steps = torch.arange(n + 1) * count // max(n, 1)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order[steps[1:] > steps[:-1]]] = True
    return mask


def statistics(images: Tensor | Encoded) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images scaled to [0, 1], from exact histograms.

    Of images that stay encoded, 1024 evenly spaced ones stand for all.
    """
    if isinstance(images, Encoded):
        images = torch.stack([images.decode(i) for i in _evenly(len(images))])
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(4096):
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in chunk.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share * (value - mean[:, None]).square()).sum(1).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def check_int(name: str, value, low: int | None = None) -> int:
    """`value`, or a TypeError or ValueError naming it where it is not an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, wanted an integer")
    if low is not None and value < low:
        raise ValueError(f"{name} is {value}, wanted at least {low}")
    return value


def _evenly(n: int) -> range:
    return range(0, n, max(1, math.ceil(n / _SAMPLED)))


def _subset(part: Part, index: Tensor) -> Part:
    images, labels = part
    return (images.subset(index) if isinstance(images, Encoded) else images[index]), labels[index]


def _settle(images: Tensor | Encoded, image_size: int | None, memory_budget: int) -> Tensor | Encoded:
    """The images at their final size, as a tensor if the budget allows."""
    if isinstance(images, Encoded):
        return images.decode_all() if math.prod(images.shape) <= memory_budget else images
    if image_size in (None, images.shape[3]):
        return images
    size = (image_size, image_size)
    return torch.cat(
        [
            F.interpolate(chunk.float(), size, mode="bilinear", antialias=True).round_().to(torch.uint8)
            for chunk in images.split(4096)
        ]
    )
