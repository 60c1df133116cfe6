"""The feature maps inside a network: of each size, (H, W), the last that one of its modules returns."""

import torch
from torch import Tensor, nn

from eekd.snapshots.wrappers import logits_of


class FeatureMaps:
    """Keeps the maps (B, C, H, W) of a network's forward, by size.

        maps = FeatureMaps(network, run, image)
        network(images)
        maps.take()  # {(28, 28): (B, 16, 28, 28), (14, 14): …}

    `run(network, images)` runs it once, in eval mode, on one image (1, C, S, S), to find the modules. Attributes:
    `shapes`, {(H, W): (C, H, W)} from the first size to the last; maps of one pixel are none.
    """

    def __init__(self, network: nn.Module, run, image: Tensor):
        self._kept, by_size, training = {}, {}, network.training

        def look(module, inputs, output):
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
                by_size.pop(tuple(output.shape[2:]), None)
                by_size[tuple(output.shape[2:])] = module, tuple(output.shape[1:])

        hooks = [module.register_forward_hook(look) for module in network.modules()]
        with torch.no_grad():
            run(network.eval(), image)
        network.train(training)
        for hook in hooks:
            hook.remove()
        self.shapes = {size: shape for size, (_, shape) in by_size.items()}
        for size, (module, _) in by_size.items():
            module.register_forward_hook(self._keep(size))

    def _keep(self, size):
        def keep(module, inputs, output):
            self._kept[size] = output

        return keep

    def take(self) -> dict[tuple[int, int], Tensor]:
        """The maps of the last forward, which are then forgotten here."""
        kept, self._kept = self._kept, {}
        return kept


class SpeakingMaps:
    """A frozen network that says its logits (1, B, C) and, of some sizes, its maps, changed and flat, (1, B, D).

    `change` makes a tensor (B, …) of the maps of each size.
    """

    def __init__(self, network: nn.Module, maps: FeatureMaps, sizes, change):
        self.network, self.maps, self.sizes, self.change = network.eval(), maps, sizes, change

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, kept = logits_of(self.network(images)), self.maps.take()
        flat = torch.cat([self.change(kept[size]).flatten(1) for size in self.sizes], 1)
        return logits[None], flat[None]
