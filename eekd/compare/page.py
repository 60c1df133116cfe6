"""study.json as a page: Markdown whose every number and verdict comes from the record, and its plots."""

import importlib.util
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from eekd.compare.methods import KINDS
from eekd.compare.plots import FIGURES, drawn, number, plots, points, series_of
from eekd.io.files import printable, write_atomic
from eekd.method.rivals import TEMPERATURE
from eekd.statistics import fewer, percent, seeds

PRINCIPLES = {
    "quality": "Quality: does a stronger ensemble teach better?",
    "weights": "Weights: which are best?",
    "number": "Number: how many snapshots?",
    "cost": "Cost: what is spent on teachers?",
}


def write(record: dict, folder: Path, stem: str = "study") -> None:
    """Writes the page and, where matplotlib is installed, the plots of a record into a folder."""
    draws = importlib.util.find_spec("matplotlib") is not None
    write_atomic(folder / f"{stem}.md", page(record, f"{stem}-" if draws else None).encode())
    if draws:
        plots(record, folder, stem)


def page(record: dict, figures: str | None = None) -> str:
    """The Markdown; `figures` is what stands before the name of a plot, None leaves them out."""
    if not record["methods"]:
        return "# Ways to teach a student, compared\n\nNo cell is finished yet.\n"

    shown = [] if figures is None else drawn(record)

    def figure(name):
        return [f"![{FIGURES[name]}]({figures}{name}.svg)", ""] if name in shown else []

    advice = record.get("advice", {}).get("text")
    lines = [
        "# Ways to teach a student, compared",
        "",
        *_setting(record),
        "",
        *([f"**{plain(advice)}**", ""] if advice else []),
        *_table("claim of the paper | here", ((row["claim"], row["verdict"]) for row in record["claims"]), 2),
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
    lines += ["## How this was made", "", *_made(record)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _setting(record: dict) -> list[str]:
    config = record["config"]
    teacher, student = config["teacher"], config["student"]
    views = f"{record['views']} augmented views in a bank" if record["augmented"] else "no augmentation"
    return [
        f"{plain(Path(config['data']).name)}, {record['images']:,} training images, {views}; teacher "
        f"{plain(teacher['model'])} ({teacher['epochs']} epochs), student {plain(student['model'])} "
        f"({student['epochs']} epochs), "
        f"M = {teacher['snapshots']}, τ = {student['temperature'] or TEMPERATURE:g} and α = {student['alpha']:g} "
        f"unless stated, {seeds(len(record['seeds']))}.",
        "",
        "For one seed, all students start from the same weights and see the same images in the same order. They share "
        "one ordinary teacher, and read its snapshots from its logit bank. The cyclic teacher starts from the same "
        "weights as the ordinary one. The ordinary teacher is the first of the independently trained ones (SED). "
        "Accuracies are those of the last epoch, on test images; nothing was chosen by them. ± is the standard "
        "deviation over seeds. Differences are taken seed by seed. In brackets is Student's 95 % interval, which is "
        "not corrected for the number of comparisons. A claim *holds* if all its intervals lie on the claimed side of "
        "0. It is *contradicted* if one lies on the other side, and *undecided* otherwise.",
    ]


def _table(columns: str, rows: Iterable[Sequence[str]], texts: int = 1) -> list[str]:
    """The lines of a table whose columns hold numbers, apart from the first `texts`."""
    marks = "---|" * texts + "--:|" * (columns.count("|") + 1 - texts)
    return [f"| {columns} |", f"|{marks}", *(f"| {' | '.join(cells)} |" for cells in rows)]


def _methods(record: dict) -> list[str]:
    over = [name for name in ("ce", "uniform", "last") if any(row.get(f"over_{name}") for row in record["methods"])]
    heads = "".join(f" | over {'CE' if name == 'ce' else name}, points" for name in over)
    cells = (
        [row["title"] + fewer(row["n"], len(record["seeds"])), f"`{row['name']}`", str(len(row["epochs"]) or ""),
         percent(row["val"]), percent(row["test"]), *(points(row.get(f"over_{name}")) for name in over)]
        for row in record["methods"]
    )  # fmt: skip
    return _table(f"method | name | M | validation, % | test, %{heads}", cells, 2)


def _ensembles(record: dict) -> list[str]:
    if not record["ensembles"]:
        return []
    cells = (
        (KINDS[row["kind"]], " ".join(f"{100 * accuracy:.1f}" for accuracy in row["members"]), percent(row["test"]),
         points(row["over_ordinary"]))
        for row in record["ensembles"]
    )  # fmt: skip
    columns = (
        "teacher | its snapshots, test % | ensemble (mean of probabilities), test % | over the ordinary one, points"
    )
    return [*_table(columns, cells, 2), ""]


def _weights(record: dict) -> list[str]:
    rows = [row for row in record["methods"] if row["weights"] and len(row["weights"]) > 1]
    cells = (
        (row["title"], " ".join(f"{weight:.2f}" for weight in row["weights"]), f"{row['weight_entropy']:.2f}",
         f"{math.log(len(row['weights'])):.2f}")
        for row in rows
    )  # fmt: skip
    columns = "method | mean weight of each snapshot, last epoch | entropy, nats | of at most"
    return [*_table(columns, cells, 2), ""] if rows else []


def _number(record: dict) -> list[str]:
    series = {name: series_of(record, name) for name in ("uniform", "attention")}
    cells = []
    for m in sorted(set().union(*series.values())):
        rows = [series[name].get(m) for name in series]
        cost = next(row["cost"] for row in rows if row)
        each = (f"{cost[key] / record['images']:.0f}" for key in ("teaching", "teaching_bank"))
        cells.append((f"{m}", *(percent(row["test"]) if row else "" for row in rows), *each))
    columns = "M | uniform, test % | attention, test % | teacher forwards per image: online | from a bank"
    return [*_table(columns, cells, 0), ""] if cells else []


def _cost(record: dict) -> list[str]:
    base = next((row["cost"] for row in record["methods"] if row["name"] == "ce"), None)
    columns = "method | teachers | train teachers | teach: online | bank | train student | TFLOP: online | bank | "
    lines = [
        "Forwards of one image by the named network, in millions. A training step counts as three forwards. Each "
        "method pays for its own teachers, trained to the end, and bank.",
        "",
    ]
    cells = []
    for row in record["methods"]:
        cost, seconds = row["cost"], row["seconds"]
        forwards = [cost[key] for key in ("teacher_training", "teaching", "teaching_bank", "student_training")]
        flops = [cost[key] for key in ("gflops_online", "gflops_bank")]
        spent = [seconds[key] for key in ("teachers", "bank", "student")]
        numbers = [number(x, 1e-6, ".3g") for x in forwards] + [number(x, 1e-3, ",.3g") for x in flops]
        numbers += [number(x, 1, ",.0f") for x in spent]
        cells.append((row["title"], str(cost["teachers"]), *numbers))
    lines += _table(columns + "s: teachers | bank | student", cells)
    flops = record["flops"]
    if base and flops:
        lines += [
            "",
            f"One forward is {flops['teacher'] / 1e6:,.2f} MFLOP of the teacher and "
            f"{flops['student'] / 1e6:,.2f} of the student. Seconds are wall-clock, for one process with "
            f"{_one(record['threads'])} thread(s), and include the passes over validation and test images.",
        ]
    return [*lines, ""]


def online(record: dict) -> list[str]:
    """The section on methods that were run both ways, [] where none was."""
    rows = [row for row in record["methods"] if row["over_online"]]
    if not rows:
        return []
    cells = ((row["title"], percent(row["test"]), points(row["over_online"])) for row in rows)
    table = _table("method | from the bank, test % | over online, points", cells)
    return [f"## A bank of {record['views']} views against snapshots that run", "", *table, ""]


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
