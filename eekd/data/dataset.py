"""A dataset: splits for training, validation and test that do not overlap, and what normalises them."""

import hashlib
import math
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from eekd.io.files import printable

from .augment import SPLIT, random_bits
from .encoded import RESAMPLE, BadImages, Encoded
from .images import is_plain, open_image
from .opened import Contents, Part, check_int, open_data
from .walk import counted

_TEST_FRACTION = 0.2  # of a dataset that comes in one piece
_TEST_ZOOM = 7 / 8  # what ImageNet's recipes show of a test image: the central 224 of 256 pixels

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
    files      of images in memory, the `Encoded` images that they were made from, where these hold more pixels; a
               random resized crop is cut from them
    """

    images: Tensor | Encoded
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: Encoded | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A dataset: its class names, the augmentation that suits it, and splits that do not overlap.

    `decisions` has one sentence for each decision about splits, classes, channels and size, with its reason; `contents`
    is what was found before it was split.
    """

    name: str
    classes: tuple[str, ...]
    augment: str
    train: Split
    val: Split
    test: Split
    interpolation: str = "bilinear"
    decisions: tuple[str, ...] = ()
    contents: Contents | None = None

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

        The image stands upright as its Exif data say, and on white where it is transparent. The centred square of
        `zoom` times the shorter side is resized by `interpolation` to image_size x image_size, in
        `channels` (1: grey, 3: RGB), scaled to [0, 1], less `mean`, over `std`.
        """
        zoom = getattr(self.test.images, "zoom", _TEST_ZOOM if self.augment == "imagenet" else 1.0)
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "zoom": zoom,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, normalisation, labels and content of train, val and test, in their order.

        Of a split that stays encoded, 1024 evenly spaced images stand for all.
        """
        digest = hashlib.sha256(b"" if self.interpolation == "bilinear" else self.interpolation.encode())
        for split in (self.train, self.val, self.test):
            digest.update(str((*split.images.shape, split.mean, split.std)).encode())
            digest.update(split.labels.numpy().data)
            if isinstance(split.images, Tensor):
                digest.update(split.images.numpy().data)
            else:
                for i in split.images.sample():
                    digest.update(_identity(split.images, i))
        return digest.hexdigest()


def _identity(images: Encoded, i: int) -> bytes:
    """A hash of an encoded image, and of how it is shown where that is not as its pixels are stored."""
    try:
        data, name = images.read(i)
        plain = is_plain(open_image(data, name))
    except (OSError, ValueError):
        if not images.bad.skip:
            raise
        return b"cannot be read"
    return hashlib.sha256(data if plain else data + b"upright, on white, of 8 bits").digest()


def load(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    train_limit: int | None = None,
    image_size: int | None = None,
    interpolation: str = "bilinear",
    channels: int | None = None,
    classes: str | os.PathLike | Sequence[str] | None = None,
    split: str | Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    bad_images: str = "stop",
    bad_image_budget: int = 10,
    memory_budget: int = 1 << 30,
) -> ImageData:
    """A dataset by name (see `names`), path, path/to/file.py:NAME, or Hugging Face id (owner/name).

    A path is a folder of CLASS/*.png, or of train/CLASS/*.png and perhaps val/ and test/; a parquet file, or a
    folder of parquet; or a table (CSV, TSV, JSON, JSON lines, text) of paths and labels. `root` is the
    folder that holds a named dataset's files, or that a relative path starts from. Without it, fashion-mnist is
    Debian's package dataset-fashion-mnist where that is installed; otherwise it and CIFAR come from Hugging Face.
    NAME in a file of Python is a function of a `Reading` that returns a `Found`; the file is run.

    If a dataset has both a validation and a test split, these are used. If it has only one of them, that is the test
    split. If it has neither, a fifth of the images becomes the test split. In the last two cases `val_fraction` of the
    training images, drawn by `seed`, is held out for validation. `train_limit` keeps that many images for training. All
    draws are stratified. `split` names the splits if their names are unusual: "TRAIN", "TRAIN,TEST" or
    "TRAIN,VAL,TEST".

    Image files become squares of `image_size`. By default they keep their size if most are squares of one size, at most
    64; else they become 224. A split is one uint8 tensor if that takes at most `memory_budget` bytes; otherwise images
    are decoded when needed. Random resized crops (augment imagenet) are cut from the files in both cases, unless these
    are squares of `image_size`. `interpolation`, "bilinear" or "bicubic", says how they are resized. `channels` is 1 or
    3; by default 1 if all images of a sample are grey, else 3. `classes` are the class names in order, or a file with
    one per line; by default they are sorted alphabetically.

    `image_column` and `label_column` name the columns of a table if their types do not tell. `config_name` names a
    configuration of a Hugging Face dataset. With `streaming`, nothing of such a dataset is stored on disk: a uniform
    sample of as many images as `train_limit` needs is kept in memory.

    An image that cannot be read raises an error. If `bad_images` is "skip", it is a warning, and another image of its
    class replaces it, for at most `bad_image_budget` images. One warning names what was found but is not used.
    `decisions` says what was decided, and why.

    Raises FileNotFoundError if there is nothing to read, ValueError for a damaged file or an impossible argument,
    ImportError if an optional package is missing.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be the name or path of a dataset, got {name!r}")
    if not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be a number from 0 to below 1, got {val_fraction!r}")
    check_int("seed", seed)
    check_int("bad_image_budget", bad_image_budget, 0)
    if train_limit is not None:
        check_int("train_limit", train_limit, 1)
    if interpolation not in RESAMPLE:
        raise ValueError(f"interpolation must be {' or '.join(RESAMPLE)}, got {interpolation!r}")
    if bad_images not in ("stop", "skip"):
        raise ValueError(f"bad_images must be stop or skip, got {bad_images!r}")
    if streaming and train_limit is None:
        raise ValueError(
            "train_limit must be the number of training images to keep in memory where streaming is, got None"
        )
    opened = open_data(
        name,
        root,
        image_size=image_size,
        channels=channels,
        classes=classes,
        split=split,
        image_column=image_column,
        label_column=label_column,
        config_name=config_name,
        keep=math.ceil(train_limit / (1 - _TEST_FRACTION) / (1 - val_fraction)) + 1 if streaming else None,
        bad=BadImages(bad_images == "skip", bad_image_budget),
    )
    parts, classes, augment, notes = dict(opened.parts), opened.classes, opened.augment, list(opened.said)
    whole, labels = parts["train"], parts["train"][1]
    given = [] if len(parts) == 1 else ["test"] if len(parts) == 2 else ["val", "test"]
    keep = torch.arange(len(labels))
    if len(parts) == 1:
        held = stratified(labels, round(_TEST_FRACTION * len(labels)), seed=0)
        parts["test"], keep = _subset(whole, keep[held]), keep[~held]
        notes.append(f"{_TEST_FRACTION:.0%} of the images are the test split, since there is no other.")
    elif len(parts) == 2:
        if "val" in parts:
            notes.append("The val split is the test split, since there is no other.")
        parts["test"] = parts.pop("val", None) or parts["test"]
    if "val" not in parts:
        held = stratified(labels[keep], round(val_fraction * len(keep)), seed)
        parts["val"], keep = _subset(whole, keep[held]), keep[~held]
        notes.append(f"{val_fraction:.0%} of the training images are held out to validate on (val_fraction).")
    if train_limit is not None:
        if not len(classes) <= train_limit <= len(keep):
            raise ValueError(f"train_limit must be from {len(classes)} (classes) to {len(keep)}, got {train_limit}")
        keep = keep[stratified(labels[keep], train_limit, seed)]
    if not len(keep):
        raise ValueError(f"val_fraction must leave an image for training, got {val_fraction}")
    if "val" not in given and val_fraction and not len(parts["val"][1]):
        raise ValueError(f"val_fraction must leave an image of {len(keep):,} for validation, got {val_fraction}")
    parts["train"] = _subset(whole, keep)

    left_out, missing = list(opened.left_out), []
    for part, purpose in (("train", "train"), *((p, "test" if p == "test" else "validate") for p in given)):
        present = set(parts[part][1].tolist())
        if absent := [classes[k] for k in range(len(classes)) if k not in present]:
            missing.append(f"no image to {purpose} on is in {counted(absent, 'class')}")
    folded = Counter(map(_folded, classes))
    if alike := [name for name in classes if folded[_folded(name)] > 1 and (len(name) > 2 or not name.isascii())]:
        accents = " (or how accents are written)" * any(not name.isascii() for name in alike)
        missing.append(f"only case or spaces{accents} tell {counted(alike, 'class')} apart")  # not a and A
    if left_out or missing:
        left_out = [f"left out are {'; '.join(left_out)}"] if left_out else []
        warnings.warn(f"{printable(name)}: {'; '.join(left_out + missing)}", stacklevel=2)

    if augment == "imagenet":
        for part in ("val", "test"):
            images = parts[part][0]
            if isinstance(images, Encoded):
                images.zoom = _TEST_ZOOM
    for images, _ in parts.values():
        if isinstance(images, Encoded):
            images.interpolation = interpolation
    options = image_size, memory_budget, interpolation
    settled = {part: (_settle(images, y, *options), y) for part, (images, y) in parts.items()}
    mean, std = _STATISTICS.get(name) or statistics(settled["train"][0])
    splits = {part: Split(images, y, mean, std) for part, (images, y) in settled.items()}
    files = parts["train"][0]
    if isinstance(files, Encoded) and isinstance(splits["train"].images, Tensor) and not files.at_size:
        splits["train"] = replace(splits["train"], files=files)
    return ImageData(
        name, classes, augment, **splits, interpolation=interpolation, decisions=tuple(notes), contents=opened.contents
    )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


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
        decoded = [image for i in images.sample() if (image := images.decode_or_skip(i)) is not None]
        if not decoded:
            raise ValueError(f"not one of {len(images.sample())} images can be read")
        images = torch.stack(decoded)
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(4096):
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in chunk.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share * (value - mean[:, None]).square()).sum(1).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def _subset(part: Part, index: Tensor) -> Part:
    images, labels = part
    return (images.subset(index) if isinstance(images, Encoded) else images[index]), labels[index]


def _settle(
    images: Tensor | Encoded, labels: Tensor, image_size: int | None, memory_budget: int, interpolation: str
) -> Tensor | Encoded:
    """The images at their final size, as a tensor if the budget allows."""
    if isinstance(images, Encoded):
        return images.decode_all(labels) if math.prod(images.shape) <= memory_budget else images
    if image_size in (None, images.shape[3]):
        return images
    size = (image_size, image_size)
    return torch.cat(
        [
            F.interpolate(chunk.float(), size, mode=interpolation, antialias=True)
            .round_()
            .clamp_(0, 255)
            .to(torch.uint8)
            for chunk in images.split(4096)
        ]
    )
