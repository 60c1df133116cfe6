"""The registry of data sets: names, and the functions that read them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eekd import user_code
from eekd.io.files import nearest

from .encoded import Encoded

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Reading:
    """The settings of `load` that a reader of a dataset can need. None: the reader chooses."""

    root: Path | None = None  # where its files are
    classes: tuple[str, ...] | None = None
    split: tuple[str, ...] | None = None  # the names of its splits: of train, or train and test, or train, val, test
    image_column: str | None = None
    label_column: str | None = None
    config_name: str | None = None
    keep: int | None = None  # images a split may have when they are read as a stream
    skip_bad: bool = False

    def refuse(self, what: str, *names: str) -> None:
        """ValueError where a setting is given that a reader of `what` has no use for."""
        for name in names:
            if getattr(self, name) is not None:
                shown = "streaming" if name == "keep" else name
                raise ValueError(f"{shown} must not be given for {what}, got {getattr(self, name)!r}")


class Found(NamedTuple):
    """What a reader found.

    parts     "train", and perhaps "val" and "test": (images, labels)
              images: (N, C, S, S) uint8, or N paths, encoded images, or cells of a Hugging Face image column
              labels: N whole numbers, the places in `classes`
    classes   the names of the classes
    augment   what suits the images, one of AUGMENTATIONS; None: their size decides
    folders   where the files must lie whose paths are data; None: anywhere
    base      the folder that names of files are told from
    said      what the reader decided, a sentence each
    left_out  what it found and did not read, a phrase each
    """

    parts: dict[str, tuple[Any, Any]]
    classes: Sequence[str]
    augment: str | None = None
    folders: Sequence[Path] | None = None
    base: Path | None = None
    said: Sequence[str] = ()
    left_out: Sequence[str] = ()


Reader = Callable[[Reading], Found]
DATASETS: dict[str, Reader] = {}


def register(name: str) -> Callable[[Reader], Reader]:
    """Decorates the function that reads the dataset of this name. It takes a `Reading` and returns a `Found`.

    ValueError if the name is taken, or looks like a path.
    """
    if not name or name in DATASETS or "/" in name or ":" in name:
        raise ValueError(f"name must be new and without / and :, got {name!r}")

    def add(read: Reader) -> Reader:
        DATASETS[name] = read
        return read

    return add


def names() -> tuple[str, ...]:
    """The names of the datasets that `load` knows."""
    return tuple(DATASETS)


def find(name: str, reading: Reading) -> Found:
    """Reads a registered data set, path/to/file.py:NAME or a path; see `eekd.data.load`, which says what it raises."""
    from .folders import read_path
    from .tables import read_hub

    own_file = user_code.is_file_name(name)
    if name in DATASETS or own_file:
        wanted = "a function of a Reading that returns a Found"
        read = user_code.load(name, wanted) if own_file else DATASETS[name]
        others = [field.name for field in fields(Reading) if field.name not in ("root", "classes", "skip_bad")]
        if not own_file:
            reading.refuse(name, *others)
        with user_code.errors_of(name) if own_file else nullcontext():
            dataset = read(reading)
        return validate(name, dataset)
    path = Path(reading.root or "", name).expanduser()
    if path.exists():
        return read_path(path, reading)
    if name.count("/") == 1 and name[0] not in "./~":
        return read_hub(name, reading, f"{name} is neither a path nor to be had from Hugging Face")
    hint = nearest(name, DATASETS) or f"; it must be {', '.join(DATASETS)}, a path or a Hugging Face id"
    raise FileNotFoundError(f"there is no dataset {str(path)!r} in {Path.cwd()}{hint}")


def validate(name: str, dataset: Found) -> Found:
    """What a reader found, with labels as tensors; ValueError or TypeError where it is not what `Found` says."""
    if not isinstance(dataset, Found):
        raise TypeError(f"{name} must return an eekd.data.Found, got a {type(dataset).__name__}")
    if not dataset.parts.keys() <= set(SPLITS) or "train" not in dataset.parts:
        raise ValueError(f"{name} must have the parts train, and perhaps val and test, got {', '.join(dataset.parts)}")
    parts, shapes = {}, set()
    for part, (images, labels) in dataset.parts.items():
        labels = torch.as_tensor(labels)
        if labels.dim() != 1 or labels.is_floating_point() or len(labels) != len(images) or not len(labels):
            got = f"{len(images)} images and labels {tuple(labels.shape)} {labels.dtype}"
            raise ValueError(f"{name} must have a whole number for each image of {part}, got {got}")
        if labels.min() < 0 or labels.max() >= len(dataset.classes):
            wanted = f"from 0 to {len(dataset.classes) - 1}"
            raise ValueError(f"{name} must have labels {wanted} in {part}, got {labels.min()} to {labels.max()}")
        if isinstance(images, Tensor):
            if images.dim() != 4 or images.dtype != torch.uint8 or images.shape[2] != images.shape[3]:
                got = f"{tuple(images.shape)} {images.dtype}"
                raise ValueError(f"{name} must have images (N, C, S, S) uint8 in {part}, got {got}")
            shapes.add(tuple(images.shape[1:]))
        elif isinstance(images, Encoded):
            raise TypeError(
                f"{name} must have images as a tensor, or a sequence of paths or bytes, in {part}, got Encoded"
            )
        parts[part] = images, labels.long().cpu()
    tensors = [part for part, (images, _) in parts.items() if isinstance(images, Tensor)]
    if len(tensors) not in (0, len(parts)):
        raise TypeError(f"{name} must have images as tensors in all parts or in none, got them in {', '.join(tensors)}")
    if len(shapes) > 1:
        raise ValueError(f"{name} must have images of one shape, got {' and '.join(map(str, sorted(shapes)))}")
    return dataset._replace(parts=parts)
