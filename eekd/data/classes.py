"""The names of the classes, and their order, which is that of a network's outputs."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error

import torch

from .formats import read_bytes
from .registry import Found
from .walk import counted


def read_classes(classes: str | os.PathLike | Sequence[str]) -> tuple[str, ...]:
    """Class names in their order: given, or of a file with one a line, or of a JSON file with a list of them."""
    where = "classes"
    if isinstance(classes, str | os.PathLike):
        where, text = str(classes), _text(classes)
        try:
            classes = json.loads(text) if where.endswith(".json") else [line.strip() for line in text.splitlines()]
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} must be a list of class names as JSON: {error}") from None
        classes = [name for name in classes if name != ""] if isinstance(classes, list) else classes
    if not isinstance(classes, Sequence) or not all(isinstance(name, str) and name for name in classes) or not classes:
        raise ValueError(f"{where} must be a list of class names, one a line, got {repr(classes)}")
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise ValueError(f"{where} must name each class once, got {twice[0]!r} twice")
    return tuple(classes)


def _text(path: str | os.PathLike) -> str:
    try:
        return read_bytes(Path(path).expanduser()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from None


def reordered(dataset: Found, classes: tuple[str, ...]) -> Found:
    """The data set with labels that are places in `classes`; ValueError where a class of it is not among them."""
    if strange := [name for name in dataset.classes if name not in classes]:
        raise ValueError(f"classes must name all classes of the data, got none of {counted(strange, 'class')}")
    place = torch.tensor([classes.index(name) for name in dataset.classes])
    return dataset._replace(parts={part: (x, place[y]) for part, (x, y) in dataset.parts.items()}, classes=classes)


def order_of(classes: tuple[str, ...], given: tuple[str, ...] | None) -> str:
    """What order the classes are in, in words."""
    if given:
        return "in the order given"
    by_number = all(name.isascii() and name.isdecimal() for name in classes)
    if list(classes) != sorted(classes):
        return "in the data set's order"
    if by_number and list(classes) != sorted(classes, key=int):
        return "in the order of the alphabet, in which 10 comes before 2 (classes gives another)"
    return "in the order of the alphabet"
