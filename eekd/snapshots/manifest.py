"""manifest.json: which snapshots a training run has recorded.

The run's folder holds `snapshot-1.safetensors` … `snapshot-M.safetensors` and `manifest.json`:

    {"format": 1, "spec": {…} or null, "schedule": [step, …],
     "snapshots": [{"file": …, "sha256": …, "step": …, "metrics": {name: number or null}}, …]}

`spec` holds the arguments of `eekd.models.build`, `schedule` the steps with which the M stages end,
`snapshots` what has been recorded so far, in the same order. A step is one call of `SnapshotRecorder.step`.
"""

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error

from eekd.io.files import read_json

FORMAT = 1
MANIFEST = "manifest.json"


def stage_ends(total: int, snapshots: int) -> list[int]:
    """The steps with which M equal stages of a training end, the last of them its own end."""
    return [total * m // snapshots for m in range(1, snapshots + 1)]


def read_entries(directory: str | Path, which: Sequence[int] | None = None) -> tuple[list[dict], dict | None]:
    """The manifest's entries of the snapshots `which`, by index, or of all of a finished run; and its spec."""
    manifest = read_manifest(directory)
    path, entries, spec = Path(directory) / MANIFEST, manifest["snapshots"], manifest["spec"]
    if which is None:
        if len(entries) < (wanted := len(manifest["schedule"])):
            raise ValueError(
                f"{path} must list {wanted} snapshots, got {len(entries)}: let its run end, or pick some with which="
            )
        return entries, spec
    indices = list(which) if isinstance(which, Sequence) else []
    if not indices or any(index not in range(-len(entries), len(entries)) for index in indices):
        raise ValueError(f"which must index the {len(entries)} snapshots in {path}, got {which!r}")
    return [entries[index] for index in indices], spec


def read_manifest(directory: str | Path) -> dict:
    """The content of the manifest in `directory`, checked; FileNotFoundError or ValueError names the file."""
    path = Path(directory) / MANIFEST
    manifest = read_json(path)

    def check(true: object, wanted: str, got) -> None:
        if not true:
            raise ValueError(f"{path} is no manifest of snapshots: {wanted}, got {repr(got)}")

    keys = "format", "spec", "schedule", "snapshots"
    whole = isinstance(manifest, dict) and manifest.keys() >= set(keys)
    check(whole, f"it must be an object of {', '.join(keys)}", manifest)
    version, spec, schedule, entries = map(manifest.get, keys)
    check(type(version) is int and version == FORMAT, f"format must be {FORMAT}", version)
    check(isinstance(spec, dict | None), "spec must be an object or null", spec)
    check(isinstance(schedule, list) and rising(schedule), "schedule must be a list of rising steps", schedule)
    check(isinstance(entries, list), "snapshots must be a list", entries)
    for m, entry in enumerate(entries):
        check(isinstance(entry, dict), f"snapshot {m} must be an object", entry)
        file, sha256, metrics = map(entry.get, ("file", "sha256", "metrics"))
        check(
            isinstance(file, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.ASCII),
            f"file of snapshot {m} must be the name of a .safetensors file in its folder",
            file,
        )
        check(
            isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256),
            f"sha256 of snapshot {m} must be 64 hexadecimal digits",
            sha256,
        )
        check(
            isinstance(metrics, dict) and all(map(_finite, metrics.values())),
            f"metrics of snapshot {m} must be numbers or null by name",
            metrics,
        )
    steps, files = [entry.get("step") for entry in entries], [entry["file"] for entry in entries]
    check(
        rising(steps) and steps == schedule[: len(steps)],
        f"steps of snapshots must be the first of schedule {repr(schedule)}",
        steps,
    )
    check(len(set(files)) == len(files), "files of snapshots must differ", files)
    return manifest


def rising(steps: list) -> bool:
    """Whether steps are integers from 1 on, each above the one before."""
    return all(type(step) is int for step in steps) and all(a < b for a, b in itertools.pairwise([0, *steps]))


def _finite(value) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < math.inf)
