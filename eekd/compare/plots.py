"""The plots of a comparison: every method, quality, number of snapshots and cost."""

import io
import re
from pathlib import Path

from eekd import statistics
from eekd.compare.methods import KINDS, representatives
from eekd.io.files import write_atomic

FIGURES = {
    "methods": "difference in test accuracy from the student taught by labels alone, per method",
    "quality": "accuracy of the students against that of the ensembles that taught them",
    "number": "accuracy and cost against the number of snapshots",
    "cost": "accuracy against cost, per method",
}
BLUE, RED, GREY, GREEN = "#4477aa", "#cc3311", "#888888", "#228833"


def points(value: dict | None) -> str:
    """As eekd.statistics writes it, with a minus sign in place of the hyphen."""
    return statistics.points(value).replace("-", "−")


def number(value: float | None, scale: float, spec: str) -> str:
    return "" if value is None else format(value * scale, spec)


def series_of(record: dict, name: str) -> dict[int, dict]:
    """The rows of a sweep over M: `last` is M = 1."""
    rows = {row["name"]: row for row in record["methods"]}
    series = [rows[key] for key in rows if re.fullmatch(rf"{name}(-m\d+)?", key)]
    series += [rows["last"]] if series and "last" in rows else []
    return {len(row["epochs"]): row for row in series}


def standing(record: dict) -> dict[str, dict]:
    """The rows of methods, what stands for a method where it is not there itself."""
    rows = {row["name"]: row for row in record["methods"]}
    known = {name: (row["n"], row["val"]["mean"]) for name, row in rows.items()}
    return {base: rows[name] for base, name in representatives(known).items()}


def drawn(record: dict) -> list[str]:
    """The figures that there are numbers for."""
    names = {row["name"] for row in record["methods"]}
    there = {
        "methods": "ce" in names and len(names) > 1,
        "quality": len(record["ensembles"]) > 1,
        "number": any(len(series_of(record, name)) > 1 for name in ("uniform", "attention")),
        "cost": "ce" in names and len(names) > 1,
    }
    return [name for name in FIGURES if there[name]]


def plots(record: dict, folder: Path, stem: str = "study") -> None:
    """Draws STEM-methods.svg, -quality.svg, -number.svg and -cost.svg, those that there are numbers for."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "eekd", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    draw = {"methods": _draw_methods, "quality": _draw_quality, "number": _draw_number, "cost": _draw_cost}
    for name in drawn(record):
        figure = plt.figure(
            figsize=(8, 0.8 + 0.24 * len(record["methods"]) if name == "methods" else 3.4), layout="constrained"
        )
        draw[name](record, figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3, axis="x" if name == "methods" else "both")
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
        plt.close(figure)
        write_atomic(folder / f"{stem}-{name}.svg", data.getvalue())


def _tests(record: dict, name: str) -> dict[int, float]:
    return {cell["seed"]: 100 * cell["test"]["accuracy"] for cell in record["cells"] if cell["name"] == name}


def _draw_methods(record: dict, figure) -> None:
    axes, alone = figure.subplots(), _tests(record, "ce")
    rows = [row for row in record["methods"] if row["over_ce"]]
    for place, row in enumerate(rows):
        gain = row["over_ce"]
        each = [value - alone[seed] for seed, value in _tests(record, row["name"]).items() if seed in alone]
        axes.plot(each, [place] * len(each), "o", color=GREY, ms=3, alpha=0.7)
        axes.plot(100 * gain["mean"], place, "o", color=BLUE, ms=5)
        if gain["low"] is not None:
            axes.plot([100 * gain["low"], 100 * gain["high"]], [place] * 2, color=BLUE, lw=1.5)
    axes.axvline(0, color=RED, lw=1)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="points of test accuracy over CE only: mean, 95 % interval, seeds")


def _draw_quality(record: dict, figure) -> None:
    axes = figure.subplots()
    methods = standing(record)
    names = {
        "ordinary": ("uniform", "attention"),
        "cyclic": ("cyclic-uniform", "cyclic-attention"),
        "sed": ("sed",),
        "soup": ("soup",),
    }
    markers = {"uniform": "o", "attention": "s", "last": "^"}
    colours = {"ordinary": GREY, "cyclic": BLUE, "sed": RED, "soup": GREEN}
    for row in record["ensembles"]:
        for name in names[row["kind"]]:
            if name in methods:
                weighting = methods[name]["weighting"]
                axes.errorbar(
                    100 * row["test"]["mean"],
                    100 * methods[name]["test"]["mean"],
                    xerr=100 * (row["test"]["std"] or 0),
                    yerr=100 * (methods[name]["test"]["std"] or 0),
                    fmt=markers[weighting],
                    color=colours[row["kind"]],
                    capsize=2,
                    label=f"{KINDS[row['kind']]}: {weighting}",
                )
    axes.set(
        xlabel="test accuracy of the ensemble, %, ± std",
        ylabel="test accuracy of its student, %, ± std",
        title="Does a stronger ensemble teach better?",
    )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_number(record: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for name, colour in (("uniform", BLUE), ("attention", RED)):
        series = sorted(series_of(record, name).items())
        if not series:
            continue
        ms = [m for m, _ in series]
        left.errorbar(
            ms,
            [100 * row["test"]["mean"] for _, row in series],
            yerr=[100 * (row["test"]["std"] or 0) for _, row in series],
            fmt="o-",
            ms=4,
            capsize=2,
            color=colour,
            label=name,
        )
        for m, row in series:
            each = list(_tests(record, row["name"]).values())
            left.plot([m] * len(each), each, ".", color=colour, alpha=0.4, ms=4)
    both = series_of(record, "uniform") | series_of(record, "attention")
    costs = sorted((m, row["cost"]) for m, row in both.items())
    for key, style, label in (("teaching", "-", "online"), ("teaching_bank", "--", "from a bank")):
        right.plot(
            [m for m, _ in costs],
            [cost[key] / record["images"] for _, cost in costs],
            f"o{style}",
            ms=4,
            color=GREY,
            label=label,
        )
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks([m for m, _ in costs])
    left.set(xlabel="snapshots M", ylabel="test accuracy, %", title="Student (mean ± std, and each seed)")
    left.legend(frameon=False)
    right.set(xlabel="snapshots M", ylabel="teacher forwards per training image", ylim=(0, None))


def _draw_cost(record: dict, figure) -> None:
    axes = figure.subplots()
    alone = next(row["cost"]["gflops_online"] for row in record["methods"] if row["name"] == "ce")
    label = {"ce": "CE", "last": "KD", "uniform": "uniform", "attention": "EEKD", "sed": "SED",
             "cyclic-uniform": "cyclic"}  # fmt: skip
    for row in record["methods"]:
        x, y, base = row["cost"]["gflops_online"] / alone, 100 * row["test"]["mean"], row["name"].partition("@")[0]
        axes.plot(x, y, "o", color=RED if base == "attention" else BLUE, ms=5)
        if base in label:
            axes.annotate(label[base], (x, y), xytext=(5, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="floating-point operations, online, teachers included; 1 is CE only",
        ylabel="test accuracy, %",
        title="Accuracy and cost, all methods",
    )
