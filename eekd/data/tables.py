"""Tables with images in them: parquet, and the data sets of Hugging Face's hub. Read by the package datasets."""

import heapq
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from eekd.io.files import printable, stranger

from .augment import SPLIT, random_bits
from .columns import classes_of, warn_of_doubtful
from .registry import SPLITS, Found, Reading
from .walk import counted, is_leftover, split_of

_LABELS = ("label", "fine_label", "labels", "target", "class")
_IMAGES = ("image", "img")
_HUB_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def read_hub(source: str, reading: Reading, problem: str) -> Found:
    """A data set of the hub by its id; `problem` begins the error where it cannot be had."""
    _package(problem)
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    streaming = {"streaming": True} if reading.keep else {}
    names = [reading.config_name] if reading.config_name else []
    splits, cache = _load(problem, FileNotFoundError, reading, source, *names, **streaming)
    return _read(source, splits, reading, [cache or HF_DATASETS_CACHE, HF_HUB_CACHE])


def read_parquet(path: Path, reading: Reading) -> Found:
    """A parquet file, or a folder of them, whose names or folders tell the splits."""
    problem = f"{path} cannot be read as parquet"
    _package(problem)
    reading.refuse(f"parquet, {path}", "config_name", "keep")
    files, left_out = {"train": [str(path)]}, []
    if path.is_dir():
        files, left_out = _by_split(path, reading)
    shards = [Path(file) for split in files.values() for file in split]
    for file in shards:
        with open(file, "rb") as start:
            if what := stranger(start.read(100), "file", {}):
                raise ValueError(f"{file} must be parquet, got {what}")
    left_out = [*left_out, *(_lacking(shards) if path.is_dir() else ())]
    splits, _ = _load(problem, ValueError, reading, "parquet", data_files=files)
    dataset = _read(str(path), splits, reading, [path if path.is_dir() else path.parent])
    notes = [*dataset.said, *(_mixed(path, files) if path.is_dir() else ())]
    return dataset._replace(left_out=[*dataset.left_out, *left_out], said=notes)


def _mixed(path: Path, files: dict[str, list[str]]) -> list[str]:
    """A sentence for each split whose files lie in several folders, which could be different data sets."""
    folders = {
        part: sorted({str(Path(file).parent.relative_to(path)) for file in paths}) for part, paths in files.items()
    }
    several = {part: names for part, names in folders.items() if len(names) > 1}
    return [
        f"The parquet files of {part} lie in {counted(names, 'folder', 3)}: all are read."
        for part, names in several.items()
    ]


def _lacking(files: Sequence[Path]) -> list[str]:
    """A phrase where the names of shards, NAME-00000-of-00005, say that there are more than these."""
    numbers: dict[tuple, set[str]] = {}
    for file in files:
        if name := re.fullmatch(r"(.+)-(\d+)-of-(\d+)(-\w+)?", file.stem):
            numbers.setdefault((file.parent, name[1], int(name[3])), set()).add(name[2])
    gaps = {name: (count - len(have), count) for (_, name, count), have in numbers.items() if len(have) < count}
    return [f"{gap} of the {count} shards of {printable(name)}, not there" for name, (gap, count) in gaps.items()]


def is_saved(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` of the package datasets wrote."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def read_saved(path: Path, reading: Reading) -> Found:
    """A folder that `save_to_disk` of the package datasets wrote."""
    problem = f"{path} cannot be read as a data set saved by datasets"
    datasets = _package(problem)
    reading.refuse(f"the saved data set {path}", "config_name", "keep")
    try:
        splits = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{problem}: {_whole(error)}") from None
    return _read(str(path), splits if isinstance(splits, dict) else {"train": splits}, reading, [path])


def _package(problem: str):
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{problem}: that needs the package datasets, pip install 'eekd[data]'") from None
    return datasets


def _load(problem: str, kind: type, reading: Reading, *arguments, **settings):
    """What `load_dataset` returns, and the folder that it cached in where that is not the usual one."""
    datasets = _package(problem)
    from datasets.config import HF_DATASETS_CACHE

    try:
        try:
            return datasets.load_dataset(*arguments, **settings), None
        except OSError as error:
            if not _is_unwritable(error):
                raise
            cache = tempfile.mkdtemp(prefix="eekd-datasets-")
            warnings.warn(
                f"{HF_DATASETS_CACHE} cannot be written to ({_whole(error)}): the data are cached in "
                f"{cache}, which the next run does not use and you can remove",
                stacklevel=2,
            )
            return datasets.load_dataset(*arguments, **settings, cache_dir=cache), cache
    except Exception as error:  # network, hub, file system and parquet each have their own
        reason = _whole(error)
        hint = "; --config-name chooses one" if "onfig name is missing" in reason and not reading.config_name else ""
        hint = "; --streaming stores nothing on disk" if "Not enough disk space" in reason else hint
        raise kind(f"{problem}: {reason}{hint}") from None


def _is_unwritable(error: OSError) -> bool:
    import errno

    return isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)


def _whole(error: Exception) -> str:
    """All that an error says, in one line."""
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__


def _by_split(path: Path, reading: Reading) -> tuple[dict[str, list[str]], list[str]]:
    """The parquet files of each split, told by a word in their names or folders, and what is left out."""
    files: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*.parquet")):
        parts = file.relative_to(path).parts
        if any(is_leftover(part) for part in parts):
            continue
        if reading.split:
            own = next((name for name in reading.split if name in parts or file.stem.startswith(name)), "")
        else:
            words = re.split(r"[-._ 0-9/]+", "/".join(parts).lower())
            own = next((part for word in words if word and (part := split_of(word))), "")
        files.setdefault(own, []).append(str(file))
    rest = files.pop("", [])
    if not files:
        return {"train": rest}, []
    names = [Path(file).name for file in rest]
    return files, [f"{counted(names, 'parquet file')} whose names tell no split"] if rest else []


def _splits(source: str, splits, reading: Reading) -> tuple[dict[str, str], list[str]]:
    """{train, val, test: what the data set calls it}, and the names of splits that are not read."""
    chosen: dict[str, str] = {}
    if reading.split:
        if missing := [name for name in reading.split if name not in splits]:
            raise ValueError(f"split must name splits of {source}, {', '.join(splits)}, got {missing[0]!r}")
        chosen = dict(zip(SPLITS if len(reading.split) == 3 else ("train", "test"), reading.split, strict=False))
    else:
        for part, names in _HUB_NAMES.items():
            others = [name for name in splits if split_of(name) == part]
            if name := next((name for name in (*names, *others) if name in splits), None):
                chosen[part] = name
        if "train" not in chosen and len(splits) == 1:
            chosen = {"train": next(iter(splits))}
        if "train" not in chosen:
            raise ValueError(
                f"{source} must have a split train, got {', '.join(splits)}: --split TRAIN,TEST names those to read"
            )
    return chosen, [name for name in splits if name not in chosen.values()]


def _image_column(source: str, features, reading: Reading) -> str:
    from datasets import Image

    if reading.image_column:
        if reading.image_column not in features:
            raise ValueError(f"image_column must be one of {', '.join(features)}, got {reading.image_column!r}")
        return reading.image_column
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    named = [name for name in _IMAGES if name in (images or features)]
    if len(images) == 1 or named:
        return images[0] if len(images) == 1 else named[0]
    raise ValueError(
        f"{source} must have the columns image and label, got {', '.join(features)}: "
        "--image-column names that of the images"
    )


def _label_column(source: str, features, image: str, reading: Reading) -> str:
    from datasets import ClassLabel, Value

    if reading.label_column:
        if reading.label_column not in features:
            raise ValueError(f"label_column must be one of {', '.join(features)}, got {reading.label_column!r}")
        return reading.label_column
    if named := [name for name in _LABELS if name in features]:
        return named[0]
    others = [name for name in features if name != image]
    classes = [name for name in others if isinstance(features[name], ClassLabel)]
    plain = [
        name
        for name in others
        if isinstance(features[name], Value)
        and re.match("u?int|string|large_string|bool|float|double", features[name].dtype)
    ]
    for candidates in (classes, plain):
        if len(candidates) == 1:
            return candidates[0]
    raise ValueError(
        f"{source} must have the columns image and label, got {', '.join(features)}: "
        "--label-column names that of the labels"
    )


def _read(source: str, splits, reading: Reading, folders: Sequence) -> Found:
    from datasets import Image

    chosen, others = _splits(source, splits, reading)
    features = splits[chosen["train"]].features
    if features is None:  # a stream without a header
        features = next(iter(splits[chosen["train"]].take(1)), {})
        features = dict.fromkeys(features)
    image = _image_column(source, features, reading)
    label = _label_column(source, features, image, reading)
    raw, notes = {}, []
    for part, name in chosen.items():
        split = splits[name]
        if isinstance(split.features and split.features.get(image), Image):
            split = split.cast_column(image, Image(decode=False))
        if reading.keep:
            cells, labels, count = _sampled(split, image, label, reading.keep)
            notes.append(f"{len(cells):,} of the {count:,} images of {name} are kept in memory.")
        else:
            cells, labels = split[image], list(split[label])
        if {type(y) for y in labels} == {float} and all(y == y // 1 for y in labels):  # as a table with gaps has them
            labels = [int(y) for y in labels]
        odd = [k for k, y in enumerate(labels) if type(y) not in (int, str, bool)]
        if odd:
            got = f"{printable(repr(labels[odd[0]]))[:100]} in row {odd[0]} of {name} and {len(odd) - 1} more"
            raise ValueError(f"{source} must have an integer or a string in {label}, one class an image, got {got}")
        if labels and set(labels) != {-1}:  # as the hub hides the labels of a test set
            raw[part] = cells, labels
        else:
            others.append(f"{name} (without labels)")
    if "train" not in raw:
        raise ValueError(f"{source} has no labels in {label} of {chosen['train']}: --label-column names another")
    values = set(raw["train"][1])
    if len({type(y) for y in values}) > 1:
        raise ValueError(f"{source} must have integers or strings in {label}, got mixed or missing values")
    names = getattr(features[label], "names", None)
    if not names:
        column = "label" if label in (reading.label_column, *_LABELS) else label
        classes_of(f"{source}, column {label},", map(str, raw["train"][1]), column)
        warn_of_doubtful(source, map(str, raw["train"][1]))
    number = {y: i for i, y in enumerate(range(len(names)) if names else sorted(values))}
    parts = {}
    for part, (cells, labels) in raw.items():
        if strange := set(labels) - number.keys():
            raise ValueError(f"{source} has the label {strange.pop()!r} in {part}, which is no class of it")
        parts[part] = cells, [number[value] for value in labels]
    notes.append(f"Images are in the column {printable(image)}, labels in {printable(label)}.")
    notes += [f"{printable(name)} is the {part} split." for part, name in chosen.items() if name != part]
    left_out = [counted(others, "split")] if others else []
    folders = [Path(folder).absolute() for folder in folders]
    return Found(parts, names or [str(y) for y in number], folders=folders, said=notes, left_out=left_out)


def _sampled(stream, image: str, label: str, keep: int) -> tuple[list, list, int]:
    """`keep` rows of a stream, each as likely as any other and always the same ones; and how many rows there are."""
    kept, count = [], 0
    for count, row in enumerate(stream, 1):
        rank = random_bits(0, 0, SPLIT, torch.tensor(count)).item()
        entry = (-rank, count, row[image], row[label])
        if len(kept) < keep:
            heapq.heappush(kept, entry)
        elif entry[0] > kept[0][0]:
            heapq.heapreplace(kept, entry)
    kept.sort(key=lambda entry: entry[1])
    return [entry[2] for entry in kept], [entry[3] for entry in kept], count
