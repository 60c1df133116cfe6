"""Seconds of an epoch, with and without a bank, and of an import, beside an older commit's: results/since-cpu.json.

python results/since.py --before FOLDER    # a built checkout of the older commit; about 5 minutes on two quiet cores

Both versions take turns, each in processes of its own, with the same settings. Medians; the first epochs are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from eekd.info import environment

HERE = Path(__file__).resolve().parent.parent
SETTINGS = {
    "data": "digits", "image_size": 28, "augment": "crop", "device": "cpu", "precision": "fp32", "channels_last": False,
    "teacher": {"model": "resnet8", "epochs": 5, "batch_size": 128, "snapshots": 5},
    "student": {"model": "resnet8_w4", "epochs": 4, "batch_size": 128},
    "students": ["ce", "attention"],
}  # fmt: skip
IMPORTS = {"import torch": "import torch", "import eekd": "import eekd", "the op": "import eekd; eekd.ensemble_kd"}


class Version:
    """A checkout of eekd, and the seconds of what it did."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch, self.count = folder.resolve(), scratch, 0
        self.settings = scratch / "settings.json"
        scratch.mkdir()
        self.settings.write_text(json.dumps(SETTINGS))
        self.seconds: dict[str, list[float]] = {}

    def python(self, *words) -> float:
        """Seconds of a program."""
        own = os.environ | {"PYTHONPATH": str(self.folder), "CUDA_VISIBLE_DEVICES": ""}
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *map(str, words)],
            check=True, stdout=subprocess.DEVNULL, env=own, cwd=self.folder,  # where Python looks first
        )  # fmt: skip
        return time.perf_counter() - start

    def epochs(self, phase: Path) -> list[float]:
        rows = [json.loads(line) for line in (phase / "metrics.jsonl").read_text().splitlines()]
        return [row["seconds"] for row in rows[1:]]

    def train(self) -> None:
        """Trains a teacher, students under its running snapshots, and one by attention from its bank."""
        self.count += 1
        teacher, students, banked = (
            self.scratch / f"{name}-{self.count}" for name in ("teacher", "students", "banked")
        )
        command = "-m", "eekd.train"
        student = *command, "student", "--config", self.settings
        self.python(*command, "teacher", "--config", self.settings, "--out", teacher)
        self.python("-m", "eekd.bank", "--teacher", teacher, "--views", 2)
        self.python(*student, "--out", students, "--teacher", teacher)
        self.python(*student, "--out", banked, "--bank", teacher / "bank", "--students", "attention")
        for name, phase in {
            "the teacher": teacher / "teacher",
            "a student alone": students / "students/ce",
            "a student of five snapshots": students / "students/attention",
            "a student of five snapshots from a bank": banked / "students/attention",
        }.items():
            self.seconds.setdefault(name, []).extend(self.epochs(phase))

    def imports(self) -> None:
        for name, code in IMPORTS.items():
            self.seconds.setdefault(name, []).append(self.python("-c", code))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a built checkout of an older commit")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("since-cpu.json"))
    args = parser.parse_args()
    found = subprocess.run(["git", "-C", args.before, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    commit = found.stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        before, now = Version(args.before, Path(scratch, "before")), Version(HERE, Path(scratch, "now"))
        for _ in range(args.rounds):
            before.train()
            now.train()
        for _ in range(2 * args.rounds):
            before.imports()
            now.imports()
    rows = [
        {"what": name, "before": median(before.seconds[name]), "now": median(seconds),
         "all": {"before": before.seconds[name], "now": seconds}}
        for name, seconds in now.seconds.items()
    ]  # fmt: skip
    for row in rows:
        print(f"{row['what']:40} {row['before']:8.3f} {row['now']:8.3f} {row['now'] / row['before']:6.2f}")
    record = {"command": ["python", "results/since.py", "--before", commit[:9]], "commit": commit,
              "environment": environment(), "config": SETTINGS, "since": rows}  # fmt: skip
    args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
