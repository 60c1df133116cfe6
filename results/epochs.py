"""Seconds of an epoch on a CPU: by precision and memory format, and by how threads wait for each other.

python results/epochs.py precision    # results/precision-cpu.json: the processor as it is, and limited to AVX2
python results/epochs.py waiting      # results/waiting-cpu.json: alone, and beside processes that are always busy

Runs take turns; medians of epochs after the first of each run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from eekd.info import environment
from eekd.train import config
from eekd.train.run_folder import read_metrics, read_settings

PRESETS = "glyphs", "fashion-mnist-cpu"
IMAGES = {"precision": 6000, "waiting": 3000}  # of an epoch
PHASES = {"teacher": "teacher", "students/ce": "student alone", "students/attention": "student by EEKD"}
LIMIT = {"EEKD_CPU_CAPABILITY": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
PROCESSORS = {"as it is": {}, "limited to AVX2": LIMIT}
OTHERS = [("fp32", False), ("fp32", True), ("bf16", True)]  # that a teacher may be told: precision, channels_last
SPINS = {"300000": {"GOMP_SPINCOUNT": "300000"}, "3000": {}, "0": {"OMP_WAIT_POLICY": "passive"}}  # libgomp's, eekd's
COMPANY = [("glyphs", 0), ("glyphs", 1), ("fashion-mnist-cpu", 0)]  # how many other processes keep a core busy each


def epochs(scratch: str, flags: list, threads: int, variables: dict) -> tuple[dict[str, list[float]], str]:
    """Of a run the seconds of every epoch but the first, by phase, and what it computed in."""
    run = Path(tempfile.mkdtemp(dir=scratch), "run")
    ours = *LIMIT, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    own = {name: value for name, value in os.environ.items() if name not in ours}
    own |= {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""} | variables
    subprocess.run(
        [sys.executable, "-m", "eekd.train", *map(str, flags), "--seeds", "1", "--out", run],
        check=True,
        stdout=subprocess.DEVNULL,
        env=own,
    )
    made = read_settings(run)
    phases = [name for name in PHASES if (run / name).exists()]
    found = {PHASES[name]: [row["seconds"] for row in read_metrics(run / name, {})[1:]] for name in phases}
    return found, made.precision + ", channels_last" * made.channels_last


def runs_of(preset: str, count: int) -> dict[str, list]:
    """Flags by setting: a whole run by the preset's own, and teachers by others."""
    limit = ["--preset", preset, "--train-limit", IMAGES["precision"]]
    snapshots = ["--teacher.epochs", config.preset(preset).teacher.snapshots]
    runs = {"preset": [*limit, *snapshots, "--students", "ce", "attention", "--student.epochs", count]}
    for word, last in OTHERS:
        told = ["--precision", word, f"--channels-last={str(last).lower()}"]
        short = ["--teacher.epochs", count, "--teacher.snapshots", 1]
        runs[word + ", channels_last" * last] = ["teacher", *limit, *told, *short]
    return runs


def precision(rounds: int, count: int) -> list[dict]:
    times, computed = {}, {}
    cases = [
        (preset, *run, *processor)
        for preset in PRESETS
        for run in runs_of(preset, count).items()
        for processor in PROCESSORS.items()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for preset, setting, flags, processor, variables in cases * rounds:
            found, made = epochs(scratch, flags, 1, variables)
            for phase, seconds in found.items():
                key = preset, phase, setting
                times.setdefault(key, {}).setdefault(processor, []).extend(seconds)
                computed.setdefault(key, {})[processor] = made
            print(preset, setting, processor, found, flush=True)
    return [{"preset": preset, "phase": phase, "setting": setting, "computed": computed[preset, phase, setting],
             "seconds": {name: median(found) for name, found in both.items()}, "all": both}
            for (preset, phase, setting), both in times.items()]  # fmt: skip


@contextmanager
def beside(busy: int):
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def waiting(rounds: int, count: int) -> list[dict]:
    times = {}
    cases = [(*company, *spins) for company in COMPANY for spins in SPINS.items()]
    with tempfile.TemporaryDirectory() as scratch:
        for preset, busy, spins, variables in cases * rounds:
            flags = ["teacher", "--preset", preset, "--train-limit", IMAGES["waiting"]]
            flags += ["--teacher.epochs", count, "--teacher.snapshots", 1]
            with beside(busy):
                found, _ = epochs(scratch, flags, 2, variables)
            times.setdefault((preset, spins), {}).setdefault(busy, []).extend(found["teacher"])
            print(preset, spins, busy, found, flush=True)
    return [{"preset": preset, "spins": spins, "seconds": {n: median(found) for n, found in each.items()}, "all": each}
            for (preset, spins), each in times.items()]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["precision", "waiting"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2, help="of a phase; the first is not counted")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {"precision": precision, "waiting": waiting}[args.what](args.rounds, args.epochs)
    (args.json or Path(__file__).parent / f"{args.what}-cpu.json").write_text(json.dumps({
        "command": ["python", "results/epochs.py", *sys.argv[1:]], "environment": environment(),
        "note": "medians of the epochs after the first", "images": IMAGES[args.what],
        "threads_per_process": {"precision": 1, "waiting": 2}[args.what],
        {"precision": "settings", "waiting": "spins"}[args.what]: rows,
    }, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
