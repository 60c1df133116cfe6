"""Reads every image of a data set once and says what is wrong."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import torch

from eekd.io.files import in_words, printable

from .encoded import BadImages, Encoded
from .images import GREY, decode_image, is_animated, is_transparent, open_image, orientation
from .opened import open_data
from .walk import counted, plural

_CHUNK = 256  # images that wait for a thread; more would only take memory
_PAIRS = 5  # of equal images that are named


@dataclass
class Checked:
    """What a check found: how many images were read, `faults`, a sentence each, and `notes` on what is unusual."""

    images: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_images(name: str, root=None, *, progress: Callable[[int, int], object] | None = None, **settings) -> Checked:
    """Decodes every image of a dataset, with as many threads as torch uses; `settings` are those of `load`.

    Faults are images that cannot be read, images of the test or validation data that are in the training data too, and
    equal images of different classes. `progress` is called with the number of images read and the total number. Raises
    what `load` raises.
    """
    opened = open_data(name, root, bad=BadImages(True), **settings)
    checked, kinds, sizes = Checked(notes=[f"Left out: {phrase}." for phrase in opened.left_out]), Counter(), Counter()
    parts = {part: (x, y) for part, (x, y) in opened.parts.items() if isinstance(x, Encoded)}
    total, same = sum(len(x) for x, _ in parts.values()), defaultdict(list)
    for part, (images, labels) in parts.items():
        for i, (fault, digest, place, size, traits) in enumerate(_read_all(images)):
            checked.images += 1
            if fault:
                checked.faults.append(fault)
            else:
                same[digest].append((part, int(labels[i]), place))
                kinds.update(traits)
                sizes[size] += 1
            if progress:
                progress(checked.images, total)
    checked.notes += [f"{plural(count, 'image')}: {what}." for what, count in sorted(kinds.items())]
    if sizes:
        smallest, largest = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
        checked.notes.append("From {} x {} to {} x {} pixels.".format(*smallest, *largest))
    _compare(same, opened.classes, checked)
    return checked


def _read_all(images: Encoded) -> Iterator[tuple]:
    """For each image in order: what is wrong, its hash, name and size, and what is unusual about it."""

    def read(i: int) -> tuple:
        try:
            data, place = images.read(i)
            image = decode_image(data, place, "L" if images.channels == 1 else "RGB")
            header = open_image(data, place)
        except (OSError, ValueError) as error:
            return in_words(error), b"", "", (0, 0), ()
        traits = {
            "in colour, and read as grey": images.channels == 1 and header.mode not in GREY,
            "grey": images.channels == 3 and header.mode in GREY,
            "can be transparent, and laid on white": is_transparent(header),
            "turned as the Exif orientation says": orientation(header) != 1,
            "animated, of which the first frame is read": is_animated(header),
            "of 16 bits a channel, and read as 8": header.mode[0] == "I",
        }
        return "", hashlib.sha256(data).digest(), place, image.size, [what for what, holds in traits.items() if holds]

    rows = iter(range(len(images)))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while chunk := list(islice(rows, _CHUNK)):
            yield from pool.map(read, chunk)


def _compare(same: dict[bytes, list[tuple[str, int, str]]], classes: tuple[str, ...], checked: Checked) -> None:
    """Adds what equal images tell: leaks from the training data, labels that differ, and copies."""
    leaks, quarrels, copies = defaultdict(list), [], 0
    for group in same.values():
        copies += len(group) - 1
        first = {part: place for part, _, place in reversed(group)}
        for part in ("val", "test"):
            if "train" in first and part in first:
                leaks[part].append(f"{printable(first[part])} = {printable(first['train'])}")
        if len({label for _, label, _ in group}) > 1:
            pair = sorted({label: place for _, label, place in group}.items())[:2]
            quarrels.append(" = ".join(f"{printable(place)} ({printable(classes[label])})" for label, place in pair))
    for part, pairs in leaks.items():
        checked.faults.append(f"{part} shares {counted(pairs, 'image', _PAIRS)} with train")
    if quarrels:
        checked.faults.append(f"equal images are of different classes: {counted(quarrels, 'pair', _PAIRS)}")
    if copies:
        checked.notes.append(f"{plural(copies, 'image')}: copies of others.")
