"""The one training loop: what a teacher's phase and every student's share."""

import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eekd import models
from eekd.bank import LogitBank
from eekd.config import Config, Phase, Teacher
from eekd.data import Batch, ImageData, Loader, load
from eekd.trainers.folder import Log
from eekd.trainers.numbers import Guard
from eekd.trainers.state import Checkpoints, State, setup_of, signals

SPLIT = ("train_limit", "val_fraction", "split_seed")  # settings that decide which images there are
CHECK = 50  # look at the loss, and whether all is finite, every so many steps: each look makes the GPU wait

Progress = Callable[[str, int, int, dict], object]  # phase, steps done, steps in all, what is known so far


def quiet(phase: str, done: int, total: int, known: dict) -> None:
    """Shows no progress."""


class Session:
    """What the phases of a run share: settings, data, logit bank (or None), device and precision.

    Sets torch's process-wide switches of determinism.
    """

    def __init__(self, config: Config, data: ImageData | None = None):
        self.config = config
        self.device = _device(config.device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        self.data = data or load(
            config.data, config.root, val_fraction=config.val_fraction, seed=config.split_seed,
            train_limit=config.train_limit, image_size=config.image_size,
        )  # fmt: skip
        self.bank = LogitBank.open(config.bank) if config.bank else None
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def spec(self, phase: Phase) -> dict:
        """The arguments of eekd.models.build for this data."""
        data = self.data
        return dict(name=phase.model, num_classes=len(data.classes), in_channels=data.channels,
                    image_size=data.image_size)  # fmt: skip

    def network(self, phase: Phase, seed: int) -> nn.Module:
        """A new network on the device; its weights, and all random numbers drawn after, are a function of the seed."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        return models.build(**self.spec(phase)).to(self.device, memory_format=self.layout)

    def loader(self, split: str, phase: Phase, train: bool = False) -> Loader:
        """Batches of a split; to train on: shuffled, augmented and never a last batch of one (batch norm).

        With a bank, epoch after epoch shows one of its views.
        """
        images = getattr(self.data, split)
        views = dict(views=self.bank.views, view_seed=self.bank.seed) if train and self.bank else {}
        augment = self.data.augment if self.config.augment == "auto" else self.config.augment
        return Loader(
            images, batch_size=phase.batch_size, augment=augment if train else "none",
            seed=self.config.seed, device=self.device, train=train, workers=self.config.workers,
            drop_last=train and len(images) % phase.batch_size == 1, **views,
        )  # fmt: skip

    def run(self, network: Callable, images: Tensor):
        """The network's output under this session's precision and memory format."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return network(images.contiguous(memory_format=self.layout))

    def compiled(self, network: nn.Module) -> nn.Module:
        return torch.compile(network) if self.config.compile else network


def fit(name: str, session: Session, phase: Phase, trained: nn.Module, objective: Callable,
        validate: Callable, loader: Loader, folder: Path, progress: Progress,
        begin: Callable[[int], Callable[[dict], object]] = lambda done: dict,
        resume: bool = False, taught_by: dict | None = None) -> list[dict]:  # fmt: skip
    """Trains for phase.epochs epochs on the batches of `loader` and returns the rows of metrics.jsonl.

    objective(batch, clock) gives what to minimise and detached measurements, validate() the val_ entries of a
    row; begin(epochs done) gives what is called with the row of an epoch when it is complete. FloatingPointError
    if loss or gradients are not finite, see `Guard`.

    The state is saved after every epoch, every config.save_every seconds, when a batch cannot be had and when
    `signals` are received; `resume` goes on from there, if only it has the same images, settings and `taught_by`.
    """
    config, device = session.config, session.device
    checkpoints = Checkpoints(folder, setup_of(name, session, phase, taught_by), device)
    optimizer = _optimizer(phase, trained)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    state = State(trained, optimizer, scaler, device)
    state.means, state.clock = Means(), Clock(device)
    saved = checkpoints.load() if resume else None
    after_epoch = begin(saved[1]["epoch"] if saved else 0)
    each, total, running, last = len(loader), phase.epochs * len(loader), math.nan, time.monotonic()

    def batches_from(step: int) -> Iterator[Batch]:
        loader.set_epoch(step // each)
        loader.skip(step % each)
        return iter(loader)

    guard = Guard(name, session, phase, state, folder, objective, batches_from)
    log = Log(folder, config.tensorboard, guard.rows(saved[1]["rows"] if saved else []) if resume else None)
    if saved:
        state.unpack(*saved)
    state.rows = log.rows

    def save() -> None:
        nonlocal last
        guard.left_out()  # raises where what would be saved is not to be gone on from
        state.seconds = time.perf_counter() - start
        checkpoints.save(state)
        last = time.monotonic()

    with signals.held():
        while state.epoch < phase.epochs:
            trained.train()
            batches = batches_from(state.epoch * each + state.batch)
            start = time.perf_counter() - state.seconds
            while state.batch < each:
                step = state.epoch * each + state.batch
                try:
                    batch = next(batches)
                except BaseException:  # between two steps
                    save()
                    raise
                lr = learning_rate(phase, step, total)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                guard.begin(step, lr)
                loss, measurements = objective(batch, state.clock)
                guard.see(loss)
                with state.clock("backward"):
                    optimizer.zero_grad()
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                state.batch, step = state.batch + 1, step + 1
                due = signals.received or (time.monotonic() - last >= config.save_every and state.batch < each)
                pause = step % CHECK == 0 or state.batch == each or due
                if guard.left_out(pause):
                    state.means.add(0, **{key: torch.zeros_like(value) for key, value in measurements.items()})
                    batches = batches_from(step)
                else:
                    state.means.add(len(batch.labels), **measurements)
                if pause:
                    running = state.means["loss"]
                if due:
                    save()
                    signals.check()
                known = {"epoch": state.epoch + 1, "epochs": phase.epochs, "train_loss": running}
                progress(name, step, total, known)
            seconds = time.perf_counter() - start
            step = (state.epoch + 1) * each
            row = {"epoch": state.epoch + 1, "step": step, "lr": learning_rate(phase, step - 1, total)}
            row |= {_TRAIN.get(key, key): value for key, value in state.means.all().items()}
            try:
                with signals.held(False):
                    row |= validate()
            except KeyboardInterrupt:
                save()
                raise
            row |= {"seconds": seconds}
            row |= {f"seconds_{part}": state.clock.seconds(part) for part in ("teacher", "forward", "backward")}
            row |= guard.row(log.rows)
            log.write(row)
            after_epoch(row)
            state.epoch, state.batch, state.seconds = state.epoch + 1, 0, 0.0
            state.means, state.clock = Means(), Clock(device)
            start = time.perf_counter()
            save()
            signals.check()
            progress(name, step, total, row | {"epochs": phase.epochs})
    return log.rows


_TRAIN = {"loss": "train_loss", "accuracy": "train_accuracy", "attention_loss": "train_attention_loss"}


def classify(session: Session, network: nn.Module, val: Loader) -> tuple[Callable, Callable]:
    """Objective and validation without a teacher: cross-entropy."""
    compiled = session.compiled(network)

    def objective(batch, clock):
        with clock("forward"):
            logits = session.run(compiled, batch.images)
        with clock("backward"):
            loss = F.cross_entropy(logits.float(), batch.labels)
        return loss, {"loss": loss.detach(), "accuracy": accuracy(logits, batch.labels)}

    def validate():
        return {f"val_{name}": mean for name, mean in evaluate(session, network, val).items()}

    return objective, validate


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Fraction of (B, C) logits that are highest at the label."""
    return (logits.argmax(1) == labels).double().mean()


@torch.no_grad()
def evaluate(session: Session, network: nn.Module, loader: Loader) -> dict[str, float]:
    """Mean cross-entropy and accuracy on all images of the loader."""
    network.eval()
    means = Means()
    for images, labels, _ in loader:
        logits = session.run(network, images).float()
        means.add(len(labels), loss=F.cross_entropy(logits, labels), accuracy=accuracy(logits, labels))
    return means.all()


def learning_rate(phase: Phase, step: int, total: int) -> float:
    """The learning rate of step 0 <= step < total.

    step: lr / 10^(milestones passed);  cosine: lr/2 (cos(pi step/total) + 1);
    cyclic: the cosine over each of the M stages (Huang et al., "Snapshot Ensembles", 2017).
    """
    if phase.schedule == "step":
        return phase.lr * 0.1 ** sum(step / total >= m for m in phase.milestones)
    cycles = phase.snapshots if isinstance(phase, Teacher) and phase.schedule == "cyclic" else 1
    return phase.lr / 2 * (math.cos(math.pi * (step * cycles % total) / total) + 1)


def _optimizer(phase: Phase, trained: nn.Module) -> torch.optim.Optimizer:
    # fused: the one that GradScaler steps without asking the GPU for the gradients' state
    options = dict(lr=phase.lr, weight_decay=phase.weight_decay, fused=True)
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(trained.parameters(), **options)
    optimizer = torch.optim.SGD(trained.parameters(), momentum=0.9, nesterov=phase.nesterov, **options)
    for parameter in trained.parameters():  # else, where the first step is skipped, torch takes what lies in memory
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Means:
    """Means over samples of named measurements, summed on the device and read when asked."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, rows: int, **means: Tensor) -> None:
        self.count += rows
        for name, mean in means.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(mean, dtype=torch.float64)
            self.sums[name].add_(mean, alpha=rows)

    def __getitem__(self, name: str) -> float | list[float]:
        return (self.sums[name] / self.count).tolist()

    def all(self) -> dict[str, float | list[float]]:
        return {name: self[name] for name in self.sums}


class Clock:
    """Seconds spent in named stretches of code: by CUDA events, read at the end, or by the clock of a CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans = defaultdict(list)
        self.before: dict[str, float] = {}  # seconds before a kill

    @contextmanager
    def __call__(self, name: str):
        start = self._now()
        yield
        self.spans[name].append((start, self._now()))

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, name: str) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        spans = (a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.spans[name])
        return sum(spans, self.before.get(name, 0.0))

    def all(self) -> dict[str, float]:
        return {name: self.seconds(name) for name in [*self.spans.keys() | self.before.keys()]}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} is not there; this machine offers cpu"
                         + ", cuda" * torch.cuda.is_available()) from None  # fmt: skip
