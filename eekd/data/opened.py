"""A data set that is found, its classes in order, its images ready to be decoded, before anything is split."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eekd.io.files import printable

from . import named  # noqa: F401  # registers them
from .classes import order_of, read_classes, reordered
from .encoded import BadImages, Encoded, decide, look_at
from .registry import Found, Reading, find, validate

LARGEST_SIZE = 8192  # of an image's side, in pixels
Part = tuple[Tensor | Encoded, Tensor]


@dataclass(frozen=True)
class Contents:
    """What was found: the images of each class in each part, and the names of files, from the data set's folder.

    `files` is None where the images are no files.
    """

    counts: dict[str, list[int]]
    files: Sequence[str] | None


@dataclass(frozen=True)
class Opened:
    """Images and labels of train, and perhaps of val and test, and what was decided and left out in finding them."""

    parts: Mapping[str, Part]
    classes: tuple[str, ...]
    augment: str
    said: list[str]
    left_out: list[str]
    contents: Contents


def open_data(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    classes: str | os.PathLike | Sequence[str] | None = None,
    split: str | Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    config_name: str | None = None,
    keep: int | None = None,
    bad: BadImages | None = None,
) -> Opened:
    """Finds a data set; `eekd.data.load` says what the arguments mean and what is raised."""
    if image_size is not None:
        check_int("image_size", image_size, 1)
        if image_size > LARGEST_SIZE:
            raise ValueError(f"image_size must be at most {LARGEST_SIZE}, got {image_size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels!r}")
    root = None if root is None else Path(root).expanduser()
    if root and not root.exists():
        raise FileNotFoundError(f"root must be a folder, got {root}, which does not exist")
    bad = bad or BadImages()
    reading = Reading(
        root=root,
        classes=None if classes is None else read_classes(classes),
        split=None if split is None else _read_split(split),
        image_column=image_column,
        label_column=label_column,
        config_name=config_name,
        keep=keep,
        skip_bad=bad.skip,
    )
    dataset = validate(name, find(name, reading))
    if reading.classes:
        dataset = reordered(dataset, reading.classes)
    parts, augment, notes = _encoded(dataset, image_size, channels, bad)
    classes = tuple(dataset.classes)
    if len(classes) < 2:
        raise ValueError(f"{name} must have at least two classes, got {', '.join(classes)}")
    listed = ", ".join(map(printable, classes[:8])) + ", ..." * (len(classes) > 8)
    notes = [*dataset.said, *notes, f"{len(classes)} classes, {order_of(classes, reading.classes)}: {listed}."]
    counts = {part: labels.bincount(minlength=len(classes)).tolist() for part, (_, labels) in dataset.parts.items()}
    return Opened(parts, classes, augment, notes, list(dataset.left_out), Contents(counts, _files(dataset)))


def _read_split(split: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (split.split(",") if isinstance(split, str) else split))
    if not 1 <= len(names) <= 3 or not all(names) or len(set(names)) < len(names):
        raise ValueError(f"split must be TRAIN, TRAIN,TEST or TRAIN,VAL,TEST, each another, got {split!r}")
    return names


def _encoded(
    dataset: Found, image_size: int | None, channels: int | None, bad: BadImages
) -> tuple[Mapping[str, Part], str, list[str]]:
    """The splits with images to decode, or as tensors; the augmentation that suits them; what was decided."""
    images = dataset.parts["train"][0]
    if isinstance(images, Tensor):
        if channels not in (None, images.shape[1]):
            raise ValueError(f"channels must be {images.shape[1]}, which these images have, got {channels}")
        size = image_size or images.shape[3]
        augment = dataset.augment or ("imagenet" if size > 64 else "crop" if images.shape[1] == 1 else "crop-flip")
        return dict(dataset.parts), augment, [f"Size {size} x {size}: {'as asked for' if image_size else 'their own'}."]

    def encode(images: Sequence, channels: int, size: int) -> Encoded:
        return Encoded(images, channels=channels, image_size=size, folders=dataset.folders, bad=bad)

    look = look_at(encode(images, 3, 1))
    channels, size, notes = decide(look, image_size, channels)
    parts = {part: (encode(images, channels, size), labels) for part, (images, labels) in dataset.parts.items()}
    parts["train"][0].at_size = look.sizes.keys() == {(size, size)}
    augment = dataset.augment or ("imagenet" if size > 64 else "crop" if channels == 1 else "crop-flip")
    return parts, augment, notes


def _files(dataset: Found) -> list[str] | None:
    """What the files of all parts are called, from the folder `base`, in order."""
    if dataset.base is None:
        return None
    prefix = os.path.join(dataset.base, "")
    return sorted(path.removeprefix(prefix) for images, _ in dataset.parts.values() for path in images)


def check_int(name: str, value, low: int | None = None) -> int:
    """`value`, or a TypeError or ValueError naming it where it is not an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value
