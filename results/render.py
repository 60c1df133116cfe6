"""Writes the tables of README.md and docs/, and the plots, from the JSON files beside this script.

python results/render.py          # rewrites what stands between <!-- table:NAME --> and <!-- end -->,
                                  # docs/results/study.md, and the plots beside it
python results/render.py --check  # changes nothing; exits 1 where a table is not what the JSON says

Over 350 lines: one function for each table, and no table in two places.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median, stdev

import evidence_page

from eekd.compare import page as comparison
from eekd.statistics import paired
from eekd.train import seeds as over_seeds
from eekd.train.checked import title_of

HERE = Path(__file__).parent
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ISAS = {"avx2": "AVX2", "avx512": "AVX-512"}


def spread(values: list[float], scale: float = 1.0, sign: str = "") -> str:
    """mean ± std"""
    values = [v * scale for v in values]
    return f"{mean(values):{sign}.2f} ± {stdev(values):.2f}"


def provenance(record: dict, commits: Iterable[str] = ()) -> str:
    env = record["environment"]
    commit = ", ".join(dict.fromkeys(c[:9] + c[40:] for c in commits or [env["commit"] or "unknown"]))
    if "driver" in record:
        device = f"{record['device']}, driver {record['driver']}, triton {env['triton']}"
    else:
        device = f"{env['cpu']}, {env['threads']} threads"
    return f"`{shlex.join(record['command'])}` on {device}, torch {env['torch']}, commit {commit}."


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
    lines = [f"> {over_seeds.sentence(summary)}", ""]
    lines += ["| | network | parameters | test accuracy, % | over CE, points | over KD (last) |"]
    lines += ["|---|---|--:|--:|--:|--:|"]
    for row in summary["rows"]:
        gains = [over_seeds.points(row[key]) if row[key] else "" for key in ("over_ce", "over_last")]
        cells = [title_of(row["name"]), row["model"], f"{row['parameters']:,}"]
        cells.append(over_seeds.spread(row["test"]))
        lines.append(f"| {' | '.join([*cells, *gains])} |")
    words = f"Mean ± std over {len(summary['seeds'])} seeds, in brackets 95 % intervals of the paired gains"
    return "\n".join([*lines, "", f"{words}, {wall:.0f} s in all: {provenance(record)}"])


def bench(record: dict) -> str:
    """Times of the kernel bench; ratios and share of the copy bandwidth are the faster backend's."""
    rows, summary = record["rows"], record["summary"]
    ran = {name for row in rows for name in row["contenders"] if "us" in row["contenders"][name]}
    backends = [name for name in ("native", "triton") if name in ran]
    baselines = [b for b in ("eager", "compile", "liger") if any(row["best_us"].get(b) for row in rows)]
    copied = "copy" in ran
    several = [key for key in ("dtype", "layout") if len({row[key] for row in rows}) > 1]
    head = ["(B, M, C, K)" if len(rows[0]["shape"]) == 4 else "(B, M, C)", *several, "fusion"]
    columns = ["eekd, µs"] if len(backends) == 1 else [f"{name}, µs" for name in backends]
    columns += ["torch.compile" if b == "compile" else b for b in baselines]
    ratios = [f"vs_{b}" for b in baselines]
    tail = [f"× {b}" for b in baselines] + ["% of copy"] * copied + ["faster"] * (len(backends) > 1)
    lines = [f"| {' | '.join([*head, *columns, *tail])} |"]
    lines += [f"|{'---|' * len(head)}{'--:|' * (len(columns) + len(tail))}"]

    def line(*cells):
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")

    def number(x, spec):
        return "" if x is None else format(x, spec)

    for row in rows:
        best = row["contenders"].get(row["fastest"], {})
        us = [row["contenders"].get(name, {}).get("us") for name in backends]
        us += [row["best_us"].get(b) for b in baselines]
        cells = [number(x, ",.0f") for x in us] + [number(best.get(ratio), ".1f") for ratio in ratios]
        cells += [number(best.get("percent_of_copy"), ".0f")] * copied
        cells += [row["fastest"] or ""] * (len(backends) > 1)
        line(f"({', '.join(map(str, row['shape']))})", *(row[key] for key in several), row["fusion"], *cells)
    for name in backends:
        means = [number(summary[name].get(f"geomean_{ratio}"), ".1f") for ratio in ratios]
        of = f" of {name}" if len(backends) > 1 else ""
        faster = [f"{summary[name]['fastest']} of {len(rows)}"] * (len(backends) > 1)
        blank = [""] * (len(head) - 1 + len(columns))
        line(f"geometric mean{of}", *blank, *(f"**{x}**" for x in means), *[""] * copied, *faster)
    dtypes = ", ".join(dict.fromkeys(SHORT[row["dtype"]] for row in rows))
    return "\n".join(lines) + f"\n\nForward + backward, {dtypes}, median: {provenance(record)}"


def by_dtype(records: list[dict]) -> str:
    """Runs of the kernel bench of several dtypes, by instruction set: microseconds."""
    names = [ISAS[record["environment"]["cpu_capability"]] for record in records]
    dtypes = list(dict.fromkeys(row["dtype"] for row in records[0]["rows"]))
    lines = _head("(B, M, C)", "fusion", *(f"{name}: {SHORT[dtype]}, µs" for name in names for dtype in dtypes))
    for i in range(0, len(records[0]["rows"]), len(dtypes)):
        row = records[0]["rows"][i]
        us = [r["contenders"]["native"]["us"] for record in records for r in record["rows"][i : i + len(dtypes)]]
        lines.append(_row(f"({', '.join(map(str, row['shape']))})", row["fusion"], *(f"{x:,.0f}" for x in us)))
    sources = "\n".join(f"{name}: {provenance(r)}" for name, r in zip(names, records, strict=True))
    return "\n".join(lines) + f"\n\nForward + backward, median. {sources}"


def overhead(record: dict) -> str:
    """The way to the kernel, and the same training step before and now."""
    shapes = [f"({', '.join(map(str, step['shape']))})" for step in record["way"]]
    lines = _head("µs", *shapes)
    for name, title in record["titles"].items():
        lines.append(_row(title, *(f"{step['us'][name]:.1f}" for step in record["way"])))
    if all("processes" in step for step in record["way"]):
        turns = [step["processes"] for step in record["way"]]
        rest = [step["us"]["nothing"] for step in record["way"]]
        words = ", ".join(
            f"{x['before']:.1f} and {x['now']:.1f} µs at {shape}, without autograd's own {x['before'] - own:.1f} and "
            f"{x['now'] - own:.1f}"
            for x, own, shape in zip(turns, rest, shapes, strict=True)
        )
        lines += ["", f"A step at commit {turns[0]['commit'][:9]} and now, taking turns: {words}."]
    return "\n".join([*lines, "", f"Forward + backward, fp32, median: {provenance(record)}"])


def side_by_side(records: list[dict]) -> str:
    """Two runs of the kernel bench at the same shapes, by instruction set."""
    if len({row["dtype"] for row in records[0]["rows"]}) > 1:
        return by_dtype(records)
    names = [ISAS[record["environment"]["cpu_capability"]] for record in records]
    columns = [f"{name}: {what}" for name in names for what in ("µs", "× eager", "× compile")]
    lines = _head("(B, M, C)", "fusion", *columns)
    for rows in zip(*(record["rows"] for record in records), strict=True):
        cells = []
        for row in rows:
            r = row["contenders"]["native"]
            cells += [f"{r['us']:,.0f}", f"{r['vs_eager']:.1f}", f"{r['vs_compile']:.1f}"]
        lines.append(_row(f"({', '.join(map(str, rows[0]['shape']))})", rows[0]["fusion"], *cells))
    for title, kind in (("geometric mean", "geomean"), ("least", "least")):
        of = [record["summary"]["native"] for record in records]
        cells = [x for f in of for x in ("", f"**{f[f'{kind}_vs_eager']:.1f}**", f"**{f[f'{kind}_vs_compile']:.1f}**")]
        lines.append(_row(title, "", *cells))
    sources = "\n".join(f"{name}: {provenance(r)}" for name, r in zip(names, records, strict=True))
    return "\n".join(lines) + f"\n\nForward + backward, fp32, median. {sources}"


def forwards(record: dict) -> str:
    """Milliseconds and ratio to one by one of every way in which M snapshots see a batch."""
    short = {"float32": "fp32", "bfloat16": "bf16"}
    cases = record["forwards"]
    names = [f"{c['model']}, {c['batch']}, {short[c['dtype']]}" for c in cases]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'--:|' * len(cases)}"]
    for way in dict.fromkeys(way for case in cases for way in case["ways"]):
        cells = [case["ways"].get(way, {}) for case in cases]
        cells = [f"{c['ms']:,.1f} ({c['ratio']:.2f})" if "ms" in c else "failed" if c else "" for c in cells]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    note = f"Milliseconds for {record['snapshots']} snapshots; in brackets, how many times as fast as one by one"
    return "\n".join([*lines, "", f"{note}. {provenance(record)}"])


def cost(record: dict) -> str:
    """Seconds of an epoch and the whole cost of a student, for each pair."""
    epochs, views, m = (record[key] for key in ("epochs", "views", "snapshots"))
    lines = []
    for pair in record["pairs"]:
        seconds, total, counts = pair["seconds"], pair["computed_total"], pair["forwards"]
        title = pair["pair"].replace("-", " → ")
        lines += [
            f"| {title} | s per epoch | × CE | wait for the bank | teacher forwards per image | hours in all |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for name, s in seconds.items():
            wait = f"{100 * pair['wait'][name]:.2f} %" if name in pair["wait"] else ""
            hours = f"{total[name] / 3600:.2f}"
            lines.append(f"| {name} | {s:.2f} | {s / seconds['CE']:.2f} | {wait} | {counts[name]:,} | {hours} |")
        lines += [
            "",
            f"{pair['images']:,} images of {pair['image_size']} × {pair['image_size']}, batch {pair['batch']}, "
            f"{pair['precision']}; the teacher's epoch {pair['teacher_epoch']:.2f} s, the bank {pair['bank']:.1f} s.",
            "",
        ]
    note = (
        f"Medians. The last two columns are computed: {epochs} epochs of the teacher (three forwards a training step), "
        f"the bank of {views} views of {m} snapshots where there is one, {epochs} epochs of the student"
    )
    return "\n".join([*lines, f"{note}. {provenance(record)}"])


def scaling(record: dict) -> str:
    """Seconds of an epoch by the number of processes, and what of the ideal that is."""
    lines = _head("student", "s, 1 process", "s, 2 processes", "images/s, 1", "images/s, 2", "efficiency, %")
    for way in record["ways"]:
        one, two = (way["seconds"][n] for n in ("1", "2"))
        speeds = (f"{record['images'] / s:,.0f}" for s in (one, two))
        lines.append(_row(way["name"], f"{one:.2f}", f"{two:.2f}", *speeds, f"{100 * one / (2 * two):.0f}"))
    note = (
        f"An epoch of {record['model']} on {record['images']:,} images of {record['image_size']} × "
        f"{record['image_size']}, {record['batch']} a step, medians; one core for each process."
    )
    return "\n".join([*lines, "", f"{note} {provenance(record)}"])


def precisions(record: dict) -> str:
    """Seconds of an epoch by settings, on a processor as it is and limited."""
    lines = ["| preset | trained | settings | s | s, limited to AVX2 | × |", "|---|---|---|--:|--:|--:|"]
    for row in record["settings"]:
        names = [row["preset"], row["phase"], row["setting"]]
        if row["setting"] == "preset":
            words = dict.fromkeys(row["computed"].values())
            names[2] = "the preset's: " + (" and ".join(words) if len(words) > 1 else [*words][0])
        whole, limited = row["seconds"].values()
        lines.append(_row(*names, f"{whole:.2f}", f"{limited:.2f}", f"{limited / whole:.1f}"))
    note = (
        f"An epoch of {record['images']:,} images in one thread. One machine, as it is and limited by "
        "`EEKD_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`, not two machines"
    )
    return "\n".join([*lines, "", f"{note}; {record['note']}. {provenance(record)}"])


def waiting(record: dict) -> str:
    """Seconds of an epoch by how long threads spin, alone and beside a busy process."""
    lines = ["| teacher of | turns | alone | beside a busy process |", "|---|--:|--:|--:|"]
    whose = {"300000": "300,000, libgomp's", "3000": "3,000, eekd's", "0": "0, `OMP_WAIT_POLICY=passive`"}
    for row in record["spins"]:
        cells = (f"{row['seconds'][busy]:.2f}" if busy in row["seconds"] else "" for busy in ("0", "1"))
        lines.append(_row(row["preset"], whose[row["spins"]], *cells))
    note = (
        f"Seconds of an epoch of {record['images']:,} images in two threads, which have two cores for themselves, or "
        "share them with a process that is always busy and the machine's other work"
    )
    return "\n".join([*lines, "", f"{note}; {record['note']}. {provenance(record)}"])


def since(record: dict) -> str:
    """Seconds of epochs and imports at an older commit and now."""
    lines = _head("seconds", f"commit {record['commit'][:9]}", "now", "×")
    for row in record["since"]:
        lines.append(
            _row(row["what"], f"{row['before']:.2f}", f"{row['now']:.2f}", f"{row['now'] / row['before']:.2f}")
        )
    note = "An epoch of the digits at 28 x 28, resnet8 and resnet8_w4, and a whole process that imports; medians"
    return "\n".join([*lines, "", f"{note}. {provenance(record)}"])


def online(record: dict) -> str:
    """Students from a bank against the same ones beside running snapshots."""
    config = record["config"]
    what = f"{record['images']:,} images, augment {config['augment']}, {config['student']['epochs']} epochs"
    table = comparison.online(record)[2:-1]
    return "\n".join(
        [
            *table,
            "",
            f"{what}, {len(record['seeds'])} seeds; in brackets Student's 95 % interval of "
            f"paired differences. {provenance(record, record['commits'])}",
        ]
    )


def linear(record: dict) -> str:
    lines = [
        "Time of a step is relative to its matrix products alone; memory is the peak beyond inputs and outputs.",
        "",
    ]
    names = [name for name in record["steps"][0]["seconds"] if name != "products"]
    lines += _head("N, H, H_m, V, M", "dtype", *names, "memory", "memory of eager")
    for row in record["steps"]:
        times = [f"{row['seconds'][name] / row['seconds']['products']:.2f}" for name in names]
        memory = [f"{row['memory'][name] / 2**20:.0f} MiB" for name in ("ours", "eager")]
        lines.append(_row(", ".join(map(str, row["shape"])), row["dtype"], *times, *memory))
    for row in record["shared_head"]:
        ratio = row["seconds"]["5"] / row["seconds"]["1"]
        shape = ", ".join(map(str, row["shape"]))
        lines += [
            "",
            f"With one shared head and logit fusion ({shape}), M = 5 takes {ratio:.2f} times as long as M = 1.",
        ]
    return "\n".join([*lines, "", provenance(record)])


def language(record: dict, name: str) -> str:
    """A task of results/language.py: teacher and students, paired differences, and what they cost."""
    task = record["tasks"][name]
    cells, scale = task["cells"], 100 if task["metric"] == "accuracy" else 1
    unit = "%" if scale > 1 else ""
    known = {who: {c["seed"]: c for c in cells if c["name"] == who} for who in dict.fromkeys(c["name"] for c in cells)}
    title = f"test {task['metric']}" + f", {unit}" * bool(unit)
    lines = _head("", "parameters", title, "less CE's", "less last's", "tokens per second", "memory, MiB")
    for who, runs in known.items():
        values = [scale * c["test"] for c in runs.values()]
        score = f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
        scores = {other: {s: scale * c["test"] for s, c in known[other].items()} for other in known}
        less = [
            paired(scores[who], scores[other]) if who not in ("teacher", other) else None for other in ("ce", "last")
        ]
        gains = ["" if d is None or who == "ce" else _interval(d) for d in less]
        costs = [
            f"{mean(c['tokens_per_second'] for c in runs.values()):,.0f}",
            f"{max(c['memory'] for c in runs.values()) / 2**20:,.0f}",
        ]
        whose = "teacher" if who == "teacher" else f"student, {title_of(who)}"
        lines.append(_row(whose, f"{next(iter(runs.values()))['parameters']:,}", score, *gains, *costs))
    seconds, size = (mean(c["stored"][key] for c in known["teacher"].values()) for key in ("seconds", "bytes"))
    running = "; ".join(
        f"{title_of(c['name'])} {c['tokens_per_second']:,.0f} and {c['memory'] / 2**20:,.0f} MiB"
        for c in task["speeds"]
    )
    count = len(known["ce"])
    words = (
        f"Mean ± std over {count} seed{'s' * (count > 1)} of the students, all of one teacher; in brackets Student's "
        "95 % interval of the paired differences. Tokens are those of a second of processor time. Students read stored "
        f"outputs of the snapshots, which took {seconds:.0f} s and {size / 2**20:,.0f} MiB. With running snapshots: "
        f"{running}."
    )
    lines += ["", words, ""]
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return "\n".join(lines) + provenance(record, [c["commit"] for c in cells]).rstrip(".") + f", {versions}."


def _interval(known: dict) -> str:
    """A paired difference: +2.10 [+1.60, +2.60]."""
    ends = "" if known["low"] is None else f" [{known['low']:+.2f}, {known['high']:+.2f}]"
    return f"{known['mean']:+.2f}{ends}"


def gpu(record: dict) -> str:
    """Both backends at many shapes."""
    lines = ["| (B, M, C) | dtype | fusion | copy, µs | triton | native | eager | % of the floor | triton, × eager |"]
    lines += ["|---|---|---|--:|--:|--:|--:|--:|--:|"]
    for row in record["shapes"]:
        copy, triton, native, eager = row["copy_us"], row["triton"]["us"], row["native"]["us"], row.get("eager_us")
        numbers = f"{copy:.0f} | {triton:.0f} | {native:.0f} | {f'{eager:,.0f}' if eager else ''}"
        ratio = f"{eager / triton:.1f}" if eager else ""
        lines.append(
            f"| {tuple(row['shape'])} | {row['dtype']} | {row['fusion']} | {numbers} | "
            f"{100 * copy / min(triton, native):.0f} | {ratio} |"
        )
    note = f" {record['note']}" if "note" in record else ""
    return "\n".join([*lines, "", f"Forward + backward, median: {provenance(record)}{note}"])


def throughput(record: dict) -> str:
    """Images a second of eekd's loader and torchvision's."""
    lines = _head("transforms", "workers", "eekd", "torchvision", "×")
    for row in record["loaders"]:
        rates = [f"{median(row['images per second'][name]):.0f}" for name in ("eekd", "torchvision")]
        lines.append(_row(row["transforms"], str(row["workers"]), *rates, f"{row['ratio']:.2f}"))
    words = f"Images a second, JPEGs of 500 × 375 to {record['size']} × {record['size']}, medians"
    return "\n".join([*lines, "", f"{words}. {provenance(record)}"])


def beside(record: dict) -> str:
    """Seconds and accuracy of plain distillation by others' losses, and by eekd."""
    lines, config = _head("", "s per epoch", "test accuracy, %"), record["config"]
    for name, runs in record["beside"].items():
        seconds = median(second for run in runs for second in run["seconds"])
        lines.append(_row(name, f"{seconds:.2f}", spread([run["test"] for run in runs], 100)))
    size = f"{config['train_limit']:,} images, {config['student']['epochs']} epochs"
    words = f"{len(runs)} seeds of preset `{record['preset']}`, with {size}, fp32"
    return "\n".join([*lines, "", f"{words}. {provenance(record)}"])


def glyphs(record: dict) -> str:
    """Packages, faces and images of each part of a data set that results/glyphs.py drew."""
    lines, classes = _head("part", "packages", "faces", "images"), len(record["characters"])
    for part in dict.fromkeys(package["part"] for package in record["packages"]):
        faces = [len(package["faces"]) for package in record["packages"] if package["part"] == part]
        lines.append(_row(part, f"{len(faces)}", f"{sum(faces)}", f"{sum(faces) * classes:,}"))
    return "\n".join([*lines, "", f"{classes} classes. SHA-256 of all pixels: `{record['sha256']}`."])


def tried(record: dict) -> str:
    """What a kernel became, step by step."""
    shapes = [str(tuple(shape)) for shape in record["tried_at"]]
    lines = [f"| {' | '.join(shapes)} | what |", "|" + "--:|" * len(shapes) + "---|"]
    lines += [f"| {' | '.join(map(str, step['rows_us']))} | {step['what']} |" for step in record["tried"]]
    return "\n".join(lines)


def launches(record: dict) -> str:
    """A launch table: what Triton's rows kernel takes by the rule, and by the launch that was found."""
    lines = ["| bucket | by the rule, µs | by the table | columns at once | warps | registers at most |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    for bucket, entry in record["launches"].items():
        cut = entry["launch"]
        how = f"{cut['block']}{'' if cut['on_chip'] else ', read twice'} | {cut['num_warps']} | {cut['maxnreg'] or ''}"
        lines.append(f"| {bucket} | {entry['us_by_rule']:.0f} | {entry['us']:.0f} | {how} |")
    return "\n".join([*lines, "", f"The rows alone: {provenance(record)}"])


def attention(record: dict, part: str) -> str:
    """A table of results/attention.py: snapshots, fits, students or targets; means over seeds."""
    commits = [made["commit"] for kind in ("teachers", "cells", "fits") for made in record[kind]]
    return "\n".join(_ATTENTION[part](record)) + f"\n\n{provenance(record, commits)}"


def _head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _weights(several: list[list[float]]) -> str:
    return " ".join(f"{mean(w):.2f}" for w in zip(*several, strict=True))


def _snapshots(record: dict) -> list[str]:
    teachers = record["teachers"]
    rows = [(f"snapshot {i + 1}", "members", i) for i in range(len(teachers[0]["val"]["members"]))]
    rows += [("uniform mean", "uniform", 0), ("for each image the best by its label", "oracle", 0)]
    lines = _head(
        "",
        *(
            f"{what}, {where}"
            for what in ("accuracy, %", "nll at 1", "nll at 5")
            for where in ("training", "validation")
        ),
    )
    for title, kind, i in rows:
        cells = []
        for key, scale, digits in (("accuracy", 100, 2), ("nll_1", 1, 3), ("nll", 1, 3)):
            for split in ("train", "val"):
                cells.append(f"{mean(t[split][kind][i][key] for t in teachers) * scale:.{digits}f}")
        lines.append(_row(title, *cells))
    return lines


def _fixed(record: dict) -> list[str]:
    teachers = record["teachers"]
    lines = _head("temperature", "least nll on training images", "least nll on validation images")
    for tau in teachers[0]["val"]["best_fixed"]:
        cells = [_weights([t[split]["best_fixed"][tau] for t in teachers]) for split in ("train", "val")]
        lines.append(_row(f"{float(tau):g}", *cells))
    return lines


def _fits(record: dict) -> list[str]:
    lines = _head(
        "attention learned",
        "nll at 5, training",
        "nll at 5",
        "nll at 1",
        "of the mean weights, at 5",
        "accuracy, %",
        "weights",
        "entropy",
    )
    whole = len(record["explored_on"])
    rows = {"uniform": [[t[split]["uniform"][0] for t in record["teachers"]] for split in ("val", "train")]}
    for name in dict.fromkeys(fit["name"] for fit in record["fits"]):
        fits = [fit for fit in record["fits"] if fit["name"] == name]
        name += f", seed {fits[0]['seed']} only" if len(fits) == 1 < whole else ""
        rows[name] = [fit["val"] for fit in fits], [fit["train"] for fit in fits]
    for name, (val, train) in rows.items():
        numbers = [f"{mean(q['nll'] for q in train):.3f}"]
        numbers += [f"{mean(q[key] for q in val):.3f}" for key in ("nll", "nll_1", "nll_mean")]
        numbers += [
            f"{100 * mean(q['accuracy'] for q in val):.2f}",
            _weights([q["weights"] for q in val]),
            f"{mean(q['weight_entropy'] for q in val):.2f}",
        ]
        lines.append(_row(name, *numbers))
    return lines


def _students(record: dict) -> list[str]:
    accuracy = {(c["name"], c["seed"]): c["val"]["accuracy"] for c in record["cells"]}
    names = dict.fromkeys(name for name, _ in accuracy)
    stages = ("explored_on", "confirmed_on")
    seeds = {stage: f"seeds {record[stage][0]}–{record[stage][-1]}" for stage in stages}
    head = [f"{what}, {seeds[stage]}" for stage in stages for what in ("accuracy, %", "less uniform's")]
    lines = _head("taught by", *head)
    for name in names:
        cells = []
        for stage in stages:
            have = [s for s in record[stage] if (name, s) in accuracy]
            few = f" ({len(have)} seeds)" if len(have) < len(record[stage]) else ""
            cells.append(spread([accuracy[name, s] for s in have], 100) + few if len(have) > 1 else "")
            less = [accuracy[name, s] - accuracy["uniform", s] for s in have if ("uniform", s) in accuracy]
            cells.append(spread(less, 100, "+") if len(less) > 1 and name != "uniform" else "")
        lines.append(_row(name, *cells))
    return lines


def _targets(record: dict) -> list[str]:
    lines = _head(
        "taught by",
        "nll, training",
        "nll",
        "nll at 1",
        "less uniform's",
        "weights",
        "entropy",
        "gradient ‖attention‖ / ‖student‖",
    )
    cells = [c for c in record["cells"] if "target" in c["val"]]
    for name in dict.fromkeys(c["name"] for c in cells):
        same = [c for c in cells if c["name"] == name]
        val = [c["val"]["target"] for c in same]
        numbers = [f"{mean(c['train']['target']['nll'] for c in same):.3f}"]
        numbers += [f"{mean(q[key] for q in val):.3f}" for key in ("nll", "nll_1")]
        numbers += [f"{mean(c['val']['target']['nll'] - c['val']['uniform']['nll'] for c in same):+.3f}"]
        numbers += [_weights([q["weights"] for q in val]), f"{mean(q['weight_entropy'] for q in val):.2f}"]
        ratios = [e["grad_attention"] / e["grad_student"] for c in same for e in c["curve"]]
        numbers += [f"{mean(ratios):.2g}" if ratios else ""]
        lines.append(_row(name, *numbers))
    return lines


_ATTENTION = {"snapshots": _snapshots, "fixed": _fixed, "fits": _fits, "students": _students, "targets": _targets}


def bandwidth(record: dict, path: Path) -> str | None:
    """Draws the share of the copy bandwidth against C, a line for each backend and M; or says why it cannot."""
    figures = {}  # by fusion, backend and M: {C: %}, of the most rows
    for row in sorted(record["rows"], key=lambda row: row["shape"][0]):
        if (row["dtype"], row["layout"]) == tuple(record["rows"][0][key] for key in ("dtype", "layout")):
            for name, r in row["contenders"].items():
                if name != "copy" and "percent_of_copy" in r:
                    line = figures.setdefault(row["fusion"], {}).setdefault((name, row["shape"][1]), {})
                    line[row["shape"][2]] = r["percent_of_copy"]
    if not figures:
        return "the copy bandwidth was not measured"
    if len({row["shape"][2] for row in record["rows"]}) < 2:
        return "one number of classes makes no curve"
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "eekd", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(figures), figsize=(4 * len(figures), 3), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (fusion, lines) in zip(panels[0], figures.items(), strict=True):
        for (name, snapshots), points in sorted(lines.items()):
            colour, marker = {"native": ("#4477aa", "o"), "triton": ("#cc3311", "s")}[name]
            style = ["-", "--", "-.", ":"][sorted({m for _, m in lines}).index(snapshots) % 4]
            axes.plot(
                *zip(*sorted(points.items()), strict=True),
                marker + style,
                color=colour,
                ms=4,
                label=f"{name}, M = {snapshots}",
            )
        axes.set(title=f"{fusion} fusion", xlabel="classes C", xscale="log", ylim=(0, None))
        axes.axhline(100, color="#888888", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
    panels[0][0].set_ylabel("% of the copy bandwidth, on own traffic")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot(record: dict, path: Path) -> None:
    """Test accuracy of every student and seed beside its teacher's snapshots."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "eekd", "font.size": 9}
    import matplotlib.pyplot as plt

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


def memory_plot(record: dict, path: Path) -> None:
    """Peak memory of a step against the number of rows, ours and eager's."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    points = record["memory_by_rows"]["points"]
    for name, title in (("eager", "eager, all logits"), ("ours", "linear_ensemble_kd")):
        axes.plot([p["rows"] for p in points], [p["memory"][name] / 2**20 for p in points], marker="o", label=title)
    h, h_m, v, m = record["memory_by_rows"]["shape"]
    axes.set(xlabel=f"rows (H {h}, H_m {h_m}, V {v:,}, M {m}, fp32)", ylabel="MiB beyond inputs and outputs")
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def file_of(name: str) -> Path:
    """Of a record: here, or a launch table of the kernels."""
    file = HERE / f"{name}.json"
    return file if file.exists() else HERE.parent / "kernels" / "launch" / f"{name}.json"


def main(argv: list[str]) -> int:
    docs = HERE.parent / "docs"
    pages = [HERE.parent / "README.md", *sorted(docs.rglob("*.md"))]
    stale, record, study = [], HERE / "study.json", docs / "results" / "study.md"
    if record.exists():
        more = "What the attention learns, and why: [attention.md](attention.md)."
        more = more if study.with_name("attention.md").exists() else ""
        fresh = comparison.page(json.loads(record.read_text()), "study-", more)
        if not study.exists() or study.read_text() != fresh:
            stale.append(study)
            if "--check" not in argv:
                study.write_text(fresh)
    for page in pages:
        text = page.read_text()

        def fill(match: re.Match) -> str:
            if "Not measured" in match[0] and not file_of(match[1]).exists():
                return match[0]
            name, _, part = match[1].partition("/")
            if name == "evidence":
                return f"<!-- table:{match[1]} -->\n{evidence_page.PARTS[part]()}\n<!-- end -->"
            record, *more = (json.loads(file_of(one).read_text()) for one in name.split("+"))
            if more:
                table = side_by_side([record, *more])
            elif part == "sentence":
                table = f"> {over_seeds.sentence(record['summary'])}"
            elif part == "tried":
                table = tried(record)
            elif part in record.get("tasks", {}):
                table = language(record, part)
            elif part:
                table = attention(record, part)
            else:
                kinds = {"rows": bench, "forwards": forwards, "pairs": cost, "ways": scaling, "claims": online,
                         "runs": seeds, "summary": demo, "shapes": gpu, "launches": launches, "settings": precisions,
                         "spins": waiting, "since": since, "shared_head": linear, "way": overhead,
                         "packages": glyphs, "loaders": throughput, "beside": beside}  # fmt: skip
                table = next(table for key, table in kinds.items() if key in record)(record)
            return f"<!-- table:{match[1]} -->\n{table}\n<!-- end -->"

        fresh = re.sub(r"<!-- table:(\S+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)
        if fresh != text:
            stale.append(page)
            if "--check" not in argv:
                page.write_text(fresh)
    if "--check" in argv:
        print("\n".join(f"{page} is not what results/ says" for page in stale))
        return bool(stale)
    shown = "".join(page.read_text() for page in pages)
    for path in HERE.rglob("*.json"):
        record, picture = json.loads(path.read_text()), docs / "results" / f"{path.stem}.svg"
        if picture.name not in shown and path.stem != "study":
            continue
        if path.stem == "study":
            comparison.plots(record, picture.parent, path.stem)
        elif "runs" in record:
            plot(record, picture)
        elif record.get("memory_by_rows", {}).get("points"):
            memory_plot(record, picture)
        elif record.get("rows") and (why := bandwidth(record, picture)):
            print(f"{path.relative_to(HERE)} has no plot: {why}")
    if evidence_page.records():
        evidence_page.plot(docs / "results" / "evidence.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
