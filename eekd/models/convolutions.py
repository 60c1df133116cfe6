"""Keeps networks from a convolution of torch that writes outside its memory, on x86 processors.

oneDNN, which computes torch's convolutions on a CPU, has a backward for weights of 1×1 kernels with a stride, whose
work space is too small for 2 to 15 input channels in channels_last. docs/reference/reliability.md says
which shapes and versions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 16  # input channels: fewer are affected with AVX-512, fewer than 8 with AVX2
_ALIKE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def needs_guard() -> bool:
    """Whether this processor can meet that convolution: x86, with AVX2 or AVX-512."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def guard(model: nn.Module) -> nn.Module:
    """Lets 1×1 convolutions with a stride and few input channels take every stride-th pixel and then no stride.

    That is the same function, which oneDNN computes by another way. Nothing is changed where `needs_guard()` is false.
    Returns the model, changed in place: weights, names and types stay as they are. Convolutions that a model calls as
    a function, and classes with a forward of their own, are not reached.
    """
    if not needs_guard():
        return model
    for module in model.modules():
        convolve = next((_ALIKE[kind] for kind in _ALIKE if isinstance(module, kind)), None)
        if convolve and _affected(module):
            module._conv_forward = Strided(convolve, module.stride)  # pyright: ignore[reportArgumentType]
    return model


def _affected(module) -> bool:
    ones, none = set(module.kernel_size) == {1}, not any(module.padding) or module.padding in ("valid", "same")
    return ones and none and max(module.stride) > 1 and module.groups == 1 and module.in_channels < FEW


class Strided:
    """What a guarded convolution does in place of its own forward; it is copied and pickled with the module."""

    def __init__(self, convolve, stride: tuple[int, ...]):
        self.convolve, self.stride = convolve, stride

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu":
            return self.convolve(x, weight, bias, self.stride)
        return self.convolve(x[(..., *(slice(None, None, s) for s in self.stride))], weight, bias)
