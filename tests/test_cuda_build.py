"""The CUDA kernels as nvcc builds them: no warnings, and in the library, for every architecture, no spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eekd import _C

if not _C.cuda_version:
    pytest.skip("built without CUDA kernels", allow_module_level=True)

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"

# Of each kernel by its numbers, its elements, its order of columns and what it keeps on chip: registers at most, 128
# where two blocks of 256 threads are to share a multiprocessor, 80 where three are, and bytes of stack: only fp64
# spills.
ON_CHIP, STREAMED = ("0_1", "2_1", "0_2", "2_2"), ("0_0", "1_0", "2_0")
ELEMENTS = ("float", "__half", "__nv_bfloat16")
LIMITS = {
    "rows_kernel d Any 0_0": (128, 64),
    "rows_kernel f Any 0_0": (104, 0),
    **{f"rows_kernel f {elements} {variant}": (128, 0) for elements in ELEMENTS for variant in ON_CHIP + STREAMED},
    "sparse_rows_kernel d Any 0": (128, 64),
    **{f"sparse_rows_kernel f {elements} {keeps}": (80, 0) for elements in ELEMENTS for keeps in (0, 1)},
    "sum_kernel d": (48, 0),
    "sum_kernel f": (48, 0),
    "count_kernel": (40, 0),
    "scale_kernel d": (48, 0),
    "scale_kernel f": (48, 0),
}


def kernel(symbol: str) -> str:
    """The name in LIMITS of a mangled name."""
    elements = r"I([df])(?:NS_3(Any)E|(f)|\d+(__\w+?))L"
    row = re.search(rf"(sparse_)?rows_kernel{elements}(?:NS\w*?OrderE(\d)ELNS\w*?KeepE(\d)E|b(\d)E)", symbol)
    if row:
        sparse, numbers, *elements, order, keep, keeps = row.groups()
        elements = "float" if elements[1] else elements[0] or elements[2]
        return f"{sparse or ''}rows_kernel {numbers} {elements} {keeps or f'{order}_{keep}'}"
    other = re.search(r"(sum_kernel|count_kernel|scale_kernel)(?:I([df])E)?", symbol)
    return " ".join(part for part in other.groups() if part)


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if not found:
        triton = pytest.importorskip("triton", reason="cuobjdump comes with the CUDA toolkit or Triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def checking_nvcc() -> str:
    """An nvcc that can end before it generates code, which takes seconds instead of minutes."""
    nvcc = shutil.which("nvcc")
    if not nvcc or "-fdevice-syntax-only" not in subprocess.check_output([nvcc, "--help"], text=True):
        pytest.skip("no nvcc on PATH that can check without generating code")
    return nvcc


def test_every_kernel_on_every_architecture():
    done = subprocess.run([cuobjdump(), "-res-usage", _C.__file__], capture_output=True, text=True)
    usage = re.split(r"arch = sm_(\d+)", done.stdout + done.stderr)
    found = {}
    for architecture, report in zip(usage[1::2], usage[2::2], strict=True):
        for symbol, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", report):
            found[architecture, kernel(symbol)] = (int(registers), int(stack))
    assert {name for _, name in found} == LIMITS.keys()
    assert sorted(found) == sorted((a, name) for a in _C.cuda_architectures.split() for name in LIMITS)
    assert not {
        key: value for key, value in found.items() if value[0] > LIMITS[key[1]][0] or value[1] > LIMITS[key[1]][1]
    }


@pytest.mark.full
@pytest.mark.parametrize("architecture", [80, 90])  # without and with clusters
@pytest.mark.parametrize("source", ["ensemble_kd.cu", "sparse_ensemble_kd.cu"])
def test_no_warnings(source, architecture, tmp_path):
    options = ["-std=c++20", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}", "-fdevice-syntax-only"]
    strict = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    done = subprocess.run(
        [checking_nvcc(), *options, *strict, "-c", SOURCES / source, "-o", tmp_path / "checked.o"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
