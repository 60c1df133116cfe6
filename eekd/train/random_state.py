"""The random generators of a process: seeded together, and their states as one tensor."""

import math
import random

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Seeds the generators of torch, on every device, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_state(device: torch.device) -> Tensor:
    """The states of the generators of torch, Python, NumPy and the device, as bytes (n,) uint8."""
    _, words, gauss = random.getstate()
    keys, place, kept, cached = np.random.get_state()[1:]  # pyright: ignore[reportCallIssue, reportArgumentType]
    numbers = np.array([math.nan if gauss is None else gauss, place, kept, cached])
    arrays = np.array(words, np.uint32), keys.astype(np.uint32), numbers
    states = [torch.get_rng_state(), *(torch.from_numpy(array.view(np.uint8)) for array in arrays)]
    return torch.cat([*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Sets the generators to what `random_state` returned; the device's only if it has one now and had one then."""
    sizes = [len(torch.get_rng_state()), 4 * 625, 4 * 624, 8 * 4]
    own, words, keys, numbers, on_device = state.split([*sizes, len(state) - sum(sizes)])
    gauss, place, kept, cached = numbers.numpy().view(np.float64).tolist()
    torch.set_rng_state(own.clone())
    if len(on_device) and device.type == "cuda":
        torch.cuda.set_rng_state(on_device.clone(), device)
    words = words.numpy().view(np.uint32).tolist()
    random.setstate((3, tuple(words), None if math.isnan(gauss) else gauss))
    np.random.set_state(("MT19937", keys.numpy().view(np.uint32), int(place), int(kept), cached))
