"""A run of two snapshots and five students."""

import shutil
from pathlib import Path

import pytest
from pages import STUDENTS, rewrite

from eekd.train import train
from eekd.train.config import Config, Student, Teacher


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of two snapshots and five students, made once; every test gets a copy."""
    shape = dict(model="resnet8_w4", epochs=4, batch_size=60)
    teacher, student = Teacher(**shape, snapshots=2), Student(**shape)
    config = Config(
        teacher=teacher,
        student=student,
        students=STUDENTS,
        train_limit=180,
        device="cpu",
        precision="fp32",
        channels_last=False,
    )
    return train(config, tmp_path_factory.mktemp("run") / "whole")


@pytest.fixture
def run(trained, tmp_path):
    """A copy without the hashes of files that tests rewrite."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for path in run.glob("**/*.json"):
        rewrite(path, lambda value: {name: value[name] for name in value if name not in ("metrics", "config_sha256")})
    return run
