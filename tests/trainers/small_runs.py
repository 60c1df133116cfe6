"""Tiny networks, settings of a run of seconds, and what it wrote."""

import json

from eekd.train.checked import student_names
from eekd.train.config import Config, Student, Teacher

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
    common = dict(epochs=3, batch_size=60, milestones=())
    teacher = dict(common, model=f"{tiny}:tiny", snapshots=3) | (teacher or {})
    student = dict(common, model=f"{tiny}:tinier") | (student or {})
    rest = dict(train_limit=200, device="cpu", precision="fp32", channels_last=False) | more
    return Config(teacher=Teacher(**teacher), student=Student(**student), **rest)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(path):
    return json.loads(path.read_text())
