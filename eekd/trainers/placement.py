"""How a network is made and run: on which device, in which precision and memory format."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from eekd import models


class Placement:
    """Makes and runs networks by the settings `precision` and `channels_last`."""

    def __init__(self, precision: str, channels_last: bool, device: torch.device):
        self.device = device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def build(self, spec: dict) -> nn.Module:
        """A new network, `spec` being the arguments of eekd.models.build."""
        return models.build(**spec).to(self.device, memory_format=self.layout)

    def run(self, network: Callable, images: Tensor):
        """The network's output."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return network(images.contiguous(memory_format=self.layout))
