"""Which implementation of an op runs: chosen by device, or named with `use_backend`."""

import contextlib
from collections.abc import Iterator

import torch

try:
    from eekd import _C
except ImportError as error:
    raise ImportError(
        f"eekd's compiled kernels could not be loaded ({error}); build them with `pip install -e .`, and do not run a "
        "non-editable install from the source folder, where the uncompiled sources shadow it"
    ) from None

BACKENDS = ("native", "triton", "reference")
_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops called inside the `with` block on one backend: "native", "triton" or "reference".

    Raises ValueError for any other name; the op itself raises RuntimeError where the backend is not available.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend_for(device: torch.device) -> str:
    """The name of the backend that runs ops on `device` now."""
    return _forced or "native"
