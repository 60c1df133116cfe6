"""The way to the kernel, step by step, at shapes where it takes longer than the kernel: results/overhead-cpu.json.

python results/overhead.py [--before FOLDER]    # a built checkout of an older commit, whose steps take turns with ours

Each row holds the step before it. What autograd itself takes is that of a function that computes nothing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import eekd
from eekd.info import environment
from eekd.kernels.timing import microseconds, wall
from eekd.ops.backend import namespace

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


def calls(rows: int, snapshots: int, classes: int) -> dict:
    """Each step as a function without arguments."""
    torch.manual_seed(0)
    student = torch.randn(rows, classes, requires_grad=True)
    z, y = torch.randn(snapshots, rows, classes), torch.randint(classes, (rows,))
    scores = torch.randn(rows, snapshots, requires_grad=True)
    fixed = student.detach(), scores.detach()
    raw = namespace(student.device).ensemble_kd_fwd
    loss, attention_loss, weights, d_student, d_scores = raw(
        fixed[0], [z], y, fixed[1], None, None, 5.0, 0.5, False, False, 1, -100, True, True
    )
    ready = loss, weights, attention_loss, d_student, d_scores

    def kernel():
        with torch.no_grad():
            raw(fixed[0], [z], y, fixed[1], None, None, 5.0, 0.5, False, False, 1, -100, True, True)

    def checked():
        with torch.no_grad():
            eekd.ensemble_kd(fixed[0], z, y, scores=fixed[1])

    def forward():
        return eekd.ensemble_kd(student, z, y, scores=scores)

    def backward(out):
        torch.autograd.grad((out[0], out[2]), (student, scores))

    return {
        "kernel": kernel, "checked": checked, "forward": forward, "step": lambda: backward(forward()),
        "nothing": lambda: backward(_Nothing.apply(student, scores, *ready)),
    }  # fmt: skip


def commit_of(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def step_of(folder: Path, shape: tuple[int, ...]) -> float:
    """Microseconds of a training step of the eekd in a folder, in a process of its own."""
    code = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import torch, eekd, time
assert eekd.__file__.startswith({str(folder)!r})
rows, snapshots, classes = {shape}
torch.manual_seed(0)
student, scores = torch.randn(rows, classes, requires_grad=True), torch.randn(rows, snapshots, requires_grad=True)
z, y, times = torch.randn(snapshots, rows, classes), torch.randint(classes, (rows,)), []
for _ in range({ROUNDS * CALLS}):
    start = time.perf_counter()
    out = eekd.ensemble_kd(student, z, y, scores=scores)
    torch.autograd.grad((out[0], out[2]), (student, scores))
    times.append(time.perf_counter() - start)
print(sorted(times[len(times) // 5 :])[len(times) * 2 // 5] * 1e6)
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a built checkout of an older commit")
    before = parser.parse_args().before
    steps = []
    for shape in SHAPES:
        each, times = calls(*shape), {name: [] for name in STEPS}
        for _ in range(ROUNDS):
            for name, call in each.items():
                times[name] += wall([call] * CALLS)[CALLS // 5 :]
        steps.append({"shape": shape, **{name: microseconds(found) for name, found in times.items()}})
        if before:
            ours = Path(__file__).resolve().parent.parent
            turns = [(step_of(before.resolve(), shape), step_of(ours, shape)) for _ in range(5)]
            old, new = (sorted(times)[2] for times in zip(*turns, strict=True))
            steps[-1]["processes"] = {"before": old, "now": new, "commit": commit_of(before)}
        print({name: round(steps[-1][name]["us"], 1) for name in STEPS}, shape)
    command = ["python", "results/overhead.py", *(["--before", commit_of(before)[:9]] if before else [])]
    record = {"command": command, "environment": environment(), "titles": STEPS, "way": steps}
    Path(__file__).with_name("overhead-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
