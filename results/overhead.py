"""The way to the kernel, step by step, at shapes where it takes longer than the kernel: results/overhead-cpu.json.

python results/overhead.py [--before FOLDER]    # a built checkout of an older commit, whose steps take turns with ours

Each row holds the step before it. What autograd itself takes is that of a function that computes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import eekd

SHAPES = [(1, 1, 2), (128, 5, 10)]
STEPS = {
    "kernel": "the kernel and its outputs, called as autograd calls it",
    "checked": "and the checks of the arguments, without gradients",
    "forward": "and an autograd node",
    "step": "and the backward: what a training step pays",
    "nothing": "for comparison, forward and backward of an autograd function that computes nothing",
}
ROUNDS, CALLS = 40, 50


class _Nothing(torch.autograd.Function):
    """As many tensors in and out as the op has."""

    @staticmethod
    def forward(ctx, student, scores, loss, weights, attention_loss, d_student, d_scores):
        ctx.save_for_backward(d_student, d_scores)
        ctx.mark_non_differentiable(weights)
        return loss.view_as(loss), weights.view_as(weights), attention_loss.view_as(attention_loss)

    @staticmethod
    def backward(ctx, *_):
        return *ctx.saved_tensors, None, None, None, None, None


def inputs(rows: int, snapshots: int, classes: int) -> tuple[torch.Tensor, ...]:
    """Student logits, snapshot logits, labels and scores."""
    torch.manual_seed(0)
    student, scores = torch.randn(rows, classes, requires_grad=True), torch.randn(rows, snapshots, requires_grad=True)
    return student, torch.randn(snapshots, rows, classes), torch.randint(classes, (rows,)), scores


def backward(out, *leaves) -> None:
    torch.autograd.grad((out[0], out[2]), leaves)


def calls(shape: tuple[int, ...]) -> dict[str, Callable]:
    """Each step as a function without arguments."""
    from eekd.ops.backend import namespace

    student, z, y, scores = inputs(*shape)
    s, e = student.detach(), scores.detach()

    def kernel():
        options = 5.0, 0.5, False, False, 1, -100, True, True
        return namespace(s.device).ensemble_kd_fwd(s, [z], y, e, None, None, *options)

    loss, attention_loss, weights, d_student, d_scores = kernel()
    ready = loss, weights, attention_loss, d_student, d_scores
    return {
        "kernel": kernel,
        "checked": lambda: eekd.ensemble_kd(s, z, y, scores=e),
        "forward": lambda: eekd.ensemble_kd(student, z, y, scores=scores),
        "step": lambda: backward(eekd.ensemble_kd(student, z, y, scores=scores), student, scores),
        "nothing": lambda: backward(_Nothing.apply(student, scores, *ready), student, scores),
    }


def microseconds(call: Callable, count: int) -> float:
    """Median of a call, those that warm up left out."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[count // 5 :]) * 1e6


def step_of(folder: Path, shape: tuple[int, ...]) -> float:
    """Microseconds of a training step of the eekd in a folder, in a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, "--step", *map(str, shape)],
        check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    return float(found.stdout)


def commit_of(folder: Path) -> str:
    found = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a built checkout of an older commit")
    parser.add_argument("--step", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        student, z, y, scores = inputs(*args.step)
        print(
            microseconds(
                lambda: backward(eekd.ensemble_kd(student, z, y, scores=scores), student, scores), ROUNDS * CALLS
            )
        )
        return
    from eekd.info import environment

    way, command = [], ["python", "results/overhead.py"]
    for shape in SHAPES:
        each, times = calls(shape), {name: [] for name in STEPS}
        for _ in range(ROUNDS):
            for name, call in each.items():
                times[name].append(microseconds(call, CALLS))
        way.append({"shape": shape, "us": {name: median(found) for name, found in times.items()}})
        if args.before:
            folders = args.before.resolve(), Path(__file__).resolve().parent.parent
            turns = [[step_of(folder, shape) for folder in folders] for _ in range(5)]
            before, now = (median(times) for times in zip(*turns, strict=True))
            way[-1]["processes"] = {"before": before, "now": now, "commit": commit_of(args.before)}
        print(way[-1])
    if args.before:
        command += ["--before", commit_of(args.before)[:9]]
    record = {"command": command, "environment": environment(), "titles": STEPS, "way": way}
    Path(__file__).with_name("overhead-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
