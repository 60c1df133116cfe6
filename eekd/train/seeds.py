"""A run once per seed: RUN/seed-0, RUN/seed-1, ..., each an ordinary run, and what all of them say together.

RUN/summary.json has format, seconds (the sum over seeds), seeds, and rows like those of an ordinary run but for

    val, test           mean and std over seeds, in place of val_accuracy and test_accuracy
    over_ce, over_last  of a student: its accuracy less that of the ce or last student of the same seed: n, mean, low
                        and high, the ends of Student's 95 % interval (eekd.statistics); null where there is none

and seconds_per_epoch, the mean over seeds; and findings, on the means (eekd.train.findings). Accuracies are fractions
of 1, those of gains of the test images.
"""

from pathlib import Path
from statistics import mean

from eekd.statistics import mean_std, paired, points, sign
from eekd.train.checked import title_of
from eekd.train.run_folder import read_record


def seeds_of(config) -> range:
    """The seeds of a run."""
    return range(config.seed, config.seed + config.seeds)


def summary_of(run: Path, seeds: range) -> dict:
    """The content of RUN/summary.json, from those of its seeds, but for the format."""
    each = [read_record(run / f"seed-{seed}" / "summary.json", "seconds", "rows") for seed in seeds]
    rows = []
    for same in zip(*(summary["rows"] for summary in each), strict=True):
        row = {key: same[0][key] for key in ("kind", "name", "model", "parameters", "epochs")}
        for split in ("val", "test"):
            row[split] = mean_std([one[f"{split}_accuracy"] for one in same])
        times = [one["seconds_per_epoch"] for one in same]
        rows.append(row | {"seconds_per_epoch": None if None in times else mean(times)})
    test = [{row["name"]: row["test_accuracy"] for row in one["rows"] if row["kind"] == "student"} for one in each]
    for row in rows:
        for other in ("ce", "last"):
            row[f"over_{other}"] = None
            if row["kind"] == "student" and other in test[0] and row["name"] not in ("ce", other):
                these, those = ({n: one[name] for n, one in enumerate(test)} for name in (row["name"], other))
                row[f"over_{other}"] = paired(these, those)
    return {"seconds": sum(summary["seconds"] for summary in each), "seeds": [*seeds], "rows": rows}


def sentence(summary: dict) -> str:
    """What was seen, in one sentence: what EEKD, or else the last student, gained over ce and over last."""
    rows = {row["name"]: row for row in summary["rows"] if row["over_ce"] or row["over_last"]}
    if not rows:
        return ""
    row = rows.get("attention") or [*rows.values()][-1]
    name = "EEKD" if row["name"] == "attention" else title_of(row["name"])
    parts = []
    for other, title in (("ce", "training alone"), ("last", "plain distillation from the last snapshot")):
        if row[f"over_{other}"]:
            parts.append(f"{points(row[f'over_{other}'])} points against {title} ({verdict(row[f'over_{other}'])})")
    return f"Over {len(summary['seeds'])} seeds, the student by {name} has {' and '.join(parts)}, with 95 % intervals."


def verdict(difference: dict) -> str:
    """Whether the interval lies above 0, below it, or leaves it open."""
    return {1: "ahead", 0: "undecided", -1: "behind"}[sign(difference)]
