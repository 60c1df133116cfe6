"""Images that stay encoded, in files or in a Hugging Face dataset, until they are asked for."""

import copy
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .formats import read_bytes

# What Pillow may take bytes for, whatever their name: for others it starts programs, for EPS Ghostscript.
KINDS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")


class Encoded:
    """A sequence of images, each decoded on demand to (C, S, S) uint8.

    items    paths, encoded bytes, or the {"bytes", "path"} cells of a Hugging Face image column
    zoom     the side of the centred square that is shown, as a fraction of the image's shorter side
    folders  where the files must lie whose paths are data, as those in a table are; None: anywhere
    """

    def __init__(
        self,
        items: Sequence,
        *,
        channels: int,
        image_size: int,
        zoom: float = 1.0,
        folders: Sequence[Path] | None = None,
    ):
        self.items, self.channels, self.image_size, self.zoom = items, channels, image_size, zoom
        self.folders = folders
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
            raise ValueError(f"image {row} is empty")
        if not isinstance(item, bytes | str):
            raise ValueError(f"image {row} is of type {type(item).__name__}, wanted bytes or the path of a file")
        if isinstance(item, bytes):
            return item, f"image {row}"
        if self.folders is not None:
            places = [folder / item for folder in self.folders if (folder / item).is_relative_to(folder)]
            if not places or ".." in Path(item).parts:
                raise ValueError(f"image {row} is {item!r}, wanted bytes or a path in {self.folders[0]}")
            item = str(places[0])
        return read_bytes(item), item

    def decode(self, i: int, choose: Callable[[int, int], Sequence[int]] | None = None) -> Tensor:
        """Image i, or its box (top, left, height, width) = choose(height, width), as (C, S, S) uint8.

        Antialiased bilinear. Raises ValueError naming the file or row that holds no readable image.
        """
        image = open_image(*self.read(i), mode="L" if self.channels == 1 else "RGB")
        if choose is None:
            height = width = self.zoom * min(image.size)
            top, left = (image.height - height) / 2, (image.width - width) / 2
        else:
            top, left, height, width = choose(image.height, image.width)
        size = (self.image_size, self.image_size)
        image = image.resize(size, resample=2, box=(left, top, left + width, top + height))  # 2: bilinear
        return torch.from_numpy(np.array(image)).view(*size, self.channels).permute(2, 0, 1)

    def decode_all(self) -> Tensor:
        """All images, (N, C, S, S) uint8, decoded by as many threads as torch uses."""
        images = torch.empty(self.shape, dtype=torch.uint8)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for out, image in zip(images, pool.map(self.decode, range(len(self))), strict=True):
                out.copy_(image)
        return images


def open_image(data: bytes, name: str, mode: str | None = None):
    """The PIL image in `data`, decoded to `mode` if given; ValueError with its name if there is none of 8 bits."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("reading image files needs Pillow: pip install 'eekd[data]'") from None
    try:
        image = Image.open(io.BytesIO(data), formats=KINDS)
        if image.mode[0] not in "IF":  # I, I;16, I;16B, F: convert would clip them
            return image.convert(mode) if mode else image
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise ValueError(f"{name} is damaged or no image ({type(error).__name__})") from None
    raise ValueError(f"{name} has 16 or 32 bits a pixel, wanted 8")
