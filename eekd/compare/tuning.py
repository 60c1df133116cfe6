"""Settings of each method, chosen by validation images alone and with as many trials for each.

OUT/tuning.json     format, command, environment, config, seeds, commits
    trials          of each: of (the method), name, settings, val (accuracy by seed), mean, seconds
    chosen          {method: name of the trial of the highest mean}
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean

from eekd.compare.methods import FORMAT, Method, folder_of, method
from eekd.compare.variants import parts, written
from eekd.io.files import write_json_atomic

TEMPERATURES, ALPHAS = (1.0, 2.0, 4.0), (0.1, 0.5)
OF_PUBLISHED, BESIDE_TEMPERATURE = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (0.25, 1.0)  # times beta


def axes(how: Method) -> dict[str, tuple[float, ...]]:
    """The settings that are tuned, six trials for every method: τ and α, τ and β, or β; none of ce."""
    if how.weighting == "ce":
        return {}
    rival = how.rival
    if not rival or "beta" not in rival.settings:
        return {"temperature": TEMPERATURES, "alpha": ALPHAS}
    joint = "temperature" in rival.settings
    around = (round(x * rival.settings["beta"], 6) for x in (BESIDE_TEMPERATURE if joint else OF_PUBLISHED))
    betas = rival.betas or tuple(around)
    return {"temperature": TEMPERATURES, "beta": betas} if joint else {"beta": betas}


def trials(name: str) -> list[str]:
    """The variants of a method that are tried; settings in its name are kept."""
    base, fixed = parts(name)
    free = {setting: values for setting, values in axes(method(name)).items() if setting not in fixed}
    return [base + written(fixed | dict(zip(free, values, strict=True))) for values in product(*free.values())]


def gather(out: Path, command: list[str], names: Sequence[str], seeds: list[int]) -> dict:
    """Writes tuning.json from the finished trials of `names`, and returns its content."""
    from eekd.compare.runner import alone, cell_made  # torch comes after the command line is read
    from eekd.info import environment
    from eekd.train.run_folder import read_record

    with alone(out, wait=True):
        tried, commits = [], set()
        for name in names:
            for trial in trials(name):
                folders = [out / f"seed-{seed}" / "students" / folder_of(trial) for seed in seeds]
                cells = [cell_made(folder, method(trial)) for folder in folders]
                records = [read_record(folder / "student.json", "seed", "val", "commit") for folder in folders]
                commits |= {record["commit"] or "" for record in records}
                val = {record["seed"]: record["val"]["accuracy"] for record in records}
                tried.append({
                    "of": folder_of(name), "name": folder_of(trial), "settings": method(trial).settings, "val": val,
                    "mean": mean(val.values()), "seconds": mean(cell["seconds"] for cell in cells),
                })  # fmt: skip
        best = {}
        for trial in tried:
            if trial["of"] not in best or trial["mean"] > best[trial["of"]]["mean"]:
                best[trial["of"]] = trial
        record = {
            "format": FORMAT, "command": command, "environment": environment(),
            "config": read_record(out / "settings.json", "config")["config"], "seeds": seeds,
            "commits": sorted(commits), "trials": tried,
            "chosen": {name: trial["name"] for name, trial in best.items()},
        }  # fmt: skip
        write_json_atomic(out / "tuning.json", record)
    return record
