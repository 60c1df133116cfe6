import os
import signal
from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest
import torch

from eekd import _C, use_backend
from eekd.ops.backend import namespace

# A shell without a terminal starts what it puts into the background with Ctrl-C ignored, which children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton's interpreter cuts fp32 off to bf16, where a GPU rounds, and takes fp64 for an integer.
    from triton.runtime import interpreter

    def cast(self, x, target, otherwise=interpreter.InterpreterBuilder.cast_impl):
        source, target = x.dtype.scalar, target.scalar
        if "bf16" not in (source.name, target.name) or not (source.is_floating() and target.is_floating()):
            return otherwise(self, x, target)
        value = torch.from_numpy(np.array(x.data))
        if source.name == "bf16":
            value = value.view(torch.bfloat16)
        value = value.to(getattr(torch, {"bf": "bfloat", "fp": "float"}[target.name[:2]] + target.name[2:]))
        value = value.view(torch.uint16) if target.name == "bf16" else value
        return interpreter.TensorHandle(value.numpy(), target)

    interpreter.InterpreterBuilder.cast_impl = cast


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of every product of parameters, marks as full what is not needed for each two values to meet in some case."""
    products = defaultdict(dict)
    for item in items:
        if not {"hub", "browser"}.isdisjoint(item.fixturenames):  # Hugging Face's datasets, or Chromium
            item.add_marker("full")
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        values = [(name, id(value)) for name, value in sorted(parameters.items())]
        if len(values) > 2:
            products[item.nodeid.split("[")[0]][item] = set(combinations(values, 2))
    for cases in products.values():
        while any(cases.values()):
            most = max(cases, key=lambda item: len(cases[item]))
            met = cases.pop(most)
            cases |= {item: pairs - met for item, pairs in cases.items()}
        for item in cases:
            item.add_marker("full")


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device at hand: a GPU test is not a second suite."""
    return request.param


def _runs(backend: str, device: str) -> bool:
    if backend == "reference" or (backend, device) == ("native", "cpu"):  # these have no excuse
        return True
    with use_backend(backend):
        try:
            namespace(torch.device(device))
        except RuntimeError:
            return False
    return True


KERNELS = [name for name in ("native", "triton") if _runs(name, "cpu") or (len(DEVICES) > 1 and _runs(name, "cuda"))]


@pytest.fixture(params=KERNELS)
def kernels(request, device):
    """Every backend of kernels that the device has, in use during the test."""
    if not _runs(request.param, device):
        pytest.skip(f"no {request.param} backend on {device}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=[*KERNELS, "reference"])
def backend(request, device):
    """Every backend that the device has, in use during the test."""
    if not _runs(request.param, device):
        pytest.skip(f"no {request.param} backend on {device}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    """Every instruction set that build and processor have."""
    before = _C.cpu_capability()
    if not _C.set_cpu_capability(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
