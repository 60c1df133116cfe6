"""Runs of snapshots, and ways to spoil their manifest."""

import json

import torch
from torch import nn

from eekd.io.files import read_json
from eekd.snapshots import SnapshotRecorder

SPEC = {"name": "resnet8_w4", "num_classes": 3, "in_channels": 1, "image_size": 8}
HASH = "0123456789abcdef" * 4


class Net(nn.Module):
    """Three classes, features of width 5, and everything that makes a state_dict awkward."""

    def __init__(self, classes=3, width=5):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.tied = nn.Conv2d(1, 4, 3)
        self.tied.weight = self.convolution.weight
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("table", torch.arange(6).view(2, 3).t())
        self.hidden = nn.Linear(4, width)
        self.dropout = nn.Dropout()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.dropout(self.hidden(self.norm(self.convolution(x)).relu().mean((2, 3)))))


def record(directory, models, spec=SPEC, **options):
    recorder = SnapshotRecorder(directory, len(models), snapshots=len(models), spec=spec, **options)
    for model in models:
        assert recorder.step(model, {"accuracy": 0.5})
    assert recorder.complete
    return models


def folder(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def edit(directory, change):
    """Let `change` do what it likes to the content of the manifest in `directory`."""
    path = directory / "manifest.json"
    manifest = read_json(path)
    change(manifest)
    path.write_text(json.dumps(manifest))


def edited(change):
    return lambda directory: edit(directory, change)


def updated(**changes):
    return edited(lambda manifest: manifest.update(changes))


def lost(name):
    return lambda directory: (directory / name).unlink()


def filled(name, text):
    return lambda directory: (directory / name).write_text(text)


def last_lost(manifest):
    manifest["snapshots"].pop()
