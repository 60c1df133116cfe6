"""Augmentation that can be replayed: every random number is a hash of (seed, view, sample).

All is integer arithmetic, and square roots that IEEE 754 rounds: the same bits on every device, in any batch,
in any order. `view` is the epoch, unless a bank of stored views says otherwise.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("none", "crop", "crop-flip", "imagenet")

# Streams: which of a sample's random numbers is meant.
ORDER, SPLIT, TOP, LEFT, FLIP, AREA, RATIO = range(7)
ERASE, ERASE_TOP, ERASE_LEFT, ERASE_AREA, ERASE_RATIO = range(7, 12)
OPERATION, LEVEL, SIGN = range(12, 15)  # of eekd.data.policies
PAIR, SHARE, CUT, CUT_TOP, CUT_LEFT = range(15, 20)  # of eekd.data.mixing

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64
_TRIES = 10
# Of a random box: least and most area, aspect ratios from 1/x to x, and streams.
_CROP_RATIOS, _ERASED_RATIOS = ([x ** (k / 512 - 1) for k in range(1025)] for x in (4 / 3, 10 / 3))
_CROP = (0.08, 1.0), _CROP_RATIOS, (AREA, RATIO, TOP, LEFT)
_ERASED = (0.02, 0.33), _ERASED_RATIOS, (ERASE_AREA, ERASE_RATIO, ERASE_TOP, ERASE_LEFT)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014) on int64, which wraps as uint64 does."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def random_bits(seed: int, view: int, stream: int, index: Tensor) -> Tensor:
    """64 random bits for every element of `index` (int64), a pure function of the four numbers."""
    key = torch.zeros((), dtype=torch.int64, device="cpu")
    for part in (seed, view, stream):
        key = _mix(key + part + _GOLDEN)
    return _mix(index * _GOLDEN + key.item())


def random_below(n: int | Tensor, seed: int, view: int, stream: int, index: Tensor) -> Tensor:
    """A random integer in [0, n), n < 2^31, for every element of `index` (int64)."""
    return (((random_bits(seed, view, stream, index) >> 32) & 0xFFFFFFFF) * n) >> 32


def augment(images: Tensor, index: Tensor, *, kind: str, seed: int, view: int) -> Tensor:
    """The samples `index` (B,) int64, with images (B, C, S, S) uint8, as view number `view` shows them.

    crop: a random S × S window of the image in a black frame round(S / 8) wide. flip: mirrored left to right
    with probability 1/2. imagenet: a random resized crop, then flip. Shape, dtype and device stay.
    """
    images = crop(images, index, kind=kind, seed=seed, view=view)
    return random_flip(images, index, seed=seed, view=view) if flips(kind) else images


def flips(kind: str) -> bool:
    """Whether `augment` of this kind mirrors images."""
    return kind in ("crop-flip", "imagenet")


def crop(images: Tensor, index: Tensor, *, kind: str, seed: int, view: int) -> Tensor:
    """What `augment` does before it mirrors."""
    size = images.shape[3]
    if kind in ("crop", "crop-flip"):
        pad = max(1, round(size / 8))
        top, left = (random_below(2 * pad + 1, seed, view, stream, index) for stream in (TOP, LEFT))
        return pad_crop(images, top, left, pad)
    if kind == "imagenet":
        return resized_crop(images, resized_crop_boxes(index, size, size, seed=seed, view=view))
    return images


def random_flip(images: Tensor, index: Tensor, *, seed: int, view: int) -> Tensor:
    """Images (B, C, H, W), each mirrored left to right with probability 1/2."""
    flipped = flipped_rows(index, seed=seed, view=view)
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def flipped_rows(index: Tensor, *, seed: int, view: int) -> Tensor:
    """Which (B,) bool of the samples `index` `random_flip` mirrors."""
    return random_below(2, seed, view, FLIP, index).bool()


def pad_crop(images: Tensor, top: Tensor, left: Tensor, pad: int) -> Tensor:
    """The H × W windows at top, left (B,) in [0, 2 pad] of images (B, C, H, W) padded with zeros."""
    height, width = images.shape[2:]
    windows = F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # B, C, top, left, H, W
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def resized_crop_boxes(index: Tensor, height: int, width: int, *, seed: int, view: int) -> Tensor:
    """Boxes (B, 4) int64 of (top, left, height, width) for the samples `index` (B,), images of one size.

    Area 8 to 100 % of the image, aspect ratio 3/4 to 4/3 evenly in the logarithm: the first of ten draws that
    fits, else the last one cut to the image. Source: Szegedy et al., "Going deeper with convolutions", 6.
    """
    return _boxes(index, height, width, *_CROP, seed=seed, view=view)


def resized_crop_choosers(index: Tensor, *, seed: int, view: int) -> list[Callable[[int, int], tuple[int, ...]]]:
    """For each sample a function of an image's height and width that gives its box of `resized_crop_boxes`."""
    (shares, ratios), streams = _draws(index, *_CROP, seed=seed, view=view), _CROP[2][2:]
    places = (((random_bits(seed, view, stream, index) >> 32) & 0xFFFFFFFF).tolist() for stream in streams)
    return [functools.partial(_box, *draws) for draws in zip(shares.tolist(), ratios.tolist(), *places, strict=True)]


def _box(shares: list[float], ratios: list[float], top: int, left: int, height: int, width: int) -> tuple[int, ...]:
    """One of `_boxes`, by the same arithmetic: for one image it is a hundred times as fast."""
    h = w = 0
    for share, ratio in zip(shares, ratios, strict=True):
        area = share * (height * width)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if h <= height and w <= width:
            break
    h, w = min(max(h, 1), height), min(max(w, 1), width)
    return (top * (height - h + 1)) >> 32, (left * (width - w + 1)) >> 32, h, w


def _draws(index, shares, ratios, streams, *, seed: int, view: int) -> tuple[Tensor, Tensor]:
    """Ten areas, as shares of an image's, and ten aspect ratios for each sample, (B, 10) float64."""
    tries = index[:, None] * _TRIES + torch.arange(_TRIES, device=index.device)
    (least, most), (area, ratio, *_) = shares, streams
    share = least + (most - least) * random_below(1 << 24, seed, view, area, tries).double() / (1 << 24)
    table = torch.tensor(ratios, dtype=torch.float64, device=index.device)
    return share, table[random_below(len(ratios), seed, view, ratio, tries)]


def _boxes(index, height, width, shares, ratios, streams, *, seed: int, view: int) -> Tensor:
    share, ratio = _draws(index, shares, ratios, streams, seed=seed, view=view)
    area = share * (height * width)
    h, w = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    misfits = ((h > height) | (w > width)).long().cumprod(1).sum(1, keepdim=True)
    chosen = misfits.clamp(max=_TRIES - 1)
    h, w = h.gather(1, chosen)[:, 0].clamp(1, height), w.gather(1, chosen)[:, 0].clamp(1, width)
    top = random_below(height - h + 1, seed, view, streams[2], index)
    left = random_below(width - w + 1, seed, view, streams[3], index)
    return torch.stack([top, left, h, w], 1)


def random_erase(images: Tensor, index: Tensor, fill: Tensor, probability: float, *, seed: int, view: int) -> Tensor:
    """Images (B, C, S, S) uint8, of each of which with that probability one rectangle has the colour `fill` (C,).

    Area 2 to 33 % of the image, aspect ratio 3/10 to 10/3 evenly in the logarithm.
    Source: Zhong et al., "Random Erasing Data Augmentation" (2020).
    """
    size = images.shape[3]
    boxes = _boxes(index, size, size, *_ERASED, seed=seed, view=view)
    erased = random_below(1 << 24, seed, view, ERASE, index) < round(probability * (1 << 24))
    if images.device.type != "cpu":
        return torch.where(inside(boxes, size) & erased[:, None, None, None], fill[:, None, None], images)
    images = images.clone()
    for row in erased.nonzero()[:, 0].tolist():  # a processor would take longer for the pixels that stay
        top, left, height, width = boxes[row].tolist()
        images[row, :, top : top + height, left : left + width] = fill[:, None, None]
    return images


def inside(boxes: Tensor, size: int) -> Tensor:
    """(B, 1, S, S) bool: which pixels of images of that size lie in boxes (B, 4) of (top, left, height, width)."""
    place = torch.arange(size, device=boxes.device)
    top, left, height, width = boxes[:, :, None].unbind(1)
    rows, columns = ((place >= start) & (place < start + extent) for start, extent in ((top, height), (left, width)))
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Each box (B, 4) of (top, left, height, width) of images (B, C, H, W) uint8, enlarged to H × W.

    Bilinear, pixel centres at half-integers, weights in 256ths: sums of integers, exact on every device.
    """
    out = images.int()
    for dim, start, extent in ((2, boxes[:, :1], boxes[:, 2:3]), (3, boxes[:, 1:2], boxes[:, 3:])):
        size = images.shape[dim]
        # Output o lies at (o + 1/2) extent / size - 1/2 of the box; here in 256ths of a pixel.
        centre = (2 * torch.arange(size, device=images.device) + 1) * extent - size
        place = (centre.clamp(min=0) * 128).div(size, rounding_mode="floor")
        low = place >> 8
        high = torch.minimum(low + 1, extent - 1)
        view = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        a, b = (out.gather(dim, (start + x).view(view).expand(out.shape)) for x in (low, high))
        out = a * 256 + (b - a) * (place & 255).view(view).int()
    return ((out + (1 << 15)) >> 16).to(torch.uint8)
