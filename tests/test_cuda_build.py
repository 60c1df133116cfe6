"""The machine code of the CUDA kernels in the built library, for every architecture: no spills, few registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eekd import _C

if not _C.cuda_version:
    pytest.skip("built without CUDA kernels", allow_module_level=True)

# Of each kernel by its numbers and its elements: registers at most, of the 128 that 512 threads leave, and bytes of
# stack. The stack is mixture_nll's array, which one thread of a row uses; only fp64 spills beyond it, 32 bytes.
LIMITS = {
    "rows_kernelIdNS_3Any": (128, 544),
    "rows_kernelIfNS_3Any": (80, 256),
    "rows_kernelIf6__half": (120, 256),
    "rows_kernelIf13__nv_bfloat16": (120, 256),
    "rows_kernelIff": (90, 256),
    "sum_kernel": (40, 0),
    "count_kernel": (40, 0),
    "scale_kernel": (48, 0),
}


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if not found:
        triton = pytest.importorskip("triton", reason="cuobjdump comes with the CUDA toolkit or Triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def test_every_kernel_on_every_architecture():
    done = subprocess.run([cuobjdump(), "-res-usage", _C.__file__], capture_output=True, text=True)
    usage = done.stdout + done.stderr
    architectures = re.findall(r"arch = sm_(\d+)", usage)
    assert sorted(set(architectures)) == sorted(_C.cuda_architectures.split())
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    for part, limits in LIMITS.items():
        found = [(int(registers), int(stack)) for name, registers, stack in kernels if part in name]
        assert len(found) >= len(set(architectures))
        assert all(registers <= limits[0] and stack <= limits[1] for registers, stack in found), (part, found)
    assert sum(part in name for part in LIMITS for name, _, _ in kernels) == len(kernels)
