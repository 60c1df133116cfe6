"""Milliseconds in which M snapshots see a batch, by every way there is: results/forward-cpu.json, or forward-GPU.json.

python results/forward.py           # about 6 minutes on two quiet cores
python results/forward.py --quick   # resnet8 only, a few repeats

The ways take turns; medians, and the ratio to one model after another. torch.compile, which needs half a minute for
each, runs for two of the networks. `eekd` is what SnapshotEnsemble does.
"""

import argparse
import copy
import functools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from eekd import models
from eekd.info import environment
from eekd.snapshots import SnapshotEnsemble

M = 5
CASES = [  # network, input, batch
    ("resnet8", (1, 28, 28), 128), ("resnet20", (3, 32, 32), 128), ("resnet56", (3, 32, 32), 64),
    ("resnet56", (3, 32, 32), 128), ("wrn_40_2", (3, 32, 32), 64),
]  # fmt: skip
COMPILED = {("resnet8", 128), ("resnet56", 64)}
Way = Callable[[Tensor], Tensor]


def folded(model: nn.Module) -> nn.Module:
    """A copy whose batch norms are folded into the convolutions that they follow in an nn.Sequential."""
    model = copy.deepcopy(model)
    for parent in model.modules():
        layers = list(parent.named_children()) if isinstance(parent, nn.Sequential) else []
        for (name, layer), (after, norm) in zip(layers, layers[1:], strict=False):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                setattr(parent, after, nn.Identity())
    return model


def one_by_one(nets: list[nn.Module]) -> Way:
    return lambda x: torch.stack([net(x) for net in nets])


def channels_last(nets: list[nn.Module]) -> tuple[list[nn.Module], Way]:
    nets = [copy.deepcopy(net).to(memory_format=torch.channels_last) for net in nets]
    way = one_by_one(nets)
    return nets, lambda x: way(x.contiguous(memory_format=torch.channels_last))


def stacked(nets: list[nn.Module]) -> Way:
    """torch.func: the weights of all M stacked, one vmap, so that each layer is one grouped convolution."""
    weights, buffers = torch.func.stack_module_state(nets)
    net = copy.deepcopy(nets[0]).to("meta")
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    call = torch.func.vmap(lambda p, b, x: torch.func.functional_call(net, (p, b), (x,)), (0, 0, None))
    return lambda x: call(weights, buffers, x)


def inference(way: Way) -> Way:
    def run(x):
        with torch.inference_mode():
            return way(x)

    return run


def by_snapshot(nets: list[nn.Module], dtype: torch.dtype) -> Way:
    """A thread of one core for each core, M snapshots among them."""

    def one_core():
        torch.get_num_threads()
        torch.set_num_threads(1)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=one_core)

    def task(net, x):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            return net(x)

    def run(x):
        x = x.contiguous(memory_format=torch.channels_last)
        done = torch.stack(list(pool.map(functools.partial(task, x=x), nets)))
        torch.set_num_threads(threads)
        return done

    return run


def streams(nets: list[nn.Module]) -> Way:
    """A CUDA stream for each snapshot."""
    lanes = [torch.cuda.Stream() for _ in nets]

    def run(x):
        main, outputs = torch.cuda.current_stream(), []
        for net, lane in zip(nets, lanes, strict=True):
            lane.wait_stream(main)
            with torch.cuda.stream(lane):
                outputs.append(net(x))
        for output, lane in zip(outputs, lanes, strict=True):
            main.wait_stream(lane)
            output.record_stream(main)
        return torch.stack(outputs)

    return run


def graph(way: Way, x: Tensor, context: Callable) -> Way:
    """The way captured in a CUDA graph, which reads one memory and writes another."""
    given = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), context():
        for _ in range(3):  # cuDNN chooses and allocates before the capture
            way(given)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured), context():
        output = way(given)

    def run(x):
        given.copy_(x)
        captured.replay()
        return output

    return run


def ways(nets: list[nn.Module], x: Tensor, dtype: torch.dtype, compiled: bool) -> dict[str, Callable[[], Way]]:
    """By name, what makes the way."""
    low, plain = dtype is not torch.float32, one_by_one(nets)
    fold = [folded(net) for net in nets]
    last, fold_last = channels_last(fold)

    def context():  # without autocast's cache, which a graph's capture must not fill
        return torch.autocast(x.device.type, dtype, enabled=low, cache_enabled=False)

    def compiles(way_of=fold_last):
        torch._dynamo.reset()
        torch._inductor.config.freezing = True
        each = [torch.compile(net) for net in last]
        return lambda x: torch.stack([net(x.contiguous(memory_format=torch.channels_last)) for net in each])

    def converted():
        low_nets = [copy.deepcopy(net).to(dtype) for net in last]
        return lambda x: one_by_one(low_nets)(x.to(dtype).contiguous(memory_format=torch.channels_last))

    ensemble = SnapshotEnsemble(nets).to(x.device)
    host = SnapshotEnsemble(nets, snapshots_on="cpu")
    found = {
        "one by one": lambda: plain,
        "inference_mode": lambda: inference(plain),
        "channels_last": lambda: channels_last(nets)[1],
        "folded": lambda: one_by_one(fold),
        "folded, channels_last": lambda: fold_last,
        "folded, channels_last, bf16 weights": converted if low else None,
        "folded, channels_last, a thread per snapshot":
            (lambda: by_snapshot(last, dtype)) if x.device.type == "cpu" else None,
        "vmap": lambda: stacked(nets),
        "torch.compile, frozen": compiles if compiled else None,
        "eekd": lambda: lambda x: ensemble(x)[0],
    }  # fmt: skip
    if x.device.type == "cuda":
        found |= {
            "streams": lambda: streams(nets),
            "CUDA graph": lambda: graph(plain, x, context),
            "CUDA graph of streams": lambda: graph(streams(nets), x, context),
            "CUDA graph, folded, channels_last": lambda: graph(fold_last, x, context),
            "CUDA graph of streams, folded, channels_last": lambda: graph(streams(last), x, context),
            "eekd, snapshots_on cpu": lambda: lambda x: host(x)[0],
        }
    return {name: make for name, make in found.items() if make}


@torch.no_grad()
def measure(name: str, shape: tuple, batch: int, dtype: torch.dtype, device: str, seconds: float) -> dict:
    torch.manual_seed(0)
    nets = [models.build(name, num_classes=100, in_channels=shape[0], image_size=shape[1]) for _ in range(M)]
    for net in nets:
        net(torch.randn(16, *shape))  # statistics that batch norm can fold
        net.to(device).eval().requires_grad_(False)
    x = torch.randn(batch, *shape, device=device)
    rows, ran, wanted = {}, {}, None

    def call(way):
        start = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            output = way(x)
        if device == "cuda":
            torch.cuda.synchronize()
        return output, 1e3 * (time.perf_counter() - start)

    for label, make in ways(nets, x, dtype, seconds > 1 and (name, batch) in COMPILED).items():
        try:
            start = time.perf_counter()
            way = make()
            output, _ = call(way)
            first = time.perf_counter() - start
            output = output.float().clone()
            wanted = output if wanted is None else wanted
            error = ((output - wanted).abs().max() / wanted.abs().max()).item()
            ran[label], rows[label] = way, {"first_s": round(first, 2), "error": error}
        except Exception as e:  # a way that does not work here is a result too
            rows[label] = {"failed": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:120]}
    times, end = {label: [] for label in ran}, time.monotonic() + seconds
    while time.monotonic() < end or len(times["one by one"]) < 3:
        for label, way in ran.items():
            times[label].append(call(way)[1])
    base = median(times["one by one"])
    for label, found in times.items():
        rows[label] |= {"ms": median(found), "ratio": base / median(found), "repeats": len(found)}
    return {"model": name, "shape": shape, "batch": batch, "dtype": str(dtype).split(".")[1], "ways": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="resnet8 only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    what = "of measuring for each network and dtype; above 1 torch.compile takes part"
    parser.add_argument("--seconds", type=float, default=15, help=what)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    name = torch.cuda.get_device_name().replace(" ", "-") if args.device == "cuda" else "cpu"
    path = args.json or Path(__file__).parent / f"forward-{name}.json"
    record = {"command": ["python", "results/forward.py", *sys.argv[1:]], "environment": environment(),
              "device": name, "snapshots": M, "forwards": []}  # fmt: skip
    for case in CASES[:1] if args.quick else CASES:
        for dtype in (torch.float32, torch.bfloat16):
            record["forwards"].append(measure(*case, dtype, args.device, 1 if args.quick else args.seconds))
            row = record["forwards"][-1]
            print(*(row[key] for key in ("model", "batch", "dtype")), flush=True)
            for label, found in row["ways"].items():
                print(f"  {label:46s}", found.get("failed") or f"{found['ms']:8.1f} ms  x {found['ratio']:.2f}")
            path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
