"""The tables of docs/results/demonstration.md, its plot, and the sentence in README.md."""

from pathlib import Path
from statistics import mean

from eekd.statistics import percent, points
from eekd.train.checked import title_of
from eekd.train.seeds import sentence
from tables import provenance, pyplot, spread


def seeds(record: dict) -> str:
    """Mean ± std of a preset's runs."""
    runs = record["runs"]
    lines = [
        "| | network | parameters | test accuracy, % | gain over CE, points | s per epoch |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for rows in zip(*(run["rows"] for run in runs), strict=True):
        first = rows[0]
        name = f"student, {title_of(first['name'])}" if first["kind"] == "student" else first["name"]
        name += f", epoch {first['epochs']}" if first["kind"] == "snapshot" else ""
        gain = (
            spread([r["gain"] for r in rows], 100, "+") if first["gain"] is not None and first["name"] != "ce" else ""
        )
        seconds = "" if first["seconds_per_epoch"] is None else f"{mean(r['seconds_per_epoch'] for r in rows):.1f}"
        accuracy = spread([r["test_accuracy"] for r in rows], 100)
        lines.append(f"| {name} | {first['model']} | {first['parameters']:,} | {accuracy} | {gain} | {seconds} |")
    minutes, config = mean(run["seconds"] for run in runs) / 60, record["config"]
    made = config["precision"] + " and channels_last" * (config["channels_last"] is True)
    lines += [
        "",
        f"Mean ± std over {len(runs)} seeds, last epoch, in {made}, {minutes:.1f} minutes per seed: "
        f"{provenance(record)}",
    ]
    return "\n".join(lines)


def demo(record: dict) -> str:
    """Means over the demonstration's seeds, with paired gains, and the sentence that the command ends with."""
    summary, wall = record["summary"], record["wall_seconds"]
    lines = [f"> {sentence(summary)}", ""]
    lines += ["| | network | parameters | test accuracy, % | over CE, points | over KD (last) |"]
    lines += ["|---|---|--:|--:|--:|--:|"]
    for row in summary["rows"]:
        gains = [points(row["over_ce"]), points(row["over_last"])]
        cells = [title_of(row["name"]), row["model"], f"{row['parameters']:,}"]
        cells.append(percent(row["test"]))
        lines.append(f"| {' | '.join([*cells, *gains])} |")
    words = f"Mean ± std over {len(summary['seeds'])} seeds, in brackets 95 % intervals of the paired gains"
    return "\n".join([*lines, "", f"{words}, {wall:.0f} s in all: {provenance(record)}"])


def accuracy_plot(record: dict, path: Path) -> None:
    """Test accuracy of every student and seed beside its teacher's snapshots."""
    plt = pyplot("path")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=False, layout="constrained")
    runs = record["runs"]
    rows = runs[0]["rows"]
    snapshots = [i for i, row in enumerate(rows) if row["kind"] == "snapshot"]
    for run in runs:
        values = [100 * run["rows"][i]["test_accuracy"] for i in snapshots]
        left.plot([rows[i]["epochs"] for i in snapshots], values, "o-", color="#4477aa", alpha=0.7, ms=4)
    left.set(title="The teacher's snapshots", xlabel="epoch", ylabel="test accuracy, %")
    students = [i for i, row in enumerate(rows) if row["kind"] == "student"]
    for place, i in enumerate(students):
        values = [100 * run["rows"][i]["test_accuracy"] for run in runs]
        right.plot([place] * len(values), values, "o", color="#4477aa", alpha=0.7, ms=4)
        right.plot([place - 0.2, place + 0.2], [mean(values)] * 2, color="#cc3311")
    names = [title_of(rows[i]["name"]) for i in students]
    right.set_xticks(range(len(names)), names)
    right.set(title="Students: each seed, and the mean", xlim=(-0.5, len(names) - 0.5), ylabel="test accuracy, %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


TABLES = {"runs": seeds, "summary": demo}
