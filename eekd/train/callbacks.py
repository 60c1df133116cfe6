"""What may happen beside the steps of a Trainer."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from eekd import parallel

if TYPE_CHECKING:
    from eekd.train.trainer import Trainer


class Callback:
    """A Trainer calls its callbacks in their order. A subclass overrides the methods it needs; here they do nothing."""

    def running(self, trainer: "Trainer") -> AbstractContextManager:
        """A context around the whole of `fit`."""
        return nullcontext()

    def fetching(self, trainer: "Trainer") -> AbstractContextManager:
        """A context around the wait for the batches of a step."""
        return nullcontext()

    def validating(self, trainer: "Trainer") -> AbstractContextManager:
        """A context around a validation."""
        return nullcontext()

    def on_step_begin(self, trainer: "Trainer") -> None:
        """Before the first forward of a step."""

    def on_loss(self, trainer: "Trainer", loss: Tensor) -> None:
        """After the forward of each part of a step, with the loss that will be differentiated."""

    def on_update(self, trainer: "Trainer") -> bool:
        """Before the optimizer's step, when all gradients are computed. Returning False skips the step."""
        return True

    def on_step_end(self, trainer: "Trainer") -> None:
        """After a step, before its measurements are added to the means. `trainer.pause = True` asks for a pause."""

    def on_pause(self, trainer: "Trainer") -> None:
        """Now and then between two steps or epochs: here a callback may wait for the device and save the state."""

    def on_save(self, trainer: "Trainer") -> None:
        """Before the state is saved."""

    def on_epoch_end(self, trainer: "Trainer", row: dict) -> None:
        """After an epoch, with its row of metrics, to which a callback may add entries."""


class ReplicaCheck(Callback):
    """RuntimeError if processes have different weights; checked every so many steps (0: never) and at the end."""

    def __init__(self, every: int = 0):
        self.every = every

    @contextmanager
    def running(self, trainer):
        yield
        parallel.check_replicas(trainer.trained)

    def on_step_end(self, trainer):
        if self.every and trainer.step % self.every == 0:
            parallel.check_replicas(trainer.trained)
