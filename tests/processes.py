"""Programs run in one process or in several, and what their runs learned."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from eekd.io import tensors as tensor_files

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # GPUs may be too few
SMALL = [
    "--precision",
    "fp32",
    "--channels-last=false",
    "--train-limit",
    "155",
    "--teacher.model",
    "resnet8_w4",
    "--student.model",
    "resnet8_w4",
    "--teacher.epochs",
    "2",
    "--student.epochs",
    "2",
    "--teacher.snapshots",
    "2",
    "--teacher.batch-size",
    "24",
    "--student.batch-size",
    "24",
    "--deterministic",
    "--augment",
    "crop",
]
TIMES = {"seconds", "seconds_teacher", "seconds_forward", "seconds_backward"}


def launch(processes: int, *command, **environment: str) -> subprocess.CompletedProcess:
    """`python command` in one process, or by torchrun in several."""
    start = [sys.executable] if processes == 1 else [*TORCHRUN, "--nproc-per-node", str(processes)]
    done = subprocess.run([*start, *map(str, command)], env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def weights(run: Path, *folders: str) -> dict[str, torch.Tensor]:
    """All that the run's networks learned."""
    files = [path for folder in folders or [""] for path in sorted((run / folder).rglob("*.safetensors"))]
    assert files
    return {
        f"{path.relative_to(run)} {name}": tensor
        for path in files
        for name, tensor in tensor_files.load_tensors(path).items()
    }


def assert_close(run: Path, other: Path, tolerance: float) -> None:
    """The same files in both, and in them numbers that are close."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (theirs[name] - tensor).abs().max().item()
        assert difference <= tolerance * (1 + tensor.abs().max().item()), name
