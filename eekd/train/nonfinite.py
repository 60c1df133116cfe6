"""Keeps steps that are not finite from the weights."""

import itertools
import math
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eekd import parallel
from eekd.method.losses import EEKDLoss
from eekd.train.callbacks import Callback
from eekd.train.evidence import keep_evidence, snapshot_tensors
from eekd.train.random_state import random_state, set_random_state
from eekd.train.watch import Found, Watch

# Of a loss in fp16: the first scale, torch's own, and the least, at which a gradient of 1 is still a normal number.
SCALES = 2.0**16, 2.0**-14
REPLAYED = "eekd.train.trainer", "eekd.train.teacher", "eekd.train.student"  # modules of trainers with eekd's losses


class NonFiniteGuard(Callback):
    """Keeps a step whose loss or gradients are not finite from the weights, then ends the phase or leaves the step out.

    Whether a step is bad is a number on the device, the largest of all processes. The fused optimizers obey it as they
    do a GradScaler's. By policy "stop" it stays, so that a GPU need be asked only at a pause; where parameters are
    sharded, which no fused optimizer takes, every step asks. In precision fp16 gradients are the scaler's business
    until no scale mends them, which ends the phase by either policy. No scale mends a loss that is not finite.
    """

    def __init__(self, folder: Path):
        self.folder, self.agree = folder, parallel.all_reduce_max

    @contextmanager
    def running(self, trainer):
        self.begin(trainer)
        hook = trainer.optimizer.register_step_pre_hook(self._before_update) if self.fused else None
        try:
            yield
        finally:
            if hook:
                hook.remove()

    def begin(self, trainer) -> None:
        """Takes a trainer to guard."""
        config = trainer.config
        self.trainer, self.skip, self.budget = trainer, config.non_finite == "skip", config.skip_budget
        self.fused = all(group["fused"] for group in trainer.optimizer.param_groups)
        self.looks = self.skip or not self.fused or trainer.device.type == "cpu"
        self.step, self.begun = 0, {}  # what is known of the steps that were not looked at yet
        self._clear()
        if self.skip:  # a phase may have gone on with another policy: all rows have the same columns
            trainer.rows = [row | {"skipped": row.get("skipped", 0)} for row in trainer.rows]

    def on_step_begin(self, trainer):
        self.step, self.begun[trainer.step] = trainer.step, (trainer.lr, random_state(trainer.device))
        if self.skip:
            self.before = [buffer.clone() for buffer in trainer.trained.buffers()], trainer.scaler.state_dict()

    def on_loss(self, trainer, loss):
        loss = loss.detach().float()
        self.loss = torch.where(self.bad == 0, loss, self.loss)
        self.bad = torch.maximum(self.bad, (~loss.isfinite()).float())

    def on_update(self, trainer):
        if self.fused:  # which asks in its step, when a scaler has unscaled
            return True
        self._judge()
        return not self.bad.item()

    def on_step_end(self, trainer):
        if self.left_out(trainer.pause):
            trainer.measured = [(0, means) for _, means in trainer.measured]

    def on_save(self, trainer):
        self.left_out()  # raises where what would be saved is not to be gone on from

    def on_epoch_end(self, trainer, row):
        if self.skip or trainer.skipped or any("skipped" in before for before in trainer.rows):
            row["skipped"] = trainer.skipped - sum(before.get("skipped", 0) for before in trainer.rows)

    def _before_update(self, optimizer: Any, *_) -> None:
        self._judge()
        scaled = self.trainer.scaler.is_enabled()
        optimizer.found_inf = torch.maximum(self.bad, optimizer.found_inf) if scaled else self.bad

    def _judge(self) -> None:
        bad, groups = self.bad, self.trainer.optimizer.param_groups
        if not self.trainer.scaler.is_enabled():
            bad = torch.maximum(bad, overflow(p.grad for group in groups for p in group["params"]))
        self.bad = self.agree(bad)
        self.first = torch.where((self.bad == 1) & (self.first < 0), self.step, self.first)

    def left_out(self, pause: bool = True) -> bool:
        """After a step, or where a state shall be saved (a `pause`): whether the step was bad and did not happen.

        All is then as before it, but for the place in the data. FloatingPointError, one sentence, by policy "stop",
        where the budget is used up, and where weights have left the range of their dtype or gradients every scale.
        """
        if not (pause or self.looks):
            return False
        if self.bad.item():
            self._report()
            return True
        if pause:
            trainer = self.trainer
            if self.begun and trainer.scaler.is_enabled() and self._unscalable():
                self._report(trainer.scaler.get_scale())
            weights = dict(trainer.trained.named_parameters())
            if parallel.all_reduce_max(overflow(p for p in weights.values() if p.is_floating_point())).item():
                bad = (f"the parameter {x}" for x, p in weights.items() if not parallel.to_local(p).isfinite().all())
                bad = next(bad, "a parameter in another process")
                where = f"after step {self.step + 1}; try a lower lr"
                raise FloatingPointError(f"{trainer.name}: {bad} is not finite {where}")
        self.begun.clear()
        return False

    def _unscalable(self) -> bool:
        """Whether scaled gradients were out of range at every scale worth a try, or at every step of the phase."""
        first, least = SCALES
        total = self.trainer.total_steps
        if self.step + 1 == total:  # each step out of range has halved the scale
            least = max(least, first * 0.5 ** (total - self.trainer.skipped) * 2)
        return bool(parallel.max_across_processes(self.trainer.scaler.get_scale() < least)[0])

    def _clear(self) -> None:
        device = self.trainer.device
        self.bad, self.loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self.first = torch.full((), -1, device=device)
        self.begun.clear()

    def _restore(self, generators: Tensor) -> None:
        trainer = self.trainer
        set_random_state(generators, trainer.device)
        if self.skip:
            buffers, scaler = self.before
            with torch.no_grad():
                for buffer, before in zip(trainer.trained.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            if scaler:
                trainer.scaler.load_state_dict(scaler)

    def _report(self, scale: float | None = None) -> None:
        """Finds and keeps what was bad, then raises, or puts all back to before the step."""
        trainer = self.trainer
        step, loss = self.first.item() if scale is None else self.step, self.loss.item()
        lr, generators = self.begun[step]
        self._restore(generators)
        facts = {"phase": trainer.name, "step": step + 1, "epoch": trainer.epoch + 1, "lr": lr, "loss": str(loss)}
        bad, index, path = self._find(facts)
        self._restore(generators)
        what = f"a gradient is not finite at loss {loss:.4g}" if math.isfinite(loss) else f"the loss became {loss}"
        where = f"epoch {facts['epoch']} at learning rate {lr:.3g}, step {step + 1}, samples {_some(index)}"
        if bad:
            first = f"the first bad tensor is {bad}"
            first += f", of sample {_some(index[bad.rows])}" if bad.rows else ""
        else:
            first = "nothing was bad when the batch was run again" + " by this process" * (parallel.world_size() > 1)
        message = f"{trainer.name}: {what} in {where}: {first}; saved in {path}"
        if scale is not None:
            message += f"; no loss scale down to {scale:.2g} makes it finite"
            raise FloatingPointError(f"{message}: try a lower lr or precision bf16 or fp32")
        if not self.skip:
            raise FloatingPointError(
                f"{message}; try a lower lr or precision fp32, or skip such steps by non_finite skip"
            )
        trainer.skipped += 1
        if trainer.skipped > self.budget:
            raise FloatingPointError(
                f"{message}; skip_budget {self.budget} is used up: try a lower lr or precision fp32"
            )
        self._clear()
        trainer.batches = trainer.batches_from(trainer.step)  # the loader has gone back
        warnings.warn(f"{message}; the step is skipped", RuntimeWarning, stacklevel=4)

    def _find(self, facts: dict) -> tuple[Found | None, Tensor, Path]:
        """Runs the batches of a step again until one is bad, and keeps all that this takes."""
        trainer, trained = self.trainer, self.trainer.trained
        kept: tuple = ()
        for part in itertools.islice(trainer.batches_from(facts["step"] - 1), trainer.config.accumulate):
            weights = {f"network.{name}": parallel.full_tensor(x).clone() for name, x in trained.state_dict().items()}
            generators = random_state(trainer.device)
            # Compiled code does not run what watches.
            eager = torch.compiler.set_stance("force_eager") if trainer.config.compile else nullcontext()
            with eager, Watch(trained, len(part.index)) as watch:
                watch.look("the images", part.images)
                watch.run(trainer.compute_loss(part)[0])
            if not (kept and kept[0].found):  # every process runs all parts, since they may exchange something in each
                kept = watch, part, weights | {"random": generators}
        watch, part, tensors = kept
        tensors |= {"images": part.images, "labels": part.labels, "index": part.index}
        loss = next((module for module in trained.modules() if isinstance(module, EEKDLoss)), None)
        given = watch.given
        taught = (given["snapshot_logits"], given.get("snapshot_features")) if given else part.teacher
        tensors |= snapshot_tensors(*taught) if taught else {}
        facts |= {"found": watch.found and str(watch.found), "spec": trainer.session.spec(trainer.phase)}
        if type(trainer).__module__ not in REPLAYED:
            facts["method"] = type(trainer).__name__  # whose loss nobody else computes
        path = keep_evidence(self.folder, f"non-finite-{facts['step']}", tensors, facts, trainer.session, loss)
        return watch.found, part.index, path


def _some(index: Tensor) -> str:
    first = ", ".join(map(str, index[:5].tolist()))
    return first + (f" and {len(index) - 5} more" if len(index) > 5 else "")


def overflow(tensors: Iterable[Tensor | None]) -> Tensor:
    """1 where any number in them, as far as this process holds them, is not finite, else 0."""
    parts = [part for x in tensors if x is not None and (part := parallel.to_local(x)).numel()]
    # Extremes, for a sum can leave the range of what it is of; on a CPU a norm takes ten times as long as these.
    if not parts or parts[0].is_cuda:
        return (~nn.utils.get_total_norm(parts, math.inf).isfinite()).float()
    extremes = torch.stack([extreme.isfinite() for part in parts for extreme in part.aminmax()])
    return (~extremes.all()).float()
