"""Seconds of a student's epoch in one process and in two, of one core each: results/scaling-cpu.json.

python results/scaling.py            # about 6 minutes on two quiet cores
python results/scaling.py --images 512 --rounds 1 --json /tmp/scaling.json

The same batch of a step is shared out, so that both do the same work. Runs take turns; medians of epochs after the
first of each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from eekd.info import environment
from eekd.train.run_folder import read_metrics

BATCH, EPOCHS = 128, 3
WAYS = {  # students and flags
    "CE": ("ce", []),
    "EEKD, all snapshots in each process": ("attention", []),
    "EEKD, snapshots spread over processes": ("attention", ["--snapshots-on", "ranks"]),
}


def run(processes: int, *flags) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), "-m", "eekd.train", *map(str, flags)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "scaling-cpu.json")
    args = parser.parse_args()
    data = ["--data", "fashion-mnist", "--train-limit", args.images, "--val-fraction", 0.01]
    phase = ["--student.epochs", EPOCHS, "--student.batch-size", BATCH, "--student.model", "resnet20"]
    times = {name: {1: [], 2: []} for name in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        teacher = Path(scratch, "teacher")
        run(1, "teacher", *data, "--teacher.model", "resnet20", "--teacher.epochs", 5, "--out", teacher)
        for turn in range(args.rounds):
            for name, (student, flags) in WAYS.items():
                for processes, seconds in times[name].items():
                    out = Path(scratch, f"{turn}-{processes}-{name}")
                    run(processes, "student", "--teacher", teacher, "--students", student, *phase, *flags, "--out", out)
                    seconds += [row["seconds"] for row in read_metrics(out / "students" / student, {})[1:]]
            print(f"round {turn}", flush=True)
        images = json.loads((teacher / "environment.json").read_text())["data"]["train"]
    args.json.write_text(json.dumps({
        "command": ["python", "results/scaling.py", *sys.argv[1:]], "environment": environment(),
        "model": "resnet20", "image_size": 28, "batch": BATCH, "images": images, "threads_per_process": 1,
        "ways": [{"name": name, "seconds": {n: median(found) for n, found in both.items()}, "all": both}
                 for name, both in times.items()],
    }, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
