"""The tables and the plot of docs/results/study.md, from the records in results/study/.

A record is the study.json of `eekd compare` for one setting, in which a method is called NAME or NAME@SETTING=VALUE.
"""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

from eekd.compare.methods import KINDS, base_of, method
from eekd.compare.plots import points
from eekd.compare.verdict import HOLDS, MISSING, UNDECIDED, seeds_needed, verdict
from eekd.io.files import write_atomic
from eekd.statistics import fewer, interval, mean_std, sign
from tables import pyplot

FOLDER = Path(__file__).parent.parent / "study"
TITLES = {
    "fashion-mlp": "Fashion-MNIST, ResNet to perceptron",
    "fashion-resnet": "Fashion-MNIST, ResNet to ResNet",
    "glyphs-mlp": "characters, ResNet to perceptron",
    "glyphs-resnet": "characters, ResNet to ResNet",
}


@dataclass(frozen=True)
class Claim:
    """That the students of one method are above those of another, or not above."""

    text: str
    who: str
    whom: str
    above: bool = True


CLAIMS = [
    Claim("Attention teaches better than the last snapshot alone", "attention", "last"),
    Claim("Attention teaches better than uniform weights", "attention", "uniform"),
    Claim("Attention teaches better than linearly increasing weights", "attention", "linear_increase"),
    Claim("Linearly increasing weights teach no better than uniform ones", "linear_increase", "uniform", False),
    Claim("Snapshots of a cyclic schedule teach no better than ordinary ones", "cyclic-uniform", "uniform", False),
    Claim("Independent teachers teach no better than snapshots", "sed", "uniform", False),
    Claim("Independent teachers teach no better than snapshots with attention", "sed", "attention", False),
    Claim("The half-way snapshot teaches better than the last", "half", "last"),
    Claim("More snapshots teach better (attention, M = 10 above M = 2)", "attention-m10", "attention-m2"),
    Claim("M = 5 is enough (attention, M = 10 not above M = 5)", "attention-m10", "attention", False),
    Claim("DKD's loss teaches better from EEKD's target than from the last snapshot", "attention-dkd", "dkd"),
    Claim("DIST's loss teaches better from EEKD's target than from the last snapshot", "attention-dist", "dist"),
    Claim("EEKD is better than FitNet", "attention", "fitnet"),
    Claim("EEKD is better than AT", "attention", "at"),
    Claim("EEKD is better than CRD", "attention", "crd"),
]


@cache
def records(ending: str = "") -> dict[str, dict]:
    """The record of every setting that there is one of; with `ending` "-tuning" or "-time", those of such a run."""
    files = {setting: FOLDER / f"{setting}{ending}.json" for setting in TITLES}
    return {setting: json.loads(file.read_text()) for setting, file in files.items() if file.exists()}


def check_names(record: dict) -> None:
    """ValueError unless every method of a record goes by one name: its own, or that of one variant."""
    known = {}
    for name in dict.fromkeys(cell["name"] for cell in record["cells"]):
        if other := known.get(base_of(name)):
            raise ValueError(f"a record must have one name for each method, got {other} and {name}")
        known[base_of(name)] = name


def scores(part: str = "test") -> dict[str, dict[str, dict[int, float]]]:
    """Accuracies on test images, or on those of `part` "val", by setting, method and seed."""
    known = {}
    for setting, record in records().items():
        check_names(record)
        found = known[setting] = {}
        for cell in record["cells"]:
            found.setdefault(base_of(cell["name"]), {})[cell["seed"]] = cell[part]["accuracy"]
    return known


def differences(found: dict[str, dict[int, float]], who: str, whom: str) -> dict[int, float]:
    """who - whom for each seed that both have, in the order of the seeds."""
    these, those = found.get(who, {}), found.get(whom, {})
    return {seed: these[seed] - those[seed] for seed in sorted(these.keys() & those.keys())}


def in_all(known: dict[str, dict[str, dict[int, float]]], who: str, whom: str) -> dict[int, float]:
    """who - whom for each seed that every setting has, the mean over the settings."""
    each = [differences(found, who, whom) for found in known.values()]
    seeds = sorted(set.intersection(*map(set, each)))
    return {seed: mean(found[seed] for found in each) for seed in seeds}


def by_setting(known: dict[str, dict[str, dict[int, float]]], who: str, whom: str) -> list[dict[int, float]]:
    """who - whom in every setting, and last their mean if there are several settings."""
    return [differences(found, who, whom) for found in known.values()] + [in_all(known, who, whom)] * (len(known) > 1)


def numbers(known: dict[str, dict[str, dict[int, float]]]) -> list[int]:
    """How many seeds every setting has, and last how many they share."""
    each = [set().union(*found.values()) for found in known.values()]
    return [*map(len, each), len(set.intersection(*each))]


def over(each: dict[int, float]) -> dict | None:
    """The mean of differences by seed, and its interval."""
    return interval([*each.values()])


def told(each: dict[int, float], number: int) -> str:
    """The same in words, and of how many seeds it is where that is not the `number` of all."""
    return points(over(each)) + fewer(len(each), number) if each else ""


def table(columns: Iterable[str], settings: Iterable[str], align: str = "---", means: bool = True) -> list[str]:
    """The head of a table with a column for each setting, and one for their mean if there are several."""
    columns, settings = list(columns), [TITLES[setting] for setting in settings]
    settings += ["mean of the settings"] * (means and len(settings) > 1)
    return [f"| {' | '.join(columns + settings)} |", "|" + "---|" * len(columns) + f"{align}|" * len(settings)]


def methods() -> str:
    """Each method's test accuracy over `last`, in every setting."""
    known = scores()
    lines = table(["method", "name"], known, "--:")
    for name in dict.fromkeys(name for found in known.values() for name in found):
        cells = []
        if name == "last":
            for found, number in zip(known.values(), numbers(known), strict=False):
                accuracy = mean_std([*found[name].values()])
                few = fewer(len(found[name]), number)
                cells.append(f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f} %{few}")
            cells += [""] * (len(known) > 1)
        else:
            for each, number in zip(by_setting(known, name, "last"), numbers(known), strict=False):
                bold = "**" if verdict(over(each), True) == HOLDS else ""
                cells.append(bold + told(each, number) + bold)
        lines.append(f"| {method(name).title} | `{name}` | " + " | ".join(cells) + " |")
    said = ", ".join(f"{len(record['seeds'])} ({TITLES[setting]})" for setting, record in records().items())
    return "\n".join([*lines, "", f"Seeds: {said}. Bold: the interval lies above 0."])


def sentence() -> str:
    """Attention over `last` and `uniform` in every setting."""
    parts, known = [], scores()
    for (setting, found), number in zip(known.items(), numbers(known), strict=False):
        last, uniform = (told(differences(found, "attention", of), number) for of in ("last", "uniform"))
        parts.append(f"{TITLES[setting]}: {last} over the last snapshot and {uniform} over uniform weights")
    each = " and ".join(sorted({str(len(record["seeds"])) for record in records().values()}))
    return f"> Points of test accuracy of EEKD's student, {each} seeds, with 95 % intervals. {'; '.join(parts)}."


def recipe() -> str:
    """By validation images, the tuning's seeds included: of the methods that are nowhere below `last`, the first."""
    known = scores("val")
    for setting, record in records("-tuning").items():
        for trial in record["trials"]:
            if trial["name"] in record["chosen"].values() and trial["of"] in known.get(setting, {}):
                known[setting][trial["of"]] |= {int(seed): accuracy for seed, accuracy in trial["val"].items()}
    gains = {}
    for name in next(iter(known.values())):
        gain = [differences(found, name, "last") for found in known.values()]
        if name != "last" and all(each and sign(over(each)) >= 0 for each in gain):
            gains[name] = mean(mean(each.values()) for each in gain)
    first = max(gains, key=lambda name: gains[name])
    known = scores()
    tests = "; ".join(
        f"{TITLES[setting]}: {told(differences(found, first, 'last'), number)}"
        for (setting, found), number in zip(known.items(), numbers(known), strict=False)
    )
    return (
        f"> By validation images `{first}` is first, {100 * gains[first]:+.2f} points over `last` in the mean of the "
        f"settings. On test images it has, in points over `last`: {tests}."
    )


def claims() -> str:
    """What the differences say of each claim, in every setting, and how many seeds would decide what is open."""
    known = scores()
    lines = table(["claim"], known)
    for claim in CLAIMS:
        cells = []
        for each, number in zip(by_setting(known, claim.who, claim.whom), numbers(known), strict=False):
            said = verdict(over(each), claim.above)
            needed = seeds_needed([*each.values()]) if said == UNDECIDED else None
            more = f"; about {needed} seeds would decide" if needed else ""
            cells.append(said if said == MISSING else f"**{said}**: {told(each, number)}{more}")
        lines.append(f"| {claim.text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuned() -> str:
    """What the tuning chose for each method, in every setting."""
    known = records("-tuning")
    lines = table(["method"], known, means=False)
    for name in dict.fromkeys(name for record in known.values() for name in record["chosen"]):
        cells = []
        for record in known.values():
            trials = {trial["name"]: trial for trial in record["trials"]}
            trial = trials.get(record["chosen"].get(name))
            settings = ", ".join(f"{key} {value:g}" for key, value in trial["settings"].items()) if trial else ""
            cells.append(f"{settings} ({100 * trial['mean']:.2f} %)".strip() if trial else "")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ensembles() -> str:
    """How accurate each dataset's teachers are, alone and together."""
    lines = [
        "| data | teacher | its snapshots, test % | their mean prediction, test % | over the ordinary one |",
        "|---|---|---|--:|--:|",
    ]
    known = {TITLES[setting].partition(",")[0]: record for setting, record in records().items()}
    for data, record in known.items():
        for row in record["ensembles"]:
            members = " ".join(f"{100 * accuracy:.1f}" for accuracy in row["members"])
            together = f"{100 * row['test']['mean']:.2f} ± {100 * row['test']['std']:.2f}"
            lines.append(f"| {data} | {KINDS[row['kind']]} | {members} | {together} | {points(row['over_ordinary'])} |")
    return "\n".join(lines)


def costs() -> str:
    """What a method takes: the teachers' forwards, all operations, the student's seconds, and all seconds."""
    known = records()
    lines = table(["method", "teachers", "teacher's forwards an image", "all operations"], known, "--:", means=False)
    lines[1] = lines[1].replace("|---|---|---|---", "|---|--:|--:|--:", 1)
    rows = {setting: {base_of(row["name"]): row for row in record["methods"]} for setting, record in known.items()}
    for name in dict.fromkeys(name for found in rows.values() for name in found):
        setting = next(setting for setting in rows if name in rows[setting])
        cost = rows[setting][name]["cost"]
        teaching = cost["teaching"] if cost["teaching_bank"] is None else cost["teaching_bank"]
        forwards = f"{teaching / known[setting]['images']:.0f}"
        of_last = [
            _operations(found[name]["cost"]) / _operations(found["last"]["cost"])
            for found in rows.values()
            if name in found
        ]
        seconds = []
        for found in rows.values():
            if name not in found:
                seconds.append("")
                continue
            own, last = found[name]["seconds"], found["last"]["seconds"]
            whole = sum(x or 0 for x in own.values()) / sum(x or 0 for x in last.values())
            seconds.append(f"{own['student'] / last['student']:.2f} ({whole:.2f})")
        cells = [f"`{name}`", str(cost["teachers"]), forwards, f"{mean(of_last):.2f}", *seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def times() -> str:
    """The seconds of a student's training from a bank, relative to `last` of the same seed: the mean, and all seeds."""
    known = records("-time")
    lines = table(["method"], known, "--:", means=False)
    seconds = {
        setting: {(base_of(cell["name"]), cell["seed"]): cell["seconds"] for cell in record["cells"]}
        for setting, record in known.items()
    }
    for name in dict.fromkeys(name for found in seconds.values() for name, _ in found if name != "last"):
        cells = []
        for found in seconds.values():
            each = [found[who, seed] / found["last", seed] for who, seed in found if who == name]
            cells.append(f"{mean(each):.2f} ({', '.join(f'{ratio:.2f}' for ratio in each)})" if each else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def made() -> str:
    """The commands, devices and versions of the records."""
    lines = ["| setting | seeds | device | torch | commit | seconds of a student, mean |", "|---|--:|---|---|---|--:|"]
    for setting, record in records().items():
        env, commits = record["environment"], ", ".join(commit[:9] for commit in record["commits"])
        seconds = f"{mean(cell['seconds'] for cell in record['cells']):.0f}"
        lines.append(
            f"| {TITLES[setting]} | {len(record['seeds'])} | {env['cpu']} | {env['torch']} | {commits} | {seconds} |"
        )
    return "\n".join(lines)


def plot(path: Path) -> None:
    """Gain over `last`, each setting in its own panel, and what each method costs beside the names."""
    plt = pyplot()
    known, costs, gains = scores(), {}, {}
    for setting, record in records().items():
        unit = next(row["cost"] for row in record["methods"] if base_of(row["name"]) == "last")
        for row in record["methods"]:
            name, cost = base_of(row["name"]), row["cost"]
            costs.setdefault(name, []).append(_operations(cost) / _operations(unit))
            gains.setdefault(name, []).append(mean(differences(known[setting], name, "last").values()))
    order = sorted(costs, key=lambda name: (-round(mean(costs[name]), 1), mean(gains[name])))
    size = {"figsize": (3 + 2.5 * len(known), 1 + 0.2 * len(order)), "layout": "constrained"}
    figure, panels = plt.subplots(1, len(known), sharey=True, squeeze=False, **size)
    for axes, (setting, found) in zip(panels[0], known.items(), strict=True):
        for place, name in enumerate(order):
            gain = over(differences(found, name, "last"))
            if name == "last" or not gain:
                continue
            low, high = (100 * (gain[end] or 0) for end in ("low", "high"))
            colour = {1: "#228833", 0: "#888888", -1: "#cc3311"}[sign(gain)]
            axes.plot([low, high], [place] * 2, color=colour, lw=1.2)
            axes.plot(100 * gain["mean"], place, "o", color=colour, ms=4)
        axes.axvline(0, color="#4477aa", lw=1)
        axes.set(title=TITLES[setting].replace(", ", "\n"), xlabel="points over last")
        axes.grid(alpha=0.3, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_yticks(range(len(order)), [f"{name}   {mean(costs[name]):.2f}" for name in order])
    panels[0, 0].set_ylabel("method, and operations of all it takes (last: 1)")
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_atomic(path, data.getvalue())


def _operations(cost: dict) -> float:
    """Of a teacher's training, its bank, or its running beside the student, and the student's training."""
    return cost["gflops_online"] if cost["gflops_bank"] is None else cost["gflops_bank"]


PARTS = {
    "sentence": sentence,
    "recipe": recipe,
    "methods": methods,
    "claims": claims,
    "ensembles": ensembles,
    "costs": costs,
    "times": times,
    "tuned": tuned,
    "made": made,
}
