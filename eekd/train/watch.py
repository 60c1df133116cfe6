"""Finds the first tensor that is not finite while a network runs and is differentiated."""

import inspect
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eekd import parallel
from eekd.method.losses import EEKDLoss
from eekd.method.topk import TopKLogits


class Found(NamedTuple):
    """A tensor that is not finite, its name and, where it is so for some of the batch only, for which rows."""

    name: str
    tensor: Tensor
    rows: list[int]

    def __str__(self):
        kinds = {"nan": self.tensor.isnan(), "inf": self.tensor.isinf()}
        counts = " and ".join(f"{kind} in {count}" for kind, bad in kinds.items() if (count := bad.sum().item()))
        return f"{self.name}, {counts} of {self.tensor.numel()} values"


class Watch:
    """Looks, while a network runs on `size` rows and is differentiated within `with`, at all that goes through it.

    `found` is, in the order in which it runs, the first tensor that is not finite: a parameter, what goes into or
    comes out of a module, the loss, or the gradient of a module's output or of a parameter. `given` are the arguments
    of an EEKDLoss.
    """

    def __init__(self, trained: nn.Module, size: int):
        self.trained, self.size, self.found, self.given, self._handles = trained, size, None, {}, []

    def __enter__(self) -> "Watch":
        for name, parameter in self.trained.named_parameters():
            self.look(f"the parameter {name}", parameter, size=0)
            if parameter.requires_grad:
                self._watch_gradient(name, parameter, size=0)
        for name, module in self.trained.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no such hooks
                continue
            title = f"{name} ({type(module).__name__})" if name else f"the network ({type(module).__name__})"
            before, after = partial(self._before, title), partial(self._after, title)
            self._handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, loss: Tensor) -> None:
        """Differentiates what the network's outputs came to."""
        self.look("the loss", loss)
        self.trained.zero_grad()
        loss.backward()
        self.trained.zero_grad()

    def look(self, name: str, value, size: int | None = None) -> None:
        for tensor in map(parallel.to_local, float_tensors(value)):
            if self.found or tensor.isfinite().all():
                continue
            bad = ~tensor.isfinite()
            size = self.size if size is None else size
            dim = next((dim for dim, rows in enumerate(bad.shape[:2]) if rows == size), None)  # (B, ...), (M, B, ...)
            rows = [] if dim is None else bad.movedim(dim, 0).flatten(1).any(1).nonzero()[:, 0].tolist()
            self.found = Found(name, tensor.detach().clone(), rows if len(rows) < size else [])

    def _watch_gradient(self, name: str, tensor: Tensor, size: int | None = None) -> None:
        self._handles.append(tensor.register_hook(partial(self.look, f"the gradient of {name}", size=size)))

    def _before(self, title: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        for name, value in given.items():
            if isinstance(module, EEKDLoss):  # to which a class of -inf is one that does not exist
                value = [tensor.clamp(min=torch.finfo(tensor.dtype).min) for tensor in float_tensors(value)]
            self.look(f"the {name} of {title}", value)
        if isinstance(module, EEKDLoss):
            self.given = given

    def _after(self, title: str, module: nn.Module, args: tuple, output) -> None:
        if isinstance(module, EEKDLoss):
            total, measured = output
            for name, value in reversed([*measured.items()]) if not total.isfinite() else ():
                self.look(f"the {name} of {title}", value)
            return
        self.look(f"the output of {title}", output)
        for tensor in float_tensors(output):
            if tensor.requires_grad:
                self._watch_gradient(f"the output of {title}", tensor)


def float_tensors(value) -> list[Tensor]:
    """The floating-point tensors anywhere in what goes into a module or comes out."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, TopKLogits):
        return [value.logits, value.atoms]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for entry in value for tensor in float_tensors(entry)]
