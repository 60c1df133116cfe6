"""The last feature of any classifier: what goes into the layer that makes its logits."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from eekd import parallel
from eekd.io.files import nearest
from eekd.models.convolutions import guard
from eekd.snapshots.wrappers import bare_model, logits_of

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


class LastFeatures:
    """Runs a classifier and returns its logits and its last features: `logits, features = capture(images)`.

    The features (B, dim) are the input of a layer: the module named `layer`; else the model's last nn.Linear; else its
    last 1×1 convolution. An input (B, dim, H, W) is averaged over the pixels. Of an input (B, T, dim) it is
    the position whose logits the model returns, as GPT-2's and Llama's classifiers do. With `features=False` the
    features are None, and any model will do.
    Gradients flow through both outputs. All arguments are passed to the model; `eekd.snapshots.wrappers.logits_of` says
    where in its output the logits may be. The model may be wrapped in DistributedDataParallel or torch.compile, but a
    compiled model must not have run before. The model's convolutions are guarded, see
    `eekd.models.convolutions.guard`.

    `remove()`, or leaving a `with` block, removes the hook from the model, which can then be exported and scripted.
    With `leave_hook=False` the model has a hook only while it runs. `run` also returns the model's own output.

    Attributes:
        dim: the width of the features. For a layer that is neither linear nor a convolution it is known after a call.
        layer: the name of the layer.

    Raises ValueError if there is no such layer, if the features are not (B, dim), if the layer does not give the
    logits, or another one of as many outputs does, and for TorchScript; RuntimeError after `remove`, if the model's
    forward does not run the layer exactly once, if a model with parameters to train gives logits without a gradient in
    training, and if the model is trained without the DistributedDataParallel around it, which would average no
    gradients.
    """

    def __init__(self, model: nn.Module, layer: str | None = None, *, features: bool = True, leave_hook: bool = True):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.model: Any = guard(model)  # None when this is removed
        self.layer = self._dim = self._classes = self._hook = None
        self._module: Any = None
        self._tap: Any = None
        self._past_ddp, self._looks, self._chooses = False, 0, False
        self._alike: dict[str, nn.Module] = {}  # layers of as many outputs, until it is known which gives the logits
        self._hooks_each_call = not leave_hook
        if features:
            self._find(bare_model(model), layer)
            self._hook = self._attach() if leave_hook else None

    def _attach(self) -> RemovableHandle:
        return self._module.register_forward_pre_hook(self._tap, with_kwargs=True)

    def _find(self, model: nn.Module, layer: str | None) -> None:
        modules, kind = dict(model.named_modules()), type(model).__name__
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(f"model must be written in Python for its features, got a {kind}; or give features=False")
        if layer is None:
            layer = classifier_of(modules)
            if layer is None:
                raise ValueError(
                    f"model must have an nn.Linear or a 1×1 convolution, got a {kind}; name its classifier by layer="
                )
            module: Any = modules[layer]
            linear = isinstance(module, nn.Linear)
            self._kind = "nn.Linear" if linear else "1×1 convolution"
            self._classes = module.out_features if linear else module.out_channels
            alike = classifiers(modules, self._classes)
            self._alike = alike if len(alike) > 1 and not hasattr(model, "_orig_mod") else {}
        elif layer not in modules:
            raise ValueError(f"layer must be in the model, got {layer!r}{nearest(layer, modules, cutoff=0)}")
        module = modules[layer]
        self._dim = getattr(module, "in_features", getattr(module, "in_channels", None))
        self._pixels = None if isinstance(module, nn.Linear) else 2 if isinstance(module, _CONVOLUTIONS) else 3
        self.layer, self._module, self._tap = layer, module, Tap()

    @property
    def dim(self) -> int:
        """The width of the features; RuntimeError if it is not known yet."""
        if self._dim is None:
            why = f"call this once, for {self.layer!r} has none" if self.layer else "features=False asks for none"
            raise RuntimeError(f"the width of the features is not known: {why}")
        return self._dim

    def __call__(self, *inputs, **named) -> tuple[Tensor, Tensor | None]:
        return self.run(*inputs, **named)[1:]

    def run(self, *inputs, **named) -> tuple[Any, Tensor, Tensor | None]:
        """The model's output, the logits in it, and the last features."""
        if self.model is None:
            raise RuntimeError("LastFeatures was removed from its model: make another one")
        if not torch.compiler.is_compiling():
            self._check_wrapper()
        if self._tap is None:
            output = self.model(*inputs, **named)
            self._check_gradient(logits := logits_of(output))
            return output, logits, None
        self._tap.clear()
        hook = self._attach() if self._hooks_each_call else None
        look = bool(self._alike) and not torch.compiler.is_compiling()
        try:
            with watched(self._alike) if look else nullcontext({}) as given:
                output = self.model(*inputs, **named)
        finally:
            if hook is not None:
                hook.remove()
        logits, features, again = logits_of(output), self._tap.input, self._tap.again
        self._check_gradient(logits)
        self._tap.clear()
        if features is None:
            heads = [name for name, rows in given.items() if same_rows(rows, logits)]
            hint = f" ({heads[0]!r} gives the logits)" if heads else ""
            raise RuntimeError(
                f"{self.layer!r} must run once in the model's forward, got none; name another by layer={hint}, or make "
                "LastFeatures before a compiled model first runs"
            )
        if again:
            raise RuntimeError(f"{self.layer!r} must run once in the model's forward, got more; name another by layer=")
        if self._classes not in (None, logits.shape[-1]):
            raise ValueError(
                f"the last {self._kind}, {self.layer!r}, must give the {logits.shape[-1]} logits, got "
                f"{self._classes} values; name the classifier by layer="
            )
        if look and len(logits):
            self._check_head(given, logits)
        return output, logits, self._rows(features, logits)

    def _check_head(self, given: Mapping[str, Tensor], logits: Tensor) -> None:
        """ValueError where another layer than that of the features gives the logits; looked at once."""
        heads = [name for name, rows in given.items() if rows is logits] or [
            name for name, rows in given.items() if same_rows(rows, logits)
        ]
        if heads and self.layer not in heads:
            raise ValueError(
                f"the last {self._kind}, {self.layer!r}, must give the logits, got those of {heads[0]!r}; name the "
                "classifier by layer="
            )
        if not heads and are_mean(given.values(), logits):
            raise ValueError(
                f"the logits must be those of one layer, got the mean of {' and '.join(map(repr, given))}; name the "
                "one whose input the features are by layer="
            )
        self._alike = {}

    def _rows(self, features: Tensor, logits: Tensor) -> Tensor:
        """(B, dim) of the layer's input."""
        if features.ndim == 3 and logits.ndim == 2 and self._classes and isinstance(self._module, nn.Linear):
            features = self._chosen(features, logits)
        if self._pixels and features.ndim > self._pixels:
            features = features.flatten(2).mean(2)
        features = features.flatten(1)
        if self._dim is None:
            self._dim = features.shape[1]
        if features.shape[1] != self._dim:
            raise ValueError(f"{self.layer!r} must have {self._dim} inputs a sample, got {features.shape[1]}")
        return features

    def _chosen(self, features: Tensor, logits: Tensor) -> Tensor:
        """Of features (B, T, dim) those (B, dim) of which the layer makes the model's logits (B, C)."""
        with torch.no_grad():
            each = nn.functional.linear(features, self._module.weight, self._module.bias)
            where = (each - logits[:, None]).abs().amax(2).argmin(1)
            rows = torch.arange(len(where), device=where.device)
            if not self._chooses and not torch.allclose(each[rows, where].to(logits), logits, rtol=1e-2, atol=1e-4):
                raise ValueError(
                    f"the logits must be those of one position of the input of {self.layer!r}, "
                    f"{tuple(features.shape)}, got others; name a layer of (B, dim) by layer="
                )
        self._chooses = True  # to compare is to wait for the device
        return features[rows, where]

    def remove(self) -> None:
        """Removes the hook from the model. Calling this object afterwards raises RuntimeError."""
        if self._hook is not None:
            self._hook.remove()
        self.model = None

    def __enter__(self) -> "LastFeatures":
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def _check_gradient(self, logits: Tensor) -> None:
        """RuntimeError where the model would learn nothing, whatever the loss: its forward detaches the logits."""
        if logits.requires_grad or not torch.is_grad_enabled():
            return
        model = self.model
        if isinstance(model, nn.Module) and model.training and any(p.requires_grad for p in model.parameters()):
            raise RuntimeError(
                "the model's logits must have a gradient in training, got none: its forward runs under no_grad, "
                "detaches, or freezes what makes them"
            )

    def _check_wrapper(self) -> None:
        """RuntimeError where the model is trained past the DistributedDataParallel that someone put around it."""
        model = self.model
        if (
            not isinstance(model, nn.Module)
            or not (model.training and torch.is_grad_enabled())
            or parallel.world_size() == 1
            or parallel.in_ddp()
        ):
            return
        self._looks += 1
        if not self._past_ddp and self._looks & (self._looks - 1) == 0:  # it may be wrapped later, and to look is slow
            wrapped = isinstance(model, DistributedDataParallel) or isinstance(
                getattr(model, "_orig_mod", None), DistributedDataParallel
            )
            alive = [] if wrapped else parallel.wrappers_alive(DistributedDataParallel)
            self._past_ddp = bool(parallel.around(model, alive))
        if self._past_ddp:
            raise RuntimeError(
                "the model must run through its DistributedDataParallel, past which no gradient is averaged: give "
                "LastFeatures the wrapped model"
            )


class Tap:
    """The hook: keeps a layer's input, and is copied and pickled empty when the model it sits in is."""

    input: Tensor | None = None
    again: bool = False  # whether the layer ran once more

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if self.input is not None:
            self.again = True
        self.input = inputs[0] if inputs else next(iter(named.values()))

    def clear(self) -> None:
        """Forgets what was kept."""
        self.input, self.again = None, False

    def __reduce__(self):
        return Tap, ()


def classifiers(modules: Mapping[str, nn.Module], classes: int) -> dict[str, nn.Module]:
    """The linear layers and 1×1 convolutions that have so many outputs, by name."""
    linear = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and m.out_features == classes}
    return linear | {n: m for n, m in modules.items() if _is_pointwise(m) and m.out_channels == classes}


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each of the modules returns while this lasts, by name; of one that runs again its last output."""
    given: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, rows, name=name: given.update({name: rows}))
        for name, module in modules.items()
    ]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def same_rows(rows: Tensor, logits: Tensor) -> bool:
    """Whether a layer's output is these logits, maybe in another dtype."""
    return rows is logits or (rows.shape == logits.shape and torch.equal(rows.to(logits.dtype), logits))


def are_mean(outputs: Iterable[Tensor], logits: Tensor) -> bool:
    """Whether the logits are the mean of several layers' outputs, as those of a distilled DeiT are."""
    rows = [x.detach().to(logits.dtype) for x in outputs if x.shape == logits.shape]
    return len(rows) > 1 and torch.allclose(torch.stack(rows).mean(0), logits, rtol=1e-2, atol=1e-4)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, _CONVOLUTIONS) and set(module.kernel_size) == {1}


def classifier_of(modules: dict[str, nn.Module]) -> str | None:
    """The last linear layer, or where there is none the last 1×1 convolution."""
    backwards = list(reversed(modules.items()))
    linear = next((name for name, module in backwards if isinstance(module, nn.Linear)), None)
    if linear is not None:
        return linear
    return next((name for name, module in backwards if _is_pointwise(module)), None)
