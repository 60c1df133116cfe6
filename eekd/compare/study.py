"""study.json: every finished cell, the statistics over seeds, and what they say about the paper's claims.

    format, command, environment      environment is that of the process that wrote the file
    config, views, augmented          the settings; whether images are augmented
    images, seeds                     training images of an epoch; the seeds found
    commits, threads                  of the cells
    cells                 seed, method, what student.json and the last line of metrics.jsonl say, seconds
    teachers              seed, kind, epochs of its snapshots, seconds, bank_seconds, val and test: each snapshot and
                          their uniform ensemble
    methods               of each: its entry, in title and settings also τ and β of its own (Method.own), n, val and
                          test (mean, std), over_ce, over_uniform, over_last and over_online (paired, test; the latter
                          over the same method without a bank), val_over_ce, val_over_last, weights and weight_entropy
                          at the end (mean over seeds), seconds, cost; where `last` is not compared, a variant stands
                          for it (eekd.compare.methods.representatives)
    ensembles             of each kind of teacher: n, test (mean, std), members (mean test accuracy of each snapshot),
                          over_ordinary (paired)
    claims                of each: principle, claim, parts (text, points, verdict), verdict
    advice                which method to take, by validation images (eekd.compare.verdict.advice)

Accuracies are fractions of 1. A paired difference is taken seed by seed: n, mean, low and high, the ends of
Student's interval mean ± t(0.975, n - 1) std / sqrt(n), null for n = 1. The intervals are not corrected for how
many there are.

cost counts forwards of one image, with a training step as three of them and validation left out:

    teacher_training = 3 N E_t K    teaching = N E_s M, online    teaching_bank = N V M    student_training = 3 N E_s

for N images, E epochs, K teachers, M snapshots and V views; the curriculum runs one snapshot in a step, so its teaching
is N E_s. Where images are not augmented, a snapshot that runs does so once, and what it said is remembered: N M,
online. A teacher is paid for to its end, that of `half` too. gflops_online and gflops_bank weigh them by what one
forward of teacher and student costs (torch.utils.flop_counter).
"""

import json
from pathlib import Path
from statistics import mean

import torch
from torch.utils.flop_counter import FlopCounterMode

from eekd import models
from eekd.compare import page
from eekd.compare.methods import FORMAT, KINDS, METHODS, SWEEP, Method, base_of, folder_of, method, online
from eekd.compare.runner import alone, cell_made
from eekd.compare.variants import titled
from eekd.compare.verdict import CONTRADICTED, HOLDS, MISSING, advice, reference, together, verdict
from eekd.info import environment
from eekd.io.files import read_json, write_json_atomic
from eekd.statistics import interval, mean_std, paired
from eekd.train.config import Config
from eekd.train.run_folder import finite, read_metrics, read_record
from eekd.user_code import is_file_name, own_name


def gather(out: Path, command: list[str], augmented: bool) -> Path:
    """Writes study.json from all that is finished in `out`, and the page and plots beside it."""
    with alone(out, wait=True):
        record = finite(study(out, command, augmented))
        write_json_atomic(out / "study.json", record)
        page.write(record, out)
    return out / "study.json"


def study(out: Path, command: list[str], augmented: bool) -> dict:
    """The content of study.json."""
    settings = read_record(out / "settings.json", "config", "views")
    config = Config.from_json(json.dumps(settings["config"]))
    folders = [path for path in out.glob("seed-*") if path.name[5:].isdecimal()]
    folders.sort(key=lambda path: int(path.name[5:]))
    cells = [_cell(path.parent) for folder in folders for path in _by_table(folder.glob("students/*/cell.json"))]
    teachers = [_teacher(path.parent) for folder in folders for path in sorted(folder.glob("*/teacher.json"))]
    images = next((path for folder in folders for path in folder.glob("*/environment.json")), None)
    images = read_record(images, "data")["data"]["train"] if images else None
    record = {
        "format": FORMAT, "command": command, "environment": environment(), "config": settings["config"],
        "views": settings["views"], "augmented": augmented, "images": images,
        "seeds": sorted({cell["seed"] for cell in cells}),
        "commits": sorted({cell["commit"] or "" for cell in cells}),
        "threads": sorted({cell["threads"] for cell in cells}), "cells": cells, "teachers": teachers,
    }  # fmt: skip
    return record | summarise(record, config, forward_flops(config, cells))


def _by_table(paths) -> list[Path]:
    """Of the methods there are, users' own at the end: another folder is a copy, or unfinished."""
    order = {name: place for place, name in enumerate(METHODS)}

    def place(path):
        return order.get(base_of(path.parent.name), len(order)), path.parent.name

    return sorted((path for path in paths if _method(path.parent)), key=place)


def _method(folder: Path) -> Method | None:
    """The method that a cell's folder is named after; a user's own is the one that the cell names. None for others."""
    name = folder.name
    if base_of(name) not in METHODS:
        recorded = read_record(folder / "cell.json", "method")["method"]
        if not isinstance(recorded, dict) or not is_file_name(recorded.get("weighting")):
            return None
        name = recorded["weighting"] + name.removeprefix(own_name(recorded["weighting"]))
    try:
        return method(name) if folder_of(name) == folder.name else None
    except ValueError:
        return None


def _cell(folder: Path) -> dict:
    how = _method(folder)
    assert how is not None  # by `_by_table`
    cell = cell_made(folder, how)
    same = "seed", "val", "test", "seconds_per_epoch", "commit", "spec", "sha256"
    record = read_record(folder / "student.json", *same)
    last = read_metrics(folder, record)[-1]
    kept = "weights", "weight_entropy", "val_target_nll", "val_target_nll_uniform"
    return {
        "name": folder.name, "method": cell["method"], "epochs": cell["epochs"], "seconds": cell["seconds"],
        "threads": cell["threads"], **{name: record[name] for name in same}, **{name: last.get(name) for name in kept},
    }  # fmt: skip


def _teacher(run: Path) -> dict:
    bank = read_record(run / "bank.json", "seconds")["seconds"] if (run / "bank.json").exists() else None
    seed, stored = int(run.parent.name[5:]), None
    if (run / "bank" / "manifest.json").exists():
        stored = read_json(run / "bank" / "manifest.json")["snapshots"]
    record = read_record(run / "teacher.json")
    del record["format"]
    return {"seed": seed, "kind": run.name, "bank_seconds": bank, "bank_snapshots": stored, **record}


def forward_flops(config: Config, cells: list[dict]) -> dict[str, int]:
    """Floating-point operations of one image's forward, of teacher and student."""
    flops = {}
    for kind, phase in (("teacher", config.teacher), ("student", config.student)):
        if cells:
            data = {name: cells[0]["spec"][name] for name in ("num_classes", "in_channels", "image_size")}
            flops[kind] = flops_of({"name": phase.model, **data, "args": phase.arguments()})
    return flops


def flops_of(spec: dict) -> int:
    """Floating-point operations of one image's forward by the network that eekd.models.build makes."""
    network = models.build(**spec).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, spec["in_channels"], spec["image_size"], spec["image_size"]))
    return counter.get_total_flops()


def summarise(record: dict, config: Config, flops: dict[str, int]) -> dict:
    """`methods`, `ensembles`, `claims` and `advice`, from the cells and teachers of a record."""
    by_name = {}
    for cell in record["cells"]:
        by_name.setdefault(cell["name"], {})[cell["seed"]] = cell
    val, test = (
        {name: {seed: cell[split]["accuracy"] for seed, cell in cells.items()} for name, cells in by_name.items()}
        for split in ("val", "test")
    )
    scores = {
        kind: {
            teacher["seed"]: [member["accuracy"] for member in teacher["test"]["members"]]
            for teacher in record["teachers"]
            if teacher["kind"] == kind
        }
        for kind in KINDS
    }
    ensemble = {kind: {seed: members[-1] for seed, members in values.items()} for kind, values in scores.items()}

    def over(scores: dict, name: str, base: str) -> dict | None:
        other = reference(val, base)
        return None if other in (None, name) else paired(scores[name], scores[other])

    methods = []
    for name, cells in by_name.items():
        several = list(cells.values())
        first = several[0]
        how = Method(**first["method"])
        another = how.settings.keys() & {"model", "model_args"}
        of_own = flops | {"student": flops_of(first["spec"])} if another else flops
        used = how.own(config)
        methods.append({
            "name": name, **first["method"], "title": how.title + titled(used), "settings": how.settings | used,
            "epochs": first["epochs"], "n": len(several),
            "val": mean_std(list(val[name].values())), "test": mean_std(list(test[name].values())),
            "over_ce": over(test, name, "ce"),
            "over_uniform": over(test, name, "uniform"),
            "over_last": over(test, name, "last"),
            "over_online": paired(test[name], test.get(online(name), {})),
            "val_over_ce": over(val, name, "ce"),
            "val_over_last": over(val, name, "last"),
            "weights": [mean(column) for column in zip(*(cell["weights"] for cell in several), strict=True)]
            if first["weights"] else None,
            "weight_entropy": mean(cell["weight_entropy"] for cell in several) if first["weight_entropy"] else None,
            "seconds": _seconds(how, first["epochs"], several, record),
            "cost": cost(how, len(first["epochs"]), config, record["images"], record["views"], of_own,
                         record["augmented"]),
        })  # fmt: skip
    ensembles = [
        {"kind": kind, "n": len(values), "test": mean_std(list(values.values())),
         "members": [mean(column) for column in zip(*scores[kind].values(), strict=True)][:-1],
         "over_ordinary": paired(values, ensemble["ordinary"]) if kind != "ordinary" else None}
        for kind, values in ensemble.items() if values
    ]  # fmt: skip
    costs = {row["name"]: row["cost"] for row in methods}
    standing = {base: name for base in METHODS if (name := reference(val, base))}
    test, costs = ({base: values[name] for base, name in standing.items()} for values in (test, costs))
    return {"flops": flops, "methods": methods, "ensembles": ensembles, "advice": advice(val),
            "claims": claims(test, ensemble, config, costs)}  # fmt: skip


def cost(
    how: Method, snapshots: int, config: Config, images: int | None, views: int, flops: dict, augmented: bool
) -> dict | None:
    """Forwards of one image in what a method needs by itself; see the module."""
    if not images:
        return None
    trainings = 0 if how.weighting == "ce" else config.teacher.snapshots if how.teacher == "sed" else 1
    training = 3 * images * config.teacher.epochs * trainings
    epochs = how.student(config).epochs
    student = 3 * images * epochs
    online, bank = images * passes(how, snapshots, epochs, augmented), images * views * snapshots
    costs = {"teachers": trainings, "teacher_training": training, "teaching": online,
             "teaching_bank": None if how.runs else bank, "student_training": student}  # fmt: skip
    of_student = student * flops["student"]
    costs["gflops_online"] = ((training + online) * flops["teacher"] + of_student) / 1e9
    costs["gflops_bank"] = None if how.runs else ((training + bank) * flops["teacher"] + of_student) / 1e9
    return costs


def passes(how: Method, snapshots: int, epochs: int, augmented: bool) -> int:
    """How often a snapshot of running ones sees every image; once each, where what it says is remembered."""
    if how.weighting == "curriculum":
        return epochs if augmented else min(snapshots, epochs)
    return snapshots * (epochs if augmented else 1)


def _seconds(how: Method, epochs: list[int], cells: list[dict], record: dict) -> dict:
    """Mean seconds of a cell, of all its teachers' training, and of its snapshots' share of the bank."""
    spent = {"student": mean(cell["seconds"] for cell in cells), "teachers": 0.0, "bank": 0.0}
    if how.weighting == "ce":
        return spent
    seeds = {cell["seed"] for cell in cells}
    more = {"sed": [f"sed-{i}" for i in range(1, len(epochs))], "soup": ["soup"]}
    kinds = ["ordinary", *more[how.teacher]] if how.teacher in more else [how.teacher]
    teachers = [t for t in record["teachers"] if t["seed"] in seeds]
    spent["teachers"] = sum(t["seconds"] for t in teachers if t["kind"] in kinds) / len(seeds)
    banks = [
        t["bank_seconds"] * len(epochs) / t["bank_snapshots"]
        for t in teachers
        if t["kind"] == how.teacher and t["bank_seconds"] is not None and t["bank_snapshots"]
    ]
    spent["bank"] = None if how.runs or not banks else mean(banks)
    return spent


def claims(test: dict, ensemble: dict, config: Config, costs: dict) -> list[dict]:
    """What the paper claims, each part a paired difference in test accuracy with its verdict."""

    def part(text: str, difference: dict | None, above: bool = True) -> dict:
        return {"text": text, "above": above, "difference": difference, "verdict": verdict(difference, above)}

    def students(a: str, b: str, above: bool = True) -> dict:
        text = f"student {a} {'above' if above else 'not above'} {b}"
        return part(text, paired(test.get(a, {}), test.get(b, {})), above)

    def ensembles(a: str, b: str) -> dict:
        return part(f"ensemble {a} above {b}", paired(ensemble[a], ensemble[b]))

    m = config.teacher.snapshots
    rivals = "uniform", "linear_increase", "linear_decrease", "last", "entropy", "confidence"
    entries = [
        ("quality", "A cyclic-schedule ensemble is more accurate than the ordinary one, yet teaches worse.",
         [ensembles("cyclic", "ordinary"), students("cyclic-uniform", "uniform", False),
          students("cyclic-attention", "attention", False)]),
        ("quality", "Strong ensembles do not make strong students: independent teachers are better together, "
         "and their student is not.",
         [ensembles("sed", "ordinary"), students("sed", "uniform", False), students("sed", "attention", False)]),
        ("quality", "A half-way snapshot teaches better than the finished teacher (the authors' follow-up).",
         [students("half", "last")]),
        ("weights", "Attention is better than uniform, linearly increasing and linearly decreasing weights.",
         [students("attention", rival) for rival in rivals[:3]]),
        ("weights", "Linearly increasing weights are no better than uniform ones.",
         [students("linear_increase", "uniform", False)]),
    ]  # fmt: skip
    for name in ("attention", "uniform"):
        series = sweep(name, m, test)
        text = f"accuracy of {name} per doubling of M"
        entries.append(("number", f"Accuracy rises with M ({name}).", [part(text, slope(series))]))
        middle, most = series.get(m, {}), series.get(max(SWEEP), {}) if m < max(SWEEP) else {}
        gained = {s: 2 * middle[s] - series[1][s] - most[s] for s in middle if s in most and s in series.get(1, {})}
        entries.append(
            (
                "number",
                f"M = {m} is the compromise ({name}).",
                [part(f"gain from M = 1 to {m} above that from {m} to {max(SWEEP)}", interval(list(gained.values())))],
            )
        )
    rows = [{"principle": principle, "claim": claim, "parts": parts, "verdict": together([p["verdict"] for p in parts])}
            for principle, claim, parts in entries]  # fmt: skip
    return [*rows, cheaper(costs)]


def sweep(name: str, snapshots: int, test: dict) -> dict[int, dict[int, float]]:
    """Test accuracies by M and seed: `last` is M = 1, the bare name is teacher.snapshots."""
    names = {1: "last", **{m: f"{name}-m{m}" for m in SWEEP}, snapshots: name}
    return {m: test[names[m]] for m in sorted(names) if names[m] in test}


def slope(series: dict[int, dict[int, float]]) -> dict | None:
    """The least-squares slope of accuracy on log2 M, seed by seed."""
    if len(series) < 2:
        return None
    seeds = set.intersection(*(set(by_seed) for by_seed in series.values()))
    x = [torch.tensor(float(m)).log2().item() for m in series]
    middle = mean(x)
    spread = sum((a - middle) ** 2 for a in x)
    return interval(
        [
            sum((a - middle) * by_seed[seed] for a, by_seed in zip(x, series.values(), strict=True)) / spread
            for seed in sorted(seeds)
        ]
    )


def cheaper(costs: dict) -> dict:
    """The claim on cost, which is arithmetic: forwards of the teacher's network that EEKD and SED spend."""
    row = {"principle": "cost", "claim": "EEKD costs about 40 % of distillation from M independent teachers.",
           "parts": [], "verdict": MISSING, "ratio": None, "ratio_bank": None}  # fmt: skip
    ours, theirs = costs.get("attention"), costs.get("sed")
    if ours and theirs:
        row["ratio"], row["ratio_bank"] = (
            (ours["teacher_training"] + ours[key]) / (theirs["teacher_training"] + theirs[key])
            for key in ("teaching", "teaching_bank")
        )
        row["ratio_gflops"], row["ratio_gflops_bank"] = (
            ours[key] / theirs[key] for key in ("gflops_online", "gflops_bank")
        )
        row["verdict"] = HOLDS if row["ratio"] <= 0.45 else CONTRADICTED
    return row
