"""Hostile files, and processes with little memory to read them in."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from eekd.bank.reader import shard_names
from eekd.data import formats
from eekd.io.files import write_atomic, write_json_atomic
from eekd.snapshots import SnapshotRecorder
from eekd.train.config import Config, Student, Teacher

ROOT = Path(__file__).resolve().parents[2]
bad_input = pytest.mark.bad_input
LARGEST, STEPS = 64 << 20, 300_000  # in place of those of eekd.data.formats, to be quick
ROOM = 320 << 20  # bytes of memory that a hostile file may cost, on top of what is there
SECONDS = 20


def contained(function, *arguments, room=ROOM):
    """What `function` raises, as (type, message), or (None, what it returns), in a process with little memory."""
    ours, theirs = multiprocessing.Pipe(False)

    def child():
        torch.set_num_threads(1)
        formats.LARGEST, formats._Steps.left = LARGEST, STEPS
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
        try:
            outcome = None, repr(function(*arguments))[:200]
        except BaseException as error:
            outcome = type(error), str(error)
        theirs.send(outcome)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            process.kill()
            pytest.fail(f"{function} took more than {SECONDS} s")
        return ours.recv()
    except EOFError:
        process.join()
        pytest.fail(f"{function} ended its process with {process.exitcode}")
    finally:
        process.join()


def refused(function, *arguments, said="", kinds=(ValueError, FileNotFoundError), room=ROOM):
    """Asserts one sentence of a decent kind, and returns it."""
    kind, message = contained(function, *arguments, room=room)
    assert kind is not None, f"nothing was refused, and {message} returned"
    assert issubclass(kind, kinds), f"{kind.__name__}: {message}"
    assert "\n" not in message and re.search(said, message), message
    return message


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def evil(folder, marker):
    """A Python file that is a factory, and leaves the marker when it is run."""
    path = folder / "evil.py"
    path.write_text(
        f"import os, torch\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
        "def net(num_classes, in_channels, image_size):\n"
        "    sizes = in_channels * image_size**2, num_classes\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(*sizes))\n"
    )
    return f"{path}:net"


def saved(content, **how):
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


def cifar(root, **files):
    x = np.zeros((4, 3072), np.uint8)
    batch = pickle.dumps({"data": x, "labels": [0, 1, 2, 3]}, protocol=2)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, data in (dict.fromkeys(names, batch) | files).items():
        (root / name.replace("meta", "batches.meta")).write_bytes(data)
    return root


def a_run(folder, model="resnet8_w4", file="snapshot-1.safetensors"):
    """A run folder of a teacher with two snapshots, and a student, before the end; networks are called `model`."""
    config = Config(teacher=Teacher(model=model, epochs=2, snapshots=2), student=Student(model=model), students=("ce",))
    write_atomic(folder / "config.json", config.to_json().encode())
    spec = {"name": model, "num_classes": 2, "in_channels": 1, "image_size": 2}
    recorder = SnapshotRecorder(folder / "teacher", epochs=2, snapshots=2, spec=spec)
    recorder._checked = True  # what comes from a stranger need not fit, and is not to be built
    for _ in range(2):
        recorder.step(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), {"val_accuracy": 0.5})
    for name in ("teacher", "students/ce"):
        rows = "".join(json.dumps({"epoch": epoch, "val_loss": 1.0, "val_accuracy": 0.5}) + "\n" for epoch in (1, 2))
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "metrics.jsonl").write_text(rows)
    return folder


def a_bank(folder, *, classes=4, shape=None, indices=None, spec=None, **changes):
    """A bank of 2 views of 6 samples, in shards of 4 rows, of 2 snapshots."""
    shards = {}
    for name in shard_names(2, 6, 4):
        rows = 4 if "shard-0" in name else 2
        tensors = {"logits": torch.zeros(shape or (rows, 2, 2 if indices is not None else 4), dtype=torch.float16)}
        if indices is not None:
            tensors["indices"] = torch.full((rows, 2), indices, dtype=torch.int16)
            tensors["atoms"] = torch.zeros(rows, 2, 2, 2)
        data = safetensors.torch.save(tensors)
        shards[name] = write_atomic(folder / name, data)
    top_k = {"format": 2, "top_k": 2, "atoms": 2} if indices is not None else {"format": 1}
    write_json_atomic(folder / "manifest.json", {
        **top_k, "run": "..", "views": 2, "samples": 6, "snapshots": 2, "classes": classes, "features": 0,
        "dtype": "float16", "shard_rows": 4, "projection": None, "teacher": {"spec": spec, "sha256": ["0" * 64] * 2},
        "images": {"fingerprint": "", "augment": "none", "seed": 0, "augmented_sha256": ""}, "shards": shards,
        **changes,
    })  # fmt: skip
    return folder


def gz(data, count=1):
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1, mtime=0) as out:
        for _ in range(count):
            out.write(data)
    return file.getvalue()


def block(name="test_batch", size=b"%011o\0" % 0, kind=b"0", data=b"", magic=b"ustar\00000"):
    """A member of a tar archive, its checksum right."""
    header = name.encode().ljust(100, b"\0") + b"0000644\0" * 3 + size.ljust(12, b"\0") + b"0" * 11 + b"\0"
    header = (header + b" " * 8 + kind).ljust(257, b"\0") + magic
    header = header.ljust(512, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:] + data + bytes(-len(data) % 512)


def octal(size):
    return b"%011o\0" % size


def extended(**records):
    data = b""
    for key, value in records.items():
        record = f" {key.replace('_', '.')}={value}\n".encode()
        data += str(len(record) + len(str(len(record) + 2))).encode() + record
    return block("x", octal(len(data)), b"x", data)


def zipped(change=lambda name, data: data, how=zipfile.ZIP_STORED, content=STATE):
    """A file of torch.save with other content or packing."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(content))) as whole, zipfile.ZipFile(file, "w", how) as out:
        for name in whole.namelist():
            out.writestr(name, change(name, whole.read(name)))
    return file.getvalue()


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib_crc(kind + data))

    from zlib import compress
    from zlib import crc32 as zlib_crc

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", compress(bytes(1000))) + chunk(b"IEND", b"")
