"""The wrappers that average the gradients of a module over processes, looked for where a module runs past its own."""

import gc
from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def in_ddp() -> bool:
    """Whether this runs in the forward of a DistributedDataParallel."""
    return DistributedDataParallel._active_ddp_module is not None


def wrappers_alive(*kinds: type) -> list[nn.Module]:
    """All modules of these types that there are, which is slow to find out."""
    return [candidate for candidate in gc.get_objects() if issubclass(type(candidate), kinds)]


def around(module: nn.Module, wrappers: Iterable[nn.Module]) -> list[nn.Module]:
    """The wrappers that hold the module."""
    return [wrapper for wrapper in wrappers if any(inside is module for inside in wrapper.modules())]
