"""Runs the demonstration, `python -m eekd.train`, and keeps what came out: results/demo.json.

python results/demo.py
"""

import json
import tempfile
import time
from pathlib import Path

from eekd.info import environment
from eekd.train import train
from eekd.train.presets import preset


def main() -> None:
    config, start = preset("glyphs"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, Path(folder, "run"))
        summary = json.loads((run / "summary.json").read_text())
    record = {
        "command": ["python", "results/demo.py"], "environment": environment(), "config": json.loads(config.to_json()),
        "wall_seconds": time.perf_counter() - start, "summary": summary,
    }  # fmt: skip
    Path(__file__).with_name("demo.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
