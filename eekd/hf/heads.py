"""A model's last hidden states, or its classifier's features, taken in its own forward, and what its head does.

The head's module is replaced for a call: of a language model it returns the hidden states as they are, so that no
logits are made; of a classifier it returns its logits and features side by side, so that the model pools both alike.
"""

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eekd.snapshots.wrappers import logits_of

PROBE = 100.0  # of the head's output, at which a soft-cap shows
EXACT, HALF = 1e-3, 4e-2  # what rounding makes of a logit, of the largest, in 32 and in 16 bits
CAPS = "final_logit_softcapping", "logits_soft_cap"
SCALES = "logit_scale", "logits_scaling", "lm_head_multiplier"  # in configurations; some models divide by theirs


class LanguageHead:
    """The layer of a language model that makes logits: logits = cap(scale (hidden weightᵀ + bias)).

    Attributes: `module`; `scale` and `softcap`, known after `verify`.

    Raises ValueError, one sentence, where the model has no such layer, or one that is quantised or has an adapter.
    """

    def __init__(self, model: nn.Module, name: str):
        self.name = name
        embeddings = getattr(model, "get_output_embeddings", None)
        self.module: Any = embeddings() if embeddings else None
        kind = type(self.module).__name__
        if self.module is None:
            raise ValueError(f"{name} must have a head (get_output_embeddings), got {type(model).__name__}")
        if any(hasattr(self.module, mark) for mark in ("lora_A", "modules_to_save", "base_layer")):
            raise ValueError(f"{name} must have no adapter on its head, got one on a {kind}")
        weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
            got = getattr(weight, "dtype", type(weight).__name__)
            raise ValueError(f"{name} must have a head of floating-point weights (V, H), got a {kind} of {got}")
        if weight.element_size() < 2:
            raise ValueError(f"{name} must have a head that is not quantised, got {weight.dtype}")
        self.scale, self.softcap = 1.0, None

    @property
    def weight(self) -> Tensor:
        """(V, H), the parameter itself."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """(V), or None."""
        return getattr(self.module, "bias", None)

    def project(self, hidden: Tensor, classes: int) -> Tensor:
        """Logits (N, classes) of hidden states (N, H), float32, with gradients."""
        bias = None if self.bias is None else self.bias[:classes].float()
        z = nn.functional.linear(hidden.float(), self.weight[:classes].float(), bias) * self.scale
        return z if self.softcap is None else self.softcap * (z / self.softcap).tanh()

    @contextmanager
    def tap(self) -> Iterator[list[Tensor]]:
        """While it lasts, forwards put the last hidden states into the list and make no logits."""
        taken = []

        def forward(hidden: Tensor) -> Tensor:
            taken.append(hidden)
            return hidden

        with replaced(self.module, forward):
            yield taken

    @torch.no_grad()
    def verify(self, model: nn.Module, inputs: dict, rows: Tensor, half: bool) -> None:
        """Finds scale and soft-cap, by the model's own logits of the inputs at `rows` of their tokens.

        Once as they are; and once with the head's output enlarged, for a soft-cap does not show in small logits.
        `half`: whether the model computes in 16 bits. ValueError where no projection that is known gives the logits.
        """
        bias = None if self.bias is None else self.bias.float()

        def linear(hidden: Tensor) -> Tensor:
            with torch.autocast(hidden.device.type, enabled=False):
                return nn.functional.linear(hidden.float(), self.weight.float(), bias)

        with self.tap() as tapped:
            run(model, self.name, inputs)
        raw = linear(only(tapped, self.name).flatten(0, -2)[rows])
        gain = (PROBE / raw.abs().max().clamp(min=1e-6)).item()
        own = [logits_of(run(model, self.name, inputs))]
        with replaced(self.module, lambda hidden: linear(hidden) * gain):
            own.append(logits_of(run(model, self.name, inputs)))
        own = [z.flatten(0, -2)[rows].float() for z in own]
        half = half or self.weight.element_size() < 4
        errors = []
        for scale, cap in _candidates(model):
            z = [raw * scale, raw * gain * scale]
            z = z if cap is None else [cap * (x / cap).tanh() for x in z]
            plain, enlarged = (((a - b).abs().max() / b.abs().max()).item() for a, b in zip(z, own, strict=True))
            errors.append(max(plain / (HALF if half else EXACT), enlarged / EXACT))
            if errors[-1] <= 1:
                self.scale, self.softcap = scale, cap
                return
        raise ValueError(
            f"{self.name} must give the logits of its head, scaled and soft-capped as its configuration says; those of "
            f"{type(model).__name__} differ by {min(errors):.2g} times what rounding makes"
        )


@dataclass
class StoredHead:
    """A teacher's head in a bank, as `LanguageHead` has it."""

    name: str
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


class ClassifierHead:
    """The last linear layer of a classifier, whose input are the features.

    `layer` names another layer, or where None the last nn.Linear with as many outputs as there are classes is taken.

    Attributes: `dim`, the width of the features.
    """

    def __init__(self, model: nn.Module, name: str, layer: str | None = None, classes: int | None = None):
        self.name, self.layer = name, layer
        modules = dict(model.named_modules())
        if layer is not None and layer not in modules:
            raise ValueError(
                f"feature_layer must be a layer of {name}, got {layer!r}; it has {', '.join(modules)[:300]}"
            )
        if layer is None:
            # an adapter's copy of the classifier stands for the layer it wraps
            heads = [n for n, m in modules.items() if _linear(m) is not None and _linear(m).out_features == classes]
            heads = [n for n in heads if not any(n.startswith(other + ".") for other in heads)]
            if not heads:
                raise ValueError(
                    f"{name} must have a linear layer of {classes} outputs, got a {type(model).__name__}; name "
                    "the layer whose input the attention reads by feature_layer="
                )
            layer = heads[-1]
        self.module, self.found = modules[layer], layer
        linear = _linear(self.module)
        self.dim = None if linear is None else linear.in_features
        self.classes = classes

    @contextmanager
    def tap(self) -> Iterator[list[Tensor]]:
        """While it lasts, the logits have the features beside them, or the list gets the named layer's input."""
        taken = []
        before = self.module.forward
        if self.layer is None:
            with replaced(self.module, lambda x: torch.cat((before(x), x), -1)):
                yield taken
        else:
            hook = self.module.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
            try:
                yield taken
            finally:
                hook.remove()

    def split(self, logits: Tensor, tapped: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and features of what a forward under `tap` gave, rows first: (N, C) and (N, D)."""
        if self.layer is None:
            features = logits[..., self.classes :]
            logits = logits[..., : self.classes]
        else:
            features = only(tapped, self.name)
        return logits.flatten(0, -2), features.flatten(0, -2)

    @torch.no_grad()
    def verify(self, model: nn.Module, inputs: dict) -> None:
        """ValueError where logits taken with features are not the model's own, or features are not (N, D)."""
        own = logits_of(run(model, self.name, inputs)).flatten(0, -2)
        try:
            with self.tap() as tapped:
                logits, features = self.split(logits_of(run(model, self.name, inputs)), tapped)
            logits, own = logits.float(), own.float()  # beside features of 32 bits, logits of 16 become such
            right = features.shape[:1] == own.shape[:1] and torch.allclose(logits, own, rtol=1e-2, atol=1e-4)
        except RuntimeError:
            right = False
        if not right:
            raise ValueError(
                f"{self.name} must be a classifier whose logits are those of one layer, got a "
                f"{type(model).__name__} with more than {self.found!r}: name a layer whose input the attention reads, "
                "(N, D), by feature_layer="
            )
        self.dim = features.shape[1]


@contextmanager
def replaced(module: nn.Module, forward) -> Iterator[None]:
    """While it lasts, a module computes `forward`."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def without_adapters(model: nn.Module) -> nn.Module:
    """The model that PEFT's stands around, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if base else model


def body_of(model: nn.Module) -> nn.Module | None:
    """What of a model stands below its head; None where that is no module of its own."""
    model = without_adapters(model)
    body = getattr(model, "base_model", model)
    return None if body is model else body


def only(tapped: list[Tensor], name: str) -> Tensor:
    """What a layer was given; RuntimeError where it ran never, or more than once."""
    if len(tapped) != 1:
        raise RuntimeError(f"the forward of {name} must run its head once, got {len(tapped)} times")
    return tapped[0]


def accepted(model: nn.Module, inputs: dict) -> dict:
    """The inputs that a model's forward takes, and no cache, with which transformers 4 sees no packed sequences."""
    parameters = _forward(model)
    if "use_cache" in parameters:
        inputs = {"use_cache": False} | inputs
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def run(model: nn.Module, name: str, inputs: dict):
    """What a model's forward returns; ValueError, one sentence, where a batch is too long or has other tokens."""
    try:
        return model(**accepted(model, inputs))
    except IndexError as error:
        sizes = {"positions": "max_position_embeddings", "tokens": "vocab_size"}
        has = " and ".join(f"{getattr(model.config, own, 'unknown')} {what}" for what, own in sizes.items())
        raise ValueError(f"{name} must have the positions and tokens of a batch, got one of more than {has}") from error


def named_inputs(model: nn.Module) -> list[str]:
    """What a model's forward takes by name."""
    return list(_forward(model))


def _forward(model: nn.Module):
    return inspect.signature(type(without_adapters(model)).forward).parameters


def _linear(module: nn.Module) -> nn.Linear | None:
    if isinstance(module, nn.Linear):
        return module
    inner = getattr(module, "original_module" if hasattr(module, "modules_to_save") else "base_layer", None)
    return inner if isinstance(inner, nn.Linear) else None


def _candidates(model: nn.Module) -> list[tuple[float, float | None]]:
    """Scales and soft-caps that the configuration may mean, the likeliest first."""
    text_config = getattr(model.config, "get_text_config", None)
    config = text_config() if text_config else model.config
    stated = [getattr(config, name, None) for name in SCALES]
    scales = [s for x in stated if isinstance(x, float | int) and x for s in (float(x), 1 / x)] + [1.0]
    caps = [float(cap) for cap in (getattr(config, name, None) for name in CAPS) if cap]
    return [*itertools.product(scales, caps), *itertools.product(scales, [None])]
