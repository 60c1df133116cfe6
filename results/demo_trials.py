"""Tries recipes for the preset glyphs and keeps every trial: results/demo-trials.json. Validation accuracy only.

python results/demo_trials.py --seeds 100 101
python results/demo_trials.py --only attention_dkd    # adds its trials, with their own command and environment
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from eekd.info import environment
from eekd.train import Session, train_student, train_teacher
from eekd.train.config import Config, Student
from eekd.train.presets import preset

GRID = [dict(lr=lr) for lr in (0.03, 0.1, 0.3)]
TEACHING = [dict(temperature=t, alpha=a) for t, a in ((2.0, 0.1), (4.0, 0.1), (2.0, 0.5))]
WITH_DKD = [dict(temperature=t, beta=b) for t, b in ((2.0, 0.5), (4.0, 0.5), (2.0, 2.0))]
TRIALS = [
    ("ce", {}),
    *((w, t) for t in TEACHING for w in ("last", "attention")),
    *(("attention_dkd", t) for t in WITH_DKD),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--preset", default="glyphs")
    parser.add_argument("--only", nargs="+", help="of the weightings only these; the trials that are there are kept")
    args = parser.parse_args()
    config = replace(preset(args.preset), seeds=1)
    path = Path(__file__).with_name("demo-trials.json")
    record = {
        "command": ["python", *sys.argv],
        "environment": environment(), "config": json.loads(config.to_json()), "trials": [],
    }  # fmt: skip
    whole, data = json.loads(path.read_text()) if args.only else record, None
    if args.only:
        whole.setdefault("added", []).append(record)
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            session = Session(replace(config, seed=seed), data)
            data = session.data
            teacher = Path(folder, f"teacher-{seed}")
            train_teacher(session.config, teacher, session=session)
            for rate in GRID:
                for weighting, options in TRIALS:
                    if args.only and weighting not in args.only:
                        continue
                    student: Student = replace(config.student, **rate, **options)
                    trial: Config = replace(config, seed=seed, student=student)
                    out = Path(folder, f"{seed}-{len(record['trials'])}")
                    known = train_student(trial, teacher, weighting, out, session=Session(trial, data))
                    row = {"seed": seed, "weighting": weighting, **rate, **options, "val": known["val"]["accuracy"]}
                    record["trials"].append(row | {"seconds_per_epoch": known["seconds_per_epoch"]})
                    print(row, flush=True)
            path.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
