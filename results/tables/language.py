"""The tables of docs/results/language.md."""

from statistics import mean, stdev

from eekd.statistics import paired
from eekd.train.checked import title_of
from tables import head, provenance, table_row


def language(record: dict, name: str) -> str:
    """A task of results/language.py: teacher and students, paired differences, and what they cost."""
    task = record["tasks"][name]
    cells, scale = task["cells"], 100 if task["metric"] == "accuracy" else 1
    unit = "%" if scale > 1 else ""
    known = {who: {c["seed"]: c for c in cells if c["name"] == who} for who in dict.fromkeys(c["name"] for c in cells)}
    title = f"test {task['metric']}" + f", {unit}" * bool(unit)
    lines = head("", "parameters", title, "less CE's", "less last's", "tokens per second", "memory, MiB")
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
        lines.append(table_row(whose, f"{next(iter(runs.values()))['parameters']:,}", score, *gains, *costs))
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
