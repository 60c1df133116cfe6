"""What the tests of the bank share."""

import dataclasses
import json

import pytest
import torch
from recipes import small_run

from eekd.bank import __main__ as cli
from eekd.io.files import read_json, write_json_atomic
from eekd.train.checked import student_names

bad_input = pytest.mark.bad_input
TAUGHT = [weighting for weighting in student_names() if weighting != "ce"]
COMMON = dict(model="resnet8_w4", batch_size=50, milestones=(), lr=0.02)
CONFIG = small_run(dict(snapshots=3), {}, COMMON | dict(epochs=3), train_limit=150, students=("last",))


def make(run, *flags):
    assert cli.main(["--teacher", str(run), *map(str, flags)]) == 0
    torch.use_deterministic_algorithms(False)


def taught_from(bank, **changes):
    return dataclasses.replace(CONFIG, bank=str(bank.path), teacher_run=str(bank.run), **changes)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def edit(bank_folder, **changes):
    write_json_atomic(bank_folder / "manifest.json", read_json(bank_folder / "manifest.json") | changes)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
