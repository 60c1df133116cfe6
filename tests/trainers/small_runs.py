"""Tiny networks, settings of a run of seconds, and what it wrote."""

import json

from recipes import small_run

from eekd.train.checked import student_names
from eekd.train.config import Config

TINY = """
from torch import nn

def tiny(num_classes, in_channels, image_size, width=12):
    body = [nn.Linear(in_channels * image_size**2, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *body, nn.Linear(width, num_classes))

def tinier(num_classes, in_channels, image_size):
    return tiny(num_classes, in_channels, image_size, width=5)

def headless(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
WEIGHTINGS = student_names()


def small(tiny, teacher=None, student=None, **more) -> Config:
    teacher = dict(model=f"{tiny}:tiny", snapshots=3) | (teacher or {})
    student = dict(model=f"{tiny}:tinier") | (student or {})
    return small_run(teacher, student, dict(epochs=3, milestones=()), **more)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(path):
    return json.loads(path.read_text())
