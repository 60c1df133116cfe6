"""Mixup and CutMix that can be replayed: partner and share are functions of (seed, view, sample), as in augment.py.

In every view the samples go in pairs, and each of a pair is mixed with the other, in a share of its own. Sample i shows

    mixup    x_i' = s x_i + (1 - s) x_j            Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018)
    CutMix   x_i', which is x_j inside of a box and x_i outside        Yun et al., "CutMix" (2019)
    labels   y_i' = (1 - e) (s y_i + (1 - s) y_j) + e / C              with label smoothing e, Szegedy et al. (2016)

with s from Beta(a, a), for CutMix then the area outside of the box. Images are mixed as integers, s in 256ths: the
same bits on every device, in any batch, in any order.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import CUT, CUT_LEFT, CUT_TOP, PAIR, SHARE, inside, random_below, random_bits

_UNITS = 256
_DRAWS = 1 << 24


def pairs(samples: int, *, seed: int, view: int) -> Tensor:
    """A permutation (N,) int64 of the samples: the first is paired with the second, the third with the fourth, …

    Of an odd number the last one is alone.
    """
    return random_bits(seed, view, PAIR, torch.arange(samples)).argsort(stable=True)


def partners(paired: Tensor) -> Tensor:
    """The partner (N,) of each sample, by `pairs`; one that is alone is its own."""
    partner, even = paired.clone(), len(paired) // 2 * 2
    partner[paired[:even]] = paired[:even].view(-1, 2).flip(1).flatten()
    partner[paired[even:]] = paired[even:]
    return partner


def shuffled(paired: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    """The samples in an order in which the two of a pair stand side by side: the pairs shuffled."""
    even = len(paired) // 2 * 2
    order = random_bits(seed, epoch, stream, torch.arange(even // 2)).argsort(stable=True)
    return torch.cat([paired[:even].view(-1, 2)[order].flatten(), paired[even:]])


def mix(
    images: Tensor, others: Tensor, index: Tensor, *, mixup: float, cutmix: float, seed: int, view: int
) -> tuple[Tensor, Tensor]:
    """Images (B, C, S, S) uint8 of the samples `index` mixed with `others`, their partners, and the share of their own.

    `mixup` and `cutmix` are the a of Beta(a, a), 0 for none; of both each sample takes either with probability 1/2.
    The share is (B,) float32.
    """
    size = images.shape[3]
    cut = random_below(2, seed, view, CUT, index).bool() if mixup and cutmix else torch.full_like(index, bool(cutmix))
    cut = cut.bool()
    draw = random_below(_DRAWS, seed, view, SHARE, index)
    mixed, share = images, torch.ones(len(index), device=images.device)
    if mixup:
        units = _units(draw, mixup)
        weight = units.int()[:, None, None, None]
        mixed = ((images.int() * weight + others.int() * (_UNITS - weight) + _UNITS // 2) >> 8).to(torch.uint8)
        share = units.float() / _UNITS
    if cutmix:
        boxes = _cut(_units(draw, cutmix), index, size, seed=seed, view=view)
        pasted = torch.where(inside(boxes, size), others, images)
        mixed = torch.where(cut[:, None, None, None], pasted, mixed)
        share = torch.where(cut, 1 - (boxes[:, 2] * boxes[:, 3]).float() / size**2, share)
    return mixed, share


def _cut(units: Tensor, index: Tensor, size: int, *, seed: int, view: int) -> Tensor:
    """Boxes (B, 4) of an area of 1 - units / 256, around a point anywhere in the image, cut to the image."""
    side = ((1 - units.double() / _UNITS).sqrt() * size).round().long()
    ends = []
    for stream in (CUT_TOP, CUT_LEFT):
        start = random_below(size, seed, view, stream, index) - side // 2
        ends.append((start.clamp(0, size), (start + side).clamp(0, size)))
    (top, bottom), (left, right) = ends
    return torch.stack([top, left, bottom - top, right - left], 1)


def soft_labels(labels: Tensor, classes: int, smoothing: float, others: Tensor | None, share: Tensor | None) -> Tensor:
    """Labels (B, C) float32 of samples with `labels` (B,), mixed with `others` in `share` where these are given."""
    soft = F.one_hot(labels, classes).float()
    if others is not None:
        share = share[:, None]
        soft = soft * share + F.one_hot(others, classes).float() * (1 - share)
    return soft * (1 - smoothing) + smoothing / classes


def _units(draw: Tensor, alpha: float) -> Tensor:
    """Shares from Beta(alpha, alpha) in 256ths, int64, of draws in [0, 2^24)."""
    return torch.searchsorted(_thresholds(alpha).to(draw.device), draw, right=True)


@functools.cache
def _thresholds(alpha: float) -> Tensor:
    """2^24 times the probability that a share, rounded to 256ths, is at most k / 256: (256,) int64.

    The integral of t^(a-1) (1-t)^(a-1) over t, taken over u = t^a, in which it has no pole, up to the middle.
    """
    edges = np.concatenate([[0.0], (np.arange(_UNITS // 2) + 0.5) / _UNITS, [0.5]]) ** alpha
    parts = np.linspace(edges[:-1], edges[1:], 65)
    middle = (parts[:-1] + parts[1:]) / 2
    grown = (((1 - middle ** (1 / alpha)) ** (alpha - 1)) * np.diff(parts, axis=0)).sum(0).cumsum()
    below = grown[:-1] / grown[-1] / 2
    return torch.from_numpy(np.rint(np.concatenate([below, 1 - below[::-1]]) * _DRAWS).astype(np.int64))
