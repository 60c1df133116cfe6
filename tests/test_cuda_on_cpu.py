"""The CUDA kernels without a GPU: their sources as C++, threads as fibers (cuda_on_cpu/), under the op's own suite.

Not seen here: races that the order of the fibers hides, the PTX of csrc/cuda/ptx.cuh, and speed.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_ensemble_kd import *  # noqa: F403  those named in SUITE run here once more

from eekd.ops.ensemble_kd import DTYPES, MAX_SNAPSHOTS

HERE = Path(__file__).parent / "cuda_on_cpu"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

if not COMPILER:
    pytest.skip("no C++ compiler", allow_module_level=True)


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int)]


class Arguments(ctypes.Structure):
    """csrc/eekd.h's EnsembleKD."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "snapshots", "classes", "width")),
        ("student", Matrix),
        ("snapshot", Matrix * MAX_SNAPSHOTS),
        ("labels", ctypes.c_void_p),
        ("scores", Matrix),
        ("query", Matrix),
        ("keys", Matrix * MAX_SNAPSHOTS),
        ("temperature", ctypes.c_double),
        ("alpha", ctypes.c_double),
        ("fusion", ctypes.c_int),
        ("objective", ctypes.c_int),
        ("ignore_index", ctypes.c_int64),
        ("row_scale", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in ("loss", "attention_loss", "weights", "d_student", "d_scores", "d_query", "d_keys")
        ),
    ]


def matrix(x: torch.Tensor | None) -> Matrix:
    return Matrix() if x is None else Matrix(x.data_ptr(), x.stride(0), DTYPES.index(x.dtype))


class Emulator:
    """The library, with the op as csrc/bindings.cpp calls it."""

    def __init__(self, folder: Path):
        path = folder / "cuda_on_cpu.so"
        subprocess.run(
            [
                COMPILER, "-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
                "-Wno-unknown-pragmas", "-include", HERE / "cuda_runtime.h", HERE / "emulator.cpp", "-o", path,
            ],
            check=True,
        )  # fmt: skip
        self.library = ctypes.PyDLL(str(path))  # which holds the lock of the interpreter: one launch at a time
        self.library.ensemble_kd_fwd.restype = ctypes.c_char_p
        assert self.library.size_of_arguments() == ctypes.sizeof(Arguments)

    def choose(self, name: str):
        facts = (list(DEVICES).index(name), *DEVICES[name])
        self.library.emulate(ctypes.byref((ctypes.c_int * len(facts))(*facts)))

    def ensemble_kd_fwd(
        self, student, snapshots, labels, scores, query, keys, temperature, alpha, logit_fusion, kl_objective, mean,
        ignore_index, loss, attention_loss, weights, d_student, d_scores, d_query, d_keys,
    ):  # fmt: skip
        snapshots = snapshots[0] if snapshots[0].dim() == 3 else snapshots
        rows, classes = student.shape
        pointers = {
            "labels": labels, "weights": weights, "d_student": d_student, "d_scores": d_scores, "d_query": d_query,
            "d_keys": d_keys,
        }  # fmt: skip
        per_row = loss.new_full((2, max(rows, 1)), torch.nan) if loss.dim() == 0 else torch.stack((loss, loss))
        args = Arguments(
            rows=rows, snapshots=len(snapshots), classes=classes, width=0 if query is None else query.shape[1],
            student=matrix(student), scores=matrix(scores), query=matrix(query), temperature=temperature, alpha=alpha,
            fusion=logit_fusion, objective=kl_objective, ignore_index=ignore_index,
            row_scale=1 / max(rows, 1) if mean else 1, loss=per_row[0].data_ptr(), attention_loss=per_row[1].data_ptr(),
            **{name: value.data_ptr() for name, value in pointers.items() if value is not None},
        )  # fmt: skip
        for m, z in enumerate(snapshots):
            args.snapshot[m] = matrix(z)
            if keys is not None:
                args.keys[m] = matrix(keys[m])
        scalars = (loss.data_ptr(), attention_loss.data_ptr()) if loss.dim() == 0 else (None, None)
        error = self.library.ensemble_kd_fwd(
            ctypes.byref(args), loss.dtype == torch.float64, mean, *map(ctypes.c_void_p, scalars),
            ctypes.byref(ctypes.c_int(-1)),
        )  # fmt: skip
        if error:
            raise RuntimeError(error.decode())
        if loss.dim():
            loss.copy_(per_row[0]), attention_loss.copy_(per_row[1])


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("cuda_on_cpu"))


KIB = 1024
# By what of a row fits on chip: shared memory of a block and of a multiprocessor, multiprocessors, capability, the
# largest cluster. With the least shared memory, the rows of a hundred classes and more are split or read twice.
DEVICES = {
    "H100": (227 * KIB, 228 * KIB, 132, 9, 8),
    "clusters": (24 * KIB, 50 * KIB, 132, 9, 8),
    "streaming": (24 * KIB, 50 * KIB, 108, 8, 1),
}


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture(params=DEVICES)
def backend(request, emulator, monkeypatch):
    emulator.choose(request.param)
    monkeypatch.setattr(sys.modules["eekd.ops.ensemble_kd"], "namespace", lambda device: emulator)
    return "native"


@pytest.fixture
def kernels(backend):
    return backend
