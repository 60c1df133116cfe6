"""Several processes, one of which is killed: the run goes on to the same bits."""

import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import ENVIRONMENT, SMALL, TIMES, TORCHRUN, launch, weights

from eekd.train.__main__ import main
from eekd.train.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]


DROPOUT = """
import os, time
from torch import nn

class Dropout(nn.Dropout):  # tells its steps, and takes long enough for them to be killed
    def forward(self, x):
        if self.training and "STEPS" in os.environ:
            time.sleep(0.05)
            with open(f"{os.environ['STEPS']}-{os.getpid()}", "a") as file:
                file.write(".")
        return super().forward(x)

def build(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), Dropout(),
                         nn.Linear(8 * (image_size - 2) ** 2, 16), nn.GELU(), nn.Linear(16, num_classes))
"""


# Averaged weights, mixed precision, mixed images, a schedule of steps: all of them go on to the same bits.
MODERN = ["--no-deterministic", "--students", "ce", "attention", "--teacher.ema", "0.8", "--student.ema", "0.9",
          "--precision", "bf16", "--student.mixup", "0.4", "--student.schedule", "one_cycle"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[int], tuple[list, Path]]:
    """Flags of a run of so many processes, whose own random numbers decide the bits, and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "net.py").write_text(DROPOUT)
    model = f"{folder / 'net.py'}:build"
    command = ["-m", "eekd.train", *SMALL, "--teacher.model", model, "--student.model", model, "--save-every", "0.05"]

    @functools.cache
    def run(processes: int) -> tuple[list, Path]:
        flags = MODERN if processes == 2 else ["--students", "ce"]
        told = folder / f"told-{processes}"
        told.mkdir()
        launch(processes, *command, *flags, "--out", folder / f"{processes}", STEPS=str(told / "steps"))
        return [*command, *flags, "--out"], folder / f"{processes}"

    return run


def steps(folder: Path, processes: int) -> list[int]:
    """How many the processes took that came last."""
    files = sorted(folder.glob("steps-*"), key=lambda path: path.stat().st_mtime)
    return [path.stat().st_size for path in files[-processes:]]


def same_outcome(run: Path, other: Path) -> None:
    """Everything that was learned and measured, to the bit."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for phase in ("teacher", *(str(path.relative_to(run)) for path in run.glob("students/*"))):
        for row, again in zip(*(read_metrics(r / phase, {}) for r in (run, other)), strict=True):
            assert [(k, v) for k, v in row.items() if k not in TIMES] == [
                (k, v) for k, v in again.items() if k not in TIMES
            ]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_workers(command: list, run: Path, kills: int, rng: random.Random, processes: int = 2) -> int:
    """Starts workers by torchrun, which restarts them, and kills one at random after checkpoints.

    Gives how often it did.
    """
    start = [*TORCHRUN, "--nproc-per-node", processes, "--max-restarts", kills, "--monitor-interval", 0.1, *command]
    environment = ENVIRONMENT | {"STEPS": str(run.parent / "steps")}
    torchrun = subprocess.Popen([*map(str, start), run], env=environment, stderr=subprocess.PIPE, text=True)
    killed, last = 0, 0.0
    try:
        while torchrun.poll() is None and killed < kills:
            written = [path.stat().st_mtime for path in run.rglob("checkpoints/*.json") if path.exists()]
            if max(written, default=0.0) > last:  # the new workers have come so far
                time.sleep(rng.uniform(0, 0.3))
                if workers := children(torchrun.pid):
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    killed, last = killed + 1, time.time()
            time.sleep(0.02)
        told = torchrun.communicate(timeout=300)[1]
    finally:
        torchrun.kill()
    assert torchrun.returncode == 0, told[-4000:]
    return killed


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_worker_changes_nothing(undisturbed, tmp_path, processes):
    command, run = undisturbed(processes)
    assert kill_workers(command, tmp_path / "run", 1, random.Random(0), processes) == 1
    same_outcome(run, tmp_path / "run")
    went_on, whole = steps(tmp_path, processes), steps(run.parent / f"told-{processes}", processes)
    assert len(set(went_on)) == 1 and 0 < went_on[0] < max(whole), went_on


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_workers_change_nothing(undisturbed, tmp_path, seed):
    command, run = undisturbed(2)
    assert kill_workers(command, tmp_path / "run", 1 + seed % 3, random.Random(seed))
    same_outcome(run, tmp_path / "run")


@pytest.mark.full
def test_the_slurm_script_goes_on_after_preemption(undisturbed, tmp_path):
    """With stand-ins for Slurm: SIGTERM saves and asks to be queued again, and the next start ends the run."""
    command, run = undisturbed(2)
    commands = {
        # As Slurm's own does, it kills its task, and here what that started, when it is told to end.
        "srun": """
            "$@" & task=$!
            echo $task > FOLDER/task
            trap 'kill -KILL $(cat /proc/$task/task/$task/children) $task; exit 137' TERM
            wait $task""",
        # To all processes of the step: torchrun then tells its workers a second time.
        "scancel": """
            [ "$*" = "--signal=TERM $SLURM_JOB_ID" ] || exit 1
            task=$(cat FOLDER/task)
            kill -TERM $(cat /proc/$task/task/$task/children) $task""",
        "scontrol": 'echo "$*" >> FOLDER/asked; echo localhost',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{textwrap.dedent(text)}\n".replace("FOLDER", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    slurm = ENVIRONMENT | {
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": str(os.getpid()), "STEPS": str(tmp_path / "steps"),
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    flags = command[command.index("eekd.train") + 1 : command.index("--out")]
    start = ["bash", ROOT / "examples" / "train.sbatch", tmp_path / "run", *flags]
    job = subprocess.Popen(start, env=slurm, stderr=subprocess.PIPE, text=True)
    while job.poll() is None and not any((tmp_path / "run").rglob("checkpoints/*.json")):
        time.sleep(0.02)
    job.terminate()
    told = job.communicate(timeout=100)[1]
    assert told.count("stopped by SIGTERM; continue with: python -m eekd.train --resume") == 2, told
    assert f"requeue {os.getpid()}" in (tmp_path / "asked").read_text()
    assert not (tmp_path / "run" / "summary.json").exists()
    subprocess.run(start, env=slurm, check=True, capture_output=True)
    same_outcome(run, tmp_path / "run")
    assert max(steps(tmp_path, 2)) < max(steps(run.parent / "told-2", 2))  # it went on


@pytest.mark.full
@pytest.mark.bad_input
def test_a_restart_with_other_settings_is_refused(undisturbed, monkeypatch, capsys):
    _, run = undisturbed(2)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert main(["--out", str(run), "--seed", "1"]) == 2
    told = capsys.readouterr().err
    assert f"{run} holds a run with another " in told and "seed" in told and "interpolation" not in told
    monkeypatch.chdir(run)  # where there is a config.json, which is not that of --out
    assert main(["--resume", "elsewhere"]) == 2
    assert "elsewhere is not the folder of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_no_process_dies_at_its_end(tmp_path):
    """As many runs at a time as load the machine fourfold: about one of 35 once died when it had written everything.

    EEKD_RUNS says how many runs there are.
    """
    flags = [
        "-m",
        "eekd.train",
        *SMALL,
        "--teacher.epochs",
        "1",
        "--teacher.snapshots",
        "1",
        "--students",
        "ce",
        "--student.epochs",
        "1",
        "--out",
    ]

    def run(number: int) -> str:
        start = [*TORCHRUN, "--nproc-per-node", "2", *flags, str(tmp_path / f"{number}")]
        done = subprocess.run(start, env=ENVIRONMENT, capture_output=True, text=True)
        return done.stderr[-2000:] if done.returncode or "terminate called" in done.stderr else ""

    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        died = [told for told in pool.map(run, range(int(os.environ.get("EEKD_RUNS", 20)))) if told]
    assert not died, "\n".join(died)
