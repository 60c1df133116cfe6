"""Snapshots of one training run: recorded as it goes, read back as M frozen teachers.

The run's folder holds `snapshot-1.safetensors` … `snapshot-M.safetensors` and `manifest.json`:

    {"format": 1, "spec": {…} or null, "schedule": [step, …],
     "snapshots": [{"file": …, "sha256": …, "step": …, "metrics": {name: number or null}}, …]}

`spec` holds the arguments of `eekd.models.build`, `schedule` the steps with which the M stages end,
`snapshots` what has been recorded so far, in the same order. A step is one call of `SnapshotRecorder.step`.
"""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from eekd import checkpoint, distributed
from eekd.features import LastFeatures
from eekd.files import first_line, read_checked, read_json, sha256_of, write_json_atomic
from eekd.forwards import Folded, Spread, Swapped, pinned

Place = Literal["device", "cpu", "ranks"]
FORMAT = 1
MANIFEST = "manifest.json"


class SnapshotRecorder:
    """Saves a model at the end of each of M stages of its training, in anybody's loop.

        recorder = SnapshotRecorder("runs/teacher", epochs=200)
        for epoch in range(200):
            ...
            recorder.step(model)

    Args:
        directory: the run's folder, made if missing; FileExistsError where it already holds snapshots.
        total_steps, epochs: how often `step` will be called: once per optimiser step, or once per epoch.
        snapshots: M. Stage m ends with step total * m // M, so the M-th snapshot is the finished model.
        schedule: "uniform", or the M steps themselves, rising to the last one (which then is the total).
        spec: the arguments of `eekd.models.build`, from which `SnapshotEnsemble.load` rebuilds the model.
        done: steps taken before, when a run is continued. Its snapshots up to there must be whole and agree
            with schedule and spec (ValueError, FileNotFoundError); later ones are forgotten and made again.

    DistributedDataParallel, fully_shard and torch.compile are seen through; of several processes, all of which must
    call `step`, the first one writes.
    Source: the teacher's "experience" of EEKD (arXiv 2202.12488).
    """

    def __init__(self, directory: str | Path, total_steps: int | None = None, *, epochs: int | None = None,
                 snapshots: int = 5, schedule: str | Sequence[int] = "uniform", spec: dict | None = None,
                 done: int = 0):
        if total_steps is not None and epochs is not None:
            raise ValueError("give total_steps or epochs, not both")
        name, total = ("total_steps", total_steps) if epochs is None else ("epochs", epochs)
        try:
            spec = json.loads(json.dumps(spec, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"spec must be a dict that JSON can hold: {error}") from error
        if not isinstance(spec, dict | None):
            raise TypeError(f"spec must be a dict or None, got {type(spec).__name__}")
        self.directory = Path(directory)
        self.schedule = _schedule(schedule, name, total, snapshots)
        self.done = _integer("done", done, 0, self.schedule[-1])
        self.manifest = {"format": FORMAT, "spec": spec, "schedule": self.schedule, "snapshots": []}
        if distributed.first():
            self._write(self._recorded())

    @property
    def complete(self) -> bool:
        """Whether the last step has been taken."""
        return self.done == self.schedule[-1]

    def step(self, model: nn.Module, metrics: Mapping[str, float] | None = None) -> dict | None:
        """Count one step; where a stage ends with it, save `model` and return the manifest's entry.

        `metrics` are numbers to keep with the snapshot; NaN and infinities become null. RuntimeError past the
        last step. An error leaves the step uncounted and the earlier snapshots as they are.
        """
        if self.complete:
            raise RuntimeError(f"{self.directory}: step was called again after the last of {self.done} steps")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        step, entry = self.done + 1, None
        if step in self.schedule:
            numbers = {name: _number(f"metrics[{name!r}]", value) for name, value in (metrics or {}).items()}
            state = distributed.whole_in_first(checkpoint.bare_names(model.state_dict()).items())
        if step in self.schedule and distributed.first():
            file = f"snapshot-{self.schedule.index(step) + 1}.safetensors"
            sha256 = checkpoint.save_tensors(self.directory / file, state)
            entry = {"file": file, "sha256": sha256, "step": step, "metrics": numbers}
            self._write([*self.manifest["snapshots"], entry])
        self.done = step
        return entry

    def _write(self, entries: list[dict]) -> None:
        manifest = {**self.manifest, "snapshots": entries}
        write_json_atomic(self.directory / MANIFEST, manifest)
        self.manifest = manifest

    def _recorded(self) -> list[dict]:
        """The snapshots up to `done`, all there and whole; for a new run none, in a folder without any."""
        path = self.directory / MANIFEST
        if not self.done:
            listed = path.exists() and read_manifest(self.directory)["snapshots"]
            if listed or any(self.directory.glob("snapshot-*.safetensors")):
                raise FileExistsError(f"{self.directory} already holds snapshots: choose another directory, "
                                      "or continue their run with done=")
            return []
        manifest = read_manifest(self.directory)
        for key in ("schedule", "spec"):
            if manifest[key] != self.manifest[key]:
                raise ValueError(f"{key} must be that of {path} to continue its run, "
                                 f"{repr(manifest[key])}, got {repr(self.manifest[key])}")
        kept = [entry for entry in manifest["snapshots"] if entry["step"] <= self.done]
        steps = [entry["step"] for entry in kept]
        if wanted := [step for step in self.schedule if step <= self.done and step not in steps]:
            raise ValueError(f"{path} must list all snapshots up to done={self.done}, got none of {wanted}")
        for entry in kept:
            read_checked(self.directory / entry["file"], entry["sha256"])
        return kept


class SnapshotEnsemble(nn.Module):
    """M frozen copies of trained models, asked together.

        ensemble = SnapshotEnsemble.load("runs/teacher")
        logits, features = ensemble(images)  # (M, B, C), (M, B, D)

    The copies stay in eval mode and never take a gradient. They are kept out of nn.Module's sight: where the
    ensemble is an attribute of a student, the student's parameters, state_dict and train() do not know them.
    What moves or casts the student (`to`, `cuda`, `half`, channels_last) does reach them.

    Args:
        models: the trained nn.Modules (copied, so yours stay as they are), alike in C and D.
        layer: the name of the layer whose input is the feature; None takes the last nn.Linear.
        snapshots_on: where the weights lie: on the "device", in host memory ("cpu"), where they stay whatever moves
            the ensemble, and go to the images' device two models at a time, the next while one runs, or spread over
            the processes of torch.distributed ("ranks"): each runs its share, every size-th model from its rank on,
            for the images of all, which must call together. One model is not spread.

    On a CPU the models run as `eekd.forwards.Folded` says, where it can be done.

    Attributes:
        models: the M copies, or this process's share of them.
        hashes: SHA-256 of the M files they came from, () for models from memory.
    """

    def __init__(self, models: Iterable[nn.Module], layer: str | None = None, *, snapshots_on: Place = "device"):
        super().__init__()
        if snapshots_on not in get_args(Place):
            raise ValueError(f"snapshots_on must be device, cpu or ranks, got {snapshots_on!r}")
        if isinstance(models, nn.Module):
            raise TypeError(f"models must be a list of nn.Modules, got one {type(models).__name__}")
        # nn.Module does not look into tuples
        frozen = tuple(_frozen(model) for model in models)
        if not frozen:
            raise ValueError("models must hold at least one nn.Module, got none")
        self._count = len(frozen)
        several = self._count > 1 and distributed.size() > 1
        self._spread = Spread() if snapshots_on == "ranks" and several else None
        self.models = self._spread.share(frozen) if self._spread else frozen
        self.hashes: tuple[str, ...] = ()
        self._captures = tuple(LastFeatures(model, layer) for model in self.models)
        self._memory: list[Tensor | None] = [None, None]  # of logits, of features
        self._folded, self._swapped = Folded(), Swapped(self._captures) if snapshots_on == "cpu" else None
        if self._swapped:
            for model in self.models:
                pinned(model)

    @classmethod
    def load(cls, directory: str | Path, factory: Callable[[], nn.Module] | None = None,
             device: str | torch.device = "cpu", which: Sequence[int] | None = None, layer: str | None = None, *,
             snapshots_on: Place = "device") -> "SnapshotEnsemble":
        """The snapshots that a SnapshotRecorder left in `directory`, each file checked against its hash.

        `factory()` makes the model; None builds it from the manifest's spec. (A spec may name a Python file,
        which is then run: give a factory for folders you do not trust.) `which` picks snapshots by index, -1
        the last; None takes all of a finished run. FileNotFoundError or ValueError names the file that is
        missing, damaged, of another architecture, or the manifest of a run that has not ended.
        """
        path, (entries, spec) = Path(directory) / MANIFEST, read_entries(directory, which)
        if factory is None and spec is None:
            raise ValueError(f"{path} names no architecture (its spec is null): give a factory")

        def build() -> nn.Module:
            from eekd import models

            try:
                return models.build(**spec)
            except (OverflowError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{path} has a spec that cannot be built: {first_line(error)}") from error

        files = [path.with_name(entry["file"]) for entry in entries]
        hashes = [entry["sha256"] for entry in entries]
        return cls.from_files(files, factory or build, device, layer, sha256=hashes, snapshots_on=snapshots_on)

    @classmethod
    def from_files(cls, paths: Sequence[str | Path], factory: Callable[[], nn.Module],
                   device: str | torch.device = "cpu", layer: str | None = None, *,
                   sha256: Sequence[str] | None = None, snapshots_on: Place = "device") -> "SnapshotEnsemble":
        """Anybody's checkpoints of the model that `factory()` makes: .safetensors or files of `torch.save`.

        Nothing is unpickled; `eekd.checkpoint.load_weights` says where in a file the state_dict may lie.
        `sha256` are the hashes that the files must have. Errors as in `load`.
        """
        if isinstance(paths, str | Path) or not paths:
            raise ValueError(f"paths must be a list of at least one file, got {paths!r}")
        if not callable(factory):
            raise TypeError(f"factory must be a function that makes a model, got {type(factory).__name__}")
        hashes = tuple(map(sha256_of, paths) if sha256 is None else sha256)
        if len(hashes) != len(paths):
            raise ValueError(f"sha256 must hold a hash for each of {len(paths)} paths, got {len(hashes)}")

        def models():
            model = factory()
            if not isinstance(model, nn.Module):
                raise TypeError(f"factory must return an nn.Module, got {type(model).__name__}")
            for path, digest in zip(paths, hashes, strict=True):
                checkpoint.load_state(model, checkpoint.load_weights(path, digest), path)
                yield model  # copied by the ensemble before the next file is read into it

        ensemble = cls(models(), layer, snapshots_on=snapshots_on).to(device)
        ensemble.hashes = hashes
        return ensemble

    def __len__(self) -> int:
        return self._count

    @property
    def feature_dim(self) -> int:
        """D, the width of the features."""
        return self._captures[0].dim

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All snapshots' logits (M, B, C) and last features (M, B, D), in the dtypes that snapshot 0 returns.

        Both are views of buffers that the next call overwrites: use or clone them before. The buffers grow
        with the largest batch. ValueError where a snapshot differs in C or D.
        """
        if self._spread:
            return tuple(self._spread.back(own, self._count) for own in self._own(self._spread.all_images(x)))
        return self._own(x)

    def _own(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the models in this process say."""
        if self._swapped and x.device.type != "cpu":
            each = self._swapped(x)
        else:  # a GPU runs one model after another: nothing faster was measured yet
            each = self._folded(self._captures, x) or (capture(x) for capture in self._captures)
        for m, outputs in enumerate(each):
            if m == 0:
                self._memory = [*map(self._room, self._memory, outputs)]
                views = [memory[:, : len(rows)] for memory, rows in zip(self._memory, outputs, strict=True)]
            for name, rows, view in zip(("logits", "features"), outputs, views, strict=True):
                if rows.shape != view.shape[1:]:  # copy_ would broadcast
                    raise ValueError(f"{name} of snapshot {m} must have snapshot 0's shape "
                                     f"{tuple(view.shape[1:])}, got {tuple(rows.shape)}")
                view[m].copy_(rows)
        return tuple(views)

    def train(self, mode: bool = True) -> "SnapshotEnsemble":
        """Stay in eval mode, whatever `mode` is."""
        return super().train(False)

    def _room(self, memory: Tensor | None, rows: Tensor) -> Tensor:
        """`memory` where M times `rows` (B, width) fit into it, else new memory."""
        if rows.ndim != 2:
            raise ValueError(f"outputs of a snapshot must be (B, width), got shape {tuple(rows.shape)}")
        kind = rows.shape[1], rows.dtype, rows.device
        fits = memory is not None and (memory.shape[2], memory.dtype, memory.device) == kind
        if not fits or memory.shape[1] < len(rows):
            with torch.inference_mode(False):  # born in inference mode, it could never serve training
                memory = torch.empty(len(self.models), *rows.shape, dtype=rows.dtype, device=rows.device)
        return memory

    def _apply(self, fn, recurse=True):
        for model in self.models:
            model._apply(fn, recurse)
            if self._swapped:
                pinned(model)
        return super()._apply(fn, recurse)


def read_entries(directory: str | Path, which: Sequence[int] | None = None) -> tuple[list[dict], dict | None]:
    """The manifest's entries of the snapshots `which`, by index, or of all of a finished run; and its spec."""
    manifest = read_manifest(directory)
    path, entries, spec = Path(directory) / MANIFEST, manifest["snapshots"], manifest["spec"]
    if which is None:
        if len(entries) < (wanted := len(manifest["schedule"])):
            raise ValueError(f"{path} lists {len(entries)} of {wanted} snapshots: let its run end, or pick "
                             "some with which=")
        return entries, spec
    indices = list(which) if isinstance(which, Sequence) else []
    if not indices or any(index not in range(-len(entries), len(entries)) for index in indices):
        raise ValueError(f"which must index the {len(entries)} snapshots in {path}, got {which!r}")
    return [entries[index] for index in indices], spec


def read_manifest(directory: str | Path) -> dict:
    """The content of the manifest in `directory`, checked; FileNotFoundError or ValueError names the file."""
    path = Path(directory) / MANIFEST
    manifest = read_json(path)

    def check(true: bool, wanted: str, got) -> None:
        if not true:
            raise ValueError(f"{path} is no manifest of snapshots: {wanted}, got {repr(got)}")

    keys = "format", "spec", "schedule", "snapshots"
    whole = isinstance(manifest, dict) and manifest.keys() >= set(keys)
    check(whole, f"it must be an object of {', '.join(keys)}", manifest)
    version, spec, schedule, entries = map(manifest.get, keys)
    check(type(version) is int and version == FORMAT, f"format must be {FORMAT}", version)
    check(isinstance(spec, dict | None), "spec must be an object or null", spec)
    rising = isinstance(schedule, list) and _rising(schedule)
    check(rising, "schedule must be a list of rising steps", schedule)
    check(isinstance(entries, list), "snapshots must be a list", entries)
    for m, entry in enumerate(entries):
        check(isinstance(entry, dict), f"snapshot {m} must be an object", entry)
        file, sha256, metrics = map(entry.get, ("file", "sha256", "metrics"))
        check(isinstance(file, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.ASCII),
              f"file of snapshot {m} must be the name of a .safetensors file in its folder", file)
        check(isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256),
              f"sha256 of snapshot {m} must be 64 hexadecimal digits", sha256)
        check(isinstance(metrics, dict) and all(map(_finite, metrics.values())),
              f"metrics of snapshot {m} must be numbers or null by name", metrics)
    steps, files = [entry.get("step") for entry in entries], [entry["file"] for entry in entries]
    check(_rising(steps) and steps == schedule[: len(steps)],
          f"steps of snapshots must be the first of schedule {repr(schedule)}", steps)
    check(len(set(files)) == len(files), "files of snapshots must differ", files)
    return manifest


def _schedule(schedule: str | Sequence[int], name: str, total: int | None, snapshots: int) -> list[int]:
    """The steps with which the stages end."""
    if total is not None:
        _integer(name, total, 1)
    if isinstance(schedule, str) and schedule == "uniform":
        if total is None:
            raise ValueError("give total_steps or epochs, the number of times that step will be called")
        _integer("snapshots", snapshots, 1, total)
        return [total * m // snapshots for m in range(1, snapshots + 1)]
    steps = list(schedule) if isinstance(schedule, Sequence) else []
    if not steps or not _rising(steps) or total not in (None, steps[-1]):
        last = "" if total is None else f" up to {name}={total}"
        raise ValueError(f'schedule must be "uniform" or a list of rising steps{last}, got {repr(schedule)}')
    return steps


def _rising(steps: list) -> bool:
    """Whether steps are integers from 1 on, each above the one before."""
    return all(type(step) is int for step in steps) and all(a < b for a, b in itertools.pairwise([0, *steps]))


def _finite(value) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < math.inf)


def _integer(name: str, value: int, least: int, most: int | None = None) -> int:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value


def _number(name: str, value: float) -> float | None:
    try:
        value = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error
    return value if math.isfinite(value) else None


def _frozen(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"models must be nn.Modules, got {type(model).__name__}")
    return copy.deepcopy(model).eval().requires_grad_(False)
