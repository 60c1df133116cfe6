"""The way to the kernel, step by step, at shapes where it takes longer than the kernel: results/overhead-cpu.json.

python results/overhead.py

Each row holds the step before it. What autograd itself takes is that of a function that computes nothing.
"""

import json
from pathlib import Path

import torch

import eekd
from eekd.info import environment
from eekd.kernels.timing import microseconds, wall

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
    raw = torch.ops.eekd.ensemble_kd_fwd
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


def main() -> None:
    steps = []
    for shape in SHAPES:
        each, times = calls(*shape), {name: [] for name in STEPS}
        for _ in range(ROUNDS):
            for name, call in each.items():
                times[name] += wall([call] * CALLS)[CALLS // 5 :]
        steps.append({"shape": shape, **{name: microseconds(found) for name, found in times.items()}})
        print({name: round(steps[-1][name]["us"], 1) for name in STEPS}, shape)
    record = {"command": ["python", "results/overhead.py"], "environment": environment(), "titles": STEPS, "way": steps}
    Path(__file__).with_name("overhead-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
