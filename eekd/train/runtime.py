"""How a network is made and run: on which device, in which precision and memory format."""

import functools
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eekd import models
from eekd.train.config import Config, settled
from eekd.train.presets import recommended

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """Makes and runs networks by the settings `precision` and `channels_last`, neither of them "auto"."""

    def __init__(self, precision: str, channels_last: bool, device: torch.device):
        self.device = device
        self.dtype = DTYPES[precision]
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def build(self, spec: dict) -> nn.Module:
        """A new network, `spec` being the arguments of eekd.models.build."""
        return models.build(**spec).to(self.device).to(memory_format=self.layout)

    def run(self, network: Callable, images: Tensor):
        """The network's output."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return network(images.contiguous(memory_format=self.layout))


def chosen(config: Config, device: torch.device) -> Config:
    """The settings with "auto" decided: bf16 where the device computes in it natively, channels_last on a CPU.

    Where no students are named, they are the recommended ones.
    A choice depends on the device and other settings alone, so that two runs on it have the same bits. Warns where a
    precision that was asked for is emulated, with how much longer a convolution takes in it.
    """
    if not natively(config.precision, device):
        times = slowdown(config.precision, device)
        warnings.warn(
            f"precision {config.precision} is emulated by this {device.type}: a convolution took {times:.1f} "
            "times as long as in fp32, so fp32 is the better choice here",
            stacklevel=2,
        )
    last = device.type == "cpu" and config.parallel != "fsdp"  # fully_shard takes contiguous parameters only
    precision = "bf16" if natively("bf16", device) else "fp32"
    return settled(config, Config(precision=precision, channels_last=last, students=recommended(config.student)))


def natively(precision: str, device: torch.device) -> bool:
    """Whether the device computes convolutions in this precision; a CPU as oneDNN sees it (ONEDNN_MAX_CPU_ISA)."""
    if precision in ("auto", "fp32"):
        return True
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return precision == "fp16"
    if not torch.backends.mkldnn.is_available():
        return False
    if precision == "fp16":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # oneDNN takes bf16 from AVX-512 on; without instructions of its own it computes in fp32 what it has converted.
    vectors = torch.backends.cpu.get_cpu_capability() == "AVX512"
    own = not vectors or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and own


@functools.cache
def slowdown(precision: str, device: torch.device) -> float:
    """Time of a small convolution, forward and backward, in this precision over that in fp32, measured now."""
    return _seconds(DTYPES[precision], device) / _seconds(torch.float32, device)


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The best of three, after one to warm up."""
    generator, times = torch.Generator().manual_seed(0), []
    x, weight = (
        torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in ((16, 16, 14, 14), (16, 16, 3, 3))
    )
    for _ in range(4):
        start = time.perf_counter()
        nn.functional.conv2d(x, weight, padding=1).sum().backward()
        weight.grad.sum().item()  # a GPU has done it all when the number is here
        times.append(time.perf_counter() - start)
    return min(times[1:])
