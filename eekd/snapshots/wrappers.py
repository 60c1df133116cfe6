"""Models as they come: without their wrappers, copied whatever hangs on them, and their logits found in any output."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, AveragedModel and torch.compile."""
    while True:
        wrapped = isinstance(model, DistributedDataParallel | DataParallel | AveragedModel)
        inner = getattr(model, "module" if wrapped else "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a model, bare, in eval mode and without gradients."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"models must be nn.Modules, got {type(model).__name__}")
    model = bare_model(model)
    computed = [  # such as the weight of torch's old weight_norm, which cannot be copied with its graph
        (module.__dict__, name, value)
        for module in model.modules()
        for name, value in list(module.__dict__.items())
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    for attributes, name, value in computed:
        attributes[name] = value.detach()
    try:
        twin = copy.deepcopy(model)
    finally:
        for attributes, name, value in computed:
            attributes[name] = value
    for parameter in twin.parameters():  # one by one: TorchScript has no requires_grad_, and copies are no leaves there
        parameter.detach_().requires_grad_(False)
    return twin.eval()


def logits_of(output) -> Tensor:
    """The logits (B, C) in what a model returns.

    That is a tensor; an object with `logits`; a dict with "logits" or of one tensor; or a tuple or list, whose first
    tensor of two or more dimensions is taken. ValueError, one sentence, for anything else.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Mapping):
        tensors = [x for x in output.values() if isinstance(x, Tensor)]
        logits = output.get("logits", tensors[0] if len(tensors) == 1 else None)
        got = f"a dict of {', '.join(map(str, output)) or 'nothing'}"
    elif isinstance(output, tuple | list):
        logits = next((x for x in output if isinstance(x, Tensor) and x.ndim > 1), None)
        got = f"a {type(output).__name__} of {', '.join(type(x).__name__ for x in output) or 'nothing'}"
    else:
        got = f"a {type(output).__name__}"
    if not isinstance(logits, Tensor):
        raise ValueError(f'the model must return logits, alone, as .logits, as ["logits"] or first, got {got}')
    return logits
