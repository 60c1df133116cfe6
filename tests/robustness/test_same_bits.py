"""The same seed gives the same bits."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from faults import config_of
from killed import check_same, untimed

from eekd.bank import __main__ as bank
from eekd.data import load
from eekd.io.files import sha256_of
from eekd.train import train
from eekd.train.session import Session


@pytest.fixture
def deterministic():
    yield
    torch.use_deterministic_algorithms(False)


RUN = """
import sys, torch
from eekd.train.config import Config
from eekd.train import train
torch.set_num_threads(1)
train(Config.load(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_of_two_processes_are_the_same(nets, tmp_path, precision):
    config = config_of(nets, deterministic=True, students=("ce", "last", "attention"), precision=precision)
    (tmp_path / "config.json").write_text(config.to_json())
    for name, seed in (("one", "1"), ("two", "2")):
        command = [sys.executable, "-c", RUN, str(tmp_path / "config.json"), str(tmp_path / name)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_deterministic_runs_from_files_are_the_same(nets, tmp_path, pictures, workers, threads, deterministic):
    threads(1)
    config = config_of(nets, data=str(pictures), train_limit=None, deterministic=True, workers=workers)
    data = load(config.data, memory_budget=0)
    one, two = (train(config, tmp_path / name, session=Session(config, data)) for name in ("one", "two"))
    check_same(one, two)


@pytest.mark.full
def test_deterministic_runs_from_a_bank_are_the_same(nets, tmp_path, threads, deterministic):
    threads(1)
    config = config_of(nets, deterministic=True, students=())
    teacher = train(config, tmp_path / "teacher")
    made = []
    for name in ("one", "two"):
        assert bank.main(["--teacher", str(teacher), "--views", "2", "--out", str(tmp_path / f"bank-{name}")]) == 0
        taught = dict(teacher_run=str(teacher), bank=str(tmp_path / f"bank-{name}"))
        made.append(train(dataclasses.replace(config, students=("attention", "entropy"), **taught), tmp_path / name))
    for path in made[0].rglob("*.safetensors"):
        assert sha256_of(path) == sha256_of(made[1] / path.relative_to(made[0]))
    for weighting in ("attention", "entropy"):
        assert untimed(made[0] / "students" / weighting) == untimed(made[1] / "students" / weighting)
