"""The data sets that are known by name: each is one function, registered under it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import formats
from .registry import SPLITS, Found, Reading, register
from .tables import read_hub

_GLYPHS = Path(__file__).with_name("glyphs.npz")
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@register("glyphs")
def _glyphs(reading: Reading) -> Found:
    """Letters and digits of many fonts, as results/glyphs.py drew them; no design is in two parts."""
    with np.load(_GLYPHS) as drawn:
        parts = {}
        for part in SPLITS:
            packed = torch.from_numpy(drawn[f"{part}_images"])
            images = torch.stack([packed >> 4, packed & 15], -1).flatten(-2) * 17  # 16 levels
            parts[part] = images.unsqueeze(1), torch.from_numpy(drawn[f"{part}_labels"]).long()
    return Found(parts, [*json.loads(_GLYPHS.with_suffix(".json").read_text())["characters"]], "crop")


@register("digits")
def _digits(reading: Reading) -> Found:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("digits needs scikit-learn: pip install 'eekd[train]'") from None
    digits: Any = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round_().to(torch.uint8).unsqueeze(1)
    return Found({"train": (images, torch.from_numpy(digits.target).long())}, [*"0123456789"], "crop")


@register("fashion-mnist")
def _fashion_mnist(reading: Reading) -> Found:
    root = reading.root or _DEBIAN_FASHION_MNIST
    if reading.root is None and not root.is_dir():
        problem = "fashion-mnist needs root=FOLDER, Debian's package dataset-fashion-mnist or Hugging Face"
        return read_hub("zalando-datasets/fashion_mnist", reading, problem)
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        paths = []
        for kind in ("images-idx3", "labels-idx1"):
            plain, packed = (root / f"{prefix}-{kind}-ubyte{suffix}" for suffix in ("", ".gz"))
            if not plain.is_file() and not packed.is_file():
                raise FileNotFoundError(f"{root} must hold fashion-mnist, got no {plain.name} (or .gz) in it")
            paths.append(plain if plain.is_file() else packed)
        parts[part] = formats.read_idx_pair(paths[0], paths[1], len(_FASHION))
    return Found(parts, _FASHION, "crop")


class _Cifar(NamedTuple):
    num_classes: int
    train: tuple[str, ...]
    test: str
    label_bytes: int
    label_key: str
    names_key: str
    names_files: tuple[str, str]
    places: tuple[str, ...]

    def parse(self, data: bytes, source: str) -> tuple[Tensor, Tensor]:
        if source.endswith(".bin"):
            return formats.parse_cifar_binary(data, source, self.label_bytes, self.num_classes)
        return formats.parse_cifar_python(data, source, self.label_key, self.num_classes)

    def classes(self, members: dict[str, bytes], place: Path) -> list[str]:
        """The names in the archive's text or pickle file, or numbers where it has none."""
        text, pickled = self.names_files
        names = []
        if text in members:
            names = members[text].decode("utf-8", "replace").split()
        elif pickled in members:
            names = formats.read_pickle(members[pickled], f"{place}/{pickled}").get(self.names_key, [])
        named = isinstance(names, list) and len(names) == self.num_classes and all(type(name) is str for name in names)
        return names if named else [str(number) for number in range(self.num_classes)]


_CIFAR = {
    "cifar10": _Cifar(
        10,
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        1,
        "labels",
        "label_names",
        ("batches.meta.txt", "batches.meta"),
        ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ),
    "cifar100": _Cifar(
        100,
        ("train",),
        "test",
        2,
        "fine_labels",
        "fine_label_names",
        ("fine_label_names.txt", "meta"),
        ("cifar-100-binary", "cifar-100-binary.tar.gz", "cifar-100-python", "cifar-100-python.tar.gz"),
    ),
}


@register("cifar10")
def _cifar10(reading: Reading) -> Found:
    return _cifar("cifar10", reading)


@register("cifar100")
def _cifar100(reading: Reading) -> Found:
    return _cifar("cifar100", reading)


def _cifar(name: str, reading: Reading) -> Found:
    spec, root = _CIFAR[name], reading.root
    if not root:
        return read_hub(f"uoft-cs/{name}", reading, f"{name} needs root=FOLDER or Hugging Face")
    files = (*spec.train, spec.test)
    wanted = {*files, *(file + ".bin" for file in files), *spec.names_files}
    for place in (root, *(root / place for place in spec.places)):
        members = formats.read_members(place, wanted) if place.exists() else {}
        for suffix in (".bin", ""):
            if all(file + suffix in members for file in files):
                parts = [spec.parse(members[file + suffix], f"{place}/{file}{suffix}") for file in files]
                images, labels = map(torch.cat, zip(*parts[:-1], strict=True))
                parts = {"train": (images, labels), "test": parts[-1]}
                return Found(parts, spec.classes(members, place), "crop-flip")
    raise FileNotFoundError(
        f"{root} must hold {name}: {', '.join(files)} (.bin or not), or {' or '.join(spec.places)}, got none of them"
    )
