"""Which column of a table holds the labels, which the splits, and what the labels mean."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from eekd.io.files import printable

from .walk import split_of

LABELS = (
    "label", "labels", "class", "class_name", "classname", "category", "target", "label_name", "species", "breed",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "usage", "dataset")
_MARKS = {f"is_{name}": name for name in ("train", "val", "valid", "validation", "test")}  # as fastai's is_valid
_TRUE, _FALSE = ("1", "true", "1.0", "yes"), ("0", "false", "0.0", "no")
_NO_LABEL = ("na", "n/a", "<na>", "null", "none")  # as tables write what is missing
DIFFERENT = 0.9  # of the rows: so many different labels are names of images, or captions


class Table(NamedTuple):
    """Rows of text; `columns` are their names, or numbers where there are no names."""

    path: Path
    columns: list[str]
    rows: list[list[str]]

    def column(self, number: int) -> list[str]:
        return [row[number] for row in self.rows]


def column_named(table: Table, name: str, setting: str) -> int:
    """The number of a column; ValueError where there is none of this name."""
    if name not in table.columns:
        raise ValueError(f"{setting} must be one of {', '.join(table.columns)}, got {name!r}")
    return table.columns.index(name)


def split_column(table: Table) -> tuple[int | None, list[str | None]]:
    """The column that tells the splits, and the split of each row."""
    for number, name in enumerate(map(str.lower, table.columns)):
        column = [value.strip().lower() for value in table.column(number)]
        if name in SPLIT_COLUMNS and all(map(split_of, set(column))):
            return number, [split_of(value) for value in column]
        if name in _MARKS and set(column) <= {*_TRUE, *_FALSE}:
            part = split_of(_MARKS[name])
            other = "test" if part == "train" else "train"
            return number, [part if value in _TRUE else other for value in column]
    return None, []


def label_column(table: Table, taken: set[int | None], asked: str | None) -> tuple[list[str], str] | None:
    """The label of each row, and what the column is called; None where no column can be meant by it."""
    lowered = [name.lower() for name in table.columns]
    others = [k for k in range(len(table.columns)) if k not in taken and lowered[k] not in ("", "index")]
    known = [lowered.index(name) for name in LABELS if name in lowered and lowered.index(name) in others]
    if asked is not None:
        chosen = column_named(table, asked, "label_column")
    elif known or len(others) == 1:
        chosen = (known or others)[0]
    elif labels := _marked(table, others):
        return labels, "a column for each class"
    elif table.columns[:2] == ["0", "1"] and 1 in others:  # no names: path and label come first
        chosen = 1
    else:
        return None
    return table.column(chosen), table.columns[chosen]


def _marked(table: Table, columns: Sequence[int]) -> list[str] | None:
    """The labels where there is a column for each class, with a 1 in that of the image."""
    try:
        marks = [[float(row[k]) for k in columns] for row in table.rows]
    except ValueError:
        return None
    if not marks or not all(sorted(row)[-2:] == [0, 1] and min(row) == 0 and sum(row) == 1 for row in marks):
        return None
    return [table.columns[columns[row.index(1)]] for row in marks]


def labels_among(classes: Sequence[str], table: Table, images: int) -> list[str] | None:
    """The labels of the rows where all are known classes: the one column, beside that of the images, whose entries,
    or their first words, are classes, or the columns with a mark for each class."""
    names, others = set(classes), [k for k in range(len(table.columns)) if k != images]
    for k in others:
        labels = [label.strip() for label in table.column(k)]
        labels = [label if label in names else label.partition(" ")[0] for label in labels]
        if set(labels) <= names:
            return labels
    marked = _marked(table, [k for k in others if table.columns[k] in names])
    return marked if marked and set(marked) <= names else None


def classes_of(source: str | Path, labels: Iterable[str], column: str) -> list[str]:
    """Labels as names of classes: 1.0, as a table with gaps has it, is 1.

    ValueError where they are measurements, and where the name of the column does not say that they are labels and
    almost each row has another.
    """
    labels = [label.strip() for label in labels]
    numbers = [label for label in labels if re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", label.lower())]
    measured = len(numbers) == len(labels) and not all(re.fullmatch(r"-?\d+(\.0*)?", label) for label in numbers)
    distinct = len(set(labels))
    guessed = column.lower() not in LABELS
    if (measured or guessed) and distinct > max(len(labels) * (0.5 if measured else DIFFERENT), 10):
        what = "different numbers" if measured else f"different ones in {len(labels)} rows"
        raise ValueError(
            f"{source} must have classes as labels, got {distinct} {what} such as {printable(labels[0])!r:.100}"
        )
    if measured or len(numbers) < len(labels):
        return labels
    return [label.partition(".")[0] for label in labels]


def ordered(labels: Iterable[str]) -> list[str]:
    """Classes in order: by number where all are whole numbers, else by the alphabet."""
    distinct = set(labels)
    numbers = all(label.removeprefix("-").isascii() and label.removeprefix("-").isdecimal() for label in distinct)
    return sorted(distinct, key=int) if numbers else sorted(distinct)


def warn_of_doubtful(source: str | Path, labels: Iterable[str]) -> None:
    """Warns of classes that could mean that there is no label, or several."""
    counts = Counter(labels)
    missing = ["-1"] if {"-1", "0"} <= counts.keys() else []
    for name in missing + [name for name in counts if name.strip().lower() in _NO_LABEL]:
        warnings.warn(
            f"{source}: {printable(name)} is read as a class, of {counts[name]:,} images; if it means that there is no "
            "label, take these rows out",
            stacklevel=3,
        )
    several = [name for name in counts if _is_several(name, counts)]
    if several:
        warnings.warn(
            f"{source}: {printable(several[0])!r:.100} is read as one class, though its parts are classes too; if it "
            "means several labels, leave one for each image",
            stacklevel=3,
        )


def _is_several(name: str, known: Counter) -> bool:
    parts = [part.strip() for part in re.split(r"[|;,]", name)]
    parts = parts if len(parts) > 1 else name.split()
    return len(set(parts)) > 1 and all(part in known for part in parts)
