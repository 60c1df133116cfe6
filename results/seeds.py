"""Runs a preset once per seed and keeps what came out: results/PRESET.json.

python results/seeds.py fashion-mnist-cpu --seeds 0 1 2
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from eekd.info import environment
from eekd.train import train
from eekd.train.config import Config
from eekd.train.presets import preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    config = preset(args.preset)
    record = {
        "command": ["python", "results/seeds.py", args.preset, "--seeds", *map(str, args.seeds)],
        "environment": environment(),
        "config": json.loads(config.to_json()),
        "runs": [],
    }
    path = Path(__file__).parent / f"{args.preset.replace(':', '-')}.json"
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            run = train(replace(config, seed=seed), Path(folder, str(seed)))
            record["config"] |= {
                name: getattr(Config.load(run / "config.json"), name) for name in ("precision", "channels_last")
            }  # as "auto" chose
            curves = {}
            for phase in ("teacher", *(f"students/{name}" for name in config.students)):
                rows = [json.loads(line) for line in (run / phase / "metrics.jsonl").read_text().splitlines()]
                keep = (
                    "epoch",
                    "val_accuracy",
                    "weights",
                    "weight_entropy",
                    "val_target_nll",
                    "val_target_nll_uniform",
                )
                curves[phase.split("/")[-1]] = [{k: row[k] for k in keep if k in row} for row in rows]
            record["runs"].append({"seed": seed, **json.loads((run / "summary.json").read_text()), "curves": curves})
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(f"seed {seed}: {record['runs'][-1]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
