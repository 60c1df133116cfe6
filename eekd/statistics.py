"""Means over seeds, and differences taken seed by seed: as numbers, and as tables show them."""

from math import sqrt
from statistics import mean, stdev

ROUNDING = 1e-12  # fractions that differ by less are equal


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


def sign(difference: dict) -> int:
    """1 if the interval of a difference lies above 0, -1 if below; 0 if it holds 0, or for equal differences.

    Two or three seeds have equal differences by chance.
    """
    low, high = difference["low"], difference["high"]
    if low is None or high - low < ROUNDING or low <= 0 <= high:
        return 0
    return 1 if low > 0 else -1


def percent(value: dict) -> str:
    """The mean and standard deviation of fractions in percent: 81.20 ± 0.31."""
    return f"{100 * value['mean']:.2f}" + ("" if value["std"] is None else f" ± {100 * value['std']:.2f}")


def seeds(number: int) -> str:
    """A number of seeds: 3 seeds."""
    return f"{number} seed{'s' * (number != 1)}"


def fewer(number: int, usual: int) -> str:
    """Where a number of seeds is not the usual one, it in brackets, after a space; else ""."""
    return f" ({seeds(number)})" if number != usual else ""


def points(difference: dict | None) -> str:
    """A difference of fractions and its interval in percentage points: +2.10 [+1.60, +2.60]; "" for None."""
    if difference is None:
        return ""
    mean, low, high = (None if difference[key] is None else 100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")
