"""A run as one HTML page.

The page is one file with no script and nothing to load. A run without students, or one that has not ended,
gives the part there is and says what is missing.
"""

import math
import shlex
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error

from eekd.io.files import write_atomic
from eekd.report.charts import (
    NLL,
    Chart,
    Html,
    Line,
    bars,
    grid,
    heatmap,
    limits,
    lines,
    missing,
    note,
    page,
    percent,
    table,
    tag,
    ticks,
)
from eekd.report.run import Run, colour_of, read
from eekd.report.weights import attention, uniform
from eekd.train.checked import title_of


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes a run's page to `out`, else to report.html in its folder; raises what `read` raises."""
    out = Path(out or Path(folder, "report.html"))
    if seeds := several(Path(folder)):
        write_atomic(out, seeds)
        return out
    run = read(folder)
    try:
        sections = [tag("section", tag("h2", title), *draw(run), id=draw.__name__) for title, draw in SECTIONS.items()]
        drawn = page(f"{run.config.data_name} · eekd", header(run), *sections)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} does not have the format of eekd.train.run_folder: {repr(error)}") from error
    write_atomic(out, drawn)
    return out


def several(folder: Path) -> bytes | None:
    """The page of a run over several seeds, whose own pages are written too; None for a run of one seed."""
    from eekd.report import seeds_page
    from eekd.train.run_folder import read_record, read_settings

    if not (folder / "config.json").is_file() or (config := read_settings(folder)).seeds == 1:
        return None
    if not (folder / "summary.json").exists():
        raise FileNotFoundError(f"{folder} has not ended: continue it with --resume {folder}, or draw one of its seeds")
    summary = read_record(folder / "summary.json", "seconds", "seeds", "rows")
    summaries = {}
    for seed in summary["seeds"]:
        own = folder / f"seed-{seed}"
        summaries[seed] = read_record(own / "summary.json", "seconds", "rows")
        report(own)
    return seeds_page.draw(folder, config, summary, summaries)


def header(run: Run) -> Html:
    config, here = run.config, run.environment or {}
    facts = [f"teacher {config.teacher.model} with {config.teacher.snapshots} snapshots"]
    facts += [f"{len(run.students)} students {config.student.model}"] if run.students else []
    facts += [f"seed {config.seed}", here.get("device"), here.get("started", "").replace("T", " ")[:16]]
    facts += [f"{run.summary['seconds']:.0f} s in all"] if run.summary else []
    lacks = [] if run.summary else ["The run has not ended: there is no summary.json yet."]
    for net in (run.teacher, *run.students):
        if not net.known:
            done = f"{len(net.rows)} of {net.epochs} epochs, and no final measurements yet"
            lacks.append(f"{net.title}: {done if net.rows else 'not found'}.")
    lacks += [] if run.students else ["No student: this run trains a teacher only."]
    lacks += run.summary.get("findings", []) if run.summary else []
    return tag("header", tag("h1", config.data_name), note(" · ".join(filter(None, facts))), *map(missing, lacks))


def results(run: Run) -> list[Html]:
    rows = run.summary["rows"] if run.summary else so_far(run)
    images = run.environment["data"]["test"] if run.environment else None
    tested = {row["name"]: row["test_accuracy"] for row in rows if row["test_accuracy"] is not None}

    def error(p):
        return math.sqrt(p * (1 - p) / images) if images else 0

    main = [tested[row["name"]] for row in rows if row["name"] in tested and row["kind"] != "snapshot"]
    low, high = limits([p + side * error(p) for p in main for side in (-1, 1)]) if main else (0, 1)

    def x(p):
        return 8 + 224 * (min(max(p, low), high) - low) / (high - low)

    def strip(name, kind, p):
        if p is None:
            return None
        parts = [tag("path", d="M8,9H232", class_="rule")]
        if "ce" in tested:
            parts.append(tag("path", d=f"M{x(tested['ce']):.5g},-6V24", class_="axis dashed"))
        if low <= p <= high:
            parts += [
                tag("path", d=f"M{x(p - error(p)):.5g},9H{x(p + error(p)):.5g}", class_="leader"),
                tag("circle", cx=x(p), cy=9, r=3 if kind == "snapshot" else 4.5, class_="fill"),
            ]
        else:
            parts.append(tag("path", d="M4,9l8,-4v8z" if p < low else "M236,9l-8,-4v8z", class_="fill"))
        style = f"color: {colour_of(name)}"
        return tag("svg", *parts, viewBox="0 0 240 18", aria_hidden="true", style=style)

    cells = []
    for row in rows:
        name, test, gain, seconds = (row[k] for k in ("name", "test_accuracy", "gain", "seconds_per_epoch"))
        cells.append(
            [
                title_of(name),
                row["model"],
                f"{row['parameters']:,}" if row["parameters"] else "",
                row["epochs"],
                percent(row["val_accuracy"]),
                percent(test),
                "" if gain is None or name == "ce" else f"{100 * gain:+.2f}".replace("-", "−"),
                "" if seconds is None else f"{seconds:.2f}",
                strip(name, row["kind"], test),
            ]
        )
    scale = (
        [tag("text", value, x=x(value / 100), y=12, class_="middle of") for value in ticks(100 * low, 100 * high, 4)]
        if main
        else []
    )
    head = [
        "",
        "network",
        "parameters",
        "epoch",
        "val, %",
        "test, %",
        "gain",
        "s/epoch",
        tag("span", "test accuracy, %", tag("svg", *scale, viewBox="0 0 240 16", aria_hidden="true")),
    ]
    kinds = [row["kind"] for row in rows]
    breaks = {i for i in range(1, len(rows)) if kinds[i] != kinds[i - 1] and kinds[i] != "ensemble"}
    words = ["The ensemble is the mean of the snapshots' probabilities."]
    words.append(
        "Gain: points of test accuracy over CE only, the dashed line."
        if "ce" in tested
        else "No gain without the test accuracy of a CE student in the same run."
    )
    if images and main:
        p = max(main)
        words += [
            f"Whiskers: one standard error from having only {images:,} test images,",
            f"{100 * error(p):.2f} points at {percent(p)} %.",
            "This is one seed; what another would change comes on top.",
        ]
    return [table(head, cells, numbers=range(2, 8), breaks=breaks), note(*words)]


def so_far(run: Run) -> list[dict]:
    """The rows of summary.json while it is not there, None for what is not known."""

    def row(kind, net, test, **own):
        return {
            "kind": kind,
            "name": net.name,
            "model": net.model,
            "parameters": None,
            "epochs": len(net.rows),
            "val_accuracy": net.last("val_accuracy"),
            "test_accuracy": test,
            "gain": None,
            "seconds_per_epoch": net.mean("seconds"),
        } | own

    record, untimed = run.teacher.known, {"seconds_per_epoch": None}
    test = [m["accuracy"] for m in record["test"]["members"]] if record else [None] * (len(run.manifest) + 2)
    rows = [row("teacher", run.teacher, test[-2])]
    for i, entry in enumerate(run.manifest):
        val = entry["metrics"].get("val_accuracy")
        rows.append(
            row(
                "snapshot",
                run.teacher,
                test[i],
                name=f"snapshot {i + 1}",
                epochs=entry["step"],
                val_accuracy=val,
                **untimed,
            )
        )
    if record:
        val = record["val"]["members"][-1]["accuracy"]
        rows.append(row("ensemble", run.teacher, test[-1], name="ensemble", val_accuracy=val, **untimed))
    ends = {net.name: net.known["test"]["accuracy"] for net in run.students if net.known}
    for net in run.students:
        gain = ends[net.name] - ends["ce"] if net.name in ends and "ce" in ends else None
        rows.append(row("student", net, ends.get(net.name), gain=gain))
    return rows


def curves(run: Run) -> list[Html]:
    networks = [net for net in (run.teacher, *run.students) if net.rows]
    if not networks:
        return [missing("No epoch has been trained yet.")]
    half = max(net.last("epoch") for net in networks[1:] or networks) / 2  # the teacher is the first

    def chart(title, y, key, scale, *words, since=0, **log):
        series = [net.line(key, scale, since=since) for net in networks]
        return lines(title, "epoch", y, series, *words, **log)

    augmented = "in training mode, on augmented images"
    return [
        grid(
            chart("Validation accuracy", "accuracy, %", "val_accuracy", 100),
            chart("Validation accuracy, second half", "accuracy, %", "val_accuracy", 100, since=half),
            chart("Training accuracy", "accuracy, %", "train_accuracy", 100, augmented),
            chart("Validation loss", "cross-entropy, nats", "val_loss", 1, "log scale", log=True),
        )
    ]


def snapshots(run: Run) -> list[Html]:
    if not run.teacher.known:
        return [missing("There is no snapshots.json yet: it is written when the teacher has ended.")]
    epochs = [entry["step"] for entry in run.manifest]

    def both(key, split, scale, colour):
        *each, mean = [scale * member[key] for member in run.teacher.known[split]["members"]]
        return [
            Line(split, colour, list(zip(epochs, each, strict=True))),
            Line(f"{split}, ensemble", colour, [(epochs[0], mean), (epochs[-1], mean)], True),
        ]

    def chart(title, y, key, scale, *words, **log):
        series = both(key, "test", scale, "var(--late)") + both(key, "val", scale, "var(--early)")
        return lines(title, "epoch of the snapshot", y, series, *words, **log)

    return [
        grid(
            chart("Accuracy", "accuracy, %", "accuracy", 100), chart("Likelihood", NLL, "nll", 1, "log scale", log=True)
        ),
        tag("h3", "Calibration on test images at temperature 1"),
        note(
            "A disc is a bin of confidence, its area the share of images. Below the diagonal a network",
            "is surer than it is right. ECE, expected calibration error, is the mean distance from it.",
        ),
        grid(*map(reliability, run.teacher.known["test"]["members"]), kind="small"),
    ]


def reliability(member: dict) -> Html:
    chart = Chart(member["name"], "confidence, %", "accuracy, %", (0, 100), (0, 100), width=164, height=180, right=12)
    chart.add("path", d=f"M{chart.x(0)},{chart.y(0)}L{chart.x(100)},{chart.y(100)}", class_="dashed axis")
    bins = member["reliability"]
    for confidence, accuracy, count in zip(bins["confidence"], bins["accuracy"], bins["count"], strict=True):
        if count:
            tooltip = f"{count} images: confidence {percent(confidence)} %, accuracy {percent(accuracy)} %"
            chart.add(
                "circle",
                tag("title", tooltip),
                cx=chart.x(100 * confidence),
                cy=chart.y(100 * accuracy),
                r=max(2.0, 11 * math.sqrt(count / sum(bins["count"]))),
                class_="fill",
                style="color: var(--late); fill-opacity: .8",
            )
    return chart.figure(tag("div", f"ECE {100 * member['ece']:.1f} %"))


def disagreement(run: Run) -> list[Html]:
    values = run.teacher.known["test"]["disagreement"] if run.teacher.known else []
    pairs = {(i + 1, j + 1): values[i][j] for i, j in combinations(range(len(values)), 2)}
    if not pairs:
        return [missing("There is no pair of snapshots that was compared.")]
    least, most = min(pairs, key=pairs.__getitem__), max(pairs, key=pairs.__getitem__)
    return [
        note(
            f"{least[0]} and {least[1]} differ least, on {percent(pairs[least])} % of the test images,",
            f"{most[0]} and {most[1]} most, on {percent(pairs[most])} %; the mean over pairs is",
            f"{percent(sum(pairs.values()) / len(pairs))} %.",
            "Snapshots that agree everywhere teach no more than one of them.",
        ),
        heatmap("Images on which two predict different classes, %", "snapshot", values, "var(--late)"),
    ]


def cost(run: Run) -> list[Html]:
    parts = {
        "snapshots' forward": "var(--early)",
        "own forward": "var(--late)",
        "loss, backward and step": "color-mix(in oklab, var(--late) 45%, var(--page))",
        "waiting for data": "var(--quiet)",
    }
    rows = []
    for net in (run.teacher, *run.students):
        means = map(net.mean, ("seconds", "seconds_teacher", "seconds_forward", "seconds_backward"))
        seconds = [mean for mean in means if mean is not None]
        if len(seconds) == 4:
            whole, *seconds = seconds
            rows.append((net.title, [*seconds, max(whole - sum(seconds), 0)]))
    if not rows:
        return [missing("No epoch has been timed yet.")]
    ratios = [f"{name} {teacher / own:.1f}" for name, (teacher, own, *_) in rows if teacher and own]
    chart = bars("Training time", "seconds per epoch, mean over epochs", rows, parts)
    words = note(f"Forward of the snapshots in units of the student's own: {', '.join(ratios)}.")
    return [words, chart] if ratios else [chart]


def settings(run: Run) -> list[Html]:
    def facts(title, values):
        return tag(
            "div", tag("h3", title), table([], [[key, plain(value)] for key, value in values.items()]), class_="facts"
        )

    config, here = asdict(run.config), run.environment
    teacher, student = config.pop("teacher"), config.pop("student")
    tables = [grid(facts("Run", config), facts("Teacher", teacher), facts("Student", student), kind="thirds")]
    if not here:
        return [*tables, missing("There is no environment.json.")]
    return [*tables, facts("Environment", here | {"command": shlex.join(here["command"])})]


def plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value).lower() if isinstance(value, bool | None) else str(value)


SECTIONS = {
    "Results": results,
    "Accuracy over epochs": curves,
    "What the snapshots know": snapshots,
    "Where snapshots disagree": disagreement,
    "How much weight each snapshot gets": attention,
    "Would uniform weights have been better?": uniform,
    "Where the time goes": cost,
    "Settings and environment": settings,
}
