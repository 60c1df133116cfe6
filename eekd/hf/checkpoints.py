"""Which folders are the checkpoints of a Trainer's run, and whether all that they name is there."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from eekd.io.files import read_json
from eekd.io.state_dicts import some
from eekd.ops.checks import MAX_SNAPSHOTS
from eekd.snapshots import files
from eekd.snapshots.manifest import stage_ends

ADAPTER = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", *files.WEIGHTS)


def checkpoint_folders(paths: str | Path | Sequence[str | Path], snapshots: int | None = None) -> list[Path]:
    """The checkpoints in the order of training: M evenly spaced of them, where `snapshots` is M.

    A folder with checkpoint-NUMBER folders stands for these, by number, and a warning names weights of its own; where a
    SnapshotCallback saved, for its snapshots. Any other folder is a checkpoint itself. A list keeps its order.
    FileNotFoundError or ValueError, one sentence, names what is missing.
    """
    folders = [folder for path in files.as_paths("teacher_checkpoints", paths) for folder in _in_run(path)]
    folders = [folders[place] for place in spaced(len(folders), snapshots)]
    if len(folders) > MAX_SNAPSHOTS:
        raise ValueError(
            f"teacher_checkpoints must be at most {MAX_SNAPSHOTS}, got {len(folders)}: choose some by snapshots="
        )
    for folder in folders:
        check_weights(folder)
    return folders


def spaced(count: int, snapshots: int | None) -> list[int]:
    """The places of M evenly spaced of `count` checkpoints, the last among them; of all where `snapshots` is None."""
    if snapshots is None:
        return [*range(count)]
    if not 1 <= snapshots <= count:
        raise ValueError(f"snapshots must be from 1 to {count}, the checkpoints there are, got {snapshots}")
    return [end - 1 for end in stage_ends(count, snapshots)]


def _in_run(path: Path) -> list[Path]:
    if not path.is_dir():
        raise FileNotFoundError(f"teacher_checkpoints must be folders, got {path}, which is missing or a file")
    numbered = [inside for inside in path.iterdir() if re.fullmatch(r"checkpoint-\d+", inside.name)]
    steps = sorted(filter(Path.is_dir, numbered), key=files.natural)
    if snapshots := files.scheduled(path):
        return snapshots
    if steps and (own := files.weights_file(path, WEIGHTS)):
        warnings.warn(f"{path} is read as its {len(steps)} folders of checkpoints, without {own.name}", stacklevel=4)
    return steps or [path]


def check_weights(folder: Path) -> None:
    """An error where the weights of a checkpoint, or some of its shards, are not there."""
    file = weights_file(folder)
    shards = set(read_json(file).get("weight_map", {}).values()) if file.suffix == ".json" else ()
    if lacking := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise FileNotFoundError(f"{folder} must hold the shards that {file.name} names, got none of {some(lacking)}")


def weights_file(folder: Path) -> Path:
    """The file, or the index of several, that holds a checkpoint's weights; of an adapter its own."""
    if file := files.weights_file(folder, WEIGHTS):
        return file
    inside = [path.name for path in folder.iterdir()]
    raise FileNotFoundError(
        f"{folder} must hold {files.WEIGHTS[0]}, its shards or an adapter, got {some(inside)}{files.merger(folder)}"
    )


def adapter_config(folder: Path) -> dict | None:
    """What an adapter says of itself; None of a whole model."""
    path = folder / ADAPTER
    config = read_json(path) if path.is_file() else None
    if not isinstance(config, dict | None):
        raise ValueError(f"{path} must hold a dict, got a {type(config).__name__}")
    return config
