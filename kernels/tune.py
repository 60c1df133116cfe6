"""Rebuilds the frozen launch table of this GPU: `python -m eekd.kernels.tune`.

For every bucket of classes, snapshots and bytes per logit it runs the launches that could be fast, refuses to time one
whose result is not the reference's, and writes the fastest to launch/<architecture>.json, which eekd.kernels.common
reads. A bucket without an entry is launched by the rule there. Sum and count kernels have nothing to tune.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
import triton
from triton import next_power_of_2

from eekd import reference
from eekd.info import environment
from eekd.kernels import common, ensemble_kd
from eekd.kernels.common import Launch

CLASSES = [2**n for n in range(3, 19)]
SNAPSHOTS = (1, 2, 4, 8, 16)
DTYPES = ("bfloat16", "float32")  # fp16 has the bytes of bf16
BYTES = 2**28  # of logits, well beyond any cache
CHECKED = 8  # rows at either end that are compared with the reference
FUSIONS = ("probability", "logit")


def candidates(classes: int, snapshots: int, itemsize: int) -> list[Launch]:
    """The rule's launch first, then others with a sensible number of registers per thread and of bytes on their way."""
    lines, whole = next_power_of_2(snapshots) + 3, next_power_of_2(classes)
    found = [common.by_rule(classes, snapshots, itemsize)]
    for warps in (1, 2, 4, 8, 16):
        for rows in (1, 2, 4, 8, 16):
            if 16 <= rows * lines * whole / (32 * warps) <= 160 and (rows == 1 or whole <= 256):
                found.append(Launch(rows, whole, True, warps, 1, None))
        for block, stages in itertools.product((512, 1024, 2048, 4096, 8192), (1, 2, 3, 4)):
            fits = (lines - 2) * block * itemsize * (stages - 1) <= common.READ_AHEAD
            if block < whole and fits and 16 <= lines * block / (32 * warps) <= 160:
                limits = (None, 255 if warps < 16 else 128)
                found += [Launch(1, block, False, warps, stages, maxnreg) for maxnreg in limits]
    return list(dict.fromkeys(found))


def call(rows: int, snapshots: int, classes: int, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    """Tensors of a call, for reduction="none", and what the first and last rows' outputs must be, by fusion."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size, scale):
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    student, logits = normal(rows, classes, scale=2), normal(snapshots, rows, classes, scale=3)
    scores = normal(rows, snapshots, scale=1).float()
    labels = torch.randint(classes, (rows,), generator=generator, device=device)
    ends = torch.arange(rows, device=device).roll(CHECKED)[: 2 * CHECKED]
    truth = {}
    for fusion in FUSIONS:
        leaves = student[ends].double().requires_grad_(), scores[ends].double().requires_grad_()
        out = reference.ensemble_kd(
            leaves[0], logits[:, ends].double(), labels[ends], scores=leaves[1], fusion=fusion, reduction="none"
        )
        grads = torch.autograd.grad((out[0] + out[2]).sum(), leaves)
        truth[fusion] = [out[0].detach(), out[2].detach(), out[1], *grads]
    outputs = [scores.new_empty(rows), scores.new_empty(rows), torch.empty_like(scores)]
    outputs += [torch.empty_like(student), torch.empty_like(scores)]
    return (student, logits, labels, scores, outputs, ends), truth


def microseconds(cut: Launch, tensors: tuple, truth: dict) -> float | None:
    """Of one launch for each fusion; None where the GPU lacks the registers or the shared memory."""
    student, logits, labels, scores, outputs, ends = tensors
    total = 0.0
    for fusion in FUSIONS:
        planned = ensemble_kd.plan(
            student, (logits,), labels, scores, None, None, 5.0, 0.5, fusion == "logit", False, False, -100,
            outputs[0], *outputs[3:], None, cut,
        )  # fmt: skip
        arguments = (student, logits, labels, scores, None, None, None, *outputs, None, None, *planned.numbers)

        def run(planned=planned, arguments=arguments):
            return ensemble_kd.rows_kernel[planned.grid](*arguments, **planned.options)

        for output in outputs:
            output.fill_(float("nan"))
        start = time.perf_counter()
        try:
            compiled = run()
        except triton.runtime.errors.OutOfResources:
            return None
        elapsed = time.perf_counter() - start
        for got, wanted in zip(outputs, truth[fusion], strict=True):
            error = (got[ends].double() - wanted).abs().max() / wanted.abs().max()
            if not error < (1e-4 if got.dtype == torch.float32 else 3e-2):
                raise SystemExit(f"{cut} is wrong for {fusion} fusion of {tuple(logits.shape)}: error {error:.1e}")
        if compiled is None:  # in the interpreter
            total += 1e6 * elapsed
        elif compiled.n_spills:
            return None
        else:
            total += 1e3 * triton.testing.do_bench_cudagraph(run, rep=20, return_mode="median")
    return total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eekd.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", metavar="M,C", help="only the bucket of this; repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this; repeatable")
    parser.add_argument("--out", type=Path, help="folder of the table; default: the package's, none with --tiny")
    parser.add_argument("--tiny", action="store_true", help="two small shapes; on cpu where TRITON_INTERPRET=1")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available() and not ensemble_kd.INTERPRETED
    if not gpu and not (args.tiny and ensemble_kd.INTERPRETED):
        parser.error("no GPU was found; TRITON_INTERPRET=1 with --tiny runs without one")
    device = "cuda" if gpu else "cpu"
    shapes = list(itertools.product(SNAPSHOTS, CLASSES)) if not args.tiny else [(2, 16), (3, 1024)]
    if args.shape:
        try:
            shapes = [tuple(int(n) for n in shape.split(",")) for shape in args.shape]
            if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
                raise ValueError
        except ValueError:
            parser.error(f"--shape must be M,C in positive numbers, got {' '.join(args.shape)}")
    architecture = common.architecture(torch.empty(0, device=device).device)
    folder = args.out or (None if args.tiny else common.TABLES)
    path = folder and folder / f"{architecture}.json"
    launches = json.loads(path.read_text())["launches"] if path and path.is_file() else {}
    print(f"{'bucket':>45} {'rule, µs':>9} {'best':>9}  launch")
    dtypes = args.dtype or (DTYPES[:1] if args.tiny else DTYPES)
    for (snapshots, classes), name in itertools.product(shapes, dtypes):
        dtype = getattr(torch, name)
        bucket = common.bucket(classes, snapshots, dtype.itemsize)
        classes = next_power_of_2(classes)
        rows = max(2 * CHECKED, min(65536, BYTES // ((snapshots + 1) * classes * dtype.itemsize)))
        found = candidates(classes, snapshots, dtype.itemsize)
        if args.tiny:
            rows, found = 2 * CHECKED, [found[0], next((cut for cut in found if not cut.on_chip), found[-1])]
        tensors, truth = call(rows, snapshots, classes, dtype, device)
        times = {cut: microseconds(cut, tensors, truth) for cut in found}
        best = min((cut for cut in found if times[cut] is not None), key=times.get, default=None)
        if best is None:
            raise SystemExit(f"no launch of {bucket} ran without spilling registers")
        rule = times[found[0]]
        launches[bucket] = {"launch": best._asdict(), "us": times[best], "us_by_rule": rule, "tried": len(found)}
        print(f"{bucket:>45} {'-' if rule is None else f'{rule:.1f}':>9} {times[best]:9.1f}  {tuple(best)}", flush=True)
        if path:  # after each bucket, so that what was measured is not lost
            folder.mkdir(parents=True, exist_ok=True)
            record = {"command": ["python", "-m", "eekd.kernels.tune", *(argv or sys.argv[1:])]}
            record |= {"environment": environment(), "launches": dict(sorted(launches.items()))}
            path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
