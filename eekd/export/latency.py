"""How long networks take, side by side on this machine."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


@torch.inference_mode()
def latencies(
    calls: dict[str, Callable[[Tensor], object]], images: Tensor, seconds: float = 1.0, least: int = 10
) -> dict[str, dict]:
    """Milliseconds a call takes on `images`, by name: p50, p95 and how many were timed.

    Calls take turns, so that all of them meet the same machine; about `seconds` for each of them, `least` times at
    least.
    """
    for call in calls.values():
        for _ in range(min(3, least)):  # sets things up
            call(images)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times[next(iter(times))]) < least:
        for name, call in calls.items():
            _wait(images)
            start = time.perf_counter()
            call(images)
            _wait(images)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: {"p50": _quantile(each, 0.5), "p95": _quantile(each, 0.95), "calls": len(each)}
            for name, each in times.items()}  # fmt: skip


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()
