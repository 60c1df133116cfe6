"""Which checkpoints a list of files and folders names, in the order of training."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from eekd.io.files import read_json, sha256_of
from eekd.io.state_dicts import some
from eekd.io.tensors import INDEX, weights_sha256

# The weights in a folder that save_pretrained, Trainer or accelerate wrote, as transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar", ".index.json")
SCHEDULE = "eekd_snapshots.json"  # beside checkpoint-* folders: which of them eekd.hf.SnapshotCallback saved
# Names of files without weights, of shards, and of what repeats another checkpoint.
BESIDE = re.compile(
    r"^(optimizer|scheduler|scaler|rng|random_states|training_args|trainer_state|\.)|_optim_states\.pt$"
)
SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
COPY = re.compile(r"(^|[^a-z])(best|last|latest)([^a-z]|$)", re.IGNORECASE)
# What shards that torch cannot load are made one file by, where a file of this name is among them.
MERGERS = {
    ".metadata": "torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes a file of it",
    "zero_to_fp32.py": "`python {0}/zero_to_fp32.py {0} {0}` makes weights of the shards of ZeRO",
    "pytorch_model_fsdp_0": "`accelerate merge-weights {0}/pytorch_model_fsdp_0 {0}` makes weights of FSDP's shards",
}


def checkpoint_files(paths: str | Path | Sequence[str | Path], folders: bool = False) -> list[Path]:
    """The checkpoints that `paths` name: a file, a folder or a list of them.

    A folder that holds `model.safetensors`, `pytorch_model.bin` or an index of several is one checkpoint. Another
    stands for those in it, folders like `checkpoint-500` or files, in the order of the numbers in their names; where
    an eekd.hf.SnapshotCallback saved, for its snapshots. With
    `folders` a folder stays a folder where it is one checkpoint. A list keeps its order; a warning says where that
    looks like the order of letters, in which 10 comes before 2.

    Raises ValueError where there is none, FileNotFoundError for a path that does not exist.
    """
    given = as_paths("paths", paths)
    if given == sorted(given, key=str) != sorted(given, key=natural):
        names = some(path.name for path in given)
        warnings.warn(
            f"checkpoints are in the order of letters: {names}; is the last the finished model?", stacklevel=3
        )
    return [file for path in given for file in (_in_folder(path, folders) if path.is_dir() else [_existing(path)])]


def as_paths(name: str, paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """One path or a list of them as a list; ValueError for anything else, and for an empty list."""
    given = [paths] if isinstance(paths, str | Path) else list(paths) if isinstance(paths, Sequence) else []
    if not given or not all(isinstance(path, str | Path) and str(path) for path in given):
        raise ValueError(f"{name} must be a file, a folder or a list of at least one, got {paths!r}")
    return [Path(path) for path in given]


def weights_file(folder: Path, names: Sequence[str] = WEIGHTS) -> Path | None:
    """The file, or the index of several, from which transformers reads the weights in a folder; None without one."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def natural(path: Path) -> list:
    """The key by which `checkpoint-2` comes before `checkpoint-10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path)) if part]


def checkpoint_sha256(path: Path) -> str:
    """SHA-256 of a checkpoint; of a folder, that of the lines "SHA-256 NAME" of the files in it."""
    if not path.is_dir():
        return weights_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = (f"{sha256_of(file)} {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def scheduled(folder: Path) -> list[Path] | None:
    """The folders of the snapshots that an eekd.hf.SnapshotCallback saved in a run's folder; None where it did not."""
    file = folder / SCHEDULE
    if not file.is_file():
        return None
    content = read_json(file)
    steps = content.get("steps") if isinstance(content, dict) else None
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"{file} must name the steps of at least one snapshot, got {repr(content)[:100]}")
    if lacking := [step for step in steps if not (folder / f"checkpoint-{step}").is_dir()]:
        raise FileNotFoundError(
            f"{folder} must hold the snapshots of steps {some(map(str, steps))}, got none of "
            f"{some(map(str, lacking))}: its run has not ended, or they were deleted"
        )
    return [folder / f"checkpoint-{step}" for step in steps]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file")
    return path


def _one(folder: Path, folders: bool) -> Path | None:
    """The checkpoint that the folder is; None where it is none, or holds several."""
    weights = weights_file(folder)
    if folders and (weights or (folder / "config.json").is_file()):
        return folder
    return weights


def _in_folder(folder: Path, folders: bool) -> list[Path]:
    if snapshots := scheduled(folder):
        return [one for path in snapshots for one in _in_folder(path, folders)]
    inside = sorted(folder.iterdir(), key=natural)
    steps = [path for path in inside if path.is_dir() and not BESIDE.search(path.name)]
    steps = {path.name: one for path in steps if (one := _one(path, folders))}
    own = _one(folder, folders)
    if steps and own:
        beside = own.name if own != folder else "weights"
        warnings.warn(f"{folder} is read as its {len(steps)} folders of checkpoints, without {beside}", stacklevel=4)
    if steps:
        return _in_order(folder, steps)
    if own:
        return [own]
    files = [path for path in inside if path.name.endswith(ENDINGS) and path.is_file() and not BESIDE.search(path.name)]
    if indices := [path for path in files if path.name.endswith(".index.json")]:
        files = indices  # which name their shards
    if not files and (folder / "checkpoints").is_dir():  # of a version of Lightning
        return _in_folder(folder / "checkpoints", folders)
    if not files:
        names = some(path.name for path in inside)
        raise ValueError(f"{folder} must hold checkpoints ({', '.join(ENDINGS)}), got {names}{merger(folder)}")
    if shards := [path.name for path in files if SHARD.search(path.name)]:
        raise ValueError(f"{folder} must hold the index of its shards, {some(shards)}, got none, *{INDEX}")
    return _in_order(folder, {path.name: path for path in files})


def merger(folder: Path) -> str:
    """The end of an error about a folder of shards: what makes weights of them; "" where that is not known."""
    return next((f"; {how.format(folder)}" for name, how in MERGERS.items() if (folder / name).exists()), "")


def _in_order(folder: Path, files: dict[str, Path]) -> list[Path]:
    """Checkpoints by the numbers in their names, then those without; none called best or last beside numbered ones."""
    copies = [name for name in files if COPY.search(name)]
    numbered = [name for name in files if re.search(r"\d", name.partition(".")[0]) and name not in copies]
    names = numbered + [name for name in files if name not in numbered and name not in copies]
    if len(numbered) > 1 and copies:
        told = some(copies)
        warnings.warn(f"{folder}: left out {told}, for the best and the last are among the others", stacklevel=5)
        copies = []
    names += copies
    unsure = None
    if len(names) > 1 and not numbered:
        unsure = "no number tells"
    elif len(names) > 1 and copies:
        unsure = "not all numbers tell"
    elif _differ(numbered):
        unsure = "different numbers tell different orders, and the first"
    if unsure:
        told = ", ".join(names)
        warnings.warn(f"{folder}: {unsure} the order of {told}; is the last the finished model?", stacklevel=5)
    return [files[name] for name in names]


def _differ(names: Sequence[str]) -> bool:
    """Whether the first number that varies names no step, and another would put the names in another order."""
    words = [re.split(r"(\d+)", name) for name in names]
    if len({len(each) for each in words}) != 1:
        return False
    numbers = [[int(each[i]) for each in words] for i in range(1, len(words[0]), 2)]
    varying = [i for i, column in enumerate(numbers) if len({*column}) > 1]
    if all(numbers[i] == sorted(numbers[i]) for i in varying):
        return False
    return not re.search(r"(epoch|step|iter\w*|checkpoint|ckpt|snapshot)\W*$", words[0][2 * varying[0]], re.IGNORECASE)
