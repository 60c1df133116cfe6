"""`make check-gpu`: all that needs a GPU, in one run without network; `--tiny` runs each part small, on a CPU too.

Each part writes a JSON to results/<gpu>/: command, environment, status, seconds and the last lines of its output. Of
bench and forward it is their own record, and tune's table is copied there. A part that fails or takes too long does not
stop the others; the exit status is 1 if any did. All end within 8 minutes, so the most important come first.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 465  # seconds for all parts
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SANITIZED = [(5, 5, 10), (5, 3, 100), (3, 5, 1000), (3, 2, 1001), (2, 3, 5000), (2, 5, 40000)]  # B, M, C


class Part(NamedTuple):
    """A command, the seconds it may take, why it is not run, what it finds in its environment."""

    command: list[str]
    seconds: float
    missing: str = ""
    environment: dict[str, str] = {}


def stages(gpu: bool, tiny: bool, results: Path, runs: Path) -> list[dict[str, Part]]:
    """Parts by name, in order; those of one stage run at once, for they are not timed."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-p", "no:cacheprovider"]
    if gpu and importlib.util.find_spec("xdist"):
        pytest += ["-n", "8"]
    bench = [*python, "-m", "eekd.kernels.bench", "--json", os.path.relpath(results / "bench.json", ROOT)]
    sanitizer = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    unsanitized = "no CUDA device" if not gpu else "" if sanitizer else "compute-sanitizer was not found"
    check = [*python, __file__, "--launch"]
    forward = [*python, "results/forward.py", "--json", os.path.relpath(results / "forward.json", ROOT)]
    train = [*python, "-m", "eekd.train", "--out"]
    short = ["--teacher.snapshots", "1", "--teacher.epochs", "1", "--student.epochs", "1", "--train-limit", "2000"]
    # The entries of the launch table that the bench's largest shapes use; as many as there is time for.
    tune = [word for c in (1000, 32000, 4096, 128256, 100) for word in ("--shape", f"5,{c}")] + ["--dtype", "bfloat16"]
    if tiny:
        short = [*short[:-1], "100", "--students", "attention"]
    return [
        {
            "build": Part(
                [*python, "setup.py", "build_ext", "--inplace"], 150,
                environment={"CUDAARCHS": os.environ.get("CUDAARCHS", "native" if gpu else "90")},
            )
        },
        {
            "tests": Part(
                [
                    *pytest, "tests/test_ensemble_kd.py", "tests/test_sparse_ensemble_kd.py",
                    *(["-k", "formulas or columns_of_the_contract"] if tiny else ["-m", "gpu"]),
                ], 110,
            )
        },
        {"bench": Part([*bench, *(["--quick", "--shape", "32,5,10"] if tiny else [])], 150)},
        {"forward": Part([*forward, *(["--quick"] if tiny else ["--seconds", "1"])], 150 if tiny else 60)},
        {
            # Without torch's cache each tensor is an allocation, whose ends the sanitizer knows.
            tool: Part(
                [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *check], 90, unsanitized,
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in ("memcheck", "racecheck", "initcheck")
        }
        | {
            "train": Part([*train, str(runs / "digits"), *(short if tiny else [])], 90),
            "fashion": Part(
                [*train, str(runs / "fashion"), "--preset", "fashion-mnist-cpu", *short], 90,
                "" if FASHION_MNIST.is_dir() else f"{FASHION_MNIST} was not found",
            ),
            "suite": Part([*pytest, *(["tests/test_ensemble_kd_errors.py"] if tiny else ["--ignore", __file__])], 120),
        },
        {
            "tune": Part(
                [*python, "-m", "eekd.kernels.tune", *(["--tiny"] if tiny else tune)], BUDGET,
                environment={} if gpu else {"TRITON_INTERPRET": "1"},
            )
        },
    ]  # fmt: skip


def launch_kernels(device: str) -> None:
    """Every path of every backend on small shapes: the sanitizers slow a kernel a hundredfold."""
    from cases import sparse, tensors
    from numerics import DIFFERENTIABLE

    import eekd
    from eekd.ops.backend import namespace

    for backend in ("native", "triton"):
        with eekd.use_backend(backend):
            try:
                namespace(torch.device(device))
            except RuntimeError as error:
                print(f"{backend}: {error}")
                continue
            launches = 0
            for shape in SANITIZED:
                for dtype, attention, fusion, objective in (
                    (torch.float32, "scores", "probability", "label"),
                    (torch.bfloat16, "query", "logit", "kl"),
                ):
                    x = tensors(*shape, device=device, dtype=dtype, attention=attention)
                    few = sparse(x, min(50, shape[2]))
                    for op, given in ((eekd.ensemble_kd, x), (eekd.sparse_ensemble_kd, few)):
                        given["labels"][0] = -100  # ignored
                        z = given.pop("snapshot_logits")
                        for name in given.keys() & set(DIFFERENTIABLE):
                            given[name].requires_grad_()
                        for logits in (z, z.transpose(0, 1).contiguous().transpose(0, 1), list(z)):
                            out = op(**given, snapshot_logits=logits, fusion=fusion, attention_objective=objective)
                            (2 * (out.loss + out.attention_loss)).backward()
                            launches += 1
            if device == "cuda":
                torch.cuda.synchronize()
            print(f"{backend}: {launches} launches")


def run(stage: dict[str, Part], end: float) -> dict[str, dict]:
    """Runs the commands of a stage at once; one that takes too long is killed with all that it started."""
    rows, running = {}, {}
    for name, part in stage.items():
        missing = part.missing or ("no time was left" if end - time.monotonic() < 5 else "")
        if missing:
            rows[name] = {"status": f"not run: {missing}", "seconds": 0.0, "output": []}
            continue
        threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // len(stage)))}
        output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, and no pipe, for it could fill
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=os.environ | threads | part.environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        running[name] = process, output, time.monotonic()

    def stop(process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    try:
        while running:
            time.sleep(0.05)
            for name, (process, output, start) in list(running.items()):
                seconds, limit = time.monotonic() - start, min(stage[name].seconds, end - start)
                status = process.poll()
                if status is None and seconds < limit:
                    continue
                stop(process)
                output.seek(0)
                lines = output.read().replace(f"{ROOT}/", "").splitlines()[-40:]
                status = f"stopped after {seconds:.0f} s" if status is None else status
                rows[name] = {"status": status, "seconds": round(seconds, 1), "output": lines}
                del running[name]
    finally:
        for process, _, _ in running.values():
            stop(process)
    return rows


def facts() -> dict:
    """What the numbers depend on; little where eekd was not built."""
    try:
        from eekd.info import environment
    except ImportError as error:
        return {"torch": torch.__version__, "commit": None, "eekd": str(error)}
    return environment()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/check_gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="each part small, whether there is a GPU or not")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--part", action="append", help="only this part; repeatable")
    parser.add_argument("--launch", action="store_true", help="only launch the kernels, as the sanitizers do")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not (gpu or args.tiny):
        parser.error("no CUDA device was found; --tiny runs each part small without one")
    if args.launch:
        launch_kernels("cuda" if gpu else "cpu")
        return 0
    name = torch.cuda.get_device_name().replace(" ", "-") if gpu else "cpu"
    results = (args.results / name).resolve()
    end = time.monotonic() + BUDGET
    rows = {}
    with tempfile.TemporaryDirectory() as runs:
        todo = stages(gpu, args.tiny, results, Path(runs))
        known = [part for stage in todo for part in stage]
        if unknown := set(args.part or ()) - set(known):
            parser.error(f"--part must be one of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        results.mkdir(parents=True, exist_ok=True)
        for stage in todo:
            stage = {part: stage[part] for part in stage if part in (args.part or known)}
            for part in stage:
                print(f"{part} ...", flush=True)
                (results / f"{part}.json").unlink(missing_ok=True)
            started = time.time()
            rows |= run(stage, end)
            for part in stage:
                command = [w.replace(sys.executable, "python").replace(f"{ROOT}/", "") for w in stage[part].command]
                record = {"part": part, "gpu": name, "command": command, "environment": facts(), **rows[part]}
                if not (results / f"{part}.json").exists():
                    (results / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n")
                if isinstance(rows[part]["status"], str) or rows[part]["status"]:
                    print(*rows[part]["output"], sep="\n", flush=True)
            for table in (ROOT / "kernels").rglob("*.json") if "tune" in stage else ():
                if table.stat().st_mtime >= started:
                    shutil.copy(table, results / f"launch-{table.name}")
    print(f"\n{'part':>10} {'seconds':>8}  result")
    for part, row in rows.items():
        status = row["status"]
        result = "passed" if status == 0 else status if isinstance(status, str) else f"FAILED: exit status {status}"
        print(f"{part:>10} {row['seconds']:>8}  {result}")
    excused = [part.missing for stage in todo for part in stage.values()]
    return int(any(row["status"] not in (0, *(f"not run: {why}" for why in excused if why)) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
