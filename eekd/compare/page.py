"""study.json as a page: Markdown whose every number and verdict comes from the record, and its plots."""

import importlib.util
import io
import math
import re
import shlex
from pathlib import Path

from eekd.compare.methods import KINDS
from eekd.io.files import printable, write_atomic

PRINCIPLES = {
    "quality": "Quality: does a stronger ensemble teach better?",
    "weights": "Weights: which are best?",
    "number": "Number: how many snapshots?",
    "cost": "Cost: what is spent on teachers?",
}
FIGURES = {
    "methods": "difference in test accuracy from the student taught by labels alone, per method",
    "quality": "accuracy of the students against that of the ensembles that taught them",
    "number": "accuracy and cost against the number of snapshots",
    "cost": "accuracy against cost, per method",
}
BLUE, RED, GREY = "#4477aa", "#cc3311", "#888888"


def write(record: dict, folder: Path, stem: str = "study") -> None:
    """Writes the page and, where matplotlib is installed, the plots of a record into a folder."""
    drawn = importlib.util.find_spec("matplotlib") is not None
    write_atomic(folder / f"{stem}.md", page(record, f"{stem}-" if drawn else None).encode())
    if drawn:
        plots(record, folder, stem)


def page(record: dict, figures: str | None = None, more: str = "") -> str:
    """The Markdown; `figures` is what stands before the name of a plot, None leaves them out; `more` ends it."""
    if not record["methods"]:
        return "# Ways to teach a student, compared\n\nNo cell is finished yet.\n"

    shown = [] if figures is None else _drawn(record)

    def figure(name):
        return [f"![{FIGURES[name]}]({figures}{name}.svg)", ""] if name in shown else []

    lines = [
        "# Ways to teach a student, compared",
        "",
        *_setting(record),
        "",
        *_verdicts(record),
        "",
        "## Every method",
        "",
        *_methods(record),
        "",
        *figure("methods"),
    ]
    for principle, title in PRINCIPLES.items():
        lines += [f"## {title}", ""]
        for row in (row for row in record["claims"] if row["principle"] == principle):
            lines += [f"> {row['claim']}", "", f"**{row['verdict'].capitalize()}.**{_reason(row)}", ""]
            lines += _parts(row)
        lines += {"quality": _ensembles, "weights": _weights, "number": _number, "cost": _cost}[principle](record)
        lines += figure(principle)
    lines += online(record)
    lines += ["## How this was made", "", *_made(record), more]
    return "\n".join(lines).rstrip("\n") + "\n"


def _setting(record: dict) -> list[str]:
    config, seeds = record["config"], len(record["seeds"])
    teacher, student = config["teacher"], config["student"]
    views = f"{record['views']} augmented views in a bank" if record["augmented"] else "no augmentation"
    return [
        f"{plain(Path(config['data']).name)}, {record['images']:,} training images, {views}; teacher "
        f"{plain(teacher['model'])} ({teacher['epochs']} epochs), student {plain(student['model'])} "
        f"({student['epochs']} epochs), "
        f"M = {teacher['snapshots']} unless stated, τ = {student['temperature']:g}, α = {student['alpha']:g}, "
        f"{seeds} seed{'s' * (seeds > 1)}.",
        "",
        "Of one seed, all students start from the same weights and see the same images in the same order; they share "
        "one ordinary teacher, from which each method takes its snapshots, and read them from its logit bank. The "
        "cyclic teacher starts from the same weights as the ordinary one, which is the first of the independently "
        "trained teachers (SED). Accuracies are those of the last epoch, on test images that nothing was chosen by; "
        "± is the standard deviation over seeds. Differences are taken seed by seed; in brackets is Student's 95 % "
        "interval, which is not corrected for the number of comparisons. A claim *holds* where all its intervals lie "
        "on the claimed side of 0, is *contradicted* where one lies on the other side, and else is *undecided*.",
    ]


def _verdicts(record: dict) -> list[str]:
    return [
        "| claim of the paper | here |",
        "|---|---|",
        *(f"| {row['claim']} | {row['verdict']} |" for row in record["claims"]),
    ]


def _methods(record: dict) -> list[str]:
    lines = [
        "| method | name | M | validation, % | test, % | over CE, points | over uniform, points |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in record["methods"]:
        cells = [row["title"], f"`{row['name']}`", str(len(row["epochs"]) or ""), percent(row["val"]),
                 percent(row["test"]), points(row["over_ce"]), points(row["over_uniform"])]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ensembles(record: dict) -> list[str]:
    if not record["ensembles"]:
        return []
    lines = [
        "| teacher | its snapshots, test % | ensemble (mean of probabilities), test % | over the ordinary one, "
        "points |",
        "|---|---|--:|--:|",
    ]
    for row in record["ensembles"]:
        each = " ".join(f"{100 * accuracy:.1f}" for accuracy in row["members"])
        lines.append(f"| {KINDS[row['kind']]} | {each} | {percent(row['test'])} | {points(row['over_ordinary'])} |")
    return [*lines, ""]


def _weights(record: dict) -> list[str]:
    rows = [row for row in record["methods"] if row["weights"] and len(row["weights"]) > 1]
    if not rows:
        return []
    lines = ["| method | mean weight of each snapshot, last epoch | entropy, nats | of at most |", "|---|---|--:|--:|"]
    for row in rows:
        weights = " ".join(f"{weight:.2f}" for weight in row["weights"])
        most = math.log(len(row["weights"]))
        lines.append(f"| {row['title']} | {weights} | {row['weight_entropy']:.2f} | {most:.2f} |")
    return [*lines, ""]


def _number(record: dict) -> list[str]:
    series = {name: series_of(record, name) for name in ("uniform", "attention")}
    if not any(series.values()):
        return []
    lines = [
        "| M | uniform, test % | attention, test % | teacher forwards per image: online | from a bank |",
        "|--:|--:|--:|--:|--:|",
    ]
    for m in sorted(set().union(*series.values())):
        rows = [series[name].get(m) for name in series]
        cost = next(row["cost"] for row in rows if row)
        each = [cost[key] / record["images"] for key in ("teaching", "teaching_bank")]
        lines.append(
            f"| {m} | {' | '.join(percent(row['test']) if row else '' for row in rows)} | "
            f"{each[0]:.0f} | {each[1]:.0f} |"
        )
    return [*lines, ""]


def _cost(record: dict) -> list[str]:
    base = next((row["cost"] for row in record["methods"] if row["name"] == "ce"), None)
    head = "| method | teachers | train teachers | teach: online | bank | train student | TFLOP: online | bank | "
    lines = [
        "Forwards of one image by the network named, in millions; a training step counts as three. Each method "
        "pays for its own teachers and bank.",
        "",
        head + "s: teachers | bank | student |",
        "|---|" + "--:|" * 10,
    ]
    for row in record["methods"]:
        cost, seconds = row["cost"], row["seconds"]
        forwards = [cost[key] for key in ("teacher_training", "teaching", "teaching_bank", "student_training")]
        flops = [cost[key] for key in ("gflops_online", "gflops_bank")]
        spent = [seconds[key] for key in ("teachers", "bank", "student")]
        cells = [
            row["title"],
            str(cost["teachers"]),
            *(number(x, 1e-6, ".3g") for x in forwards),
            *(number(x, 1e-3, ",.3g") for x in flops),
            *(number(x, 1, ",.0f") for x in spent),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    flops = record["flops"]
    if base and flops:
        lines += [
            "",
            f"One forward is {flops['teacher'] / 1e6:,.2f} MFLOP of the teacher and "
            f"{flops['student'] / 1e6:,.2f} of the student. Seconds are wall-clock, of one process with "
            f"{_one(record['threads'])} thread(s), and hold the passes over validation and test images "
            "too.",
        ]
    return [*lines, ""]


def online(record: dict) -> list[str]:
    """The section on methods that were run both ways, [] where none was."""
    rows = [row for row in record["methods"] if row["over_online"]]
    if not rows:
        return []
    lines = [
        f"## A bank of {record['views']} views against snapshots that run",
        "",
        "| method | from the bank, test % | over online, points |",
        "|---|--:|--:|",
    ]
    lines += [f"| {row['title']} | {percent(row['test'])} | {points(row['over_online'])} |" for row in rows]
    return [*lines, ""]


def _reason(row: dict) -> str:
    """What follows a verdict."""
    if row["principle"] == "cost":
        if row["ratio"] is None:
            return ""
        text = f" In forwards of the teacher's network, training and teaching: {row['ratio']:.0%} online"
        text += f", {row['ratio_bank']:.0%} from a bank" if row["ratio_bank"] is not None else ""
        text += f"; with the student's training, in floating-point operations, {row['ratio_gflops']:.0%}"
        return text + (f" and {row['ratio_gflops_bank']:.0%}." if row["ratio_gflops_bank"] is not None else ".")
    why = {"undecided": " An interval contains 0, or there is none.", "not measured": " A method of it was not run."}
    return why.get(row["verdict"], "")


def _parts(row: dict) -> list[str]:
    if not row["parts"]:
        return []
    lines = ["| part | difference, points | verdict |", "|---|--:|---|"]
    lines += [f"| {part['text']} | {points(part['difference'])} | {part['verdict']} |" for part in row["parts"]]
    return [*lines, ""]


def _made(record: dict) -> list[str]:
    env = record["environment"]
    commits = _one([commit[:9] + "+" * commit.endswith("+") for commit in record["commits"]])
    return [
        f"{_code(shlex.join(record['command']))} on {plain(env['cpu'])}, {_one(record['threads'])} thread(s) a "
        f"process, torch {plain(env['torch'])}, commit {commits}; seeds {_one(record['seeds'])}.",
        "",
    ]


def plain(value) -> str:
    """What comes from a file, with nothing in it that is Markdown or HTML."""
    return re.sub(r"[&<|`*\[\\]", lambda found: f"&#{ord(found[0])};", printable(value))


def _code(line: str) -> str:
    """Code between more backticks than it holds in a row."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{ticks}{printable(line)}{ticks}"


def _one(values: list) -> str:
    return ", ".join(map(plain, values))


def percent(value: dict) -> str:
    """A mean ± std of accuracies in percent."""
    return f"{100 * value['mean']:.2f}" + ("" if value["std"] is None else f" ± {100 * value['std']:.2f}")


def points(value: dict | None) -> str:
    """A difference of accuracies and its interval in points."""
    if value is None:
        return ""
    mean, low, high = (None if value[key] is None else 100 * value[key] for key in ("mean", "low", "high"))
    text = f"{mean:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")
    return text.replace("-", "−")


def number(value: float | None, scale: float, spec: str) -> str:
    return "" if value is None else format(value * scale, spec)


def series_of(record: dict, name: str) -> dict[int, dict]:
    """The rows of a sweep over M: `last` is M = 1."""
    rows = {row["name"]: row for row in record["methods"]}
    found = [rows[key] for key in rows if key == name or key.startswith(f"{name}-m")]
    found += [rows["last"]] if found and "last" in rows else []
    return {len(row["epochs"]): row for row in found}


def _drawn(record: dict) -> list[str]:
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
    for name in _drawn(record):
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
        found = row["over_ce"]
        each = [value - alone[seed] for seed, value in _tests(record, row["name"]).items() if seed in alone]
        axes.plot(each, [place] * len(each), "o", color=GREY, ms=3, alpha=0.7)
        axes.plot(100 * found["mean"], place, "o", color=BLUE, ms=5)
        if found["low"] is not None:
            axes.plot([100 * found["low"], 100 * found["high"]], [place] * 2, color=BLUE, lw=1.5)
    axes.axvline(0, color=RED, lw=1)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="points of test accuracy over CE only: mean, 95 % interval, seeds")


def _draw_quality(record: dict, figure) -> None:
    axes = figure.subplots()
    methods = {row["name"]: row for row in record["methods"]}
    names = {"ordinary": ("uniform", "attention"), "cyclic": ("cyclic-uniform", "cyclic-attention"), "sed": ("sed",)}
    markers = {"uniform": "o", "attention": "s"}
    colours = {"ordinary": GREY, "cyclic": BLUE, "sed": RED}
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
        x, y = row["cost"]["gflops_online"] / alone, 100 * row["test"]["mean"]
        axes.plot(x, y, "o", color=RED if row["name"] == "attention" else BLUE, ms=5)
        if row["name"] in label:
            axes.annotate(label[row["name"]], (x, y), xytext=(5, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="floating-point operations, online, teachers included; 1 is CE only",
        ylabel="test accuracy, %",
        title="Accuracy and cost, all methods",
    )
