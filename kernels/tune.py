"""Rebuilds the frozen launch table of this GPU: `python -m eekd.kernels.tune`.

For every bucket of classes, snapshots, bytes per logit and fusion it compiles the launches that could be fast, in as
many processes as there are cores, runs each that can run, refuses one whose result is not the reference's, times the
fastest few once more, and writes the fastest to launch/<architecture>.json, which eekd.kernels.launch reads. A launch
that fails is counted with its reason and passed over. A bucket without an entry is launched by the rule there.
"""

import argparse
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton import next_power_of_2

from eekd.info import environment
from eekd.kernels import ensemble_kd, launch
from eekd.kernels.launch import Launch
from eekd.kernels.outputs import Call
from eekd.kernels.rows import SEPARATE
from eekd.ops import reference

CLASSES = [2**n for n in range(3, 19)]
SNAPSHOTS = (1, 2, 3, 4, 5, 8, 16)
DTYPES = ("bfloat16", "float32")  # fp16 has the bytes of bf16
BYTES = 3 * 2**27  # of logits, well beyond any cache
CHECKED = 8  # rows at either end that are compared with the reference
FUSIONS = ("probability", "logit")
FINALS = 4  # launches of a bucket that are timed once more
SHARED = 216 * 1024  # bytes of an SM for tiles on their way
REGISTERS = 65536  # of an SM


class Shape(NamedTuple):
    """What launches are measured on."""

    rows: int
    snapshots: int
    classes: int
    dtype: torch.dtype
    fusion: str

    @property
    def bucket(self) -> str:
        return launch.bucket(self.classes, self.snapshots, self.dtype.itemsize, self.fusion == "logit")


class Compiled(NamedTuple):
    """What came of compiling a launch; why it cannot run, or ""."""

    registers: int = 0
    spills: int = 0
    failure: str = ""


def candidates(classes: int, snapshots: int, itemsize: int, again: bool) -> list[Launch]:
    """The rule's launch first, then others with a sensible number of registers per thread and of bytes on their way.

    With few warps a row has few reductions across them; with many an SM has more loads and exponentials under way.
    """
    found = [launch.by_rule(classes, snapshots, itemsize, again)]
    whole = next_power_of_2(classes)
    if snapshots <= SEPARATE.value:
        column = launch.column_registers(snapshots, itemsize, again)
        lines = snapshots + 1
    else:
        column, lines = next_power_of_2(snapshots) + 3, next_power_of_2(snapshots) + 1
    vector = 16 // itemsize
    for warps, rows in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
        each = rows * whole / (32 * warps)  # columns of a thread
        if 4 <= each <= 64 and each * column <= 280 and (rows == 1 or whole <= 256 or rows * whole == 2048):
            found.append(Launch(rows, whole, True, warps, 1, None))
            held = min(each * column + 40, REGISTERS / (32 * warps))
            limits = (most for most in (200, 168, 128, 96) if 0.75 * held <= most < held)
            found += [Launch(rows, whole, True, warps, 1, most) for most in limits]
    for warps in (1, 2, 4, 8, 16):
        for most, many, stages in (
            (168, 1, 3),
            (128, 1, 2),
            (128, 1, 3),
            (128, 1, 4),
            (96, 1, 3),
            (255, 2, 2),
            (255, 2, 3),
            (168, 2, 3),
            (128, 1, 1),
            (96, 1, 1),
            (168, 2, 1),
        ):
            block = 32 * warps * vector * many
            fits = lines * block * itemsize * (stages - 1) <= SHARED // max(1, REGISTERS // (warps * 32 * most))
            fits = fits and (stages > 1 or whole * lines * itemsize <= 2**16)  # read again from the cache of an SM
            if block < whole and min(whole, 32768) <= 8192 * warps and warps * 32 * most <= REGISTERS and fits:
                found.append(Launch(1, block, False, warps, stages, most))
    return list(dict.fromkeys(found))


def planned(shape: Shape, cut: Launch, tensors: list):
    """The plan of a launch on student, snapshots, labels, scores and outputs."""
    student, logits, labels, scores, outputs = tensors
    options = 5.0, 0.5, shape.fusion == "logit", False, 0, -100, True, True
    call = Call(student, (logits,), labels, scores, None, None, *options)
    return ensemble_kd.plan(call, [*outputs, None, None], cut)


def arguments(planned, tensors: list) -> tuple:
    """Of the kernel, whose tensors these are."""
    *inputs, outputs = tensors
    return (*inputs, None, None, None, *outputs, None, None, *planned.numbers)


def made(shape: Shape, device: str) -> list:
    """Tensors of a call for reduction="none": student, snapshots, labels, scores, and outputs."""
    rows, snapshots, classes, dtype, _ = shape
    seed = torch.Generator("cpu" if device == "meta" else device).manual_seed(0)

    def normal(*size, scale):
        if device == "meta":
            return torch.empty(size, dtype=dtype, device=device)
        return (torch.randn(size, generator=seed, device=device) * scale).to(dtype)

    student, logits = normal(rows, classes, scale=2), normal(snapshots, rows, classes, scale=3)
    scores = normal(rows, snapshots, scale=1).float()
    labels = torch.arange(rows, device=device) * 7919 % classes
    outputs = [scores.new_empty(rows), scores.new_empty(rows), torch.empty_like(scores)]
    return [student, logits, labels, scores, [*outputs, torch.empty_like(student), torch.empty_like(scores)]]


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:120]


def compile_one(shape: Shape, cut: Launch) -> Compiled:
    """Compiles a launch into Triton's cache on disk, and loads it as launching it would."""
    try:
        tensors = made(shape, "meta")
        plan = planned(shape, cut, tensors)
        dtypes = [x.dtype if isinstance(x, torch.Tensor) else x for x in arguments(plan, tensors)]
        kernel = ensemble_kd.rows_kernel.warmup(*dtypes, grid=plan.grid, **plan.options)
        kernel._init_handles()
        return Compiled(kernel.n_regs, kernel.n_spills)
    except Exception as error:
        return Compiled(failure=first_line(error))


class Compilers:
    """Processes that compile at once; one that dies fails the launch that it was at and no other."""

    def __init__(self, count: int):
        self.threads, self.mine = ThreadPoolExecutor(count), threading.local()

    def submit(self, shape: Shape, cut: Launch) -> Future:
        return self.threads.submit(self._compile, shape, cut)

    def _compile(self, shape, cut):
        if getattr(self.mine, "process", None) is None:
            self.mine.process = ProcessPoolExecutor(1, get_context("spawn"))
        try:
            return self.mine.process.submit(compile_one, shape, cut).result()
        except BrokenProcessPool:
            self.mine.process = None
            return Compiled(failure="the compiler died")


class Bench:
    """A shape's tensors, and what the first and last rows' outputs must be."""

    def __init__(self, shape: Shape, device: str):
        self.shape, self.tensors = shape, made(shape, device)
        student, logits, labels, scores, _ = self.tensors
        self.ends = torch.arange(shape.rows, device=device).roll(CHECKED)[: 2 * CHECKED]
        leaves = student[self.ends].double().requires_grad_(), scores[self.ends].double().requires_grad_()
        out = reference.ensemble_kd(
            leaves[0],
            logits[:, self.ends].double(),
            labels[self.ends],
            scores=leaves[1],
            fusion=shape.fusion,
            reduction="none",
        )
        grads = torch.autograd.grad((out[0] + out[2]).sum(), leaves)
        self.truth = [out[0].detach(), out[2].detach(), out[1], *grads]

    def microseconds(self, cut: Launch, milliseconds: float = 5) -> float:
        """Of a launch; raises where its outputs are wrong."""
        plan, outputs = planned(self.shape, cut, self.tensors), self.tensors[-1]
        given = arguments(plan, self.tensors)

        def run():
            return ensemble_kd.rows_kernel[plan.grid](*given, **plan.options)

        for output in outputs:
            output.fill_(float("nan"))
        start = time.perf_counter()
        compiled = run()
        elapsed = time.perf_counter() - start
        for got, wanted in zip(outputs, self.truth, strict=True):
            error = (got[self.ends].double() - wanted).abs().max() / wanted.abs().max()
            if not error < (1e-4 if got.dtype == torch.float32 else 3e-2):
                raise ValueError("a wrong result")
        if compiled is None:  # in the interpreter
            return 1e6 * elapsed
        return 1e3 * triton.testing.do_bench_cudagraph(run, rep=milliseconds, return_mode="median")  # pyright: ignore


def timed(bench: Bench, cut: Launch, failures: Counter, **how) -> float | None:
    """Microseconds, or None, and the reason is counted."""
    try:
        return bench.microseconds(cut, **how)
    except Exception as error:
        failures[first_line(error)] += 1
        return None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eekd.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", metavar="M,C", help="only the bucket of this; repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this; repeatable")
    parser.add_argument("--fusion", action="append", choices=FUSIONS, help="only this; repeatable")
    parser.add_argument("--out", type=Path, help="folder of the table; default: the package's, none with --tiny")
    parser.add_argument("--tried", type=Path, help="write what every launch took to this file")
    parser.add_argument("--tiny", action="store_true", help="two small shapes; on cpu where TRITON_INTERPRET=1")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available() and not ensemble_kd.INTERPRETED
    if not gpu and not (args.tiny and ensemble_kd.INTERPRETED):
        parser.error("no GPU was found; TRITON_INTERPRET=1 with --tiny runs without one")
    device = "cuda" if gpu else "cpu"
    sizes = list(itertools.product(SNAPSHOTS, CLASSES)) if not args.tiny else [(2, 16), (3, 1024)]
    if args.shape:
        try:
            sizes = [tuple(int(n) for n in shape.split(",")) for shape in args.shape]
            if any(len(size) != 2 or min(size) < 1 for size in sizes):
                raise ValueError
        except ValueError:
            parser.error(f"--shape must be M,C in positive numbers, got {' '.join(args.shape)}")
    architecture = launch.architecture(torch.empty(0, device=device).device)
    folder = args.out or (None if args.tiny else launch.TABLES)
    path = folder and folder / f"{architecture}.json"
    launches = json.loads(path.read_text())["launches"] if path and path.is_file() else {}
    dtypes = [getattr(torch, name) for name in args.dtype or (DTYPES[:1] if args.tiny else DTYPES)]
    fusions = args.fusion or (FUSIONS[:1] if args.tiny else FUSIONS)

    compilers, todo = Compilers(os.cpu_count() or 1), {}
    for (snapshots, classes), dtype, fusion in itertools.product(sizes, dtypes, fusions):
        rows = BYTES // ((snapshots + 1) * classes * dtype.itemsize)
        rows = max(2 * CHECKED, min(65536, next_power_of_2(rows + 1) // 2))
        shape = Shape(2 * CHECKED if args.tiny else rows, snapshots, classes, dtype, fusion)
        found = candidates(classes, snapshots, dtype.itemsize, fusion == "logit")
        if args.tiny:
            found = [found[0], next((cut for cut in found if not cut.on_chip), found[-1])]
        todo[shape] = {cut: compilers.submit(shape, cut) if gpu else None for cut in found}

    times, failures, tried, start = {}, {}, {}, time.monotonic()
    print(f"{sum(map(len, todo.values()))} launches of {len(todo)} buckets", flush=True)
    print(f"{'bucket':>50} {'rule, µs':>9} {'best':>9}  registers, launch", flush=True)

    def save():
        if args.tried:
            args.tried.parent.mkdir(parents=True, exist_ok=True)
            args.tried.write_text(json.dumps(tried, indent=1) + "\n")
        if path:
            folder.mkdir(parents=True, exist_ok=True)
            record = {"command": ["python", "-m", "eekd.kernels.tune", *(argv or sys.argv[1:])]}
            record |= {"environment": environment(), "launches": dict(sorted(launches.items()))}
            path.write_text(json.dumps(record, indent=1) + "\n")

    def conclude(shape, rule):
        took, which = times[shape], todo[shape]
        if not took:
            print(f"{shape.bucket:>50} {'-':>9} {'-':>9}  no launch ran", flush=True)
            return
        best = min(took, key=took.get)
        launches[shape.bucket] = {
            "launch": best._asdict(), "us": took[best], "us_by_rule": took.get(rule), "tried": len(which)
        }  # fmt: skip
        registers = which[best].result().registers if gpu else "-"
        by_rule = f"{took[rule]:.1f}" if rule in took else "-"
        print(f"{shape.bucket:>50} {by_rule:>9} {took[best]:9.1f}  {registers}, {tuple(best)}", flush=True)
        save()  # after each bucket, so that what was measured is not lost

    def benches():
        """A bench at a time, whose tensors are freed before the next."""
        for shape in todo:
            yield shape, Bench(shape, device)

    for shape, bench in benches():
        failures[shape], times[shape], tried[shape.bucket] = Counter(), {}, []
        for cut, compiling in todo[shape].items():
            compiled = compiling.result() if compiling else Compiled()
            if compiled.failure:
                failures[shape][compiled.failure] += 1
                took = None
            else:
                took = timed(bench, cut, failures[shape])
                times[shape] |= {} if took is None else {cut: took}
            tried[shape.bucket].append([tuple(cut), took, *compiled])
        conclude(shape, next(iter(todo[shape])))
        for reason, count in failures[shape].items():
            print(f"{'':>50} {count} passed over: {reason}", flush=True)
    print(f"all timed once after {time.monotonic() - start:.0f} s; the best {FINALS} of each again", flush=True)
    for shape, bench in benches() if gpu else ():  # nothing else compiles any more
        rule = next(iter(todo[shape]))
        finals = {*sorted(times[shape], key=times[shape].get)[:FINALS], *({rule} & times[shape].keys())}
        again = {cut: timed(bench, cut, failures[shape], milliseconds=20) for cut in finals}
        times[shape] = {cut: took for cut, took in again.items() if took is not None}
        tried[shape.bucket].append([[tuple(cut), took] for cut, took in again.items()])
        conclude(shape, rule)


if __name__ == "__main__":
    main()
