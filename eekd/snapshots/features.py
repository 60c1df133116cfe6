"""The last feature of any classifier: what goes into its last linear layer."""

import difflib

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eekd.models.convolutions import guard


class LastFeatures:
    """Runs a classifier and returns its logits and its last features: `logits, features = capture(x)`.

    The features (B, dim) are the input of the model's last nn.Linear, or of the layer named `layer`.
    Gradients flow through both outputs. The model may be wrapped in DistributedDataParallel or torch.compile,
    but a compiled one must not have run before. An output object that has `logits` is understood. The model's
    convolutions are guarded, see `eekd.models.convolutions.guard`.

    Raises ValueError where no such layer exists, or where it does not take (B, dim) or give the logits;
    RuntimeError where the model's forward does not run it.
    """

    def __init__(self, model: nn.Module, layer: str | None = None):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.model = guard(model)
        modules = dict(_unwrapped(model).named_modules())
        if layer is None:
            self.layer = next((n for n, m in reversed(modules.items()) if isinstance(m, nn.Linear)), None)
            if self.layer is None:
                kind = type(model).__name__
                raise ValueError(f"model must have an nn.Linear, got a {kind}; name its classifier by layer=")
        elif layer in modules:
            self.layer = layer
        else:
            nearest = difflib.get_close_matches(str(layer), modules, n=1, cutoff=0)[0]
            raise ValueError(f"layer must be in the model, got {layer!r}; the nearest is {nearest!r}")
        module = modules[self.layer]
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim < 2:
            raise ValueError(f"layer must name a linear layer, got {self.layer!r}, a {type(module).__name__}")
        self.dim = weight.shape[1]
        self._classes = weight.shape[0] if layer is None else None  # a named layer need not be the classifier
        self._tap = Tap()
        module.register_forward_pre_hook(self._tap)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(x)
        logits, features, self._tap.input = getattr(output, "logits", output), self._tap.input, None
        if features is None:
            raise RuntimeError(
                f"the model's forward did not run {self.layer!r}; name another layer by layer=, or make "
                "LastFeatures before a compiled model first runs"
            )
        if self._classes not in (None, logits.shape[-1]):
            raise ValueError(
                f"the last nn.Linear, {self.layer!r}, gives {self._classes} values but the logits are "
                f"{logits.shape[-1]}; name the classifier by layer="
            )
        features = features.flatten(1)  # a 1×1 convolution takes (B, dim, 1, 1)
        if features.shape[1] != self.dim:
            raise ValueError(f"{self.layer!r} must have {self.dim} inputs a sample, got {features.shape[1]}")
        return logits, features


class Tap:
    """The hook: keeps a layer's input, and is copied and pickled empty when the model it sits in is."""

    input: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.input = inputs[0]

    def __reduce__(self):
        return Tap, ()


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model
