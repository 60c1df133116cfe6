"""linear_ensemble_kd beside eager, torch.compile and its own matrix products: results/linear-cpu.json.

python results/linear.py
python results/linear.py --shape 1024 512 768 32000 4 --rounds 2    # one shape, without the plot

Times are medians of a training step (loss and all gradients), contenders taking turns in one process. Memory is the
peak of a step beyond its inputs and outputs, each contender in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from eekd import linear_ensemble_kd
from eekd.info import environment

SHAPES = [(1024, 512, 768, 32000, 4), (512, 768, 768, 50257, 5), (256, 1024, 1024, 128256, 4)]  # N, H, H_m, V, M
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE, ALPHA = 2.0, 0.5
SHARED = (512, 768, 768, 32000)  # N, H, H_m, V of the shared head
ROWS = (64, 128, 256, 512, 1024, 2048, 4096)  # N of the plot
WIDE = (256, 256, 32000, 4)  # H, H_m, V, M of the plot


def inputs(n: int, h: int, h_m: int, v: int, m: int, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator).mul_(scale).to(dtype)

    return {
        "student_hidden": normal(n, h).requires_grad_(),
        "student_weight": normal(v, h, scale=h**-0.5).requires_grad_(),
        "snapshot_hidden": [normal(n, h_m) for _ in range(m)],
        "snapshot_weights": [normal(v, h_m, scale=h_m**-0.5) for _ in range(m)],
        "labels": torch.randint(v, (n,), generator=generator),
        "scores": torch.randn(n, m, generator=generator).requires_grad_(),
    }


def ours(x: dict, **options) -> torch.Tensor:
    loss, _, attention_loss = linear_ensemble_kd(**x, temperature=TEMPERATURE, alpha=ALPHA, **options)
    return loss + attention_loss


def eager(x: dict) -> torch.Tensor:
    """The same loss as one writes it: fp32 logits of all rows, the target mixed op by op."""
    tau, w = TEMPERATURE, x["scores"].softmax(1)
    s = x["student_hidden"].float() @ x["student_weight"].float().t()
    each = [h.float() @ head.float().t() for h, head in zip(x["snapshot_hidden"], x["snapshot_weights"], strict=True)]
    p = sum(w[:, m, None] * (z / tau).softmax(1) for m, z in enumerate(each))
    attention_loss = -p.gather(1, x["labels"][:, None]).log().mean()
    kl = F.kl_div((s / tau).log_softmax(1), p.detach(), reduction="batchmean")
    return ALPHA * F.cross_entropy(s, x["labels"]) + (1 - ALPHA) * tau**2 * kl + attention_loss


def ce_in_chunks(x: dict) -> torch.Tensor:
    """The cross-entropy alone, by torch's own chunks."""
    return F.linear_cross_entropy(x["student_hidden"], x["student_weight"], x["labels"])


def step(loss, x: dict) -> None:
    leaves = [value for value in x.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    torch.autograd.grad(loss(x), leaves, allow_unused=True)


def products(x: dict) -> None:
    """The matrix products of a step, in fp32, of weights that are fp32 already."""
    with torch.no_grad():
        h, w = x["student_hidden"], x["student_weight"]
        g = h @ w.t()
        for hidden, head in zip(x["snapshot_hidden"], x["snapshot_weights"], strict=True):
            hidden @ head.t()
        g @ w
        g.t() @ h


def measure(calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in times.items()}


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def peak(contender: str, shape: list[int], dtype: str) -> int:
    """Bytes of a step beyond its inputs and outputs, in this process."""
    small, x = inputs(32, 8, 8, 64, shape[4], DTYPES[dtype]), inputs(*shape, DTYPES[dtype])
    call = {"ours": ours, "eager": eager}[contender]
    step(call, small)  # what is loaded at the first call is not counted
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    step(call, x)
    outputs = sum(v.nbytes for v in x.values() if isinstance(v, torch.Tensor) and v.requires_grad)
    return max(0, status("VmHWM") - before - outputs)


def peak_elsewhere(contender: str, shape, dtype: str) -> int:
    done = subprocess.run(
        [sys.executable, __file__, "--peak", contender, dtype, "--shape", *map(str, shape)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs=5, type=int, help="N H H_m V M (default: those of the table)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("linear-cpu.json"))
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak[0], args.shape, args.peak[1]))
        return
    rows = []
    for shape in [args.shape] if args.shape else SHAPES:
        for name, dtype in DTYPES.items():
            x, single = inputs(*shape, dtype), inputs(*shape, torch.float32)
            compiled = torch.compile(eager)
            calls = {
                "ours": lambda x=x: step(ours, x),
                "eager": lambda x=x: step(eager, x),
                "compile": lambda x=x, c=compiled: step(c, x),
                "products": lambda x=single: products(x),
            }
            if hasattr(F, "linear_cross_entropy"):
                calls["torch's chunked cross-entropy alone"] = lambda x=x: step(ce_in_chunks, x)
            seconds = measure(calls, args.rounds)
            del x, single
            memory = {contender: peak_elsewhere(contender, shape, name) for contender in ("ours", "eager")}
            rows.append({"shape": list(shape), "dtype": name, "seconds": seconds, "memory": memory})
            print(rows[-1], flush=True)
    n, h, h_m, v = SHARED if not args.shape else args.shape[:4]
    calls = {}
    for m in (1, 5):
        x = inputs(n, h, h_m, v, m, torch.float32)
        x["snapshot_weights"] = x["snapshot_weights"][0]
        calls[str(m)] = lambda x=x: step(lambda y: ours(y, fusion="logit"), x)
    shared = [{"fusion": "logit", "shape": [n, h, h_m, v], "seconds": measure(calls, args.rounds)}]
    print(shared[0], flush=True)
    by_rows = []
    if not args.shape:
        h, h_m, v, m = WIDE
        for n in ROWS:
            found = {contender: peak_elsewhere(contender, (n, h, h_m, v, m), "fp32") for contender in ("ours", "eager")}
            by_rows.append({"rows": n, "memory": found})
            print(by_rows[-1], flush=True)
    args.json.write_text(json.dumps({
        "command": ["python", "results/linear.py", *sys.argv[1:]], "environment": environment(),
        "note": "N, H, H_m, V, M; seconds of a step; bytes beyond inputs and outputs",
        "steps": rows, "shared_head": shared, "memory_by_rows": {"shape": WIDE, "points": by_rows},
    }, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
