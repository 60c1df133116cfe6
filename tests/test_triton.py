"""The Triton backend without a GPU: the op's own suite under Triton's interpreter, and the launch rule."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import eekd.kernels.ensemble_kd  # noqa: F401  registers the op
from eekd.kernels.common import alignment, launch

SUITE = Path(__file__).with_name("test_ensemble_kd.py")
# What runs on every commit; `pytest -m slow` runs all.
QUICK = (
    "formulas or temperature_and_alpha or far_apart or no_probability or padded or on_a_masked or expanded or ignored "
    "or embedding or (compiles_whole and label) or (every_shape and (65x5x10- or 9x5x1001 or 5x3x5000 or 0x5x100)) "
    "or same_inputs"
)


def run_suite(expression: str):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-k", f"triton and ({expression})", SUITE],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_the_op_s_suite_in_the_interpreter():
    run_suite(QUICK)


@pytest.mark.slow
def test_the_op_s_whole_suite_in_the_interpreter():
    run_suite("test")


def test_same_schema_as_the_native_op():
    native, triton = (str(x.ensemble_kd_fwd.default._schema) for x in (torch.ops.eekd, torch.ops.eekd_triton))
    assert native.removeprefix("eekd::") == triton.removeprefix("eekd_triton::")


@pytest.mark.parametrize("snapshots", [1, 2, 5, 17, 64])
def test_every_number_of_classes_has_a_launch(snapshots):
    for classes in (1, 2, 10, 100, 1000, 1001, 4096, 8192, 8193, 50257, 262144):
        for wide in (False, True):
            cut = launch(classes, snapshots, wide)
            assert cut.block >= (classes if cut.on_chip else 32) and cut.num_warps in (1, 2, 4, 8, 16)


def test_alignment():
    aligned = alignment(1000, 2, [0, 8], [1000, 1000], [8000])
    assert aligned == (8, False)
    assert alignment(1001, 2, [0, 8], [1001, 1001], [8008]) == (8, True)  # a batch of 8: all rows alike
    assert alignment(1001, 2, [0, 8], [1001, 1001], [9009]) == (1, False)  # of 9: snapshots begin elsewhere
    assert alignment(1001, 2, [0, 8], [1001, 5005], [1001]) == (1, False)  # (B, M, C) memory
    assert alignment(1000, 4, [1, 8], [1000, 1000], [8000]) == (1, False)
