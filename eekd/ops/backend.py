"""Which implementation of an op runs: chosen by device, or named with `use_backend`."""

import contextlib
from collections.abc import Iterator

import torch

try:
    import eekd._C as _C  # after torch, whose libraries it needs
except ImportError as error:
    if "EEKD_CPU_CAPABILITY" in str(error):  # a wrong value, which no build mends
        raise
    raise ImportError(
        f"eekd's compiled kernels could not be loaded ({error}); build them with `pip install -e .`, and do not run a "
        "non-editable install from the source folder, where the uncompiled sources shadow it"
    ) from None

if getattr(_C, "ops_version", 1) != 4:  # of the ops' arguments, counted in csrc/bindings.cpp
    raise ImportError(
        "eekd's compiled kernels are of another version than its Python code; build them again with `pip install -e .`"
    )

BACKENDS = ("native", "triton", "reference")
_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops inside the `with` block on one backend: "native", "triton" or "reference".

    Raises ValueError for any other name. The op itself raises RuntimeError if the backend is not available.
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
    if _forced:
        return _forced
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "reference"  # kernels know nothing of torch.func and torch.vmap
    # On GPUs the C++/CUDA kernels have not been measured against Triton's yet, so the more portable of the two runs.
    return "triton" if device.type == "cuda" else "native"


def namespace(device: torch.device, backend: str | None = None):
    """The namespace of the ops that run on `device` now; raises RuntimeError where its backend is not available.

    `backend` is what `backend_for` says, where it has been asked.
    """
    if (backend or backend_for(device)) == "native":
        kind = device.type
        if kind == "cuda" and not _C.cuda_version:
            raise RuntimeError("the native backend was built without CUDA; install nvcc and build it again")
        if kind not in ("cpu", "cuda", "meta"):
            raise RuntimeError(f'the native backend runs on cpu and cuda, not on {kind}; use "reference" there')
        return torch.ops.eekd
    try:
        from eekd.kernels import ensemble_kd, sparse_ensemble_kd  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"the triton backend needs Triton ({error}); `pip install triton`") from None
    if device.type == "cpu" and not ensemble_kd.INTERPRETED:
        raise RuntimeError("the triton backend runs on cpu only where TRITON_INTERPRET=1 is set before Python starts")
    return torch.ops.eekd_triton
