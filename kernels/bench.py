"""Microbenchmarks: `python -m eekd.kernels.bench [--quick] [--json FILE]` checks each op, then times it.

Every contender computes the same: M snapshots fused by attention scores, α CE + (1 - α) τ² KL, the label objective of
the attention, and the gradients of student logits and scores, forward + backward. Nothing is timed before its result
agrees with the fp64 reference. Contenders take turns within one run; the figure is the median.

  eekd      the fused op
  eager     the same formulas in plain PyTorch (the fusion as an einsum, faster here than a broadcast sum)
  compile   torch.compile of them (the fusion as a sum, faster there), the better of its default mode and
            max-autotune-no-cudagraphs
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import eekd
from eekd import reference
from eekd.info import environment

SHAPES = [(128, 5, 10), (128, 5, 100), (256, 5, 1000), (1024, 5, 1000), (64, 5, 32000), (16, 4, 128256)]
TEMPERATURE, ALPHA = 5.0, 0.5


def fused(student, snapshots, labels, scores, fusion):
    out = eekd.ensemble_kd(student, snapshots, labels, scores=scores, fusion=fusion)
    return out.loss + out.attention_loss


def plain(student, snapshots, labels, scores, fusion, einsum=True):
    def mix(x):
        if einsum:
            return torch.einsum("bm,mbc->bc", weights, x)
        return (weights.t()[:, :, None] * x).sum(0)

    weights = scores.softmax(1)
    if fusion == "logit":
        log_p = F.log_softmax(mix(snapshots) / TEMPERATURE, 1)
        p = log_p.detach().exp()
        attention_loss = F.nll_loss(log_p, labels)
    else:
        p = mix(F.softmax(snapshots / TEMPERATURE, 2))
        attention_loss = -p.gather(1, labels[:, None]).log().mean()
        p = p.detach()
    kl = F.kl_div(F.log_softmax(student / TEMPERATURE, 1), p, reduction="batchmean")
    return ALPHA * F.cross_entropy(student, labels) + (1 - ALPHA) * TEMPERATURE**2 * kl + attention_loss


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, snapshots, classes = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale):
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    labels = torch.randint(classes, (rows,), generator=generator)
    student = normal(rows, classes, scale=2).requires_grad_()
    scores = normal(rows, snapshots, scale=1).float().requires_grad_()
    return student, normal(snapshots, rows, classes, scale=3), labels, scores


def error(run: Callable[[], Tensor], tensors, fusion: str) -> float:
    """The largest difference from the fp64 reference among loss and gradients, each relative to its largest value."""
    student, snapshots, labels, scores = tensors
    leaves = [x.detach().double().requires_grad_() for x in (student, scores)]
    loss, _, attention_loss = reference.ensemble_kd(
        leaves[0], snapshots.double(), labels, scores=leaves[1], fusion=fusion
    )
    loss = loss + attention_loss
    truth = [loss, *torch.autograd.grad(loss, leaves)]
    got = run()
    pairs = zip([got, *torch.autograd.grad(got, (student, scores))], truth, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def peak_extra_bytes(step: Callable[[], object]) -> int | None:
    """The highest resident memory during forward + backward, above what was resident before; Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def quantiles(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    return {name: times[int(q * (len(times) - 1))] * 1e6 for name, q in (("us", 0.5), ("p20", 0.2), ("p80", 0.8))}


def measure(shape, dtype, fusion, modes, seconds, seed) -> dict:
    tensors = inputs(shape, dtype, seed)
    leaves = tensors[0], tensors[3]
    torch._dynamo.reset()
    functions = {"eekd": fused, "eager": plain}
    functions |= {
        f"compile:{mode}": torch.compile(plain, mode=None if mode == "default" else mode, dynamic=False)
        for mode in modes
    }

    def runner(name, function):
        extra = {"einsum": False} if name.startswith("compile") else {}
        return lambda: function(*tensors, fusion, **extra)

    runs = {name: runner(name, function) for name, function in functions.items()}
    row = {"shape": shape, "fusion": fusion, "dtype": str(dtype).removeprefix("torch."), "error": {}, "peak_bytes": {}}
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    for name, run in runs.items():
        row["error"][name] = error(run, tensors, fusion)
        if not row["error"][name] < limit:
            raise SystemExit(f"{name} is wrong at {shape} {fusion}: relative error {row['error'][name]:.1e}, not timed")

    def step(name):  # not .backward(): in training the logits are no leaves, and nothing copies their gradient
        torch.autograd.grad(runs[name](), leaves)

    times = {name: [] for name in runs}
    stop = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < stop or len(times["eekd"]) < 5:
        for name in runs:  # taking turns, so that what else the machine does meets all alike
            for _ in range(max(1, min(50, 2**21 // math.prod(shape)))):
                start = time.perf_counter()
                step(name)
                times[name].append(time.perf_counter() - start)
    warm = {name: values[len(values) // 10 :] for name, values in times.items()}
    row["times"] = {name: quantiles(values) for name, values in warm.items()}
    for name in ("eekd", "eager"):
        row["peak_bytes"][name] = peak_extra_bytes(lambda name=name: step(name))
    compiled = min(row["times"][name]["us"] for name in runs if name.startswith("compile"))
    row["vs_eager"] = row["times"]["eager"]["us"] / row["times"]["eekd"]["us"]
    row["vs_compile"] = compiled / row["times"]["eekd"]["us"]
    return row


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def print_row(row: dict) -> None:
    times = row["times"]
    compiled = min(t["us"] for name, t in times.items() if name.startswith("compile"))
    print(
        f"{str(tuple(row['shape'])):>16} {row['fusion']:>11}  {times['eekd']['us']:9.0f} {times['eager']['us']:9.0f} "
        f"{compiled:9.0f}  {row['vs_eager']:6.1f}x {row['vs_compile']:6.1f}x  {row['error']['eekd']:.0e}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eekd.kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="?", default="ensemble_kd", choices=["ensemble_kd"])
    parser.add_argument("--shape", action="append", metavar="B,M,C", help="repeatable; default: the protocol's six")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="two small shapes, one mode of torch.compile: a smoke test"
    )
    parser.add_argument("--json", type=Path, help="save the figures here")
    args = parser.parse_args(argv)
    try:
        shapes = [tuple(int(n) for n in s.split(",")) for s in args.shape] if args.shape else SHAPES
        if any(len(s) != 3 or min(s) < 1 for s in shapes):
            raise ValueError
    except ValueError:
        parser.error(f"--shape must be B,M,C in positive numbers, got {' '.join(args.shape)}")
    modes = ["default", "max-autotune-no-cudagraphs"]
    if args.quick:
        shapes, modes, args.seconds = [(32, 5, 10), (16, 3, 1000)], modes[:1], 0.05
    torch.set_num_threads(args.threads)

    print("forward + backward, µs (median)")
    names = f"{'eekd':>9} {'eager':>9} {'compile':>9}  {'/eager':>7} {'/compile':>7}"
    print(f"{'(B, M, C)':>16} {'fusion':>11}  {names}  error")
    rows = []
    for shape in shapes:
        for fusion in ("probability", "logit"):
            rows.append(measure(shape, getattr(torch, args.dtype), fusion, modes, args.seconds, args.seed))
            print_row(rows[-1])
    summary = {
        "geomean_vs_eager": geometric_mean([row["vs_eager"] for row in rows]),
        "geomean_vs_compile": geometric_mean([row["vs_compile"] for row in rows]),
        "least_vs_compile": min(row["vs_compile"] for row in rows),
    }
    print("  ".join(f"{name} {value:.2f}" for name, value in summary.items()))
    if args.json:
        record = {"op": args.op, "command": ["python", "-m", "eekd.kernels.bench", *(argv or sys.argv[1:])]}
        record |= {"seed": args.seed, "threads": args.threads, "environment": environment(), "summary": summary}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
