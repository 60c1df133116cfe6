"""A run of two snapshots and five students."""

import shutil
from pathlib import Path

import pytest
from pages import STUDENTS, rewrite
from recipes import small_run

from eekd.train import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of two snapshots and five students, made once; every test gets a copy."""
    config = small_run({}, {}, dict(model="resnet8_w4", epochs=4), students=STUDENTS, train_limit=180)
    return train(config, tmp_path_factory.mktemp("run") / "whole")


@pytest.fixture
def run(trained, tmp_path):
    """A copy without the hashes of files that tests rewrite."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for path in run.glob("**/*.json"):
        rewrite(path, lambda value: {name: value[name] for name in value if name not in ("metrics", "config_sha256")})
    return run
