import pytest
import torch

from eekd import use_backend
from eekd.ops.backend import namespace

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
