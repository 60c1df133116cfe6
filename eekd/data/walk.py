"""What lies in a folder of images, without what operating systems, editors and notebooks leave behind."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eekd.io.files import printable

from .images import ENDINGS

TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")
# Files that nobody takes for images, and that stand beside images often.
_PAPERS = {*TABLES, ".xml", ".md", ".yaml", ".yml", ".html", ".pdf", ".log", ".ini", ".db", ".py", ".mat", ".parquet"}
_LEFTOVERS = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__", "wandb", "mlruns", "lightning_logs", "node_modules",
    "site-packages",
}  # fmt: skip
_SPLITS = {"train": "train|training", "val": "val|valid|validation|dev", "test": "test|testing|eval|evaluation"}
UNLABELLED = {"images", "image", "imgs", "unknown", "unlabeled", "unlabelled", "all", "none", "data", "dummy", "files"}
_FILLERS = {"set", "data", "dataset", "images", "image", "imgs", "img", "split", "folder", "seg", "samples"}


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by a system, an editor or another program."""
    return name.startswith((".", "~$")) or name.endswith("~") or name.lower() in _LEFTOVERS


def entries(folder: str | Path) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """The folders and the files in a folder, each by name; links to them count as what they lead to."""
    with os.scandir(folder) as inside:
        inside_folder = sorted((entry for entry in inside if not is_leftover(entry.name)), key=lambda entry: entry.name)
    folders = [entry for entry in inside_folder if entry.is_dir()]
    return folders, [entry for entry in inside_folder if not entry.is_dir()]


def split_of(name: str) -> str | None:
    """The split that a folder or column entry of this name is meant to be: "train", "val", "test", or None."""
    words = [re.sub("(set|data|images|imgs)$", "", word) for word in re.split("[^a-z]+", name.lower())]
    words = [word for word in words if word and word not in _FILLERS]
    if len(words) != 1:
        return None
    return next((split for split, names in _SPLITS.items() if re.fullmatch(names, words[0])), None)


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """The split of each name that tells one, alone or by the word that tells it from another: x_train and x_test."""
    names = list(names)
    splits = {name: split for name in names if (split := split_of(name))}
    if "train" in splits.values():
        return splits
    alike: dict[tuple, dict[str, str]] = {}
    for name in names:
        words = [word for word in re.split("[^a-z0-9]+", name.lower()) if word]
        for k, word in enumerate(words):
            if split := split_of(word):
                alike.setdefault((*words[:k], *words[k + 1 :]), {})[name] = split
    several = [group for group in alike.values() if len(set(group.values())) > 1 and "train" in group.values()]
    return several[0] if len(several) == 1 else splits


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image."""
    return name.lower().endswith(ENDINGS)


@dataclass
class Passed:
    """What was found in folders of images and not read; `said` is what was decided on the way."""

    endings: Counter = field(default_factory=Counter)
    dangling: int = 0
    empty: list[str] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)  # the split of each folder of a class, by its real path
    unusable: list[str] = field(default_factory=list)  # tables that name images and no labels

    def count(self, entry: os.DirEntry) -> None:
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.is_symlink() and not os.path.exists(entry.path):
            self.dangling += 1
        elif ending not in _PAPERS:
            self.endings[ending or "no ending"] += 1

    def all(self) -> list[str]:
        """A phrase for each kind."""
        phrases = list(self.phrases)
        if self.empty:
            phrases.append(f"{counted(self.empty, 'folder')} without images")
        if self.endings:
            kinds = ", ".join(
                f"{count:,} {ending}"
                for ending, count in sorted(self.endings.items(), key=lambda kind: (-kind[1], kind[0]))
            )
            phrases.append(f"{plural(self.endings.total(), 'file')} of other kinds ({printable(kinds)})")
        if self.dangling:
            phrases.append(f"{plural(self.dangling, 'link')} without a target")
        return phrases


def images_in(folder: str | Path, passed: Passed | None = None) -> Iterator[str]:
    """The paths of all images in a folder and its folders, in no order; each folder is entered once."""
    passed = passed or Passed()
    waiting, entered = [str(folder)], set(map(str, Path(folder).resolve().parents))
    while waiting:
        here = waiting.pop()
        if (real := os.path.realpath(here)) in entered:  # a link to a folder above
            continue
        entered.add(real)
        with os.scandir(here) as inside:
            visible = [entry for entry in inside if not is_leftover(entry.name)]
        for entry in visible:
            if entry.is_dir():
                waiting.append(entry.path)
            elif not is_image(entry.name):
                passed.count(entry)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                passed.dangling += 1
            else:
                yield entry.path


def holds_images(folder: str | Path) -> bool:
    """Whether there is an image in a folder or its folders."""
    return next(images_in(folder), None) is not None


def counted(names: Iterable[str], what: str, shown: int = 5) -> str:
    """`3 folders (a, b, c)`: how many there are, and the first of their names."""
    names = list(names)
    listed = ", ".join(printable(name)[:300] for name in names[:shown]) + ", ..." * (len(names) > shown)
    return f"{plural(len(names), what)} ({listed})"


def plural(count: int, what: str) -> str:
    """`1 image`, `3 images`, `3 classes`."""
    return f"{count:,} {what}" + ("" if count == 1 else "es" if what.endswith("s") else "s")
