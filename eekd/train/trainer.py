"""The one training loop: what a teacher and every student share.

    fit             epochs, each trained, validated and reported
      train_epoch   the steps of an epoch
        train_step  one step of the optimizer
          compute_loss
      validate

Checkpoints, signals, logs, snapshots and checks of the numbers are callbacks (eekd.train.callbacks): a Trainer without
any trains just so.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eekd import parallel
from eekd.io.tensors import load_state
from eekd.snapshots.wrappers import logits_of
from eekd.train.average import WeightAverage
from eekd.train.callbacks import Callback
from eekd.train.config import Phase
from eekd.train.metrics import PhaseTimer, RunningMeans, accuracy, evaluate
from eekd.train.optim import build_optimizer, clip_gradients, learning_rate, sync_gradients
from eekd.train.random_state import random_state, set_random_state
from eekd.train.run_folder import finite
from eekd.train.session import Progress, Session, quiet
from eekd.train.teaching import TaughtBatch

LOOK_EVERY = 50  # steps between looks at the loss: each look makes a GPU wait
UNPREFIXED = "weights", "weight_entropy"  # measurements whose entries in a row are not called train_NAME


class Trainer:
    """Trains a network on labels, in one process or several.

        network = session.network(phase, seed)
        rows = Trainer(session, phase, network, "teacher").fit()

    A subclass overrides `compute_loss`, and `build_criterion` if its loss has parameters.

    A subclass or a callback may read: `session`, `config`, `phase`, `device`; `network`, and `model`, which is the
    network as it trains (parallel, compiled); `kept`, the network that is validated and saved: `network` or, with
    phase.ema, the average of its weights; `criterion`; `optimizer`; `loader` and `val_loader`; `epoch` and `step`, the
    numbers of completed epochs and steps; `steps_per_epoch`, `total_steps`, `lr`; `rows`, one for every completed
    epoch; `means` of the epoch in progress.
    """

    def __init__(
        self,
        session: Session,
        phase: Phase,
        network: nn.Module,
        name: str,
        *,
        callbacks: Sequence[Callback] = (),
        progress: Progress = quiet,
    ):
        self.session, self.config, self.device = session, session.config, session.device
        self.phase, self.network, self.name = phase, network, name
        self.callbacks, self.progress = [*callbacks], progress
        self.loader, self.val_loader = session.loader("train", phase, train=True), session.loader("val", phase)
        self.steps_per_epoch = math.ceil(len(self.loader) / self.config.accumulate)
        self.total_steps = phase.epochs * self.steps_per_epoch

        self.average = WeightAverage(network, phase.ema) if phase.ema else None
        if self.average:
            self.callbacks.append(self.average)
            if self.config.parallel == "fsdp":
                session.parallelize(self.average.network.requires_grad_(True)).requires_grad_(False)
        self.kept = self.average.network if self.average else network
        self.replica = session.parallelize(network)
        self.model = session.compiled(self.replica)
        self.setup()
        own = self.build_criterion()
        self.own_criterion = own and own.to(self.device)
        self.criterion = own and session.parallelize(own, "ddp")
        self.trained = nn.ModuleList([network, own]) if own else network
        self._buffers = [buffer for buffer in self.trained.buffers() if not parallel.is_sharded(buffer)]
        self.optimizer = self.build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "fp16")

        self.epoch, self.step, self.skipped, self.rows, self.pause = 0, 0, 0, [], False
        self.running_loss, self.lr = math.nan, self._rate(0)
        self._begin_epoch()

    def setup(self) -> None:
        """Runs before `build_criterion`: sets what a subclass needs there."""

    def build_criterion(self) -> nn.Module | None:
        """The loss as a module, whose parameters are trained with the network's; None if the loss has none."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of `trained`, the network and the criterion; "lr_scale" of a group multiplies its rate."""
        return build_optimizer(self.phase, self.trained, self.network)

    def fit(self) -> list[dict]:
        """Trains from `epoch` and `step` to the end of the last epoch and returns the rows of metrics.jsonl."""
        self._check_modules()
        with self._around("running"):
            while self.epoch < self.phase.epochs:
                row = self.train_epoch()
                with self._around("validating"):
                    row |= self.validate()
                row |= {"seconds": self._seconds}
                row |= {f"seconds_{part}": self.timer.seconds(part) for part in ("teacher", "forward", "backward")}
                self.tell("on_epoch_end", row)
                self.rows.append(finite(row))
                self.epoch += 1
                self._begin_epoch()
                self.tell("on_pause")
                self.progress(self.name, self.step, self.total_steps, row | {"epochs": self.phase.epochs})
        return self.rows

    def train_epoch(self) -> dict:
        """Trains to the end of the epoch and returns its part of the row of metrics."""
        self.trained.train()
        self.batches = self.batches_from(self.step)
        self._start = time.perf_counter() - self._seconds
        try:
            while self.step < (self.epoch + 1) * self.steps_per_epoch:
                with self._around("fetching"):
                    batches = list(islice(self.batches, self.config.accumulate))
                self.train_step(batches)
        finally:
            self.batches = None  # ends the threads of whoever reads ahead
        self._seconds = time.perf_counter() - self._start
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": self._rate(self.step - 1)}
        means = self.means.all().items()
        return row | {name if name in UNPREFIXED else f"train_{name}": mean for name, mean in means}

    def train_step(self, batches: Sequence[TaughtBatch]) -> None:
        """One step of the optimizer on the parts of a batch."""
        self.lr = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        self.tell("on_step_begin")
        self.optimizer.zero_grad()
        first = self.step % self.steps_per_epoch * self.config.accumulate
        samples = sum(self.loader.rows(first + part) for part in range(len(batches)))  # of all processes
        self.measured = []
        for batch in batches:
            sync_gradients((self.replica, self.criterion), batch is batches[-1])
            with self.timer("backward"):
                loss, measurements = self.compute_loss(batch)
                self.tell("on_loss", loss)
                # Gradients are averaged over processes and summed over parts: a mean over the step's samples.
                self.scaler.scale(loss * (parallel.world_size() * len(batch.labels) / samples)).backward()
            self.measured.append((len(batch.labels), {"loss": loss.detach(), **measurements}))
        with self.timer("backward"):
            if self.phase.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                clip_gradients(self._parameters(), self.phase.clip_grad)
            if all([callback.on_update(self) for callback in self.callbacks]):
                self.scaler.step(self.optimizer)
                self.scaler.update()
            parallel.all_reduce_mean_(self._buffers)
        self.step += 1
        self.pause = self.step % LOOK_EVERY == 0 or self.step == (self.epoch + 1) * self.steps_per_epoch
        self.tell("on_step_end")
        for rows, means in self.measured:
            self.means.add(rows, **means)
        if self.pause:
            self.running_loss = self.means["loss"]
            self.tell("on_pause")
        state = {"epoch": self.epoch + 1, "epochs": self.phase.epochs, "train_loss": self.running_loss}
        self.progress(self.name, self.step, self.total_steps, state)

    def compute_loss(self, batch: TaughtBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, a mean over its samples, and measurements by name, which are means, too.

        A measurement becomes the entry train_NAME of the epoch's row. "loss", if it is missing, is the loss.
        """
        logits = self.forward(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels)
        return loss, {"loss": loss, "accuracy": accuracy(logits, batch.labels)}

    def forward(self, images: Tensor) -> Tensor:
        """The network's logits (B, C) in training."""
        with self.timer("forward"):
            return logits_of(self.session.run(self.model, images))

    def validate(self) -> dict[str, float]:
        """The val_ entries of an epoch's row."""
        return {f"val_{name}": mean for name, mean in evaluate(self.session, self.kept, self.val_loader).items()}

    def batches_from(self, step: int) -> Iterator[TaughtBatch]:
        """The batches of an epoch, part by part, from those of `step` on."""
        self.loader.set_epoch(step // self.steps_per_epoch)
        self.loader.skip(step % self.steps_per_epoch * self.config.accumulate)
        return (TaughtBatch(*batch) for batch in self.loader)

    def state_dict(self) -> dict:
        """Everything that the next step depends on: `tensors` by name, in the first process, and the rest as JSON.

        All processes call it together. The random generators and the means differ between processes and are stacked in
        the order of the ranks.
        """
        states = [(f"network.{name}", x) for name, x in self.trained.state_dict().items()]
        if self.average:
            states += [(f"average.{name}", x) for name, x in self.kept.state_dict().items()]
        for i, parameter in enumerate(self._parameters()):
            states += [(f"optimizer.{i}.{name}", x) for name, x in self.optimizer.state.get(parameter, {}).items()]
        tensors = parallel.gather_to_main_process((name, x) for name, x in states if isinstance(x, Tensor))
        rest = {name.removeprefix("optimizer."): x for name, x in states if not isinstance(x, Tensor)}
        # A fused optimizer reads memory in the parameter's order.
        strides = {name: x.stride() for name, x in tensors.items() if name[:1] == "o" and not x.is_contiguous()}
        tensors |= {f"means.{name}": parallel.all_gather(tensor) for name, tensor in self.means.sums.items()}
        values = {
            "epoch": self.epoch, "batch": self.step - self.epoch * self.steps_per_epoch, "rows": self.rows,
            "skips": self.skipped, "seconds": time.perf_counter() - self._start, "clock": self.timer.all(),
            "means": list(self.means.sums), "counts": parallel.all_gather(torch.tensor(self.means.count)).tolist(),
            "scaler": self.scaler.state_dict(), "optimizer": rest, "strides": strides,
        }  # fmt: skip
        tensors["random"] = parallel.all_gather(random_state(self.device))
        return {"tensors": tensors, **values}

    def load_state_dict(self, state: dict, source: str | Path = "the state") -> None:
        """Restores what `state_dict` returned; ValueError, which names `source`, if it does not fit."""
        parts = {
            part: {name.removeprefix(part): x for name, x in state["tensors"].items() if name.startswith(part)}
            for part in ("network.", "average.", "means.", "optimizer.")
        }
        place = parallel.distribute_like
        for module, part in ((self.trained, "network."), *([(self.kept, "average.")] if self.average else [])):
            own = module.state_dict()
            weights = {name: place(x, own[name]) if name in own else x for name, x in parts[part].items()}
            load_state(module, weights, source)
        self.epoch, self.rows, self.skipped, self._seconds = (
            state[name] for name in ("epoch", "rows", "skips", "seconds")
        )
        self.step = self.epoch * self.steps_per_epoch + state["batch"]
        sums, counts = {name: parts["means."][name].to(self.device) for name in state["means"]}, state["counts"]
        rank = parallel.rank()
        if len(counts) == parallel.world_size():
            self.means.sums, self.means.count = {name: x[rank] for name, x in sums.items()}, counts[rank]
        else:  # once as many processes: what all of them had seen is the first one's
            self.means.sums = {name: x.sum(0) * (rank == 0) for name, x in sums.items()}
            self.means.count = sum(counts) * (rank == 0)
        self.timer.before = state["clock"]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        parameters = self._parameters()
        for name, value in (parts["optimizer."] | state["optimizer"]).items():
            index, entry = name.split(".", 1)
            parameter = parameters[int(index)]
            if isinstance(value, Tensor):
                strides = state["strides"].get(f"optimizer.{name}", value.stride())
                laid = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=parameter.device)
                value = place(laid.copy_(value), parameter) if value.ndim else laid.copy_(value)
            self.optimizer.state[parameter][entry] = value
        generators = state["tensors"]["random"]
        set_random_state(generators[rank % len(generators)], self.device)

    def _begin_epoch(self) -> None:
        self.means, self.timer = RunningMeans(), PhaseTimer(self.device)
        self._seconds, self._start = 0.0, time.perf_counter()

    def _rate(self, step: int) -> float:
        return learning_rate(self.phase, step, self.total_steps)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _check_modules(self) -> None:
        """ValueError for a module that a subclass made and that would not be trained."""
        trained = {id(parameter) for parameter in self.trained.parameters()}
        for name, value in vars(self).items():
            if isinstance(value, nn.Module) and any(
                p.requires_grad and id(p) not in trained for p in value.parameters()
            ):
                raise ValueError(
                    f"{type(self).__name__}.{name} must be part of what build_criterion returns, for it is not trained"
                )

    def tell(self, event: str, *args) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)

    @contextmanager
    def _around(self, name: str):
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(getattr(callback, name)(self))
            yield
