"""A phase in progress, kept so that it continues bit for bit, and the signals at which it is put down.

    PHASE/checkpoints/
      N.safetensors    tensors: the network's, its average's and the optimiser's; of each process the states of its
                     random generators and the sums of the epoch's means
      N.json           the rest (below), and the SHA-256 of N.safetensors; written last, so it marks a whole checkpoint

The newest two are kept, and the newest that was waited for until it lay on the disk; when the phase has ended, none.

    format, sha256, setup    what the phase was begun with: name, images, settings, hashes of snapshots and bank
    made_with                versions and device
    epoch, batch             epochs that are complete; batches done of the next one
    rows                     of metrics.jsonl, one for each complete epoch
    seconds, clock           of the epoch in progress: in all and by part
    means, counts            of the epoch in progress: names of its means in their order, and samples in them by process
    skips                    steps of the phase that were left out
    scaler, optimizer, strides    what is no tensor in the states of each
"""

import dataclasses
import functools
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from eekd import parallel
from eekd.info import environment
from eekd.io.files import read_json, write_atomic, write_json_atomic
from eekd.io.tensors import load_tensors, save_tensors
from eekd.kept_code import SOURCES, copies, described, setup_of
from eekd.train.callbacks import Callback
from eekd.train.config import Config, Student, Teacher, differences
from eekd.train.random_state import random_state, set_random_state
from eekd.train.signals import signals
from eekd.user_code import is_file_name, own_name

FORMAT = 1
KEEP = 2
SYNC = 10  # seconds: how much training a power cut may cost, where a kill costs what the last checkpoint lacks
# Settings that leave the bits of a phase as they are, or that its `setup` knows by their content.
_NO_BITS = {
    "data", "root", "interpolation", "channels", "classes", "split", "image_column", "label_column", "config_name",
    "streaming", "bad_images", "bad_image_budget", "teacher", "teacher_run", "checkpoints", "checkpoint_entry", "bank",
    "student", "students", "workers", "device", "tensorboard", "wandb", "mlflow", "save_every", "seeds",
    "check_replicas", "non_finite", "skip_budget", "verify_loss",
}  # fmt: skip
_DEFAULTS = {
    field.name: list(field.default) if isinstance(field.default, tuple) else field.default
    for kind in (Teacher, Student, Config)
    for field in dataclasses.fields(kind)
}


class Checkpoints:
    """The checkpoints of a phase in `folder`, begun with `identity`. ValueError where they would lie behind a link."""

    def __init__(self, folder: Path, identity: dict, device: torch.device):
        self.folder, self.identity, self.device = folder / "checkpoints", identity, device
        if self.folder.is_symlink():  # from which nothing may be removed
            raise ValueError(f"{self.folder} must be a folder, got a link to {self.folder.readlink()}")
        self._newest, self._synced, self._sync_time = [], None, -SYNC

    def load(self) -> tuple[dict, Path] | None:
        """The newest whole checkpoint, for Trainer.load_state_dict, and the path of its JSON; None where none was made.

        One that is damaged is passed over with a warning that names the file. ValueError where all are damaged,
        where the phase was begun with another identity, and where there is none but the metrics of several epochs.
        """
        damaged = []
        for number in sorted(self._numbers("json"), reverse=True):
            path = self.folder / f"{number}.json"
            try:
                record = read_json(path)
                if record.get("format") != FORMAT:
                    raise ValueError(f"{path} must have format {FORMAT}, got {record.get('format')!r}")
                tensors = load_tensors(path.with_suffix(".safetensors"), record["sha256"])
            except (AttributeError, FileNotFoundError, KeyError, ValueError) as error:
                damaged.append(str(error))
                continue
            for fault in damaged:
                message = f"{fault}; continuing from the checkpoint before it, {path}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            self._check(path, record)
            self._newest = [number]
            return {"tensors": tensors, **record}, path
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.folder} is whole: {damaged[0]}; remove {self.folder.parent} to "
                "train this phase from its start"
            )
        metrics = self.folder.with_name("metrics.jsonl")
        if metrics.exists() and (epochs := metrics.read_bytes().count(b"\n")) > 1:
            raise ValueError(
                f"{metrics} has {epochs} epochs, but neither a checkpoint nor a record of their end "
                f"is there: remove {self.folder.parent} to train this phase again"
            )
        return None

    def save(self, state: dict) -> None:
        """Writes what Trainer.state_dict returned, then removes what that replaces and what a kill or damage left."""
        if not parallel.is_main_process():
            return
        tensors, record = state["tensors"], {name: value for name, value in state.items() if name != "tensors"}
        number = max(self._numbers("json") + self._numbers("safetensors"), default=0) + 1
        path = self.folder / f"{number}.json"
        sync = time.monotonic() - self._sync_time >= SYNC
        sha256 = save_tensors(path.with_suffix(".safetensors"), tensors, sync=sync)
        head = {"format": FORMAT, "sha256": sha256, "setup": self.identity, "made_with": provenance(self.device)}
        write_json_atomic(path, head | record, sync)
        if sync:
            self._synced, self._sync_time = number, time.monotonic()
        self._newest = [*self._newest, number][-KEEP:]
        kept = {str(number) for number in (*self._newest, self._synced)}
        for old in _own(self.folder):
            if old.stem not in kept:
                old.unlink()

    def _numbers(self, kind: str) -> list[int]:
        return [int(path.stem) for path in self.folder.glob(f"*.{kind}") if path.stem.isdecimal()]

    def _check(self, path: Path, record: dict) -> None:
        check_identity(path, record, self.identity)
        was, now = record["made_with"], provenance(self.device)
        changed = [f"{name} {now[name]!r} for {was.get(name)!r}" for name in now if was.get(name) != now[name]]
        if changed:
            warnings.warn(
                f"{path} continues with {', '.join(changed)}: the last bits may differ from those of a run "
                "that was not interrupted",
                RuntimeWarning,
                stacklevel=3,
            )


class Checkpointing(Callback):
    """Saves the state after every epoch, every `every` seconds, when a batch cannot be had and when `signals` come.

    `resume` goes on from the newest whole checkpoint in the folder, if the phase was begun with the same `identity`.
    """

    def __init__(self, folder: Path, identity: dict, device: torch.device, *, every: float, resume: bool = False):
        self.checkpoints, self.every, self.resume = Checkpoints(folder, identity, device), every, resume
        self.due, self.stop, self.last = False, 0, time.monotonic()

    @contextmanager
    def running(self, trainer):
        if self.resume and (saved := self.checkpoints.load()):
            trainer.load_state_dict(*saved)
        self.last = time.monotonic()
        with signals.held():
            yield

    @contextmanager
    def fetching(self, trainer):
        try:
            yield
        except BaseException:  # between two steps
            if parallel.world_size() == 1:  # the others know nothing of it
                self._save(trainer)
            raise

    @contextmanager
    def validating(self, trainer):
        generators = random_state(trainer.device)
        try:
            with signals.held(parallel.world_size() > 1):
                yield
        except KeyboardInterrupt:
            set_random_state(generators, trainer.device)  # validation begins again
            self._save(trainer)
            raise

    def on_step_end(self, trainer):
        due = time.monotonic() - self.last >= self.every and trainer.step % trainer.steps_per_epoch != 0
        self.stop, due = parallel.max_across_processes(signals.received, due)
        self.due = bool(due or self.stop)
        trainer.pause |= self.due

    def on_pause(self, trainer):
        between_epochs = trainer.step == trainer.epoch * trainer.steps_per_epoch
        if between_epochs or self.due:
            self._save(trainer)
        if between_epochs:
            [self.stop] = parallel.max_across_processes(signals.received)
        signals.check(self.stop)

    def _save(self, trainer) -> None:
        trainer.tell("on_save")  # which may refuse
        self.checkpoints.save(trainer.state_dict())
        self.last, self.due = time.monotonic(), False


def run_identity(name: str, session, phase, snapshots: list[str] | None = None) -> dict:
    """What decides the bits of a phase: its name, images and settings, and hashes of the snapshots and the bank."""
    config = {key: value for key, value in dataclasses.asdict(session.config).items() if key not in _NO_BITS}
    settings = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in (config | dataclasses.asdict(phase)).items()
    }
    if start := session.start(phase):  # wherever it lies
        settings["weights"] = start.sha256
    own, _ = session.normalization(phase)
    more = {"normalization": own} if own else {}
    if is_file_name(phase.model):
        settings["model"] = own_name(phase.model)
        more["model"] = described(Path(phase.model.rpartition(":")[0]))
    identity = {"phase": name, "images": session.data.fingerprint, "settings": settings, "snapshots": snapshots}
    return identity | {"bank": session.bank and session.bank.sha256} | more


def setups_in(run: Path) -> Iterator[tuple[Path, dict]]:
    """The folders of a run's phases that have begun, and what each was begun with; damaged files are left to others."""
    places = "teacher", "students/*", "seed-*/teacher", "seed-*/students/*"
    for folder in (folder for place in places for folder in run.glob(place)):
        checkpoints = sorted(folder.glob("checkpoints/*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in (folder / "snapshots.json", folder / "student.json", *checkpoints):
            with suppress(FileNotFoundError, ValueError):
                if setup := setup_of(read_json(path)):
                    yield folder, setup
                    break


def check_identity(path: Path, record: dict, identity: dict) -> None:
    """ValueError unless what `path` holds was made with this identity.

    A setting that there was not yet, and that has its default now, is no difference.
    """
    recorded = record["setup"].get("settings", {})
    for name, (was, now) in differences({"": record["setup"]}, {"": identity}).items():
        _, what, *key = name.split(".")
        if what in SOURCES and key == ["file"]:  # it may move
            continue
        if what == "settings" and key and key[0] not in recorded and now == _DEFAULTS.get(key[0]):
            continue
        old = name == ".settings.model" and is_file_name(was) and own_name(was) == now
        if old or (name == ".model" and was is None):  # written before the network's file was hashed
            continue
        if what in SOURCES and key and key[0] in ("sha256", "neighbours"):
            if key == ["neighbours"]:  # written before they were hashed
                continue
            phase = path.parent.parent if path.parent.name == "checkpoints" else path.parent
            file, copy, place = Path(identity[what]["file"]), phase / SOURCES[what], ".".join(key[1:])
            if place:
                file, copy = file.parent / place, phase / what / place
            got = "another content" if was and now else "none" if was else "one that was not imported"
            kept = f": {copy} is a copy of what it was" * bool(was)
            raise ValueError(f"{file} must be what it was when {path} was written, got {got}{kept}")
        raise ValueError(f"{name.strip('.') or 'setup'} must be {was!r}, with which {path} was written, got {now!r}")


class KeepSources(Callback):
    """Keeps copies of the user's own files that a phase runs: of its network, and of its `method` where it has one."""

    def __init__(self, folder: Path, model: str, method: Path | None = None):
        files = {"model": Path(model.rpartition(":")[0]) if is_file_name(model) else None, "method": method}
        self.copies = {}
        for what, file in files.items():
            self.copies |= copies(folder, what, file) if file else {}

    def write(self) -> None:
        for path, content in self.copies.items():
            write_atomic(path, content)

    @contextmanager
    def running(self, trainer):
        if parallel.is_main_process():
            self.write()
        yield


@functools.cache
def provenance(device: torch.device) -> dict:
    """What the bits of a step depend on besides its identity."""
    facts = environment()
    chosen = {name: facts[name] for name in ("eekd", "commit", "torch", "cpu", "cpu_capability", "threads")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return chosen | {"device": name, "processes": parallel.world_size()}


def delete_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of a phase that has ended."""
    folder = folder / "checkpoints"
    if parallel.is_main_process() and folder.is_dir() and not folder.is_symlink():
        for path in _own(folder):
            path.unlink()
        with suppress(OSError):  # where there is something else
            folder.rmdir()
    parallel.barrier()


def _own(folder: Path) -> list[Path]:
    """The files of checkpoints, whole or not, in their folder, and nothing that somebody put there.

    The JSON come first. Removed in this order, they leave nothing that is taken for a damaged checkpoint after a kill.
    """
    name = re.compile(r"\d+\.(json|safetensors)|\.\d+\.(json|safetensors)\.tmp")
    files = [path for path in folder.iterdir() if name.fullmatch(path.name)]
    return sorted(files, key=lambda path: path.suffix != ".json")
