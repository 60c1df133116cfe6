"""`make check-gpu`: all that needs a GPU, in one run without network; `--tiny` runs each part small, on a CPU too.

Writes one JSON per part to results/<gpu>/: command, exit status, seconds and the last lines of its output. A part that
fails or exceeds its time does not stop the others; the exit status is 1 if any did.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]
# The sanitizers slow kernels a hundredfold: a few shapes of every path, on every backend.
SANITIZED = "cuda and (formulas or ignored or 65x5x10- or 9x5x1001 or 5x3x5000)"
TOOLS = ("memcheck", "racecheck", "initcheck")


def parts(gpu: bool, tiny: bool, folder: str) -> dict[str, tuple[list[str], int]]:
    """Each part's command, after the interpreter unless it names a program, and its seconds: 8 minutes in all."""
    op = ["tests/test_ensemble_kd.py"]
    small = ["-k", "formulas"]
    tests = op + small if tiny else ["-m", "gpu"] if gpu else []
    train = ["-m", "eekd.train", "--out", folder] + (["--dry-run"] if tiny else [])
    found = {
        "build": (["setup.py", "build_ext", "--inplace"], 150),
        "tests": ([*PYTEST, *tests], 120),
        "train": (train, 60),
    }
    sanitizer = shutil.which("compute-sanitizer")
    for tool in TOOLS if gpu and sanitizer else ():
        run = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all", sys.executable]
        found[tool] = ([*run, *PYTEST, *op, *(small if tiny else ["-k", SANITIZED])], 45)
    return found


def run(command: list[str], seconds: int) -> dict:
    if command[0].startswith("-") or command[0].endswith(".py"):
        command = [sys.executable, *command]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = f"stopped after {seconds} s", (error.stdout or b"").decode(errors="replace")
    elapsed = round(time.perf_counter() - start, 1)
    return {"command": command, "status": status, "seconds": elapsed, "output": output.splitlines()[-40:]}


def main(argv: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(prog="python tests/check_gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="each part small, whether there is a GPU or not")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--part", action="append", help="only this part; repeatable")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    os.environ.setdefault("CUDAARCHS", "native" if gpu else "90")
    if not (gpu or args.tiny):
        parser.error("no CUDA device was found; --tiny runs each part small without one")
    name = torch.cuda.get_device_name().replace(" ", "-") if gpu else "cpu"
    folder = args.results / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    with tempfile.TemporaryDirectory() as runs:
        todo = parts(gpu, args.tiny, str(Path(runs) / "run"))
        if unknown := set(args.part or ()) - set(todo):
            parser.error(f"--part must be one of {', '.join(todo)}, got {', '.join(sorted(unknown))}")
        for part, (command, seconds) in todo.items():
            if args.part and part not in args.part:
                continue
            print(f"{part} ...", flush=True)
            rows[part] = run(command, seconds)
            record = {"part": part, "gpu": name, "torch": torch.__version__, **rows[part]}
            (folder / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n")
            if rows[part]["status"] != 0:
                print("\n".join(rows[part]["output"]), flush=True)
    print(f"\n{'part':>10} {'seconds':>8}  result")
    for part, row in rows.items():
        print(f"{part:>10} {row['seconds']:>8}  {'passed' if row['status'] == 0 else 'FAILED: ' + str(row['status'])}")
    return int(any(row["status"] != 0 for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
