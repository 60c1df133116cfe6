"""Images that stay encoded, in files or in a Hugging Face dataset, until they are asked for."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eekd.io.files import in_words, printable

from .formats import read_bytes
from .images import GREY, decode_image, is_animated, is_transparent, open_image, orientation

SAMPLED = 1024  # images that stand for a split too large to read whole
SMALL = 64  # the largest side of images that keep their size
LARGE = 224  # the side of all others, by default: that of ImageNet's networks

RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers

Box = Callable[[int, int], Sequence[int]]  # height, width -> top, left, height, width


@dataclass
class BadImages:
    """What happens at an image that cannot be read: the run stops, or skips it, at most `budget` of them."""

    skip: bool = False
    budget: int = 10
    seen: set[str] = field(default_factory=set)

    @staticmethod
    def explain(error: Exception) -> None:
        """Adds the ways on to the error of an image that stops a run."""
        if not getattr(error, "__notes__", None):
            error.add_note("--check-data lists all such images, --bad-images skip takes others in their place")

    def note(self, faults: Iterable[str]) -> None:
        """Warns of each image once; ValueError where there are more than `budget` of them."""
        for fault in faults:
            if fault in self.seen:
                continue
            self.seen.add(fault)
            if len(self.seen) > self.budget:
                raise ValueError(f"more than {self.budget} images (bad_image_budget) cannot be read; the last: {fault}")
            warnings.warn(f"{printable(fault)}: another image of its class stands in for it", stacklevel=2)


class Encoded:
    """A sequence of images, each decoded on demand to (C, S, S) uint8.

    items    paths, encoded bytes, or the {"bytes", "path"} cells of a Hugging Face image column
    zoom     the side of the centred square that is shown, as a fraction of the image's shorter side
    interpolation  how it is resized, "bilinear" or "bicubic", both antialiased
    folders  where the files must lie whose paths are data, as those in a table are; None: anywhere
    bad      what happens at an image that cannot be read
    at_size  whether the images are known to be squares of image_size
    """

    at_size = False

    def __init__(
        self,
        items: Sequence,
        *,
        channels: int,
        image_size: int,
        zoom: float = 1.0,
        interpolation: str = "bilinear",
        folders: Sequence[Path] | None = None,
        bad: BadImages | None = None,
    ):
        self.items, self.channels, self.image_size, self.zoom = items, channels, image_size, zoom
        self.interpolation = interpolation
        self.folders, self.bad = folders, bad or BadImages()
        self.rows = np.arange(len(items))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, S, S), the shape of all images in one tensor."""
        return len(self), self.channels, self.image_size, self.image_size

    def subset(self, index: Tensor) -> "Encoded":
        """The images `index` (n,) int64 of this sequence."""
        part = copy.copy(self)
        part.rows = self.rows[index.numpy()]
        return part

    def read(self, i: int) -> tuple[bytes, str]:
        """The encoded bytes of image i, and its name for an error."""
        row = int(self.rows[i])
        item = self.items[row]
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
        if not item:
            raise ValueError(f"image {row} must be bytes or the path of a file, got nothing")
        if not isinstance(item, bytes | str):
            raise ValueError(f"image {row} must be bytes or the path of a file, got a {type(item).__name__}")
        if isinstance(item, bytes):
            return item, f"image {row}"
        if "://" in item:
            raise ValueError(
                f"image {row} must be bytes or the path of a file, got an address: download {item[:200]!r}"
            )
        if self.folders is not None:
            places = [folder / item for folder in self.folders if (folder / item).is_relative_to(folder)]
            if not places or ".." in Path(item).parts:
                raise ValueError(f"image {row} must be bytes or a path in {self.folders[0]}, got {item!r}")
            item = str(places[0])
        return read_bytes(item), item

    def decode(self, i: int, choose: Box | None = None, change: Callable | None = None) -> Tensor:
        """Image i, or its box (top, left, height, width) = choose(height, width), as (C, S, S) uint8.

        `change` is done to the resized Pillow image. Raises ValueError naming the file or row that
        holds no readable image.
        """
        image = decode_image(*self.read(i), mode="L" if self.channels == 1 else "RGB")
        if choose is None:
            height = width = self.zoom * min(image.size)
            top, left = (image.height - height) / 2, (image.width - width) / 2
        else:
            top, left, height, width = choose(image.height, image.width)
        size = (self.image_size, self.image_size)
        box = left, top, left + width, top + height
        image = image.resize(size, resample=RESAMPLE[self.interpolation], box=box)
        image = image if change is None else change(image)
        return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))

    def decode_or_stand_in(
        self, i: int, labels: Tensor, choose: Box | None = None, change: Callable | None = None
    ) -> tuple[Tensor, list[str]]:
        """Image i, and what was wrong with it: where bad images are skipped, the next of its label stands in for it."""
        same, faults = None, []
        while True:
            try:
                return self.decode(i, choose, change), faults
            except (OSError, ValueError) as error:
                if not self.bad.skip:
                    self.bad.explain(error)
                    raise
                faults.append(in_words(error))
            if same is None:
                same = (labels == labels[i]).nonzero()[:, 0].tolist()
                same = iter((same * 2)[same.index(i) + 1 : same.index(i) + len(same)])
            i = next(same, None)  # pyright: ignore[reportAssignmentType]
            if i is None or len(faults) > self.bad.budget + 1:
                raise ValueError(f"no image can stand in for others of its class: {faults[0]}")

    def decode_or_skip(self, i: int) -> Tensor | None:
        """Image i, or None where it cannot be read and bad images are skipped."""
        try:
            return self.decode(i)
        except (OSError, ValueError) as error:
            if not self.bad.skip:
                self.bad.explain(error)
                raise
            return None

    def decode_all(self, labels: Tensor | None = None) -> Tensor:
        """All images, (N, C, S, S) uint8, decoded by as many threads as torch uses.

        With labels (N,), others stand in for images that cannot be read, where bad images are skipped.
        """
        images = torch.empty(self.shape, dtype=torch.uint8)

        def decode(i: int) -> tuple[Tensor, list[str]]:
            return (self.decode(i), []) if labels is None else self.decode_or_stand_in(i, labels)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for out, (image, faults) in zip(images, pool.map(decode, range(len(self))), strict=True):
                out.copy_(image)
                self.bad.note(faults)
        return images

    def sample(self) -> list[int]:
        """Up to 1024 images, evenly spaced, that stand for all."""
        return list(range(0, len(self), max(1, math.ceil(len(self) / SAMPLED))))


@dataclass
class Look:
    """What the headers of a sample of images say."""

    sizes: Counter  # (width, height)
    grey: int = 0
    transparent: int = 0
    turned: int = 0
    animated: int = 0

    @property
    def count(self) -> int:
        return self.sizes.total()


def look_at(images: Encoded) -> Look:
    """Reads the headers of a sample; where bad images are not skipped, the first of them is an error."""
    look = Look(Counter())

    def header(i: int):
        try:
            image = open_image(*images.read(i))
        except (OSError, ValueError) as error:
            if not images.bad.skip:
                images.bad.explain(error)
                raise
            return None  # it is met again, and counted, when all is read
        return image.size, image.mode in GREY, is_transparent(image), orientation(image) != 1, is_animated(image)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for size, grey, transparent, turned, animated in filter(None, pool.map(header, images.sample())):
            look.sizes[size] += 1
            look.grey += grey
            look.transparent += transparent
            look.turned += turned
            look.animated += animated
    return look


def decide(look: Look, image_size: int | None, channels: int | None) -> tuple[int, int, list[str]]:
    """Channels and size of the images in memory, as asked for or as a look at them suggests, and sentences why."""
    if not look.count:
        raise ValueError(f"not one of {SAMPLED} images can be read")
    seen = f"of {look.count} images looked at"
    colour = look.count - look.grey
    if channels is None:
        chosen = 3 if colour else 1
        why = f"all {seen} are grey" if not colour else f"{colour} {seen} {'is' if colour == 1 else 'are'} in colour"
        why += f" and {look.grey} grey" * bool(colour and look.grey)
    else:
        chosen, why = channels, f"as asked for; {colour} {seen} in colour"
    notes = [f"{chosen} channel{'s' * (chosen > 1)}: {why}."]

    (width, height), most = look.sizes.most_common(1)[0]
    shapes = f"{width} x {height}"
    if len(look.sizes) > 1:
        small, large = (pick(look.sizes, key=math.prod) for pick in (min, max))
        shapes = f"from {small[0]} x {small[1]} to {large[0]} x {large[1]}"
    if image_size:
        size, why = image_size, f"as asked for; the images looked at are {shapes}"
    elif width == height <= SMALL and 2 * most > look.count:
        size, why = width, f"{most} {seen} {'has' if most == 1 else 'have'} this size"
    else:
        size = LARGE
        why = (
            f"the images looked at are {shapes}, and not small squares (at most {SMALL} x {SMALL}) of one size; "
            "--image-size sets another"
        )
    notes.append(f"Size {size} x {size}: {why}.")
    for count, what in (
        (look.transparent, "can be transparent: they are laid on white"),
        (look.turned, "are turned as their Exif orientation says"),
        (look.animated, "are animated: their first frame is read"),
    ):
        if count:
            notes.append(f"{count} {seen} {what}.")
    return chosen, size, notes
