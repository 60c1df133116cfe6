"""Means over seeds, and differences taken seed by seed."""

from math import sqrt
from statistics import mean, stdev


def mean_std(values: list[float]) -> dict:
    """The mean, and the standard deviation of a sample (None for one)."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def paired(these: dict[int, float], those: dict[int, float]) -> dict | None:
    """The mean difference these - those over the seeds they share, with Student's 95 % interval; None without any."""
    return interval([these[seed] - those[seed] for seed in these if seed in those])


def interval(values: list[float], level: float = 0.95) -> dict | None:
    """The mean and its interval, mean ± t((1 + level) / 2, n - 1) std / sqrt(n); needs scipy where n > 1."""
    if not values:
        return None
    n, centre = len(values), mean(values)
    if n < 2:
        return {"n": n, "mean": centre, "low": None, "high": None}
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + level) / 2)) * stdev(values) / sqrt(n)
    return {"n": n, "mean": centre, "low": centre - half, "high": centre + half}
