"""An exponential moving average of a network's weights, which is then what is validated and kept."""

import torch
from torch import nn

from eekd import parallel
from eekd.snapshots.wrappers import frozen_copy
from eekd.train.callbacks import Callback


class WeightAverage(Callback):
    """Keeps an average of the weights and buffers of a network: after each step t, w <- d w + (1 - d) w_t.

    d is `decay`, and at first less, (1 + t) / (10 + t): the random weights of the start are soon forgotten, however
    short the training. Buffers of whole numbers are copied. A step that was left out does not count.

    Attributes: `network`, a frozen copy of the network, with the average.
    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992); TensorFlow's warm-up.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network, self.decay, self.steps = frozen_copy(network), decay, 0

    def on_step_end(self, trainer):
        steps = trainer.step - trainer.skipped
        if steps == self.steps:  # it was left out
            return
        self.steps = steps
        self.update(trainer.network, min(self.decay, (1 + steps) / (10 + steps)))

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """Takes the network's weights in by 1 - decay."""
        for mean, x in zip(self._tensors(self.network), self._tensors(network), strict=True):
            if mean.is_floating_point():
                mean.lerp_(x, 1 - decay)
            else:
                mean.copy_(x)

    def running(self, trainer):
        self.steps = trainer.step - trainer.skipped
        return super().running(trainer)

    @staticmethod
    def _tensors(network: nn.Module):
        return (parallel.to_local(x) for x in (*network.parameters(), *network.buffers()))
