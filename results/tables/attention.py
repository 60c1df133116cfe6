"""The tables of docs/results/attention.md."""

from statistics import mean

from tables import head, provenance, spread, table_row


def attention(record: dict, part: str) -> str:
    """A table of results/attention.py: snapshots, fits, students or targets; means over seeds."""
    commits = [made["commit"] for kind in ("teachers", "cells", "fits") for made in record[kind]]
    return "\n".join(_ATTENTION[part](record)) + f"\n\n{provenance(record, commits)}"


def _weights(several: list[list[float]]) -> str:
    return " ".join(f"{mean(w):.2f}" for w in zip(*several, strict=True))


def _snapshots(record: dict) -> list[str]:
    teachers = record["teachers"]
    rows = [(f"snapshot {i + 1}", "members", i) for i in range(len(teachers[0]["val"]["members"]))]
    rows += [("uniform mean", "uniform", 0), ("for each image the best by its label", "oracle", 0)]
    lines = head(
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
        lines.append(table_row(title, *cells))
    return lines


def _fixed(record: dict) -> list[str]:
    teachers = record["teachers"]
    lines = head("temperature", "least nll on training images", "least nll on validation images")
    for tau in teachers[0]["val"]["best_fixed"]:
        cells = [_weights([t[split]["best_fixed"][tau] for t in teachers]) for split in ("train", "val")]
        lines.append(table_row(f"{float(tau):g}", *cells))
    return lines


def _fits(record: dict) -> list[str]:
    lines = head(
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
        lines.append(table_row(name, *numbers))
    return lines


def _students(record: dict) -> list[str]:
    accuracy = {(c["name"], c["seed"]): c["val"]["accuracy"] for c in record["cells"]}
    names = dict.fromkeys(name for name, _ in accuracy)
    stages = ("explored_on", "confirmed_on")
    seeds = {stage: f"seeds {record[stage][0]}–{record[stage][-1]}" for stage in stages}
    columns = [f"{what}, {seeds[stage]}" for stage in stages for what in ("accuracy, %", "less uniform's")]
    lines = head("taught by", *columns)
    for name in names:
        cells = []
        for stage in stages:
            have = [s for s in record[stage] if (name, s) in accuracy]
            few = f" ({len(have)} seeds)" if len(have) < len(record[stage]) else ""
            cells.append(spread([accuracy[name, s] for s in have], 100) + few if len(have) > 1 else "")
            less = [accuracy[name, s] - accuracy["uniform", s] for s in have if ("uniform", s) in accuracy]
            cells.append(spread(less, 100, "+") if len(less) > 1 and name != "uniform" else "")
        lines.append(table_row(name, *cells))
    return lines


def _targets(record: dict) -> list[str]:
    lines = head(
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
        lines.append(table_row(name, *numbers))
    return lines


_ATTENTION = {"snapshots": _snapshots, "fixed": _fixed, "fits": _fits, "students": _students, "targets": _targets}
