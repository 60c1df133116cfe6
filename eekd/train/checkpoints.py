"""A phase in progress, kept so that it continues bit for bit, and the signals at which it is put down.

    PHASE/checkpoints/
      N.safetensors    tensors: the network's and the optimiser's; of each process the states of its random generators
                     and the sums of the epoch's means
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
import math
import random
import re
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eekd.info import environment
from eekd.io.files import read_json, write_json_atomic
from eekd.io.tensors import load_state, load_tensors, save_tensors
from eekd.parallel import (
    all_gather,
    barrier,
    distribute_like,
    gather_to_main_process,
    is_main_process,
    rank,
    world_size,
)
from eekd.train.config import differences

FORMAT = 1
KEEP = 2
SYNC = 10  # seconds: how much training a power cut may cost, where a kill costs what the last checkpoint lacks
# Settings that leave the bits of a phase as they are, or that its `setup` knows by their content.
_NO_BITS = {
    "data",
    "root",
    "teacher",
    "teacher_run",
    "bank",
    "student",
    "students",
    "workers",
    "device",
    "tensorboard",
    "save_every",
    "seeds",
    "check_replicas",
    "non_finite",
    "skip_budget",
    "verify_loss",
}


class State:
    """All that the next step of a phase depends on; `means` and `clock` are those of the epoch in progress.

    Of several processes each packs and unpacks together with the others, and what differs between them, the random
    generators and the means, is stacked in the order of their ranks.
    """

    def __init__(self, trained: nn.Module, optimizer: torch.optim.Optimizer, scaler, device: torch.device):
        self.trained, self.optimizer, self.scaler, self.device = trained, optimizer, scaler, device
        self.epoch, self.batch, self.rows, self.skips = 0, 0, [], 0
        self.means = self.clock = None
        self.seconds = 0.0

    def pack(self) -> tuple[dict[str, Tensor], dict]:
        """The state as named tensors, those of the network and the optimiser in the first process only, and as JSON."""
        states = [(f"network.{name}", x) for name, x in self.trained.state_dict().items()]
        for i, parameter in enumerate(self._parameters()):
            states += [(f"optimizer.{i}.{name}", x) for name, x in self.optimizer.state.get(parameter, {}).items()]
        tensors = gather_to_main_process((name, x) for name, x in states if isinstance(x, Tensor))
        rest = {name.removeprefix("optimizer."): x for name, x in states if not isinstance(x, Tensor)}
        # A fused optimiser reads memory in the parameter's order.
        strides = {name: x.stride() for name, x in tensors.items() if name[:1] == "o" and not x.is_contiguous()}
        tensors |= {f"means.{name}": all_gather(tensor) for name, tensor in self.means.sums.items()}
        known = {"epoch": self.epoch, "batch": self.batch, "rows": self.rows, "skips": self.skips,
                 "seconds": self.seconds, "clock": self.clock.all(), "means": list(self.means.sums),
                 "counts": all_gather(torch.tensor(self.means.count)).tolist(),
                 "scaler": self.scaler.state_dict(), "optimizer": rest, "strides": strides}  # fmt: skip
        tensors["random"] = all_gather(random_state(self.device))
        return tensors, known

    def unpack(self, tensors: dict[str, Tensor], known: dict, source: Path) -> None:
        """Becomes what was packed; ValueError where it does not fit, `source` in it."""
        parts = {
            part: {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
            for part in ("network.", "means.", "optimizer.")
        }
        own = self.trained.state_dict()
        network = {name: distribute_like(x, own[name]) if name in own else x for name, x in parts["network."].items()}
        load_state(self.trained, network, source)
        for name in ("epoch", "batch", "rows", "skips", "seconds"):
            setattr(self, name, known[name])
        sums, counts = {name: parts["means."][name].to(self.device) for name in known["means"]}, known["counts"]
        if len(counts) == world_size():
            self.means.sums, self.means.count = {name: x[rank()] for name, x in sums.items()}, counts[rank()]
        else:  # once as many processes: what all of them had seen is the first one's
            self.means.sums = {name: x.sum(0) * is_main_process() for name, x in sums.items()}
            self.means.count = sum(counts) * is_main_process()
        self.clock.before = known["clock"]
        if known["scaler"]:
            self.scaler.load_state_dict(known["scaler"])
        parameters = self._parameters()
        for name, value in (parts["optimizer."] | known["optimizer"]).items():
            index, entry = name.removeprefix("optimizer.").split(".", 1)
            parameter = parameters[int(index)]
            if isinstance(value, Tensor):
                strides = known["strides"].get(f"optimizer.{name}", value.stride())
                laid = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=parameter.device)
                value = distribute_like(laid.copy_(value), parameter) if value.ndim else laid.copy_(value)
            self.optimizer.state[parameter][entry] = value
        set_random_state(tensors["random"][rank() % len(tensors["random"])], self.device)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def random_state(device: torch.device) -> Tensor:
    """The states of the generators of torch, Python, NumPy and the device, as bytes (n,) uint8."""
    _, words, gauss = random.getstate()
    _, keys, place, kept, cached = np.random.get_state()
    numbers = np.array([math.nan if gauss is None else gauss, place, kept, cached])
    arrays = np.array(words, np.uint32), keys.astype(np.uint32), numbers
    states = [torch.get_rng_state(), *(torch.from_numpy(array.view(np.uint8)) for array in arrays)]
    return torch.cat([*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Puts the generators into the states that `random_state` told, that of a device where both had one."""
    sizes = [len(torch.get_rng_state()), 4 * 625, 4 * 624, 8 * 4]
    own, words, keys, numbers, on_device = state.split([*sizes, len(state) - sum(sizes)])
    gauss, place, kept, cached = numbers.numpy().view(np.float64).tolist()
    torch.set_rng_state(own.clone())
    if len(on_device) and device.type == "cuda":
        torch.cuda.set_rng_state(on_device.clone(), device)
    words = words.numpy().view(np.uint32).tolist()
    random.setstate((3, tuple(words), None if math.isnan(gauss) else gauss))
    np.random.set_state(("MT19937", keys.numpy().view(np.uint32), int(place), int(kept), cached))


class Checkpoints:
    """The checkpoints of the phase in `folder`, begun with `setup`. ValueError where they would lie behind a link."""

    def __init__(self, folder: Path, setup: dict, device: torch.device):
        self.folder, self.setup, self.device = folder / "checkpoints", setup, device
        if self.folder.is_symlink():  # from which nothing may be removed
            raise ValueError(f"{self.folder} must be a folder, got a link to {self.folder.readlink()}")
        self._newest, self._synced, self._sync_time = [], None, -SYNC

    def load(self) -> tuple[dict[str, Tensor], dict, Path] | None:
        """The newest whole checkpoint and the path of its JSON, None where none was made.

        One that is damaged is passed over with a warning that names the file. ValueError where all are damaged,
        where the phase was begun with another setup, and where there is none but the metrics of several epochs.
        """
        damaged = []
        for number in sorted(self._numbers("json"), reverse=True):
            path = self.folder / f"{number}.json"
            try:
                known = read_json(path)
                if known.get("format") != FORMAT:
                    raise ValueError(f"{path} must have format {FORMAT}, got {known.get('format')!r}")
                tensors = load_tensors(path.with_suffix(".safetensors"), known["sha256"])
            except (AttributeError, FileNotFoundError, KeyError, ValueError) as error:
                damaged.append(str(error))
                continue
            for fault in damaged:
                warnings.warn(f"{fault}; going on from the checkpoint before it, {path}", RuntimeWarning, stacklevel=2)
            self._check(path, known)
            self._newest = [number]
            return tensors, known, path
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.folder} is whole: {damaged[0]}; remove {self.folder.parent} to "
                "train this phase from its start"
            )
        metrics = self.folder.with_name("metrics.jsonl")
        if metrics.exists() and (epochs := metrics.read_bytes().count(b"\n")) > 1:
            raise ValueError(
                f"{metrics} tells of {epochs} epochs, and neither a checkpoint nor a record of their end "
                f"is there: remove {self.folder.parent} to train this phase again"
            )
        return None

    def save(self, state: State) -> None:
        """Writes a checkpoint, then removes those that it replaces and what a kill or damage left."""
        tensors, known = state.pack()
        if not is_main_process():
            return
        number = max(self._numbers("json") + self._numbers("safetensors"), default=0) + 1
        path = self.folder / f"{number}.json"
        sync = time.monotonic() - self._sync_time >= SYNC
        sha256 = save_tensors(path.with_suffix(".safetensors"), tensors, sync=sync)
        head = {"format": FORMAT, "sha256": sha256, "setup": self.setup, "made_with": made_with(self.device)}
        write_json_atomic(path, head | known, sync)
        if sync:
            self._synced, self._sync_time = number, time.monotonic()
        self._newest = [*self._newest, number][-KEEP:]
        kept = {str(number) for number in (*self._newest, self._synced)}
        # The JSON goes first, so that what a kill leaves is not taken for a damaged checkpoint.
        for old in sorted(_own(self.folder), key=lambda old: old.suffix != ".json"):
            if old.stem not in kept:
                old.unlink()

    def _numbers(self, kind: str) -> list[int]:
        return [int(path.stem) for path in self.folder.glob(f"*.{kind}") if path.stem.isdecimal()]

    def _check(self, path: Path, known: dict) -> None:
        check_setup(path, known, self.setup)
        was, now = known["made_with"], made_with(self.device)
        changed = [f"{name} {now[name]!r} for {was.get(name)!r}" for name in now if was.get(name) != now[name]]
        if changed:
            warnings.warn(
                f"{path} goes on with {', '.join(changed)}: the last bits may differ from those of a run "
                "that was not interrupted",
                RuntimeWarning,
                stacklevel=3,
            )


def setup_of(name: str, session, phase, snapshots: list[str] | None = None) -> dict:
    """What decides the bits of a phase: its name, images and settings, and hashes of the snapshots and the bank."""
    config = {key: value for key, value in dataclasses.asdict(session.config).items() if key not in _NO_BITS}
    settings = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in (config | dataclasses.asdict(phase)).items()
    }
    return {"phase": name, "images": session.data.fingerprint, "settings": settings, "snapshots": snapshots,
            "bank": session.bank and session.bank.sha256}  # fmt: skip


def check_setup(path: Path, known: dict, setup: dict) -> None:
    """ValueError unless what `path` holds was made with this setup."""
    for name, (was, now) in differences({"": known["setup"]}, {"": setup}).items():
        raise ValueError(f"{path} was written with {name.strip('.') or 'setup'} {was!r}, and cannot go on with {now!r}")


@functools.cache
def made_with(device: torch.device) -> dict:
    """What the bits of a step depend on besides its setup."""
    facts = environment()
    chosen = {name: facts[name] for name in ("eekd", "commit", "torch", "cpu", "cpu_capability", "threads")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return chosen | {"device": name, "processes": world_size()}


def forget(folder: Path) -> None:
    """Removes the checkpoints of a phase that has ended."""
    folder = folder / "checkpoints"
    if is_main_process() and folder.is_dir() and not folder.is_symlink():
        for path in _own(folder):
            path.unlink()
        with suppress(OSError):  # where there is something else
            folder.rmdir()
    barrier()


def _own(folder: Path) -> list[Path]:
    """The files of checkpoints, whole or not, in their folder, and nothing that somebody put there."""
    name = re.compile(r"\d+\.(json|safetensors)|\.\d+\.(json|safetensors)\.tmp")
    return [path for path in folder.iterdir() if name.fullmatch(path.name)]
