"""Any bytes are a value or one sentence."""

import json
import pickle
import struct

import numpy as np
import pytest
import safetensors.torch
from hostile import STATE, a_bank, bad_input, block, extended, gz, octal, png, zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eekd.bank import LogitBank
from eekd.data import formats
from eekd.data.annotations import read_table
from eekd.data.classes import read_classes
from eekd.data.images import decode_image
from eekd.io.files import read_json
from eekd.io.tensors import load_tensors, load_weights
from eekd.report import run
from eekd.snapshots import read_manifest
from eekd.train.config import Config


def changed(whole: bytes):
    """`whole` with bytes overwritten, cut out or repeated; or any bytes."""

    @st.composite
    def draw_changed(draw):
        data = bytearray(whole)
        for place, byte in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=6)):
            data[place] = byte
        start, stop = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
        return bytes(draw(st.sampled_from([data, data[:start] + data[stop:], data[:stop] + data[start:]])))

    return st.one_of(draw_changed(), st.binary(max_size=60))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    [10**400, -(10**400), 1 << 63, "../x", "\ud800", "\0", "/dev/zero", "x.py:f", [[]], {}, {"": {}}]
)  # fmt: skip


VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=6
)


def rewritten(value):
    """The JSON of `value` with some of what is in it replaced, renamed or left out; or changed bytes of it."""

    @st.composite
    def draw_rewritten(draw):
        copy = json.loads(json.dumps(value))
        for _ in range(draw(st.integers(1, 3))):
            at = copy
            while True:
                keys = list(at) if isinstance(at, dict) else range(len(at))
                if not keys:
                    break
                key = draw(st.sampled_from(keys))
                if isinstance(at[key], dict | list) and at[key] and draw(st.booleans()):
                    at = at[key]
                    continue
                if isinstance(at, dict) and draw(st.integers(0, 4)) == 0:
                    at[draw(st.text(max_size=8))] = at.pop(key)
                else:
                    at[key] = json.loads(json.dumps(draw(VALUES)))  # a copy: what is drawn is drawn again
                break
        return json.dumps(copy).encode()

    return st.one_of(draw_rewritten(), changed(json.dumps(value).encode()))


def inside(read, name="f"):
    """Reads bytes that lie in the file `name` of a folder."""

    def from_bytes(data, folder):
        (folder / name).write_bytes(data)
        return read(folder if name.endswith(".json") else folder / name)

    return from_bytes


CIFAR = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], "filenames": ["a", "b"]}, protocol=2)
ENTRIES = [{"file": f"{i}.safetensors", "sha256": "0" * 64, "step": i, "metrics": {"loss": 0.5}} for i in (1, 2)]
MANIFEST = {"format": 1, "spec": {"name": "resnet8", "num_classes": 2}, "schedule": [1, 2], "snapshots": ENTRIES}
CONFIG = json.loads(Config().to_json())
PARSERS = {
    "idx": (changed(b"\0\0\x08\x03" + struct.pack(">3I", 2, 2, 2) + bytes(8)),
            lambda data, _: formats.parse_idx(data, "f")),
    "cifar binary": (changed(bytes(3073 * 2)), lambda data, _: formats.parse_cifar_binary(data, "f", 1, 10)),
    "cifar python": (changed(CIFAR), lambda data, _: formats.parse_cifar_python(data, "f", "labels", 10)),
    "pickle": (changed(CIFAR[:60] + CIFAR[-120:]), lambda data, _: formats.read_pickle(data, "f")),
    "gzip": (changed(gz(b"\0\0\x08\x01\0\0\0\x02ab")), inside(formats.read_bytes)),
    "tar": (changed(block(size=octal(3), data=b"abc") + extended(path="x") + block("y", kind=b"5") + bytes(1024)),
            inside(lambda path: formats.read_members(path, {"test_batch"}))),
    "packed tar": (changed(block(size=octal(3), data=b"abc")).map(gz),
                   inside(lambda path: formats.read_members(path, {"test_batch"}))),
    "json": (rewritten({"a": [1, {"b": None}], "own_sha256": "0" * 64}), inside(read_json)),
    "snapshot manifest": (rewritten(MANIFEST), inside(read_manifest, "manifest.json")),
    "bank manifest": (None, inside(LogitBank.open, "manifest.json")),
    "config": (rewritten(CONFIG), lambda data, _: Config.from_json(data.decode())),
    "config file": (rewritten(CONFIG), inside(Config.load)),
    "safetensors": (changed(safetensors.torch.save(STATE)), inside(load_tensors)),
    "torch.save": (changed(zipped()), inside(load_weights)),
    "metrics": (rewritten({"epoch": 1, "weights": [0.5]}).map(lambda data: data + b"\n"), inside(run._rows)),
    "table of paths": (changed(b"path,label\na.png,cat\nb.png,dog\n"), inside(read_table, "l.csv")),
    "JSON of paths": (rewritten([{"path": "a.png", "label": "cat"}]), inside(read_table, "l.json")),
    "list of classes": (rewritten(["cat", "dog"]), inside(read_classes, "l.json")),
    "image": (changed(png(4, 4)), lambda data, _: decode_image(data, "f", "RGB")),
}  # fmt: skip


@bad_input
@pytest.mark.parametrize("examples", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parser", PARSERS)
def test_any_bytes_are_a_value_or_a_sentence(tmp_path, parser, examples):
    strategy, parse = PARSERS[parser]
    if parser == "bank manifest":
        strategy = rewritten(read_json(a_bank(tmp_path) / "manifest.json"))

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 100,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(data):
        try:
            parse(data, tmp_path)
        except (OSError, ValueError) as error:
            assert str(error)

    check()
