"""Folders of images: which of them are splits, which are classes, and what lies there besides."""

import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from eekd.io.files import nearest, printable

from .annotations import labels_beside, read_annotations
from .registry import SPLITS, Found, Reading
from .tables import is_saved, read_parquet, read_saved
from .walk import (
    TABLES,
    UNLABELLED,
    Passed,
    counted,
    entries,
    holds_images,
    images_in,
    is_image,
    is_leftover,
    split_of,
    splits_among,
)

# What is given in place of images, by its name, and the way on.
_ADVICE = {
    r"^(data_batch_[1-5]|test_batch)(\.bin)?$": "--data cifar10 --root FOLDER reads it",
    r"^(fine_label_names\.txt|coarse_label_names\.txt)$": "--data cifar100 --root FOLDER reads it",
    r"idx[13]-ubyte(\.gz)?$|-\d+-of-\d+$|\.(npz|npy|pt|pth|pkl|pickle|h5|hdf5|mat|tfrecords?|lmdb|mdb|dcm|nii)$": (
        "a function of your own reads it, --data FILE.py:NAME"
    ),
    r"\.(zip|tar|gz|tgz|bz2|xz|7z|rar|zst)$": "unpack it and give the folder",
}
_WANTED = "must be CLASS/*.png, train/CLASS/*.png, parquet, or a table of paths and labels"


def read_path(path: Path, reading: Reading) -> Found:
    """Reads a folder of images or of parquet, or a file: parquet, or a table of paths and labels."""
    if path.is_file():
        ending = path.suffix.lower()
        if ending == ".parquet":
            return read_parquet(path, reading)
        if ending in TABLES:
            return read_annotations({"train": path}, reading)
        raise ValueError(f"{path} {_WANTED}, got a file {path.suffix or 'without an ending'}{_advice([path.name])}")
    if is_saved(path):
        return read_saved(path, reading)
    passed = Passed()
    if _has_parquet(path):
        filled = [entry.name for entry in entries(path)[0] if holds_images(entry.path)]
        if len(filled) < 2 and not any(map(split_of, filled)):  # images of a page about the data
            found = read_parquet(path, reading)
            beside = [f"the images in {printable(name)}/, beside parquet files" for name in filled]
            return found._replace(left_out=[*found.left_out, *beside])
        passed.phrases.append("parquet files, for there are folders of images")
    reading.refuse(f"the folder of images {path}", "image_column", "config_name", "keep")
    return _read_folder(_unwrapped(path, passed), reading, passed)


def _has_parquet(path: Path) -> bool:
    return any(
        not any(is_leftover(part) for part in file.relative_to(path).parts)
        for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet")
        for file in path.glob(pattern)
    )


def _unwrapped(path: Path, passed: Passed) -> Path:
    """The folder meant, where there is nothing in this one but another folder of folders."""
    while True:
        folders, files = entries(path)
        if any(is_image(file.name) for file in files) or "train" in _tables(path):
            return path
        if len(folders) > 1:  # images/ beside folders of other things
            filled = [entry for entry in folders if holds_images(entry.path)]
            if len(filled) == 1 and filled[0].name.lower() in UNLABELLED:
                tables = {entry.name: _tables(Path(entry.path)) for entry in folders if entry not in filled}
                lists = [f"{name}/{file.name}" for name, inside in tables.items() for file in inside.values()]
                if lists:
                    passed.phrases.append(f"{counted(sorted(lists), 'list', 3)}, which could tell the splits")
                folders = filled
        if len(folders) != 1 or split_of(folders[0].name) or len(entries(folders[0].path)[0]) < 1:
            return path
        path = Path(folders[0].path)


def _tables(path: Path) -> dict[str, Path]:
    """The tables of splits in a folder, by their names."""
    files = [Path(entry.path) for entry in entries(path)[1] if entry.name.lower().endswith(TABLES)]
    return {part: file for file in files if (part := split_of(file.stem))}


def _read_folder(path: Path, reading: Reading, passed: Passed) -> Found:
    if "train" in (tables := _tables(path)) and not any(split_of(entry.name) for entry in entries(path)[0]):
        return read_annotations(tables, reading, path)
    splits, beside = _splits(path, reading)
    notes = []
    if beside:
        passed.phrases.append(f"{counted(beside, 'folder')} beside train/")
    if not splits:
        splits = {"train": path}
        notes.append(f"The folders of {printable(path.name)}/ are the classes.")
    parts, classes = {}, []
    for part in SPLITS:
        folder = splits.get(part)
        if folder is None:
            continue
        labelled = _labelled(folder, part, classes, passed, reading)
        if labelled is None:
            passed.phrases.append(f"{printable(folder.name)}/, whose images have no labels")
            continue
        if part == "train":
            classes = labelled[2]
            notes += _inner_folders(folder, labelled[0])
        parts[part] = labelled[:2]
        if folder != path:
            notes.append(
                f"{printable(folder.name)}/ is {'the training data' if part == 'train' else f'the {part} split'}."
            )
    if not passed.said:
        reading.refuse(f"the folders of classes in {path}", "label_column")
    return Found(parts, classes, folders=None, base=path, said=notes + passed.said, left_out=passed.all())


def _splits(path: Path, reading: Reading) -> tuple[dict[str, Path], list[str]]:
    """The folders of the splits, none where the folder holds classes, and other folders of images beside them."""
    folders = {entry.name: Path(entry.path) for entry in entries(path)[0]}
    if reading.split:
        if missing := [name for name in reading.split if not (path / name).is_dir()]:
            raise ValueError(f"split must name folders of {path}, got {missing[0]!r}; there are {', '.join(folders)}")
        chosen = dict(zip(named(reading.split), (path / name for name in reading.split), strict=True))
        return chosen, [name for name in folders if name not in reading.split]
    candidates, split_by_name = {}, splits_among(folders)
    for name in sorted(split_by_name, key=lambda name: (name not in SPLITS, name)):  # the plain name comes first
        if name not in (reading.classes or ()):
            candidates.setdefault(split_by_name[name], folders[name])
    others = [name for name in folders if folders[name] not in candidates.values()]
    if "train" in candidates:
        flat = not any(holds_images(entry.path) for entry in entries(_inner(candidates["train"]))[0])
        if flat and any(holds_images(folders[name]) for name in others):
            return {}, []  # "train" is a class among others
        return {part: _inner(folder) for part, folder in candidates.items()}, [
            name for name in others if holds_images(folders[name])
        ]
    if candidates and not others:
        raise ValueError(f"{path} {_WANTED}, got {', '.join(f'{name}/' for name in folders)} and no train/")
    _refuse_unknown_splits(path, folders, reading)
    return {}, []


def named(split: tuple[str, ...]) -> tuple[str, ...]:
    """What the names in `split` stand for, in their order."""
    return SPLITS if len(split) == 3 else ("train", "test")[: len(split)]


def _inner(folder: Path) -> Path:
    """train/train/ or train/images/, where it is all there is in train/."""
    while True:
        folders, files = entries(folder)
        if len(folders) != 1 or any(is_image(file.name) for file in files) or len(entries(folders[0].path)[0]) < 2:
            return folder
        folder = Path(folders[0].path)


def _refuse_unknown_splits(path: Path, folders: dict[str, Path], reading: Reading) -> None:
    """ValueError where folders hold the same folders each, as splits with other names do, and not images."""
    if reading.classes and set(folders) & set(reading.classes):
        return
    inside = []
    for folder in folders.values():
        below, files = entries(folder)
        below = {entry.name for entry in below if holds_images(entry.path)}
        if any(is_image(file.name) for file in files):
            return
        if below:
            inside.append(below)
    if len(inside) > 1 and len(common := set.intersection(*inside)) > 1:
        raise ValueError(
            f"{path} holds {counted(folders, 'folder')} with the same folders {', '.join(sorted(common)[:3])} in each: "
            "where they are splits, name them by --split TRAIN,TEST; where they are classes, by --classes FILE"
        )


def _advice(names: list[str]) -> str:
    """What to do with the first name that something is known about."""
    return next(
        (f": {way}" for form, way in _ADVICE.items() if any(re.search(form, name.lower()) for name in names)), ""
    )


def _instead(folder: Path, passed: Passed) -> str:
    """What lies in a folder without images, and what to do with it."""
    names = sorted(entry.name for kind in entries(folder) for entry in kind)
    if passed.endings:
        return f"{passed.all()[-1]}{_advice([*names, *passed.endings])}"
    return f"none among {counted(names, 'name', 3)}{_advice(names)}" if names else "an empty folder"


def _inner_folders(folder: Path, files: list[str]) -> list[str]:
    """A sentence where images of a class lie in several folders, which could be meant as classes."""
    inner, start = defaultdict(set), len(str(folder)) + 1
    for path in files:
        parts = path[start:].split("/", 2)
        if len(parts) == 3:
            inner[parts[0]].add(parts[1])
    if several := [f"{name}: {', '.join(sorted(names)[:3])}" for name, names in inner.items() if len(names) > 1]:
        return [f"Folders inside of a class are no classes, as in {counted(several, 'class', 2)}."]
    return []


def _labelled(folder: Path, part: str, classes: list[str], passed: Passed, reading: Reading):
    """Paths, labels and classes of a split; None where its images have no labels, and it is not the training data."""
    below, files = entries(folder)
    loose = [entry for entry in files if is_image(entry.name)]
    filled: dict[str, list[str]] = {}
    real, above = {}, {os.path.realpath(folder), *map(str, Path(folder).resolve().parents)}
    for entry in below:
        if (place := os.path.realpath(entry.path)) in above:
            passed.phrases.append(f"{printable(entry.name)}, a link to a folder that it is in")
            continue
        if (twin := real.setdefault(place, entry.name)) != entry.name:
            raise ValueError(f"{folder} has two classes in one folder: {twin} and {entry.name} both are {place}")
        if (other := passed.places.setdefault(place, part)) != part:
            raise ValueError(f"{entry.path} must hold other images than {other} has, got a link to {place}")
        if os.path.isfile(os.path.join(entry.path, "pyvenv.cfg")):
            passed.phrases.append(f"{printable(entry.name)}, an environment of Python")
            continue
        filled[entry.name] = sorted(images_in(entry.path, passed))
        if not filled[entry.name]:
            passed.empty.append(f"{folder.name}/{entry.name}")
    filled = {name: images for name, images in filled.items() if images}
    if len(filled) > 1:
        beside = [entry.name for entry in files if Path(entry.name).stem == "metadata"]
        passed.phrases += [f"{name} of {printable(folder.name)}/, for the folders are the classes" for name in beside]
    numbers = {unicodedata.normalize("NFC", name): number for number, name in enumerate(classes)}
    places = {name: numbers.get(unicodedata.normalize("NFC", name)) for name in filled}
    unlabelled = len(filled) == 1 and all(
        name.lower() in UNLABELLED or split_of(name) or name == folder.name for name in filled
    )
    if (not filled and loose) or (unlabelled and (part == "train" or None in places.values())):
        images = [entry.path for entry in loose] + [image for images in filled.values() for image in images]
        labelled = labels_beside(folder, images, classes, passed, reading.label_column)
        if labelled or part != "train":
            return labelled
        tried = f" ({passed.unusable[0]} names them, but no column of it can be their label)" if passed.unusable else ""
        raise ValueError(
            f"{folder} holds {len(images):,} images and no folders of classes: give a table of their paths and labels, "
            f"--data FILE.csv{tried}"
        )
    if not filled:
        raise ValueError(f"{folder} must hold images as {folder}/CLASS/*.png, got {_instead(folder, passed)}")
    if part == "train":
        classes = list(filled)
        places = {name: number for number, name in enumerate(classes)}
    if strange := [name for name, place in places.items() if place is None]:
        raise ValueError(f"{folder / strange[0]} is a class that train has not{nearest(strange[0], classes, 0.8)}")
    if loose:
        passed.phrases.append(
            f"{counted([entry.name for entry in loose], 'image')} of {folder.name}/ outside its classes"
        )
    files, labels = [], []
    for name, images in filled.items():
        files += images
        labels += [places[name]] * len(images)
    return files, labels, classes
