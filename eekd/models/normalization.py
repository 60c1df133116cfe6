"""A network with a normalisation of its own, among others that see the same images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Renormalize:
    """A network's hook, which brings images normalised by one mean and std to those that the network was trained with.

        x  ->  (x · given_std + given_mean - own_mean) / own_std

    with a number for each channel of images (B, C, H, W). So networks may see the same view, each normalised in its
    own way, and whatever holds the network (a snapshot, a copy) gives it the same images.
    """

    def __init__(self, given: dict[str, Sequence[float]], own: dict[str, Sequence[float]]):
        stds, means = (tuple(zip(given[key], own[key], strict=True)) for key in ("std", "mean"))
        self.scale = [a / b for a, b in stds]
        self.shift = [(a - b) / own_std for (a, b), (_, own_std) in zip(means, stds, strict=True)]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *more = inputs
        scale, shift = torch.tensor([self.scale, self.shift], dtype=x.dtype).to(x.device)[:, :, None, None]
        return x * scale + shift, *more


def renormalize(normalization: dict, channels: int) -> Renormalize:
    """The hook of a spec's `normalization`; ValueError unless that is two means and stds of so many numbers."""
    try:
        parts = [normalization[which][key] for which in ("given", "own") for key in ("mean", "std")]
        good = all(len(part) == channels and all(isinstance(x, float | int) for x in part) for part in parts)
        good = good and len(normalization) == 2 and min(*parts[1], *parts[3]) > 0
    except (KeyError, TypeError):
        good = False
    if not good:
        wanted = f"given and own, each a mean and a std of {channels} numbers"
        raise ValueError(f"normalization must be {wanted}, got {normalization!r:.200}")
    return Renormalize(**normalization)
