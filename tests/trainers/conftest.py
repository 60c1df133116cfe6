"""A run with every kind of student, and its settings."""

import pytest
from small_runs import TINY, WEIGHTINGS, small

from eekd.train import train


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture
def config(tiny):
    return small(tiny)


@pytest.fixture(scope="session")
def run(tiny, tmp_path_factory):
    """A finished run with every kind of student, which tests only read."""
    return train(small(tiny, students=WEIGHTINGS), tmp_path_factory.mktemp("run") / "tiny")
