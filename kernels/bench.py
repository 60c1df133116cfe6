"""Microbenchmarks: `python -m eekd.kernels.bench [--op OP] [--quick | --full] [--json FILE]` checks, then times an op.

Every contender computes the same, in fp32 as the op does: M snapshots fused by attention scores, α CE + (1 - α) τ² KL,
the label objective of the attention, and the gradients of student logits and scores, forward + backward. Nothing is
timed before its result agrees with the fp64 reference. Contenders take turns within one run; the figure is the median.

  native, triton  the fused op, on every backend that the device has
  eager           the formulas in plain PyTorch, the fusion as an einsum (on a GPU also as a broadcast sum: the better)
  compile         torch.compile of them (the fusion as a sum, faster there), the better of its default mode and
                  max-autotune-no-cudagraphs
  liger           eager with Liger's KL, fed the mixed teacher, mixing included; on a GPU, where it is installed
  copy            a device copy that moves as many bytes as M + 2 accesses: the roofline. For sparse_ensemble_kd, whose
                  shapes are B,M,C,K and whose baselines get the same K classes and tails, as 2 + M K / C

On a GPU inputs rotate through three times the L2 cache, events are recorded while the host is ahead, and shapes below
50 µs are also timed in a captured graph (graph_us). There a backend's row also has its forward alone (forward_us), what
the backward adds to it (backward_us), the host's time (host_us), the time of each kernel (kernels_us), and the launch
that was chosen, if Triton's. percent_of_floor is of M + 2 accesses, whatever the op read and wrote.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean

from eekd import command
from eekd.kernels.options import LETTERS, PARSER, parse

if __name__ == "__main__":
    command.start()
    parse(command.arguments(None))  # a mistake, or a call for help, ends here, before torch is imported

import torch

from eekd import _C  # pyright: ignore[reportAttributeAccessIssue]
from eekd.info import environment
from eekd.kernels.contenders import (
    BACKENDS,
    BASELINES,
    ERROR_LIMIT,
    Case,
    Sparse,
    contenders,
    error,
    exact,
    gradients,
    inputs,
    using,
)
from eekd.kernels.timing import events, in_graph, microseconds, peak_extra_bytes, rotation, wall

SETTLING = 2e-3  # seconds of a turn before it counts: caches and spinning threads are still of the contender before
CPU_SHAPES = [(96, 5, 10), (128, 5, 100), (160, 4, 100), (256, 5, 1000), (768, 6, 1000), (64, 5, 32000),
              (16, 4, 128256)]  # fmt: skip
GPU_SHAPES = [(128, 5, 100), (32768, 5, 1000), (32768, 5, 1001), (8192, 5, 4096), (1024, 5, 32000), (256, 5, 128256)]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

SPARSE_SHAPES = [(rows, 5, c, k) for rows, c in ((256, 1000), (64, 10000), (64, 32000), (16, 128256))
                 for k in (20, 50, 100)]  # times 32 on a GPU  # fmt: skip


def protocol() -> Iterable[Case]:
    """All C and M in bf16, at a gigabyte of traffic and at few rows; the other dtypes and the other layout at M = 5."""
    for classes, snapshots in itertools.product((10, 100, 1000, 1001, 4096, 10000, 32000, 50257, 128256), (1, 2, 5, 8)):
        large = (2**29 // ((snapshots + 2) * classes), snapshots, classes)
        for fusion in ("probability", "logit"):
            yield from (Case(shape, "bfloat16", fusion) for shape in (large, (64, snapshots, classes)))
            if snapshots == 5:
                yield from (Case(large, dtype, fusion) for dtype in ("float16", "float32"))
                yield Case(large, "bfloat16", fusion, "BMC")


def measure(case: Case, device: torch.device, functions: dict[str, Callable], clock, seconds: float, seed: int) -> dict:
    """A row: each contender checked, then timed in turns by `wall` or `events`, `seconds` for each."""
    (rows, _, classes), fusion, dtype = case.shape[:3], case.fusion, getattr(torch, case.dtype)
    torch._dynamo.reset()
    sets = inputs(case, device, seed)
    one, random = torch.ones((), device=device), torch.rand((), device=device) + 0.5
    truth = exact(sets[0], fusion)
    scale = rows if dtype == torch.float16 else 1  # like a loss scaler's, for gradients of a mean underflow
    result, calls = {}, {}  # calls: of each contender, one for each set
    for name, function in functions.items():
        result[name] = r = {}
        try:
            with using(name):
                upstreams = scale * one, scale * random
                errors = [error(gradients(function, sets[0], fusion, g), truth, g) for g in upstreams]
            r["error"] = max(errors)
            if all(e < ERROR_LIMIT[case.dtype] for e in errors):
                calls[name] = [partial(gradients, function, tensors, fusion) for tensors in sets]
            else:
                r["failed"] = f"is wrong by a relative error of {r['error']:.1e}"
        except Exception as failure:  # out of memory, or a compiler's: the others are still worth timing
            r["failed"] = " ".join(f"raises {type(failure).__name__}: {failure}".split())[:300]
    half = torch.randn(int(least(case) * rows * classes) // 2, device=device, dtype=dtype)
    pairs = [(torch.empty_like(half), half.clone()) for _ in range(rotation(2 * half.nbytes, device))]
    calls["copy"] = [lambda upstream, to=to, source=source: to.copy_(source) for to, source in pairs]
    result["copy"] = {}

    each_turn = max(1, min(10, (2**24 if clock is events else 2**21) // math.prod(case.shape[:3])))
    rotating = {name: itertools.cycle(calls[name]) for name in calls}

    def turn(name, upstream=one, n=each_turn):
        return [partial(call, upstream=upstream) for call in itertools.islice(rotating[name], n)]

    for name in calls:  # warm-up
        with using(name):
            stop = time.perf_counter() + 0.1
            while time.perf_counter() < stop:
                clock(turn(name))
            result[name]["peak_bytes"] = peak_extra_bytes(*turn(name, n=1), device)
    times = {name: ([], []) for name in calls}
    stop = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < stop or len(times["copy"][0]) < 10 * each_turn:
        for name in calls:  # taking turns, so that what else the machine does meets all alike
            with using(name):
                start = time.perf_counter()
                while time.perf_counter() < start + SETTLING:
                    clock(turn(name, n=1))
                for upstream, taken in zip((one, random), times[name], strict=True):
                    taken += clock(turn(name, upstream))
    for name in calls:
        result[name] |= microseconds(times[name][0]) | {"us_random": microseconds(times[name][1])["us"]}
    for name in [name for name in calls if name in BACKENDS] if device.type == "cuda" else ():
        with using(name):
            forwards = [partial(functions[name], *tensors, fusion) for tensors in sets]
            forward_us = microseconds(events(forwards * math.ceil(20 / len(forwards))))["us"]
            result[name] |= {"forward_us": forward_us, "backward_us": result[name]["us"] - forward_us}
            result[name] |= {"host_us": microseconds(wall(turn(name)))["us"], "kernels_us": by_kernel(turn(name))}
        if name == "triton":
            result[name]["launch"] = chosen(sets[0], fusion)
    small = clock is events and any(result[name]["us"] < 50 for name in calls if name in BACKENDS)
    for name in calls if small else ():
        with using(name):
            result[name]["host_us"] = microseconds(wall(turn(name)))["us"]  # the GPU is idle, its queue empty
            if name != "liger":  # whose backward waits for the GPU, which a capture forbids
                try:
                    result[name]["graph_us"] = in_graph(turn(name, n=len(calls[name]))) * 1e6
                except RuntimeError as failure:
                    result[name]["graph_failed"] = str(failure)
    return row_of(case, device, result)


def by_kernel(calls: list[Callable]) -> dict[str, float]:
    """GPU microseconds per call of each kernel, by name, as torch's profiler has them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call()
        torch.cuda.synchronize()
    found = {event.key: event.device_time_total / len(calls) for event in profile.key_averages()}
    return {name: us for name, us in sorted(found.items(), key=lambda item: -item[1]) if us > 0}


def chosen(tensors, fusion: str) -> dict | None:
    """The launch of the dense Triton op for these tensors."""
    from eekd.kernels.launch import architecture, launch_for

    student, snapshots, *_ = tensors
    if isinstance(snapshots, Sparse):
        return None
    again = fusion == "logit"
    return launch_for(
        student.shape[1], len(snapshots), student.element_size(), architecture(student.device), again
    )._asdict()


def least(case: Case) -> float:
    """Accesses of B·C elements that the op cannot do without."""
    _, m, classes, *k = case.shape
    return 2 + m * k[0] / classes if k else m + 2


def accesses(backend: str, case: Case, device: torch.device) -> float:
    """Reads and writes of B·C elements by forward + backward at an upstream gradient of 1, as the kernels document.

    M + 1 reads and a write where a row stays on chip (on a CPU: in L2; in CUDA: in the shared memory of a block, from
    sm_90 of a cluster of 8), twice the reads where it is streamed. Any other upstream gradient adds 2. The roofline's
    copy moves M + 2.
    """
    _, m, classes, *k = case.shape
    if k:  # where the student's row is read again, from the L2 cache as a rule, this says too little
        return least(case)
    on_chip = True
    if backend == "triton":
        from eekd.kernels.launch import architecture, launch_for

        again = case.fusion == "logit"
        on_chip = launch_for(classes, m, getattr(torch, case.dtype).itemsize, architecture(device), again).on_chip
    elif backend == "native" and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        blocks = 8 if properties.major >= 9 else 1
        lines = (m + 1) * classes * getattr(torch, case.dtype).itemsize
        on_chip = lines < blocks * (properties.shared_memory_per_block_optin - 8192)  # the rest holds sums
    return m + 2 if on_chip else 2 * m + 3


def row_of(case: Case, device: torch.device, result: dict[str, dict]) -> dict:
    """The record of a case, with what follows from the times: bandwidth by own traffic, ratios to the baselines."""
    us = {name: r["us"] for name, r in result.items() if "us" in r}
    best = {b: min((us[name] for name in us if name.startswith(b)), default=None) for b in BASELINES}
    megabytes = case.shape[0] * case.shape[2] * getattr(torch, case.dtype).itemsize / 1e6
    for name in us.keys() & {*BACKENDS, "copy"}:
        traffic = accesses(name, case, device)
        result[name] |= {"accesses": traffic, "gb_s": traffic * megabytes / us[name] * 1e3}
        result[name]["percent_of_copy"] = 100 * traffic / least(case) * us["copy"] / us[name]
        result[name]["percent_of_floor"] = 100 * us["copy"] / us[name]
        if name in BACKENDS:
            result[name] |= {f"vs_{b}": best[b] / us[name] for b in BASELINES if best[b]}
    backends = [name for name in BACKENDS if name in us]
    key = "graph_us" if all("graph_us" in result[name] for name in backends) else "us"
    fastest = min(backends, key=lambda name: result[name][key], default=None)
    return case._asdict() | {"best_us": best, "fastest": fastest, "contenders": result}


def summary_of(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Per backend: at how many shapes it is the fastest, geometric mean and least of its ratios."""
    summary = {}
    for name, ratio in itertools.product(BACKENDS, [f"vs_{baseline}" for baseline in BASELINES]):
        figures = [row["contenders"][name][ratio] for row in rows if ratio in row["contenders"].get(name, ())]
        if figures:
            of = summary.setdefault(name, {"fastest": sum(row["fastest"] == name for row in rows)})
            of |= {f"geomean_{ratio}": math.exp(mean(map(math.log, figures))), f"least_{ratio}": min(figures)}
    return summary


def line_of(row: dict) -> str:
    """What is printed of a row; the JSON has everything."""
    r, case = row["contenders"], f"{str(tuple(row['shape'])):>20} {row['dtype']:>8} {row['layout']} {row['fusion']:>11}"
    best = r.get(row["fastest"], {})
    us = [r.get(name, {}).get("us") for name in BACKENDS] + [*row["best_us"].values(), r["copy"]["us"]]
    ratios = [best.get(name) for name in ("vs_eager", "vs_compile", "vs_liger", "percent_of_floor")]
    line = case + "".join(f" {'' if x is None else f'{x:.0f}':>8}" for x in us)
    line += "".join(f" {'' if x is None else f'{x:.1f}':>8}" for x in ratios)
    line += f" {row['fastest']:>8} {best['error']:.0e}" if best else ""
    failed = [f"{name} {x['failed']}, not timed at {' '.join(case.split())}" for name, x in r.items() if "failed" in x]
    return "\n".join([line, *failed])


def cases(args, cuda: bool) -> list[Case]:
    """What the arguments ask for."""
    dtypes = args.dtype or ["bfloat16" if cuda else "float32"]
    if args.op == "sparse_ensemble_kd":
        shapes = args.shape or ([(16, 3, 1000, 20)] if args.quick else SPARSE_SHAPES)
        if shapes is SPARSE_SHAPES and cuda:
            shapes = [(32 * rows, *rest) for rows, *rest in shapes]
        return [Case(s, dtype, fusion) for s in shapes for fusion in ("probability", "logit") for dtype in dtypes]
    if args.full:
        return list(protocol())
    shapes = args.shape or ([(32, 5, 10), (16, 3, 1000)] if args.quick else GPU_SHAPES if cuda else CPU_SHAPES)
    if shapes is GPU_SHAPES:  # two minutes of them, most of it torch.compile's
        few = [*((s, "probability") for s in shapes), *((s, "logit") for s in shapes[1::3])]
        return [Case(s, dtype, fusion) for s, fusion in few for dtype in dtypes]
    return [Case(s, dtype, fusion) for s in shapes for fusion in ("probability", "logit") for dtype in dtypes]


def limit_to_avx2(argv: list[str]) -> None:
    """Starts Python again where torch has not been told yet, then limits eekd and torch.compile as well."""
    if any(os.environ.get(name) != value for name, value in AVX2.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "eekd.kernels.bench", *argv], os.environ | AVX2)
    from torch._inductor import config

    config.cpp.simdlen = 256
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or not _C.set_cpu_capability("avx2"):
        raise SystemExit("--avx2: torch or eekd has no AVX2 here")


def main(argv: list[str] | None = None) -> None:
    argv = command.arguments(argv)
    args, gpu = parse(argv), torch.cuda.is_available()
    args.device = args.device or ("cuda" if gpu else "cpu")
    device, cuda, letters = torch.device(args.device), args.device == "cuda", LETTERS[args.op]
    if cuda and not gpu:
        PARSER.error("--device cuda: no CUDA device was found")
    if args.avx2:
        limit_to_avx2(argv)
    seconds = args.seconds or (0.05 if args.quick else 0.5 if cuda else 1.0)
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)

    functions, missing = contenders(
        cuda, ["default", "max-autotune-no-cudagraphs"][: 1 if args.quick else 2], args.contender
    )
    typed = ["python", "-m", "eekd.kernels.bench", *argv]
    record = {"op": args.op, "command": typed, "seed": args.seed, "threads": args.threads, "device": args.device}
    record |= {"environment": environment(), "load": os.getloadavg(), "missing": missing, "rows": []}
    if cuda:
        record["device"] = torch.cuda.get_device_name()
        record["driver"] = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    print(*(f"{name}: {why}" for name, why in missing.items()), "forward + backward, µs (median)", sep="\n")
    names = [*BACKENDS, *BASELINES, "copy", "/eager", "/compile", "/liger", "% floor", "fastest"]
    first = f"({letters.replace(',', ', ')})"
    print(f"{first:>20}    dtype mem      fusion{''.join(f' {name:>8}' for name in names)} error")
    for case in cases(args, cuda):
        try:
            record["rows"].append(measure(case, device, functions, events if cuda else wall, seconds, args.seed))
        except torch.OutOfMemoryError as failure:  # of the inputs
            record["missing"][str(case)] = str(failure)
            print(f"{case} does not fit: {failure}")
            continue
        record["summary"] = summary_of(record["rows"])
        print(line_of(record["rows"][-1]), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    for name, figures in record.get("summary", {}).items():
        print(name, "  ".join(f"{figure} {value:.3g}" for figure, value in figures.items()))
    failed = sum("failed" in row["contenders"].get(name, {}) for row in record["rows"] for name in BACKENDS)
    if failed:
        raise SystemExit(f"eekd failed {failed} times")


if __name__ == "__main__":
    command.run(main)
