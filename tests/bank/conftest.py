"""A teacher's run, and the bank in it."""

import dataclasses
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from banks import CONFIG, TAUGHT

from eekd import LogitBank
from eekd.bank import __main__ as cli
from eekd.bank import writer
from eekd.train import train


@contextmanager
def small_shards():
    """150 images make three shards, of 64, 64 and 22."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_ROWS", 64)
        yield


@pytest.fixture(scope="module", autouse=True)
def shards():
    with small_shards():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A teacher's run with a bank of three views in it, which tests only read."""
    with small_shards():
        run = train(dataclasses.replace(CONFIG, students=()), tmp_path_factory.mktemp("bank") / "run")
        assert cli.main(["--teacher", str(run), "--views", "3"]) == 0
    return run


@pytest.fixture(scope="session")
def bank(run):
    return LogitBank.open(run / "bank")


@pytest.fixture
def copy(run, tmp_path):
    """A run of one's own to break."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="session")
def online(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("online") / "run"
    return train(dataclasses.replace(CONFIG, teacher_run=str(run), students=tuple(TAUGHT)), out)
