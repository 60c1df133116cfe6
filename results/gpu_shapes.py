"""Both backends on a GPU at more shapes than the bench has: `python results/gpu_shapes.py --json FILE`.

Forward + backward as in eekd.kernels.bench, checked against the fp64 reference; the median of 20 calls, the time of the
kernel of the rows alone, and that of a device copy of M + 2 accesses.
"""

import argparse
import json
import subprocess
from pathlib import Path

import torch

import eekd
from eekd.info import environment
from eekd.kernels import bench
from eekd.kernels.timing import events

SHAPES = [
    (128, 5, 100), (32768, 5, 1000), (32768, 5, 1001), (8192, 5, 4096), (4096, 5, 8192), (2048, 5, 16384),
    (1024, 5, 32000), (256, 5, 128256), (16384, 8, 1000), (32768, 1, 4096), (32768, 2, 1000),
]  # of 16 bits; half as many rows of fp32  # fmt: skip


def measured(case: bench.Case, device: torch.device) -> dict:
    sets, one = bench.inputs(case, device, 0), torch.ones((), device=device)
    truth = bench.exact(sets[0], case.fusion)
    rows, snapshots, classes = case.shape
    half = torch.randn((snapshots + 2) * rows * classes // 2, device=device, dtype=getattr(torch, case.dtype))
    to = torch.empty_like(half)
    found = case._asdict() | {"copy_us": sorted(events([lambda: to.copy_(half)] * 11))[5] * 1e6}
    for backend in bench.BACKENDS:
        with eekd.use_backend(backend):
            error = bench.error(bench.gradients(bench.fused, sets[0], case.fusion, one), truth, one)
            calls = [lambda t=t: bench.gradients(bench.fused, t, case.fusion, one) for t in sets] * 10
            for call in calls[:3]:
                call()
            us = sorted(events(calls[:20]))[10] * 1e6
            found[backend] = {"us": us, "rows_us": max(bench.by_kernel(calls[:5]).values()), "error": error}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device("cuda")
    record = {"command": ["python", "results/gpu_shapes.py", "--json", str(args.json)], "seed": 0}
    record |= {"environment": environment(), "device": torch.cuda.get_device_name(), "shapes": []}
    record["driver"] = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    for dtype in ("bfloat16", "float32"):
        for rows, *rest in SHAPES:
            for fusion in ("probability", "logit"):
                shape = (rows if dtype == "bfloat16" else rows // 2, *rest)
                record["shapes"].append(measured(bench.Case(shape, dtype, fusion), device))
                print(record["shapes"][-1], flush=True)
                args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
