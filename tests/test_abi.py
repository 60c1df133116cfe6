"""One built library serves every torch since 2.11: the same file is loaded under a second torch."""

import os
import subprocess
import sys

import pytest
import torch

from eekd import _C

RUN = """
import importlib.machinery, importlib.util, sys, torch
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
student = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]])
snapshots = torch.arange(12.0).view(2, 2, 3).sin()
loss, attention_loss, weights, grad = torch.ops.eekd.ensemble_kd_fwd(
    student, [snapshots], torch.tensor([2, 0]), None, None, None, 5.0, 0.5, False, False, 1, -100, True, False)
print(torch.__version__, loss.item(), attention_loss.item(), *grad.flatten().tolist(), sep="\\n")
"""


def run(python: str) -> tuple[str, list[float]]:
    out = subprocess.run([python, "-c", RUN, _C.__file__], capture_output=True, text=True, check=True).stdout.split()
    return out[0], [float(x) for x in out[1:]]


@pytest.mark.full
@pytest.mark.skipif("EEKD_SECOND_PYTHON" not in os.environ, reason="EEKD_SECOND_PYTHON is not set: no second torch")
def test_the_same_file_runs_under_two_torch_versions():
    here, numbers = run(sys.executable)
    there, same_numbers = run(os.environ["EEKD_SECOND_PYTHON"])
    assert here == torch.__version__ != there
    assert same_numbers == numbers
