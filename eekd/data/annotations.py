"""Tables that say which image has which label: CSV, TSV, JSON, JSON lines, or text with a path and a label a line."""

import csv
import io
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from reprlib import repr  # a damaged file must not become a page of error

from eekd.io.files import printable

from .columns import (
    LABELS,
    SPLIT_COLUMNS,
    Table,
    classes_of,
    column_named,
    label_column,
    labels_among,
    ordered,
    split_column,
    warn_of_doubtful,
)
from .formats import read_bytes
from .registry import Found, Reading
from .walk import TABLES, Passed, counted, entries, images_in, is_image, plural, split_of

_TRIED = 50  # rows that tell which column holds what


class Images:
    """The images in a folder, found by what a table calls them."""

    def __init__(self, base: Path, paths: Iterable[str]):
        self.base, self.named, self.folded = base, defaultdict(list), defaultdict(list)
        for path in paths:
            parts = Path(path).relative_to(base).parts
            for name in {parts[-1], PurePosixPath(parts[-1]).stem}:
                self.named[name].append((parts, path))
                self.folded[name.casefold()].append((parts, path))

    def find(self, text: str) -> str | None:
        """The path of the image that `text` names: by its path, the end of it, or its name without ending.

        Where no name is the same, capitals do not count. ValueError where several images are called so.
        """
        parts = PurePosixPath(text.strip().replace("\\", "/")).parts
        parts = tuple(part for part in parts if part not in ("/", "."))
        if not parts or ".." in parts:
            return None
        best, most = [], 0
        exact = self.named.get(parts[-1])
        for parts_of, path in exact or self.folded.get(parts[-1].casefold(), ()):
            same = 1  # the name itself
            while same < min(len(parts), len(parts_of)) and (
                parts[-same - 1] == parts_of[-same - 1]
                or (not exact and parts[-same - 1].casefold() == parts_of[-same - 1].casefold())
            ):
                same += 1
            if same >= min(len(parts), len(parts_of), 2) and same >= most:
                best, most = [*(best if same == most else []), path], same
        if len(best) > 1:
            exact = self.base.joinpath(*parts)
            best = [path for path in best if Path(path) in (exact, *(exact.with_suffix(Path(p).suffix) for p in best))]
            if len(best) != 1:
                raise ValueError(f"{self.base} must hold one image called {text!r}, got several")
        return best[0] if best else None


def read_table(path: Path, columns: int = 2) -> Table:
    """The table in a file, of UTF-8; the first row may be names. ValueError where it is none of so many columns."""
    ending = path.suffix.lower()
    try:
        data = read_bytes(path)
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")  # as Excel writes it
        if ending in (".json", ".jsonl", ".ndjson"):
            return _from_json(path, text)
        if re.match(r"sep=[,;|\t]\r?\n", text):  # which Excel reads
            text = text.partition("\n")[2]
        first = text.partition("\n")[0]
        if ending == ".txt" and "\t" not in text and (len(first.split()) > 1 or not re.search("[,;|]", first)):
            rows = [line.rsplit(None, 1) for line in text.splitlines() if line.strip()]
        else:
            delimiter = max(",;\t|", key=first.count)
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    except (csv.Error, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a table in UTF-8: {error}") from None
    if not rows or len(rows[0]) < columns:
        got = f"{', '.join(map(printable, rows[0]))!r:.100} in row 1" if rows else "0 rows"
        raise ValueError(f"{path} must have a path and a label in each row, got {got}")
    if odd := next((number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])), None):
        raise ValueError(f"{path} must have {len(rows[0])} columns in each row, got {len(rows[odd - 1])} in row {odd}")
    return Table(path, [], rows)


def _from_json(path: Path, text: str) -> Table:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:  # an object in each line, whatever the ending
        value = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(value, dict) and path.suffix.lower() != ".json":  # of one line
        value = [value]
    [inner] = value.values() if isinstance(value, dict) and len(value) == 1 else [None]
    if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
        value = inner  # of {"annotations": [{…}, …]}
    if isinstance(value, dict) and isinstance(value.get("labels"), list):  # as StyleGAN's dataset.json has them
        value = value["labels"]
    if isinstance(value, dict) and value and all(isinstance(names, list) for names in value.values()):
        value = [[name, label] for label, names in value.items() for name in names]
    if isinstance(value, dict):
        value = [[name, label] for name, label in value.items()]
    records = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    if records and len(records) == len(value):
        columns = list(dict.fromkeys(name for row in records for name in row))
        columns = [name for name in columns if name in LABELS or not any(_nested(row.get(name)) for row in records)]
        rows = [[row.get(name) for name in columns] for row in records]
    else:
        columns, rows = ["0", "1"], value
    plain = isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) == len(columns)
        and all(x is None or isinstance(x, str | int | float) for x in row)
        for row in rows
    )
    if not plain or not rows or not columns:
        wanted = "a list of objects of path and label, or an object of path: label or of label: [paths]"
        raise ValueError(f"{path} must be {wanted}, got {repr(value)}")
    return Table(path, [str(name) for name in columns], [["" if x is None else str(x) for x in row] for row in rows])


def _nested(value) -> bool:
    return isinstance(value, list | dict)


def _with_header(table: Table, images: Images) -> Table:
    """The table with names of its columns: its first row, where that names no image."""
    if table.columns:
        return table
    numbers = [str(number) for number in range(len(table.rows[0]))]
    if any(_is_image(cell, images) for cell in table.rows[0]) or len(table.rows) == 1:
        return table._replace(columns=numbers)
    return table._replace(columns=[cell.strip() for cell in table.rows[0]], rows=table.rows[1:])


def _is_image(text: str, images: Images) -> bool:
    try:
        return images.find(text) is not None
    except ValueError:
        return True


def _image_column(table: Table, images: Images, asked: str | None) -> int | None:
    """The column that names most images, or that asked for; None where no column names any."""
    if asked is not None:
        return column_named(table, asked, "image_column")
    hits = []
    for k in range(len(table.columns)):  # a label can be called as a file is without its ending
        values = {row[k].strip() for row in table.rows[:_TRIED]}
        named = [value for value in values if _is_image(value, images)]
        hits.append((sum(is_image(value) for value in named), len(named)))
    return hits.index(max(hits)) if max(hits)[1] else None


def read_annotations(files: dict[str, Path], reading: Reading, base: Path | None = None) -> Found:
    """Reads a table for each split, or one for all; the images lie below `base`, else root, else the table's folder.

    ValueError where no column names images, where no column or several can be meant by the label, where images are
    missing (unless bad images are skipped), and where a row has no label.
    """
    reading.refuse("a table of paths", "config_name", "keep", "split")
    base = base or reading.root or files["train"].parent
    if not base.is_dir():
        raise ValueError(f"root must be the folder of the images in {files['train']}, got {base}")
    passed, notes = Passed(), []
    labels_of: dict[str, dict[str, str]] = {}  # of each part: the label of each path
    images = Images(base, images_in(base, passed))
    for part, file in files.items():
        table = _with_header(read_table(file, 2 if part == "train" else 1), images)
        place = _image_column(table, images, reading.image_column)
        names = ", ".join(map(printable, table.columns[:12])) + ", ..." * (len(table.columns) > 12)
        if place is None:
            raise ValueError(
                f"{file} must name images below {base}, got none in its columns {names}: --root says where they are"
            )
        split, splits = split_column(table)
        unlabelled = part != "train" and reading.label_column not in (None, *table.columns)
        column = None if unlabelled else label_column(table, {place, split}, reading.label_column)
        labels, labelled_by = column or ([], "")
        if not any(labels):
            if part != "train":
                passed.phrases.append(f"{printable(file.name)}, which has no labels")
                continue
            raise ValueError(f"{file} must have a column label, got {names}: --label-column says which it is")
        for name in set(table.columns) - {labelled_by}:
            if name.lower() in SPLIT_COLUMNS and split is None:
                values = sorted({value or "nothing" for value in table.column(table.columns.index(name))})
                passed.phrases.append(
                    f"the column {printable(name)}, whose {counted(values, 'value', 3)} tell no splits"
                )
        labels, missing, again = classes_of(file, labels, "label" if reading.label_column else labelled_by), [], 0
        for number, (name, label) in enumerate(zip(table.column(place), labels, strict=True), 1):
            path = images.find(name)
            if path is None:
                missing.append(name)
                continue
            if label.lower() in ("", "nan"):
                raise ValueError(f"{file} must have a label for {name!r}, got none in row {number}")
            own = labels_of.setdefault((splits[number - 1] if splits else None) or part, {})
            if (other := own.get(path, label)) != label:
                raise ValueError(
                    f"{file} must have one label for {name!r}, got {other!r} and, in row {number}, {label!r}"
                )
            again += path in own
            own[path] = label
        if missing and not reading.skip_bad:
            raise ValueError(f"{file} names {counted(missing, 'image')} that {base} lacks")
        if missing:
            passed.phrases.append(f"{counted(missing, 'row')} of {printable(file.name)} whose images are missing")
        if again:
            passed.phrases.append(f"{plural(again, 'row')} of {printable(file.name)} that name an image again")
        notes.append(
            f"{printable(file.name)} names the images in {printable(table.columns[place])}, their labels in "
            f"{printable(labelled_by)}."
        )
    if "train" not in labels_of:
        raise ValueError(f"{files['train']} must name images to train on, got {', '.join(labels_of)}")
    classes = ordered(labels_of["train"].values())
    warn_of_doubtful(files["train"], labels_of["train"].values())
    number = {name: k for k, name in enumerate(classes)}
    parts = {}
    for part, pairs in labels_of.items():
        if part != "train" and (both := pairs.keys() & labels_of["train"].keys()):
            warnings.warn(f"{files['train']}: {plural(len(both), 'image')} of {part} are in train too", stacklevel=2)
        if strange := next((label for label in pairs.values() if label not in number), None):
            raise ValueError(
                f"{files.get(part, files['train'])} has the label {strange!r} in {part}, which train has not"
            )
        parts[part] = list(pairs), [number[label] for label in pairs.values()]
    return Found(parts, classes, base=base, said=notes, left_out=passed.all())


def labels_beside(
    folder: Path, images: Sequence[str], classes: list[str], passed: Passed, asked: str | None = None
) -> tuple[list[str], list[int], list[str]] | None:
    """Paths, labels and classes of the images in a folder without classes, from a table in it or beside it.

    `asked` names the column of the labels. With `classes`, all labels are one of them, or begin with it. None where
    there is no such table; images that it does not name are left out.
    """
    candidates = Images(folder, images)
    own = split_of(folder.name)
    for place in (folder, folder.parent):
        tables = [Path(entry.path) for entry in entries(place)[1] if entry.name.lower().endswith(TABLES)]
        # A table beside the folders speaks of the training data, unless its name says otherwise: images of another
        # split can be called the same.
        meant = [path for path in tables if place == folder or (split_of(path.stem) or "train") == (own or "train")]
        for path in sorted(meant, key=lambda path: (split_of(path.stem) != own, path.name)):
            try:
                table = _with_header(read_table(path), candidates)
                number = _image_column(table, candidates, None)
            except ValueError:  # a text of another kind
                continue
            if number is None:
                continue
            named = [(candidates.find(row[number]) or "", row) for row in table.rows]
            named = [(image, row) for image, row in named if image]
            if 2 * len(dict(named)) < len(images):
                continue
            table = table._replace(rows=[row for _, row in named])
            labels = labels_among(classes, table, number) if classes else _labels_of(table, number, asked)
            if not labels:
                passed.unusable.append(printable(path.name))
                continue
            if not classes:
                warn_of_doubtful(path, labels)
            labels_of: dict[str, str] = {}
            for (image, _), label in zip(named, labels, strict=True):
                if (other := labels_of.setdefault(image, label)) != label:
                    raise ValueError(f"{path} must have one label for {image!r}, got {other!r} and {label!r}")
            if left := len(images) - len(labels_of):
                passed.phrases.append(
                    f"{plural(left, 'image')} of {printable(folder.name)}/ that {printable(path.name)} lacks"
                )
            passed.said.append(f"{printable(path.name)} names the labels of the images in {printable(folder.name)}/.")
            names = classes or ordered(labels)
            return list(labels_of), [names.index(label) for label in labels_of.values()], names
    return None


def _labels_of(table: Table, number: int, asked: str | None) -> list[str] | None:
    """The labels in a table whose column of that number names images; None where it is one of something else."""
    labels, column = label_column(table, {number, split_column(table)[0]}, asked) or ([], "")
    try:
        return classes_of(table.path, labels, "label" if asked else column) if labels and all(labels) else None
    except ValueError:
        return None
