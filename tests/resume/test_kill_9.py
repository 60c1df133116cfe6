"""kill -9 at any moment."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killed import check_files, check_same, config_of

from eekd.train import __main__ as cli
from eekd.train import checkpoints, prepare
from eekd.train.config import Config


def kill_at_random(config: str, folder: str, kills: int) -> None:
    """Trains, in forks of this process, runs that are killed so often in all; the last one runs to its end.

    All that ended must be as the first, which nothing disturbed.
    """
    torch.set_num_threads(1)
    draw, folder, number = random.Random(0), Path(folder), 0
    prepare(Config.load(config))  # imports what the forks need
    checkpoints.provenance(torch.device("cpu"))  # nobody's commit may come between

    def start(out: Path) -> int:
        child = os.fork()
        if child:
            return child
        begun = (out / "config.json").exists()
        if not begun:
            shutil.rmtree(out, ignore_errors=True)  # killed before there was anything to keep
        arguments = ["--resume", str(out)] if begun else ["--config", config, "--out", str(out)]
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            os._exit(cli.main(arguments))

    begin = time.monotonic()
    assert os.waitpid(start(folder / "0"), 0)[1] == 0
    length, ended = time.monotonic() - begin, 0
    while kills or not ended:
        out = folder / str(number + 1)
        child = start(out)
        if kills:
            time.sleep(draw.uniform(0, length / 2))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            check_same(folder / "0", out)
            number, ended = number + 1, ended + 1
        else:
            assert os.WTERMSIG(status) == signal.SIGKILL, f"exit status {status}"
            kills -= 1
            check_files(out)
    print(f"{ended} runs ended")


def killed_at_random(nets, tmp_path, kills):
    config = config_of(nets, save_every=0.01)
    (tmp_path / "config.json").write_text(config.to_json())
    arguments = str(tmp_path / "config.json"), str(tmp_path), kills
    code = f"import test_kill_9; test_kill_9.kill_at_random{arguments}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.full)])
def test_kill_9(nets, tmp_path, kills):
    killed_at_random(nets, tmp_path, kills)


@pytest.mark.slow
def test_kill_9_sixty_times(nets, tmp_path):
    killed_at_random(nets, tmp_path, 60)
