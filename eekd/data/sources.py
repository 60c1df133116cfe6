"""Datasets as they are found, by name or path, before anything is split."""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import formats
from .encoded import Encoded, open_image

NAMES = ("glyphs", "digits", "fashion-mnist", "cifar10", "cifar100")

Part = tuple[Tensor | Encoded, Tensor]

_GLYPHS = Path(__file__).with_name("glyphs.npz")
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_HUB = {"fashion-mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_LABELS = ("label", "fine_label", "labels", "target", "class")
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class Found(NamedTuple):
    """Train, perhaps val and test, each (images, labels); the class names; the augmentation that suits."""

    parts: dict[str, Part]
    classes: Sequence[str]
    augment: str


def find(name: str, root: Path | None, image_size: int | None) -> Found:
    """Reads a named dataset or a path; see `eekd.data.load`, which says where it looks and what it raises."""
    if name == "glyphs":
        return _glyphs()
    if name == "digits":
        return _digits()
    if name == "fashion-mnist" and (root or _DEBIAN_FASHION_MNIST.is_dir()):
        return _fashion_mnist(root or _DEBIAN_FASHION_MNIST)
    if name in _CIFAR and root:
        return _cifar(name, root)
    if name in _HUB:
        package = ", Debian's package dataset-fashion-mnist" if name == "fashion-mnist" else ""
        return _hugging_face(_HUB[name], image_size, f"{name} needs root=FOLDER{package} or Hugging Face")
    path = Path(root or "", name).expanduser()
    if (path / "train").is_dir():
        return _folder(path, image_size)
    if path.suffix == ".parquet" and path.is_file() or path.is_dir() and any(path.rglob("*.parquet")):
        return _hugging_face(path, image_size, f"{path} cannot be read as parquet")
    if path.exists():
        raise ValueError(f"{path} is neither a folder with train/ in it nor parquet")
    if name.count("/") == 1 and name[0] not in "./~":
        return _hugging_face(name, image_size, f"{name} is neither a path nor to be had from Hugging Face")
    near = difflib.get_close_matches(name, NAMES, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"wanted {', '.join(NAMES)}, a path or a Hugging Face id"
    raise FileNotFoundError(f"there is no dataset {str(path)!r}: {hint}")


def _glyphs() -> Found:
    """Letters and digits of many fonts, as results/glyphs.py drew them; no design is in two parts."""
    with np.load(_GLYPHS) as drawn:
        parts = {}
        for part in _SPLITS:
            packed = torch.from_numpy(drawn[f"{part}_images"])
            images = torch.stack([packed >> 4, packed & 15], -1).flatten(-2) * 17  # 16 levels
            parts[part] = images.unsqueeze(1), torch.from_numpy(drawn[f"{part}_labels"]).long()
    return Found(parts, [*json.loads(_GLYPHS.with_suffix(".json").read_text())["characters"]], "crop")


def _digits() -> Found:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("digits needs scikit-learn: pip install 'eekd[train]'") from None
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round_().to(torch.uint8).unsqueeze(1)
    return Found({"train": (images, torch.from_numpy(digits.target).long())}, [*"0123456789"], "crop")


def _fashion_mnist(root: Path) -> Found:
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        paths = []
        for kind in ("images-idx3", "labels-idx1"):
            plain, packed = (root / f"{prefix}-{kind}-ubyte{suffix}" for suffix in ("", ".gz"))
            if not plain.is_file() and not packed.is_file():
                raise FileNotFoundError(f"{root} has no fashion-mnist: {plain.name} (or .gz) is not in it")
            paths.append(plain if plain.is_file() else packed)
        parts[part] = formats.read_idx_pair(*paths, len(_FASHION))
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

    def parse(self, data: bytes, source: str) -> Part:
        if source.endswith(".bin"):
            return formats.parse_cifar_binary(data, source, self.label_bytes, self.num_classes)
        return formats.parse_cifar_python(data, source, self.label_key, self.num_classes)

    def classes(self, members: dict[str, bytes], place: Path) -> list[str]:
        """The names in the archive's text or pickle file, or numbers where it has none."""
        text, pickled = self.names_files
        names = None
        if text in members:
            names = members[text].decode("utf-8", "replace").split()
        elif pickled in members:
            names = formats.read_pickle(members[pickled], f"{place}/{pickled}").get(self.names_key)
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


def _cifar(name: str, root: Path) -> Found:
    spec = _CIFAR[name]
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
        f"{root} has no {name}: wanted {', '.join(files)} (.bin or not), or {' or '.join(spec.places)}"
    )


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _folder(path: Path, image_size: int | None) -> Found:
    classes = _names(path / "train")
    parts = {}
    for part, aliases in _SPLITS.items():
        folder = next((path / alias for alias in aliases if (path / alias).is_dir()), None)
        if folder is None:
            continue
        files, labels = [], []
        for name in _names(folder):
            if name not in classes:
                raise ValueError(f"{folder / name} is a class that {path / 'train'} has not")
            images = [file.path for file in os.scandir(folder / name) if file.name.lower().endswith(_IMAGES)]
            files += sorted(images)
            labels += [classes.index(name)] * len(images)
        if not files:
            raise ValueError(f"{folder} holds no images, wanted {folder}/CLASS/*.png")
        parts[part] = files, labels
    return _encoded(parts, classes, image_size)


def _hugging_face(source: str | Path, image_size: int | None, problem: str) -> Found:
    """A dataset of the hub by its id, or local parquet by its path; `problem` begins the error."""
    try:
        from datasets import Image, load_dataset
        from datasets.config import HF_DATASETS_CACHE
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        raise ImportError(f"{problem}: that needs the package datasets, pip install 'eekd[data]'") from None
    try:
        if isinstance(source, str):
            found, folders = load_dataset(source), (HF_DATASETS_CACHE, HF_HUB_CACHE)
        else:
            folders = [source if source.is_dir() else source.parent]
            key = "data_files" if source.is_file() else "data_dir"
            found = load_dataset("parquet", **{key: str(source)})
    except Exception as error:  # network, hub, file system and parquet each have their own
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise (FileNotFoundError if isinstance(source, str) else ValueError)(f"{problem}: {reason}") from None
    if "train" not in found:
        raise ValueError(f"{source} has the splits {', '.join(found)}, wanted one called train")
    features = found["train"].features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    images += [name for name in ("image", "img") if name in features]
    labels = [name for name in _LABELS if name in features]
    if not images or not labels:
        raise ValueError(f"{source} has the columns {', '.join(features)}, wanted image and label")
    image, label = images[0], labels[0]
    if {type(y) for y in found["train"][label]} not in ({int}, {str}):
        raise ValueError(f"{source} has mixed or missing values in {label}, wanted integers or strings")
    values = set(found["train"][label])
    names = getattr(features[label], "names", None)
    number = {y: i for i, y in enumerate(range(len(names)) if names else sorted(values))}
    parts = {}
    for part, aliases in _SPLITS.items():
        split = next((found[alias] for alias in aliases if alias in found), None)
        y = [] if split is None else list(split[label])
        if not y or set(y) == {-1}:  # as the hub hides the labels of a test set
            continue
        if strange := set(y) - number.keys():
            raise ValueError(f"{source} has the label {strange.pop()!r} in {part}, which is no class of it")
        if isinstance(features[image], Image):
            split = split.cast_column(image, Image(decode=False))
        parts[part] = split[image], [number[value] for value in y]
    folders = [Path(folder).absolute() for folder in folders]
    return _encoded(parts, names or [str(y) for y in number], image_size, folders)


def _encoded(
    parts: dict[str, tuple[Sequence, list]],
    classes: list[str],
    image_size: int | None,
    folders: list[Path] | None = None,
) -> Found:
    """Images to decode, with labels; the first one tells grey from colour, and small from large."""
    image = open_image(*Encoded(parts["train"][0], channels=3, image_size=1, folders=folders).read(0))
    channels = 1 if image.mode in ("1", "L") else 3
    size = image_size or (image.width if image.width == image.height <= 64 else 224)
    encoded = {
        part: (Encoded(images, channels=channels, image_size=size, folders=folders), torch.tensor(labels))
        for part, (images, labels) in parts.items()
    }
    return Found(encoded, classes, "imagenet" if size > 64 else "crop" if channels == 1 else "crop-flip")
