"""How calls are timed, on a CPU and on a GPU."""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch


def wall(calls: list[Callable]) -> list[float]:
    """Seconds of each call on the host."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def events(calls: list[Callable]) -> list[float]:
    """Seconds of each call on the GPU, which sleeps before, about 1 ms per call, to let the host get ahead."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    torch.cuda._sleep(2_000_000 * len(calls))
    for (start, end), call in zip(pairs, calls, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


def in_graph(calls: list[Callable]) -> float:
    """Seconds per call of one captured graph of all of them: no host, no gaps between launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return sorted(events([graph.replay] * 21))[10] / len(calls)


def rotation(size: int, device: torch.device) -> int:
    """How many sets of `size` bytes to use in turn for each to have left a GPU's L2 cache when its turn comes."""
    if device.type != "cuda":
        return 1
    return min(512, max(2, math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / size)))


def peak_extra_bytes(call: Callable, device: torch.device) -> int | None:
    """The highest memory during the call above what was taken before; on a CPU resident memory, on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        status = Path("/proc/self/status")
        before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
        call()
        return 1024 * (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before)
    except OSError:
        return None


def microseconds(times: list[float]) -> dict[str, float]:
    """Median, and 20th and 80th percentile."""
    times = sorted(times)
    return {name: times[int(q * (len(times) - 1))] * 1e6 for name, q in (("us", 0.5), ("p20", 0.2), ("p80", 0.8))}
