"""TrivialAugment and RandAugment that can be replayed: what is done to an image is a function of (seed, view, sample).

torchvision.transforms.v2 draws from torch's global generator, in the order in which it sees images. Here operation,
level and sign are hashes, as in augment.py, and Pillow changes the image, as it does for torchvision, which is not
needed.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .augment import LEVEL, OPERATION, SIGN, random_below

POLICIES = ("none", "trivial", "rand")
LEVELS = 31
RAND_OPERATIONS, RAND_LEVEL = 2, 9  # torchvision's defaults, and those of the paper for ImageNet
_AFFINE = 0  # Pillow's Transform.AFFINE


def strengths(policy: str, side: int) -> dict[str, float]:
    """What the highest level of each kind of operation means, on images of that side."""
    if policy == "trivial":  # "TrivialAugment (Wide)" of Müller and Hutter, "TrivialAugment" (2021)
        return dict(shear=0.99, translate=min(32, side), rotate=135, enhance=0.99, posterize=6, solarize=255)
    # Cubuk et al., "RandAugment" (2020)
    return dict(shear=0.3, translate=150 / 331 * side, rotate=30, enhance=0.9, posterize=4, solarize=255)


def changes(index: Tensor, policy: str, side: int, *, seed: int, view: int) -> list[Callable]:
    """For each of the samples `index` (B,) a function from its Pillow image to that image changed by the policy.

    trivial: one operation of 14 at one of 31 levels. rand: two operations at level 9. Half of those with a sign take
    the other one. What an operation moves into the image is black. ImportError where Pillow is missing.
    """
    pillow()
    count = 1 if policy == "trivial" else RAND_OPERATIONS
    draws = index[:, None] * count + torch.arange(count)
    chosen, levels, signs = (
        random_below(n, seed=seed, view=view, stream=stream, index=draws).tolist()
        for n, stream in ((len(OPERATIONS), OPERATION), (LEVELS, LEVEL), (2, SIGN))
    )
    most = strengths(policy, side)

    def change(row: int, image):
        for operation, level, sign in zip(chosen[row], levels[row], signs[row], strict=True):
            kind, signed, apply = OPERATIONS[operation]
            by = most.get(kind, 0) * (level if policy == "trivial" else RAND_LEVEL) / (LEVELS - 1)
            image = apply(image, -by if signed and sign else by)
        return image

    return [functools.partial(change, row) for row in range(len(index))]


def apply_policy(images: Tensor, index: Tensor, policy: str, *, seed: int, view: int) -> Tensor:
    """Images (B, C, S, S) uint8 on the CPU, of the samples `index` (B,), by `changes`."""
    if policy == "none" or not len(index):
        return images
    image_of, changed = pillow().Image.fromarray, []
    by_sample = changes(index, policy, images.shape[3], seed=seed, view=view)
    for change, pixels in zip(by_sample, images.permute(0, 2, 3, 1).contiguous().numpy(), strict=True):
        image = change(image_of(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]))
        changed.append(np.array(image).reshape(pixels.shape))
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()


def _affine(along_x: float = 0, along_y: float = 0, shear_x: float = 0, shear_y: float = 0) -> Callable:
    def change(image, by):
        matrix = 1, shear_x * by, int(along_x * by), shear_y * by, 1, int(along_y * by)
        return image.transform(image.size, _AFFINE, matrix)

    return change


def _enhance(name: str) -> Callable:
    return lambda image, by: getattr(pillow().ImageEnhance, name)(image).enhance(1 + by)


# Kind, whether half of the time the other sign is taken, and what it does to an image.
OPERATIONS: tuple[tuple[str, bool, Callable], ...] = (
    ("identity", False, lambda image, by: image),
    ("shear", True, _affine(shear_x=1)),
    ("shear", True, _affine(shear_y=1)),
    ("translate", True, _affine(along_x=1)),
    ("translate", True, _affine(along_y=1)),
    ("rotate", True, lambda image, by: image.rotate(by)),
    ("enhance", True, _enhance("Brightness")),
    ("enhance", True, _enhance("Color")),
    ("enhance", True, _enhance("Contrast")),
    ("enhance", True, _enhance("Sharpness")),
    ("posterize", False, lambda image, by: pillow().ImageOps.posterize(image, 8 - round(by))),
    ("solarize", False, lambda image, by: pillow().ImageOps.solarize(image, 255 - by)),
    ("autocontrast", False, lambda image, by: pillow().ImageOps.autocontrast(image)),
    ("equalize", False, lambda image, by: pillow().ImageOps.equalize(image)),
)


def pillow():
    """Pillow, with what the operations need of it."""
    try:
        import PIL.Image
        import PIL.ImageEnhance
        import PIL.ImageOps
    except ImportError:
        raise ImportError("auto_augment needs Pillow: pip install 'eekd[data]'") from None
    return PIL
