"""Runs that are killed at a step, and what must be the same when they have gone on."""

import dataclasses
import json
from pathlib import Path

import pytest
from recipes import ADAMW, small_run

from eekd.io.files import read_checked, read_json, sha256_of
from eekd.snapshots import read_manifest
from eekd.train import resume, train
from eekd.train.config import Config

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
    body.append(nn.Conv2d(width, width, 2))  # whose weights have an order in channels_last, which one channel has not
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def small(num_classes, in_channels, image_size):
    return net(num_classes, in_channels, image_size, width=5)
"""


VARIANTS = {"fp32": dict(), "fp16-channels_last": dict(precision="fp16", channels_last=True)}
EVERY_STEP = 1e-9  # for save_every


class Killed(BaseException):
    """Where a process would be gone, nothing is left to save."""


def config_of(nets, **more) -> Config:
    models = dict(model=f"{nets}:net"), dict(model=f"{nets}:small", schedule="cosine", **ADAMW)
    return small_run(*models, **dict(students=("ce", "attention")) | more)


def killer(*steps):
    """Progress that kills when the run has done so many steps, counted over all phases and processes."""
    seen = set()

    def progress(phase, done, total, known):
        seen.add((phase, done))
        if len(seen) in steps and (phase, done) not in killed:
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
    rows = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in read_json(run / "summary.json")["rows"]]
        for run in (one, two)
    ]
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
        epochs = [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
        assert epochs == [*range(1, len(epochs) + 1)]


def broken_off(run, out, step=6):
    """A run that was killed after so many steps."""
    session, _ = run
    session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)
    with pytest.raises(Killed):
        train(session.config, out, session=session, progress=killer(step))
    return out
