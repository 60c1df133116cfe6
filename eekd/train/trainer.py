"""The one training loop: what a teacher's phase and every student's share."""

import inspect
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eekd import parallel
from eekd.bank import LogitBank
from eekd.data import Batch, ImageData, Loader, load
from eekd.train.checkpoints import Checkpoints, State, random_state, set_random_state
from eekd.train.config import Config, Phase, Teacher
from eekd.train.nonfinite import Guard
from eekd.train.run_folder import Log
from eekd.train.runtime import Placement, chosen
from eekd.train.signals import signals

SPLIT = ("train_limit", "val_fraction", "split_seed")  # settings that decide which images there are
CHECK = 50  # look at the loss every so many steps: each look makes the GPU wait

Progress = Callable[[str, int, int, dict], object]  # phase, steps done, steps in all, what is known so far


def quiet(phase: str, done: int, total: int, known: dict) -> None:
    """Shows no progress."""


# Of DistributedDataParallel: whether each forward brings the first process's buffers; torch 2.14 renames it.
_OWN_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class Session(Placement):
    """What the phases of a run share: settings, data, logit bank (or None), device and precision.

    Of several processes (eekd.parallel.process_group) each has its share of every batch; batch_size is that of a
    step, over all of them and all micro-batches. `config` are the settings with "auto" decided, `asked` those that
    were given. Sets torch's process-wide switches of determinism.
    """

    def __init__(self, config: Config, data: ImageData | None = None):
        device = _device(config.device)
        self.asked, self.config = config, (config := chosen(config, device))
        super().__init__(config.precision, config.channels_last, device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        self.data = data or load(
            config.data,
            config.root,
            val_fraction=config.val_fraction,
            seed=config.split_seed,
            train_limit=config.train_limit,
            image_size=config.image_size,
        )
        self.bank = LogitBank.open(config.bank) if config.bank else None

    def spec(self, phase: Phase) -> dict:
        """The arguments of eekd.models.build for this data."""
        data = self.data
        return dict(
            name=phase.model, num_classes=len(data.classes), in_channels=data.channels, image_size=data.image_size
        )

    def network(self, phase: Phase, seed: int) -> nn.Module:
        """A new network on the device; its weights, and all random numbers drawn after, are a function of the seed.

        The random numbers drawn after differ between processes.
        """
        _seed(seed)
        network = self.build(self.spec(phase))
        if not parallel.is_main_process():
            _seed(int(np.random.SeedSequence((seed, parallel.rank())).generate_state(1)[0]))
        return parallel.convert_sync_batchnorm(network) if self.config.sync_batchnorm else network

    def parallelize(self, network: nn.Module, kind: str | None = None) -> nn.Module:
        """The network as all processes train it together, by config.parallel: replicas with one gradient, or shards."""
        if parallel.world_size() == 1 or not any(p.requires_grad for p in network.parameters()):
            return network
        if (kind or self.config.parallel) == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            return fully_shard(network, mesh=init_device_mesh(self.device.type, (parallel.world_size(),)))
        # To look for unused parameters keeps the buckets of gradients as they are: else they, and with three processes
        # the order of a sum, change after the first step, so that a resumed run would have other bits.
        return DistributedDataParallel(
            network,
            gradient_as_bucket_view=True,
            **{_OWN_BUFFERS: False},
            find_unused_parameters=self.config.deterministic,
        )

    def micro_batch(self, phase: Phase) -> int:
        """How many samples of a step a process sees at once; ValueError where they cannot be shared out evenly."""
        parts = parallel.world_size() * self.config.accumulate
        if phase.batch_size % parts:
            raise ValueError(
                f"{phase._prefix}batch_size must be a multiple of {parts} ({parallel.world_size()} "
                f"processes x accumulate {self.config.accumulate}), got {phase.batch_size}"
            )
        return phase.batch_size // parts

    def loader(self, split: str, phase: Phase, train: bool = False) -> Loader:
        """Batches of a split; to train on: shuffled, augmented and never a process's last one of one (batch norm).

        With a bank, epoch after epoch shows one of its views.
        """
        images = getattr(self.data, split)
        views = dict(views=self.bank.views, view_seed=self.bank.seed) if train and self.bank else {}
        augment = self.data.augment if self.config.augment == "auto" else self.config.augment
        each, processes = self.micro_batch(phase), parallel.world_size()
        rest = len(images) % (each * processes)
        return Loader(
            images,
            batch_size=each,
            augment=augment if train else "none",
            seed=self.config.seed,
            device=self.device,
            train=train,
            workers=self.config.workers,
            drop_last=train and 0 < rest < 2 * processes,
            rank=parallel.rank(),
            world_size=processes,
            **views,
        )

    def compiled(self, network: nn.Module) -> nn.Module:
        return torch.compile(network) if self.config.compile else network


def fit(
    setup: dict,
    session: Session,
    phase: Phase,
    trained: nn.Module,
    replicas: Sequence[nn.Module],
    objective: Callable,
    validate: Callable,
    loader: Loader,
    folder: Path,
    progress: Progress,
    begin: Callable[[int], Callable[[dict], object]] = lambda done: dict,
    resume: bool = False,
) -> list[dict]:
    """Trains for phase.epochs epochs on the batches of `loader` and returns the rows of metrics.jsonl.

    `replicas` are the parts of `trained` as session.parallelize made them, or what was to be trained where it did not.
    objective(batch, clock) gives what to minimise and detached measurements, validate() the val_ entries of a
    row; begin(epochs done) gives what is called with the row of an epoch when it is complete. FloatingPointError
    if loss or gradients are not finite, see `Guard`.

    The state is saved after every epoch, every config.save_every seconds, when a batch cannot be had and when
    `signals` are received; `resume` goes on from there, if only `setup`, made by `setup_of`, is the same.
    """
    config, device, processes, name = session.config, session.device, parallel.world_size(), setup["phase"]
    checkpoints = Checkpoints(folder, setup, device)
    optimizer = _optimizer(phase, trained)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    state = State(trained, optimizer, scaler, device)
    state.means, state.clock = Means(), Clock(device)
    saved = checkpoints.load() if resume else None
    after_epoch = begin(saved[1]["epoch"] if saved else 0)
    each = math.ceil(len(loader) / config.accumulate)
    total, running, last = phase.epochs * each, math.nan, time.monotonic()

    def batches_from(step: int) -> Iterator[Batch]:
        loader.set_epoch(step // each)
        loader.skip(step % each * config.accumulate)
        return iter(loader)

    guard = Guard(name, session, phase, state, folder, objective, batches_from, total)
    log = Log(folder, config.tensorboard, guard.rows(saved[1]["rows"] if saved else []) if resume else None)
    if saved:
        state.unpack(*saved)
    state.rows = log.rows
    buffers = [buffer for buffer in trained.buffers() if not parallel.is_sharded(buffer)]

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
                    parts = list(islice(batches, config.accumulate))
                except BaseException:  # between two steps
                    if processes == 1:  # the others know nothing of it
                        save()
                    raise
                lr = learning_rate(phase, step, total)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                guard.begin(step, lr)
                optimizer.zero_grad()
                seen = []
                rows = sum(loader.rows(state.batch * config.accumulate + i) for i in range(len(parts)))
                for part in parts:
                    _share_gradients(replicas, part is parts[-1])
                    loss, measurements = objective(part, state.clock)
                    guard.see(loss)
                    seen.append((len(part.labels), measurements))
                    with state.clock("backward"):
                        # Gradients are averaged over processes and summed over parts: a mean over the step's samples.
                        scaler.scale(loss * (processes * len(part.labels) / rows)).backward()
                with state.clock("backward"):
                    guard.update()
                    parallel.all_reduce_mean_(buffers)
                state.batch, step = state.batch + 1, step + 1
                if config.check_replicas and step % config.check_replicas == 0:
                    parallel.check_replicas(trained)
                due = time.monotonic() - last >= config.save_every and state.batch < each
                stop, due = parallel.max_across_processes(signals.received, due)
                due = due or stop
                pause = step % CHECK == 0 or state.batch == each or due
                left_out = guard.left_out(pause)
                if left_out:
                    batches = batches_from(step)
                for count, measurements in seen:
                    state.means.add(0 if left_out else count, **measurements)
                if pause:
                    running = state.means["loss"]
                if due:
                    save()
                    signals.check(stop)
                known = {"epoch": state.epoch + 1, "epochs": phase.epochs, "train_loss": running}
                progress(name, step, total, known)
            seconds = time.perf_counter() - start
            step = (state.epoch + 1) * each
            row = {"epoch": state.epoch + 1, "step": step, "lr": learning_rate(phase, step - 1, total)}
            row |= {_TRAIN.get(key, key): value for key, value in state.means.all().items()}
            generators = random_state(device)
            try:
                with signals.held(processes > 1):
                    row |= validate()
            except KeyboardInterrupt:
                set_random_state(generators, device)  # validation begins again
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
            signals.check(*parallel.max_across_processes(signals.received))
            progress(name, step, total, row | {"epochs": phase.epochs})
    parallel.check_replicas(trained)
    return log.rows


def _share_gradients(replicas: Sequence[nn.Module], now: bool) -> None:
    """Whether the next backward exchanges gradients: of a step's parts the last one does, for all."""
    for module in replicas:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = now
        elif hasattr(module, "set_requires_gradient_sync"):  # fully_shard
            module.set_requires_gradient_sync(now)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


_TRAIN = {"loss": "train_loss", "accuracy": "train_accuracy", "attention_loss": "train_attention_loss"}


def classify(session: Session, network: nn.Module, replica: nn.Module, val: Loader) -> tuple[Callable, Callable]:
    """Objective and validation by cross-entropy of a network that session.parallelize made `replica`."""
    compiled = session.compiled(replica)

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
    """Mean cross-entropy and accuracy on all images of all processes' loaders."""
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
    kinds = {False: [], True: []}  # no fused optimiser takes sharded parameters
    for parameter in trained.parameters():
        kinds[parallel.is_sharded(parameter)].append(parameter)
    groups = [{"params": kind, "fused": not sharded, "foreach": sharded} for sharded, kind in kinds.items() if kind]
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=phase.nesterov, **options)
    for parameter in trained.parameters():  # else, where the first step is skipped, torch takes what lies in memory
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Means:
    """Means over samples of named measurements, summed on the device and read when asked.

    `means[name]` is of this process, `means.all()` of all processes, which must ask together.
    """

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, rows: int, **means: Tensor) -> None:
        self.count += rows
        for name, mean in means.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(mean, dtype=torch.float64)
            if rows:
                self.sums[name].add_(mean, alpha=rows)

    def __getitem__(self, name: str) -> float | list[float]:
        return (self.sums[name] / self.count).tolist()

    def all(self) -> dict[str, float | list[float]]:
        if not self.sums:
            return {}
        sums, every = [*self.sums.values()], Means()
        count = torch.tensor([self.count], dtype=torch.float64, device=sums[0].device)
        count, *parts = parallel.all_reduce_sum(torch.cat([count, *(x.flatten() for x in sums)])).split(
            [1, *(x.numel() for x in sums)]
        )
        every.count = count.item()
        every.sums = {name: x.view_as(own) for (name, own), x in zip(self.sums.items(), parts, strict=True)}
        return {name: every[name] for name in every.sums}


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
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"device {name!r} is not there; this machine offers cpu" + ", cuda" * torch.cuda.is_available()
        ) from None
    device = torch.device(name)
    if device.type == "cuda" and not parallel.enough_gpus():
        raise ValueError(
            f"device {name} needs a GPU for each process of this machine, and there are "
            f"{torch.cuda.device_count()}: start fewer processes, or give --device cpu"
        )
    return device
