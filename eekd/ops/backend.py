"""Which implementation of an op runs: chosen by device, or named with `use_backend`."""

import contextlib
import contextvars
from collections.abc import Iterator

import torch

BACKENDS = ("native", "triton", "reference")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("eekd_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops called inside the `with` block on one backend: "native", "triton" or "reference".

    Raises ValueError for any other name; the op itself raises RuntimeError where the backend is not available.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def backend_for(device: torch.device) -> str:
    """The name of the backend that runs ops on `device` now."""
    return _forced.get() or "reference"
