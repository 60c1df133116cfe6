"""Image data: datasets by name or path, and loaders whose order and augmentation can be replayed.

data = load("cifar10", root="~/data")
for images, labels, index in Loader(data.train, batch_size=128, augment=data.augment, device="cuda"):
    ...
"""

from .augment import AUGMENTATIONS
from .check import Checked, check_images
from .dataset import ImageData, Split, load
from .encoded import Encoded
from .loader import Batch, Loader
from .registry import Found, Reading, names, register

__all__ = [
    "AUGMENTATIONS",
    "Batch",
    "Checked",
    "Encoded",
    "Found",
    "ImageData",
    "Loader",
    "Reading",
    "Split",
    "check_images",
    "load",
    "names",
    "register",
]
