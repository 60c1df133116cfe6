"""What docs/reliability.md promises: kill a run, go on, and the bits are those of a run that nothing disturbed."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from eekd import train as cli
from eekd.bank import __main__ as bank
from eekd.checkpoint import read_checked, read_json, sha256_of, write_json_atomic
from eekd.config import Config, Student, Teacher
from eekd.snapshots import read_manifest
from eekd.trainers import prepare, resume, train, train_student, train_teacher
from eekd.trainers.folder import locked, read_settings
from eekd.trainers.loop import Session
from eekd.trainers.state import Checkpoints, signals

NETS = """
import random
import numpy as np
import torch
from torch import nn

class Noise(nn.Module):
    def forward(self, x):
        return x + 0.01 * (random.random() + np.random.randn() + torch.rand(())) if self.training else x

def net(num_classes, in_channels, image_size, width=12):
    body = [nn.Conv2d(in_channels, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1), Noise()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def small(num_classes, in_channels, image_size):
    return net(num_classes, in_channels, image_size, width=5)
"""
VARIANTS = {
    "fp32": dict(),
    "fp16-channels_last": dict(precision="fp16", channels_last=True),
}
EVERY_STEP = 1e-9  # for save_every


class Killed(BaseException):
    """Where a process would be gone, nothing is left to save."""


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


def config_of(nets, **more) -> Config:
    common = dict(epochs=2, batch_size=60)
    return Config(
        teacher=Teacher(model=f"{nets}:net", snapshots=2, **common),
        student=Student(model=f"{nets}:small", optimizer="adamw", lr=1e-3, schedule="cosine", **common),
        **dict(students=("ce", "attention"), train_limit=200, device="cpu") | more,
    )


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, nets, tmp_path_factory):
    """A session and a run of it that nothing disturbed, which tests only read."""
    session = prepare(config_of(nets, **VARIANTS[request.param]))
    return session, train(session.config, tmp_path_factory.mktemp("run") / "whole", session=session)


@pytest.fixture(scope="module")
def run(nets, tmp_path_factory):
    """The same in one variant."""
    session = prepare(config_of(nets))
    return session, train(session.config, tmp_path_factory.mktemp("run") / "whole", session=session)


def killer(*steps):
    """Progress that kills when the run has done so many steps, counted over all phases and processes."""
    seen = set()

    def progress(phase, done, total, known):
        seen.add((phase, done))
        if len(seen) in steps and not (phase, done) in killed:
            killed.add((phase, done))
            raise Killed

    killed = set()
    return progress


def go_on(run, session, progress) -> int:
    """Resumes until the run has ended; returns how often it was killed."""
    for kills in range(1000):
        try:
            resume(run, session=session, progress=progress)
            return kills
        except Killed:
            check_files(run)


def untimed(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def check_same(one: Path, two: Path) -> None:
    """The same files in both, the same bytes in each but for times and paths."""
    def names(run):
        return {path.relative_to(run) for path in run.rglob("*") if path.is_file()}

    assert names(one) == names(two)
    for path in names(one):
        if path.suffix == ".safetensors":
            assert sha256_of(one / path) == sha256_of(two / path), path
    for folder in one.glob("**/metrics.jsonl"):
        folder = folder.parent.relative_to(one)
        assert untimed(one / folder) == untimed(two / folder)
        tables = [(run / folder / "metrics.csv").read_text().splitlines() for run in (one, two)]
        assert len(tables[0]) == len(tables[1]) == 1 + len(untimed(one / folder)) and tables[0][0] == tables[1][0]
    for name in ("teacher/snapshots.json", "summary.json"):
        first, second = read_json(one / name), read_json(two / name)
        assert (first["val"], first["test"]) == (second["val"], second["test"]) if "val" in first else True
    rows = [[{k: v for k, v in row.items() if "seconds" not in k} for row in read_json(run / "summary.json")["rows"]]
            for run in (one, two)]  # fmt: skip
    assert rows[0] == rows[1]


def check_files(run: Path) -> None:
    """Every file of an unfinished run is whole, or not yet marked as such."""
    for path in run.rglob("*.json"):
        if path.name != "config.json":
            read_json(path)
    for path in run.glob("**/checkpoints/*.json"):
        read_checked(path.with_suffix(".safetensors"), read_json(path)["sha256"])
        assert len(list(path.parent.glob("*.json"))) <= 4
    for path in run.glob("**/manifest.json"):
        for entry in read_manifest(path.parent)["snapshots"]:
            read_checked(path.parent / entry["file"], entry["sha256"])
    for path in run.glob("**/student.json"):
        read_checked(path.parent / "student.safetensors", read_json(path)["sha256"])
    for path in run.glob("**/metrics.jsonl"):
        assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] in ([], [1], [1, 2])


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """A kill is no damage: nothing is to be passed over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def test_killed_after_every_step(whole, tmp_path):
    session, undisturbed = whole
    session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)
    progress = killer(*range(1, 1000))
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=progress)
    assert go_on(tmp_path / "run", session, progress) >= 3 * 2 * 4 - 1
    check_same(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("steps", [(1,), (3, 9), (5, 14), (8, 17, 22), (2, 4, 6, 12, 20)])
def test_killed_between_checkpoints(run, tmp_path, steps):
    session, undisturbed = run
    session.config = dataclasses.replace(session.config, save_every=300.0)
    progress = killer(*steps)
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=progress)
    go_on(tmp_path / "run", session, progress)
    check_same(undisturbed, tmp_path / "run")
