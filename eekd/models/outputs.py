"""A network that returns more than logits, among others that return logits alone."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class TakeOutput:
    """A network's hook, which returns of its outputs the one called `which`: the logits.

    In a tuple or list that is a number, below 0 from the end; in a dict a key; in an object an attribute. An output
    that is one tensor stays as it is, for many networks have several outputs in training only. ValueError where there
    is no such output.
    """

    def __init__(self, which: str):
        if not isinstance(which, str) or not which:
            raise ValueError(f"output must be a number or a name, as text, got {which!r}")
        self.which = which

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        outputs = outputs_of(output)
        which = self.which
        if re.fullmatch("-[0-9]+", which) and isinstance(output, tuple | list):
            which = str(len(output) + int(which))
        if which not in outputs:
            raise ValueError(
                f"output must be one of {', '.join(outputs) or 'none'}, which the model returns, got {which!r}"
            )
        return outputs[which]


def take_output(network: nn.Module, which: str | None) -> nn.Module:
    """The network, changed in place so that it returns the output called `which` alone; None: as it is."""
    if which is not None:
        network.register_forward_hook(TakeOutput(which))
    return network


def outputs_of(output: Any) -> dict[str, Tensor]:
    """The tensors that a model returns, by what they are called: numbers in a tuple or list, else names."""
    if isinstance(output, Mapping):
        named = output.items()
    elif hasattr(output, "_asdict"):  # a named tuple: by number too
        named = [*enumerate(output), *output._asdict().items()]
    elif isinstance(output, tuple | list):
        named = enumerate(output)
    else:
        named = getattr(output, "__dict__", {}).items()
    return {str(name): x for name, x in named if isinstance(x, Tensor)}
