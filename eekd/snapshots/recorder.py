"""Records snapshots of a model while it trains."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error

import numpy as np
import torch
from torch import nn

from eekd import parallel
from eekd.io import tensors as tensor_files
from eekd.io.files import first_line, read_checked, write_json_atomic
from eekd.io.state_dicts import mismatch
from eekd.snapshots.manifest import FORMAT, MANIFEST, read_manifest, rising, stage_ends
from eekd.snapshots.wrappers import bare_model


class SnapshotRecorder:
    """Saves a model at the end of each of M stages of its training, in any training loop.

        recorder = SnapshotRecorder("runs/teacher", epochs=200)
        for epoch in range(200):
            ...
            recorder.step(model)

    Args:
        directory: the run's folder, made if missing; FileExistsError if it already holds snapshots.
        total_steps: how often `step` will be called, if you call it once per optimiser step.
        epochs: the same, if you call it once per epoch. Exactly one of the two must be given.
        snapshots: M. Stage m ends with step total * m // M, so the M-th snapshot is the finished model.
        schedule: "uniform", or the M steps themselves, rising; the last of them is then the total.
        spec: the arguments of `eekd.models.build`, from which `SnapshotEnsemble.load` rebuilds the model.
        done: the number of steps already taken, to continue a run. Its snapshots up to that step must be undamaged and
            agree with schedule and spec (ValueError, FileNotFoundError); later ones are made again.

    The model may be wrapped in DistributedDataParallel, DataParallel, fully_shard, AveragedModel or torch.compile. All
    processes must call `step`; the first one writes.
    The first `step` checks that the snapshots can be loaded again: TypeError for an entry of the state_dict that is no
    dense tensor, ValueError for a model that differs from the one that `spec` builds.
    Source: the teacher's "experience" of EEKD (arXiv 2202.12488).
    """

    def __init__(
        self,
        directory: str | Path,
        total_steps: int | None = None,
        *,
        epochs: int | None = None,
        snapshots: int = 5,
        schedule: str | Sequence[int] = "uniform",
        spec: dict | None = None,
        done: int = 0,
    ):
        if total_steps is not None and epochs is not None:
            raise ValueError(f"total_steps must be None where epochs is given, got {total_steps} and {epochs}")
        name, total = ("total_steps", total_steps) if epochs is None else ("epochs", epochs)
        try:
            spec = json.loads(json.dumps(spec, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"spec must be a dict that JSON can hold: {error}") from error
        if not isinstance(spec, dict | None):
            raise TypeError(f"spec must be a dict or None, got {type(spec).__name__}")
        self.directory, self._checked = Path(directory), False
        self.schedule = _schedule(schedule, name, total, snapshots)
        self.done = _integer("done", done, 0, self.schedule[-1])
        self.manifest = {"format": FORMAT, "spec": spec, "schedule": self.schedule, "snapshots": []}
        if parallel.is_main_process():
            self._write(self._recorded())

    @property
    def complete(self) -> bool:
        """Whether the last step has been taken."""
        return self.done == self.schedule[-1]

    def step(self, model: nn.Module, metrics: Mapping[str, float] | None = None) -> dict | None:
        """Count one step. If it ends a stage, save `model` and return the manifest's entry.

        `metrics` are numbers to store with the snapshot; NaN and infinities become null. RuntimeError after the last
        step. After an error the step is not counted, and the earlier snapshots are unchanged.
        """
        if self.complete:
            raise RuntimeError(f"{self.directory}: step was called again after the last of {self.done} steps")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        model = bare_model(model)
        if not self._checked:
            self._check(model)
            self._checked = True
        step, entry = self.done + 1, None
        if step in self.schedule:
            numbers = {name: _number(f"metrics[{name!r}]", value) for name, value in (metrics or {}).items()}
            state = parallel.gather_to_main_process(tensor_files.bare_names(model.state_dict()).items())
        if step in self.schedule and parallel.is_main_process():
            file = f"snapshot-{self.schedule.index(step) + 1}.safetensors"
            sha256 = tensor_files.save_tensors(self.directory / file, state)
            entry = {"file": file, "sha256": sha256, "step": step, "metrics": numbers}
            self._write([*self.manifest["snapshots"], entry])
        self.done = step
        return entry

    def _check(self, model: nn.Module) -> None:
        """An error where a snapshot of this model could not be loaded again."""
        state, spec = tensor_files.bare_names(model.state_dict()), self.manifest["spec"]
        tensor_files.check_tensors(state, self.directory)
        if spec is None:
            return
        built = tensor_files.bare_names(_built(spec).state_dict())
        if reasons := mismatch(built, state):
            raise ValueError(f"spec must be that of the recorded {type(model).__name__}, which does not fit: {reasons}")

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
                raise FileExistsError(
                    f"{self.directory} already holds snapshots: choose another directory, "
                    "or continue their run with done="
                )
            return []
        manifest = read_manifest(self.directory)
        for key in ("schedule", "spec"):
            if manifest[key] != self.manifest[key]:
                raise ValueError(
                    f"{key} must be that of {path} to continue its run, "
                    f"{repr(manifest[key])}, got {repr(self.manifest[key])}"
                )
        kept = [entry for entry in manifest["snapshots"] if entry["step"] <= self.done]
        steps = [entry["step"] for entry in kept]
        if wanted := [step for step in self.schedule if step <= self.done and step not in steps]:
            raise ValueError(f"{path} must list all snapshots up to done={self.done}, got none of {wanted}")
        for entry in kept:
            read_checked(self.directory / entry["file"], entry["sha256"])
        return kept


def _schedule(schedule: str | Sequence[int], name: str, total: int | None, snapshots: int) -> list[int]:
    """The steps with which the stages end."""
    if total is not None:
        _integer(name, total, 1)
    if isinstance(schedule, str) and schedule == "uniform":
        if total is None:
            raise ValueError("total_steps or epochs must be the number of times that step will be called, got neither")
        _integer("snapshots", snapshots, 1, total)
        return stage_ends(total, snapshots)
    steps: list = list(schedule) if isinstance(schedule, Sequence) else []
    if not steps or not rising(steps) or total not in (None, steps[-1]):
        last = "" if total is None else f" up to {name}={total}"
        raise ValueError(f'schedule must be "uniform" or a list of rising steps{last}, got {repr(schedule)}')
    return steps


def _built(spec: dict) -> nn.Module:
    """The model of a spec, without data where it can be built so; no generator of random numbers is moved."""
    from eekd import models

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    return models.build(**spec)
            except RuntimeError:  # it computes with its weights
                return models.build(**spec)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"spec must be one that can be built, got {spec!r}: {first_line(error)}") from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


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
