"""The CUDA kernels as nvcc builds them: no warnings, and in the library, for every architecture, no spills."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sass import cuobjdump, kernels

from eekd import _C

pytestmark = pytest.mark.full

if not _C.cuda_version:
    pytest.skip("built without CUDA kernels", allow_module_level=True)

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"

# Of each kernel by its numbers, its elements, its order of columns and what it keeps on chip: registers at most, 128
# where two blocks of 256 threads are to share a multiprocessor, 80 where three are, and bytes of stack: only fp64
# spills, and of few snapshots, whose exponentials fill the registers, a number or two of a row.
ON_CHIP, STREAMED = ("0_1", "2_1", "0_2", "2_2"), ("0_0", "1_0", "2_0")
ELEMENTS = ("float", "__half", "__nv_bfloat16")
FEW, FUSIONS = (1, 2, 3, 4, 5, 8), ("probability", "logit")
# Of soft labels, of which dense rows keep all lines or none.
SOFT = {
    "rows_kernel d Any 0_0 soft": (128, 256),
    "rows_kernel f Any 0_0 soft": (128, 64),
    **{
        f"rows_kernel f {elements} {variant} soft": (128, 64)
        for elements in ELEMENTS
        for variant in ("0_1", "2_1", *STREAMED)
    },
    "sparse_rows_kernel d Any 0 soft": (128, 64),
    **{f"sparse_rows_kernel f {elements} {keeps} soft": (80, 0) for elements in ELEMENTS for keeps in (0, 1)},
}
LIMITS = {
    "rows_kernel d Any 0_0": (128, 64),
    "rows_kernel f Any 0_0": (104, 0),
    **{f"rows_kernel f {elements} {variant}": (128, 0) for elements in ELEMENTS for variant in ON_CHIP + STREAMED},
    **SOFT,
    **{
        f"few_rows_kernel {x} {m} {f}": (255, 32 if x == "float" else 16)
        for x in ELEMENTS
        for m in FEW
        for f in FUSIONS
    },
    "sparse_rows_kernel d Any 0": (128, 64),
    **{f"sparse_rows_kernel f {elements} {keeps}": (80, 0) for elements in ELEMENTS for keeps in (0, 1)},
    "sum_kernel d": (48, 0),
    "sum_kernel f": (48, 0),
    "count_kernel": (40, 0),
    "scale_kernel d": (64, 8),
    "scale_kernel f": (64, 0),
}


def kernel(symbol: str) -> str:
    """The name in LIMITS of a mangled name."""
    few = re.search(r"few_rows_kernelI(?:(f)|\d+(__\w+?))Li(\d+)ELNS\w*?FusionE(\d)E", symbol)
    if few:
        return f"few_rows_kernel {'float' if few[1] else few[2]} {few[3]} {FUSIONS[int(few[4])]}"
    elements = r"I([df])(?:NS_3(Any)E|(f)|\d+(__\w+?))L"
    row = re.search(rf"(sparse_)?rows_kernel{elements}(?:NS\w*?OrderE(\d)ELNS\w*?KeepE(\d)EL|b(\d)EL)b(\d)E", symbol)
    if row:
        sparse, numbers, *elements, order, keep, keeps, soft = row.groups()
        elements = "float" if elements[1] else elements[0] or elements[2]
        name = f"{sparse or ''}rows_kernel {numbers} {elements} {keeps or f'{order}_{keep}'}"
        return name + " soft" * (soft == "1")
    other = re.search(r"(sum_kernel|count_kernel|scale_kernel)(?:I([df])E)?", symbol)
    return " ".join(part for part in other.groups() if part)


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
    # The kernels of few snapshots were made for sm_90; what they spill elsewhere is not known to matter.
    elsewhere = {name: (255, 1024) for name in LIMITS if name.startswith("few_rows_kernel")}
    limits = {(a, name): (LIMITS if a == "90" else LIMITS | elsewhere)[name] for a, name in found}
    assert not {key: value for key, value in found.items() if any(map(int.__gt__, value, limits[key]))}


@pytest.fixture(scope="module")
def sm_90():
    if "90" not in _C.cuda_architectures.split():
        pytest.skip("built without sm_90, where the budgets were set")
    return {kernel(symbol): code for symbol, code in kernels(_C.__file__, 90).items()}


# Instructions a column at M = 5 in 16 bits, of both visits: the second for attention that is fixed, learns by the label
# or by the KL. A thread's 32 columns are written out, one vector of 8 after the other. What is O(M) per row (weights,
# sums over threads, logarithms) is not counted.
@pytest.mark.parametrize("fusion, first, second", [("probability", 32, [21, 26]), ("logit", 23, [26, 37, 43])])
@pytest.mark.parametrize("elements", ["__nv_bfloat16"])
def test_instructions_a_column(sm_90, elements, fusion, first, second):
    blocks = [b for b in sm_90[f"few_rows_kernel {elements} 5 {fusion}"].blocks() if b.count("MUFU.EX2") >= 8]
    assert not any(block.count("LDL", "STL") for block in blocks)
    visits = [blocks[: -4 * len(second)], *(blocks[len(blocks) - 4 * i :][:4] for i in range(len(second), 0, -1))]
    lines = [sum(block.count("LDS.128") for block in visit) for visit in visits]
    assert lines == [4 * 6, *[4 * (1 if fusion == "probability" else 6)] * len(second)]  # M + 1, or the student's
    counts = [sum(map(len, visit)) / 32 for visit in visits]
    assert all(found <= most for found, most in zip(counts, [first, *second], strict=True)), counts
    assert counts[0] + counts[-2] <= 70, counts  # by the label; of probability that is as if it were fixed


@pytest.mark.parametrize("name, loads", [("count_kernel", 8), ("sum_kernel f", 16)])
def test_loads_are_under_way_together(sm_90, name, loads):
    assert max(loop.count("LDG") for loop in sm_90[name].innermost_loops()) >= loads


@pytest.mark.parametrize("numbers", "df")
def test_scaling_divides_no_element(sm_90, numbers):
    loops = [loop for loop in sm_90[f"scale_kernel {numbers}"].innermost_loops() if loop.count("STG", "ST")]
    assert loops and not any(loop.count("CALL", "MUFU.RCP", "I2F") for loop in loops)


def test_the_streams_of_torch_are_found_whatever_the_library_was_linked_to():
    assert _C.finds_cuda_streams() == (torch.version.cuda is not None)
    # Not by a symbol that a torch without CUDA lacks, not even a weak one, which is found or not as the linker had it.
    assert "cuda_stream" not in subprocess.check_output(["nm", "-D", "--undefined-only", _C.__file__], text=True)


@pytest.mark.skipif("EEKD_SECOND_PYTHON" not in os.environ, reason="EEKD_SECOND_PYTHON is not set: no second torch")
def test_streams_under_a_second_torch():
    code = (
        "import importlib.machinery, importlib.util, sys, torch\n"
        "loader = importlib.machinery.ExtensionFileLoader('_C', sys.argv[1])\n"
        "_C = importlib.util.module_from_spec(importlib.util.spec_from_loader('_C', loader))\n"
        "loader.exec_module(_C)\n"
        "print(_C.finds_cuda_streams() == (torch.version.cuda is not None))"
    )
    for python in (os.environ["EEKD_SECOND_PYTHON"], sys.executable):
        assert subprocess.check_output([python, "-c", code, _C.__file__], text=True) == "True\n"


@pytest.mark.full
@pytest.mark.parametrize("architecture", [80, 90])  # without and with clusters
@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.name)
def test_no_warnings(source, architecture, tmp_path):
    options = ["-std=c++20", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}", "-fdevice-syntax-only"]
    strict = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    done = subprocess.run(
        [checking_nvcc(), *options, *strict, "-c", source, "-o", tmp_path / "checked.o"], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
