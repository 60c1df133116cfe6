"""`make check-gpu`: all that needs a GPU, in a run without network; `--tiny` runs each part small, on a CPU too.

python tools/check_gpu.py --out DIR                     # until the budget of 9 minutes is used
python tools/check_gpu.py --out DIR                     # again: goes on with what has not passed
python tools/check_gpu.py --out DIR --part tests-native # only this, passed or not

First come the build and the times of both backends at all shapes, in two minutes, then the ops' tests, all others that
use a GPU, sanitizers, torch.compile and Liger, training and tune. Each backend has a process of its own, for an illegal
access spoils all that its process does later. As each part ends DIR gets parts.json (command, environment, status,
seconds and last lines of output of every part), output.txt with all lines, the records of bench, forward and tune, and
all of it in check-gpu.tar.gz. A part that fails or takes too long does not stop the others, but for the build; the exit
status is 1 if any did.

Over 350 lines, for it runs where nothing of this project may be installed yet.
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
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 540  # seconds of a call, by default
LINES = 40  # of a part's output, in parts.json
GRACE = 10  # seconds between SIGINT, after which pytest reports, and SIGKILL
ARCHIVE = "check-gpu.tar.gz"
OUTPUT = "output.txt"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
BACKENDS = ("native", "triton")
# B, M, C: every path, more snapshots than are unrolled, odd rows in step, and more rows than a program counts.
SANITIZED = [
    (5, 5, 10), (5, 3, 100), (3, 5, 1000), (3, 2, 1001), (8, 3, 1001), (2, 64, 100), (2, 3, 5000), (2, 5, 40000),
    (2100, 2, 10),
]  # fmt: skip
REDUCTIONS = ("mean", "none")


class Part(NamedTuple):
    """A command, the seconds it may take, why it is not run, what it finds in its environment."""

    command: list[str]
    seconds: float
    missing: str = ""
    environment: dict[str, str] = {}


def stages(gpu: bool, tiny: bool, out: Path, runs: Path) -> list[dict[str, Part]]:
    """Parts by name, in order; those of one stage run at once, for they are not timed."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--show-capture=no"]  # logs are long
    if gpu and importlib.util.find_spec("xdist"):
        pytest += ["-n", str(os.cpu_count() or 2)]  # which also share the compiling
    sanitizer = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    unsanitized = "no CUDA device" if not gpu else "" if sanitizer else "compute-sanitizer was not found"
    me = [*python, __file__, *(["--tiny"] if tiny else [])]
    train = [*python, "-m", "eekd.train", "--out"]
    short = ["--teacher.snapshots", "1", "--teacher.epochs", "1", "--student.epochs", "1", "--train-limit", "2000"]
    # The entries of the launch table that the bench's largest shapes use; as many as there is time for.
    tune = [word for c in (1000, 32000, 4096, 128256, 100) for word in ("--shape", f"5,{c}")] + ["--dtype", "bfloat16"]
    if tiny:
        short = [*short[:-1], "100", "--students", "attention"]

    def bench(file, *contenders, seconds):
        chosen = [word for name in contenders for word in ("--contender", name)]
        small = ["--quick", "--shape", "32,5,10"] if tiny else ["--seconds", "0.2"]
        return Part([*python, "-m", "eekd.kernels.bench", "--json", str(out / file), *chosen, *small], seconds)

    def tests(backend):
        which = f"{backend} and (formulas or columns_of_the_contract)" if tiny else backend
        return Part(
            [*pytest, "tests/ops", *([] if tiny else ["-m", "gpu"]), "-k", which],
            240,
            "" if gpu or backend == "native" else "no CUDA device",
        )

    found = [
        {
            "build": Part(
                [*python, "setup.py", "build_ext", "--inplace"], 240, environment={"CUDAARCHS": architectures(gpu)}
            )
        },
        {"ready": Part([*me, "--ready"], 60)},
        {"warm": Part([*me, "--warm", "bench"], 90, "" if gpu else "no CUDA device")},
        {"bench-native": bench("bench-native.json", "native", "eager", seconds=60)},
        {"bench-triton": bench("bench-triton.json", "triton", "eager", seconds=60)._replace(
            missing="" if gpu else "no CUDA device")},
        {f"tests-{backend}": tests(backend) for backend in BACKENDS},
        {
            "tests-ops": Part(  # what no backend's name is in
                [*pytest, "tests/ops", "-m", "gpu", "-k", "not native and not triton and not reference"], 60,
                "" if gpu else "no CUDA device",
            ),
            "tests-rest": Part(
                [*pytest, "tests", "--ignore=tests/ops", "-m", "gpu"], 240, "" if gpu else "no CUDA device"
            ),
        },
        {"warm-sanitized": Part([*me, "--warm", "sanitized"], 90, unsanitized)},
        {
            # Without torch's cache each tensor is an allocation, whose ends the sanitizer knows.
            f"{tool}-{backend}": Part(
                [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *me, "--launch", backend], 120, unsanitized,
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in ("memcheck", "racecheck", "initcheck") for backend in BACKENDS
        },
        {"bench": bench("bench.json", seconds=180)},
        {
            "forward": Part(
                [*python, "results/forward.py", "--json", str(out / "forward.json"),
                 *(["--quick"] if tiny else ["--seconds", "1"])],
                150 if tiny else 60,
            )
        },
        {
            "train": Part([*train, str(runs / "digits"), *(short if tiny else [])], 90, absent("tyro")),
            "fashion": Part(
                [*train, str(runs / "fashion"), "--preset", "fashion-mnist-cpu", *short], 90,
                absent("tyro") or ("" if FASHION_MNIST.is_dir() else f"{FASHION_MNIST} was not found"),
            ),
        },
        {
            "tune": Part(
                [*python, "-m", "eekd.kernels.tune", "--out", str(out), "--tried", str(out / "tried.json"),
                 *(["--tiny"] if tiny else tune)], 3600,
                environment={} if gpu else {"TRITON_INTERPRET": "1"},
            )
        },
    ]  # fmt: skip
    if tiny:  # a rehearsal, on a machine that others may use: only the budget ends it
        found = [{name: part._replace(seconds=3600) for name, part in stage.items()} for stage in found]
    return found


def architectures(gpu: bool) -> str:
    """CUDAARCHS: of the GPU at hand alone, by its number, which the build's record then has."""
    if os.environ.get("CUDAARCHS", "native") != "native":
        return os.environ["CUDAARCHS"]
    return "{}{}".format(*torch.cuda.get_device_capability()) if gpu else "90"


def absent(package: str) -> str:
    """Why a part that needs this package is not run."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed, nor among --wheels"


def tree(folder: Path) -> Path:
    """A folder for PYTHONPATH where eekd is this tree's, eekd.kernels included, whether it is installed or not."""
    package = folder / "eekd"
    package.mkdir(parents=True)
    for path in (ROOT / "eekd").iterdir():
        if path.name != "kernels":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return folder


def ready(gpu: bool) -> None:
    """Raises unless both backends can be used."""
    from eekd import _C  # noqa: F401
    from eekd.kernels import ensemble_kd  # noqa: F401
    from eekd.ops.backend import namespace, use_backend

    for backend in BACKENDS if gpu else BACKENDS[:1]:
        with use_backend(backend):
            namespace(torch.device("cuda" if gpu else "cpu"))


def apart(x: torch.Tensor) -> torch.Tensor:
    """A copy in memory that ends at whole 16 bytes: Triton reads the last piece of a tensor to its end."""
    memory = x.new_zeros(-(-x.numel() * x.element_size() // 16) * 16 // x.element_size())
    return memory[: x.numel()].view(x.shape).copy_(x)


def launch_kernels(device: str, backend: str, shapes=SANITIZED) -> int:
    """Every path of a backend on small shapes, the sanitizers slow a kernel a hundredfold; how many launches."""
    sys.path.insert(0, str(ROOT / "tests"))
    from cases import sparse, tensors
    from numerics import DIFFERENTIABLE

    import eekd

    launches = 0
    with eekd.use_backend(backend):
        for shape in shapes:
            for dtype, attention, fusion, objective in (
                (torch.float32, "scores", "probability", "label"),
                (torch.bfloat16, "query", "logit", "kl"),
            ):
                x = tensors(*shape, device=device, dtype=dtype, attention=attention)
                for op in (eekd.ensemble_kd, eekd.sparse_ensemble_kd):
                    given = dict(x) if op is eekd.ensemble_kd else sparse(x, min(50, shape[2]))
                    given = {name: apart(value) for name, value in given.items()}
                    given["labels"][0] = -100  # ignored
                    z = given.pop("snapshot_logits")
                    for name in given.keys() & set(DIFFERENTIABLE):
                        given[name].requires_grad_()
                    layouts = (z, apart(z.transpose(0, 1)).transpose(0, 1), [apart(one) for one in z])
                    for reduction in REDUCTIONS:
                        for logits in layouts:
                            out = op(
                                **given,
                                snapshot_logits=logits,
                                fusion=fusion,
                                attention_objective=objective,
                                reduction=reduction,
                            )
                            (2 * (out.loss + out.attention_loss)).sum().backward()
                            launches += 1
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"{backend}: {launches} launches")
    return launches


def _warm(shape, fusion, small: bool) -> None:
    if small:
        launch_kernels("cuda", "triton", [shape])
        return
    import eekd
    from eekd.kernels import bench

    with eekd.use_backend("triton"):
        device = torch.device("cuda")
        tensors = bench.inputs(bench.Case(shape, "bfloat16", fusion), device, 0)[0]
        bench.gradients(bench.fused, tensors, fusion, torch.ones((), device=device))
        torch.cuda.synchronize()


def warm(of: str) -> None:
    """Compiles what the bench or the sanitizers launch of Triton, in as many processes as there are cores."""
    from eekd.kernels.bench import GPU_SHAPES

    jobs = [(shape, "", True) for shape in SANITIZED]
    if of == "bench":
        jobs = [(shape, fusion, False) for fusion in ("probability", "logit") for shape in GPU_SHAPES]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for job in [pool.submit(_warm, *job) for job in jobs]:
            job.result()


def run(stage: dict[str, Part], end: float, environment: dict[str, str]) -> dict[str, dict]:
    """Runs the commands of a stage at once, and prints lines that tell of a failure as they come.

    One that takes too long is sent SIGINT, and killed with all that it started if it does not end soon.
    """
    rows, running = {}, {}
    for name, part in stage.items():
        missing = part.missing or ("no time was left" if end - time.monotonic() < 5 else "")
        if missing:
            rows[name] = {"status": f"not run: {missing}", "seconds": 0.0, "output": []}
            continue
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // len(stage))), "PYTHONUNBUFFERED": "1"}
        output = tempfile.NamedTemporaryFile("w+", errors="replace")  # noqa: SIM115, and no pipe, for it could fill
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=os.environ | threads | environment | part.environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        running[name] = process, open(output.name, errors="replace"), [], time.monotonic()  # noqa: SIM115

    def send(process, what):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, what)

    def read(name):
        _, output, lines, _ = running[name]
        for line in output.read().replace(f"{ROOT}/", "").splitlines():
            lines.append(line)
            if any(word in line for word in ("FAILED", "ERROR", "Error:")):
                print(f"  {name}: {line}", flush=True)

    interrupted = {}
    try:
        while running:
            time.sleep(0.05)
            for name, (process, output, lines, start) in list(running.items()):
                read(name)
                seconds, limit = time.monotonic() - start, min(stage[name].seconds, end - start)
                status = process.poll()
                if status is None and seconds < limit:
                    continue
                if status is None and seconds < limit + GRACE:
                    if name not in interrupted:
                        interrupted[name] = f"stopped after {seconds:.0f} s"
                        send(process, signal.SIGINT)
                    continue
                send(process, signal.SIGKILL)
                process.wait()
                read(name)
                output.close()
                status = interrupted.get(name, f"stopped after {seconds:.0f} s" if status is None else status)
                rows[name] = {"status": status, "seconds": round(seconds, 1), "output": lines}
                del running[name]
    finally:
        for process, *_ in running.values():
            send(process, signal.SIGKILL)
            process.wait()
    return rows


def facts(environment: dict[str, str]) -> dict:
    """What the numbers depend on; little where eekd was not built."""
    code = "import json; from eekd.info import environment; print(json.dumps(environment()))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    if found.returncode:
        return {"torch": torch.__version__, "commit": None, "eekd": found.stderr[-300:]}
    return json.loads(found.stdout.splitlines()[-1])


def write(out: Path, parts: dict[str, dict]) -> None:
    """parts.json, and everything in one archive, output.txt included."""
    (out / "parts.json").write_text(json.dumps(parts, indent=1) + "\n")
    with tarfile.open(out / ARCHIVE, "w:gz") as archive:
        for path in sorted([*out.glob("*.json"), out / OUTPUT]):
            archive.add(path, path.name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/check_gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the figures; default: results/GPU")
    parser.add_argument("--part", action="append", help="only this, passed before or not; repeatable")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for this call")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first, without network")
    parser.add_argument("--tiny", action="store_true", help="each part small, whether there is a GPU or not")
    parser.add_argument("--launch", choices=BACKENDS, help="only launch its kernels, as the sanitizers do")
    parser.add_argument("--ready", action="store_true", help="only see whether both backends can be used")
    parser.add_argument("--warm", choices=["bench", "sanitized"], help="only compile the Triton kernels of these parts")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not (gpu or args.tiny):
        parser.error("no CUDA device was found; --tiny runs each part small without one")
    if args.launch or args.ready or args.warm:
        if args.launch:
            launch_kernels("cuda" if gpu else "cpu", args.launch)
        elif args.ready:
            ready(gpu)
        else:
            warm(args.warm)
        return 0
    end = time.monotonic() + args.budget
    name = torch.cuda.get_device_name().replace(" ", "-") if gpu else "cpu"
    out = (args.out or ROOT / "results" / name).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch)
        paths = [str(tree(runs / "tree"))]
        if args.wheels:
            site = runs / "site"
            wheels = sorted(map(str, args.wheels.glob("*.whl")))
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
            subprocess.run([*install, *wheels], check=True)
            paths.append(str(site))
            sys.path.append(str(site))
        environment = {"PYTHONSAFEPATH": "1"}  # or the working folder's eekd, without its kernels, came first
        environment |= {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
        todo = stages(gpu, args.tiny, out, runs)
        known = [part for stage in todo for part in stage]
        if unknown := set(args.part or ()) - set(known):
            parser.error(f"--part must be one of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        out.mkdir(parents=True, exist_ok=True)
        parts = json.loads((out / "parts.json").read_text()) if (out / "parts.json").is_file() else {}
        rows, found = {}, None
        for stage in todo:
            stage = {
                part: stage[part]
                for part in stage
                if (part in args.part if args.part else parts.get(part, {}).get("status") != 0)
            }
            if not stage:
                continue
            print(f"{', '.join(stage)} ...", flush=True)
            links = runs / "tree"
            shutil.rmtree(links)  # what was built is new
            tree(links)
            got = run(stage, end, environment)
            rows |= got
            if found is None or "build" in stage:
                found = facts(environment)
            for part in stage:
                with (out / OUTPUT).open("a") as file:
                    print(f"== {part}", *got[part]["output"], sep="\n", file=file)
                got[part]["output"] = got[part]["output"][-LINES:]
                command = [w.replace(sys.executable, "python").replace(f"{ROOT}/", "") for w in stage[part].command]
                parts[part] = {"gpu": name, "command": command, "environment": found, **got[part]}
                status = got[part]["status"]
                if status and not str(status).startswith("not run"):
                    print(*got[part]["output"], sep="\n", flush=True)
            write(out, parts)
            if any(got.get(part, {"status": 0})["status"] for part in ("build", "ready")):
                print("the rest needs both backends: nothing more is run", flush=True)
                break
    print(f"\n{'part':>18} {'seconds':>8}  result")
    for part, row in rows.items():
        status = row["status"]
        result = "passed" if status == 0 else status if isinstance(status, str) else f"FAILED: exit status {status}"
        print(f"{part:>18} {row['seconds']:>8}  {result}")
    excused = {part: f"not run: {stage[part].missing}" for stage in todo for part in stage if stage[part].missing}
    return int(any(row["status"] not in (0, excused.get(part, 0)) for part, row in rows.items()))


if __name__ == "__main__":
    sys.exit(main())
