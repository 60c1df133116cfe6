"""Files that would grow, or never end, are refused in bounded memory and time."""

import hashlib
import json
import os
import pickle
import struct
import zipfile

import pytest
from hostile import (
    STATE,
    Payload,
    a_run,
    bad_input,
    block,
    cifar,
    contained,
    extended,
    gz,
    octal,
    png,
    refused,
    saved,
    zipped,
)

from eekd.bank import LogitBank
from eekd.data import formats, load
from eekd.io.files import printable, read_checked
from eekd.io.tensors import load_tensors, load_weights
from eekd.report import page
from eekd.snapshots import read_manifest
from eekd.train.config import Config
from eekd.train.run_folder import read_settings

MEGABYTE = bytes(1 << 20)


@bad_input
@pytest.mark.parametrize(("data", "said"), [
    (gz(MEGABYTE, 200), "unpacks to more than"),
    (gz(b"\0\0\x08\x03" + struct.pack(">3I", 200, 1024, 1024)) + gz(MEGABYTE, 200), "unpacks to more than"),
    (b"\0\0\x08\x04" + b"\xff" * 16, "its header says"),
    (gz(b"\0\0\x08\x04" + b"\xff" * 16), "its header says"),
    (b"\0\0\x08\xff" + b"\xff" * 1020, "must be an idx file"),
    (gz(b"")[:-8] * 1000, "damaged gzip|must be an idx"),
])  # fmt: skip
def test_idx_bombs(tmp_path, data, said):
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(data)
    refused(load, "fashion-mnist", tmp_path, said=said)


@bad_input
@pytest.mark.parametrize(("data", "said"), [
    (block(size=b"7" * 11), "unpacks to more than"),
    (block(size=b"7" * 12), "unpacks to more than"),
    (block(size=b"\x80" + b"\0" * 3 + b"\xff" * 8), "damaged"),  # 2^64 in base 256
    (block(size=b"\xff" * 12) + block(), "damaged"),  # -1: tarfile would go round for ever (CVE-2025-8194)
    (block(size=b"-0000000777"), "damaged"),
    (block(size=octal(1 << 20)), "cut off"),
    (block("other", b"7" * 11), "unpacks to more than"),
    (block("x", b"7" * 11, b"x"), "unpacks to more than"),
    (extended(GNU_sparse_major=1, GNU_sparse_minor=0, GNU_sparse_realsize=1 << 50) + block(size=octal(512),
     data=b"1\n0\n1125899906842624\n"), "must hold cifar10: "),  # holes of 2^50 bytes
    (block(size=octal(512), kind=b"S", data=bytes(512)), "is refused"),
    (block("x", octal(1 << 20), b"x", b"1" * (1 << 20)) + block(), "must hold cifar10: "),  # CVE-2024-6232
    (gz(block("other", octal(200 << 20))) + gz(MEGABYTE, 200), "unpacks to more than"),
    (gz(block("a" * 90), 200_000), "unpacks to more than"),
    (block("../test_batch"), "is refused"),
    (block("/etc/test_batch"), "is refused"),
    (block("x", kind=b"2"), "is refused"),
    (block("x\x1b[2J", kind=b"2"), r"is refused: 'x\\x1b"),
    (b"\x1f\x8b" + bytes(100), "damaged"),
    (b"BZh9" + bytes(1000), "damaged"),
])  # fmt: skip
def test_tar_bombs(tmp_path, data, said):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(data)
    refused(load, "cifar10", tmp_path, said=said)


def pickled(value):
    """A dict with these bytes as its one value."""
    return b"\x80\x02}U\x0blabel_namesq\xff" + value + b"s."


def array(data=b"U\0", shape=b"K\0\x85"):
    """An array whose bytes and shape are these bytes of a pickle."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87R\x89"
        + data
        + b"tb"
    )


HUGE = struct.pack("<Q", 1 << 40)
DEEP, LONG = 140_000, 310_000  # operations: fewer and more than STEPS
DOUBLED = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # a tuple with 2^60 leaves


@bad_input
@pytest.mark.parametrize(("data", "said"), [
    (pickled(b"c_codecs\nencode\n\x8a\x06" + HUGE[:6] + b"\x85R"), "TypeError"),  # bytes(2^40)
    (pickled(array(b"c_codecs\nencode\nJ\0\0\0\x01\x85R", b"J\0\0\0\x01\x85")), "TypeError"),
    (pickled(array(shape=b"(U\x01aJ\xff\xff\xff\x7fK\x7ft")), "is not one of bytes"),  # "a" times 2^31 times 127
    (pickled(array(shape=b"(" + (b"\x8b\0\0\1\0" + b"\x7f" * (1 << 16)) * 64 + b"t")), "one of bytes"),
    (b"\x80\x02})" + b"\x85" * DEEP + b"K\x01s.", "a tuple is a key"),  # the hash goes as deep as the tuple,
    (b"\x80\x02}" + DOUBLED + b"K\x01s.", "a tuple is a key"),  # and to every leaf
    (b"\x80\x02(" + b")" + b"\x85" * DEEP + b"K\x01d.", "not built entry by entry"),
    (b"\x80\x04(" + b")" + b"\x85" * DEEP + b"\x91.", "KeyError"),  # a frozenset
    (b"\x80\x04\x8f(" + b")" + b"\x85" * DEEP + b"\x90.", "KeyError"),
    (pickled(b"\x96" + HUGE), "KeyError"),
    (pickled(b"\x8e" + HUGE), "EOFError"),
    (pickled(b"\x8b" + struct.pack("<i", -1)), "negative byte count"),
    (pickled(b"\x95" + b"\xff" * 8), "IndexError"),
    (pickled(b"c_codecs\nencode\nN}U\x07__new__Ns\x86b"), "AttributeError"),  # the state of the reader's own class
    (pickled(b"cnumpy\ndtype\nN}U\x0c__setstate__Ns\x86b"), "TypeError"),
    (pickled(b"P0\n"), "KeyError"), (pickled(b"\x82\x01"), "KeyError"), (pickled(b"2"), "KeyError"),
    (pickled(b"I" + b"9" * 5000 + b"\n"), "ValueError"),
    (b"N" * LONG + b".", "it takes more than"), (b"(" * LONG + b".", "it takes more than"),
])  # fmt: skip
def test_pickle_bombs(tmp_path, data, said):
    for file in ("data_batch_1", "meta"):
        root = tmp_path / file
        root.mkdir()
        refused(load, "cifar10", cifar(root, **{file: data}), said=f"{file} is no pickle .*{said}")


@bad_input
@pytest.mark.parametrize(
    "names",
    [
        b"]" * 100_000 + b"a" * 99_999,  # as text it is too deep
        b"](" + b"]" * 9 + b"c_codecs\nencode\ne",
        b"](" + b"N" * 10 + b"e",
        b"](" + DOUBLED + b"h\1" * 9 + b"e",
        DOUBLED,
        b"](" + (b"T" + struct.pack("<i", 1 << 20) + b"x" * (1 << 20)) * 9 + b"e",
        b"U\nabcdefghij",
    ],
)
def test_class_names_are_text_or_numbers(tmp_path, names):
    kind, said = contained(lambda: load("cifar10", cifar(tmp_path, meta=pickled(names))).classes)
    assert (kind, said) == (None, repr(tuple("0123456789")))


@bad_input
@pytest.mark.parametrize(
    "labels", [b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20), b"\x8a\xff" + b"\x80" * 255]
)
def test_labels_without_end(tmp_path, labels):
    pixels = array(b"T" + struct.pack("<i", 3072) + bytes(3072), b"K\x01M\0\x0c\x86")
    data = b"\x80\x02}U\x04data" + pixels + b"sU\x06labels](" + labels + b"es."
    refused(load, "cifar10", cifar(tmp_path, test_batch=data), said="must have labels from 0 to 9")


def tensors_of(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def one(offsets, shape=(1,), dtype="F32"):
    return {"weight": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@bad_input
@pytest.mark.parametrize("data", [
    tensors_of(b"", length=2**64 - 1), tensors_of(b"{}", length=2**63), tensors_of(b"{}", length=1 << 40),
    tensors_of(b"{}", length=10**8 - 1), tensors_of(b"[" * 2_000_000), tensors_of(b'{"a":' * 100_000),
    tensors_of(one((0, 1 << 60), (1 << 58,))), tensors_of(one((0, 0), (1 << 62, 1 << 62))),
    tensors_of(one((0, 4), (1 << 40,)), bytes(4)), tensors_of(one((1 << 60, (1 << 60) + 4)), bytes(4)),
    tensors_of(one((0, 4)) | {"b": one((0, 4))["weight"]}, bytes(4)), tensors_of(one((4, 0)), bytes(4)),
    tensors_of(one((0, 4), dtype="__reduce__"), bytes(4)), tensors_of(one((0, 4), dtype="\x1b[2J"), bytes(4)),
])  # fmt: skip
def test_safetensors_bombs(tmp_path, data):
    (tmp_path / "weights.safetensors").write_bytes(data)
    assert printable(message := refused(load_tensors, tmp_path / "weights.safetensors", said="weights")) and message


def sized(name, data):
    """The pickle of STATE, its tensors 2^50 long."""
    return data.replace(b"K\x02K\x03\x86", b"\x8a\x07" + struct.pack("<Q", 1 << 50)[:7] + b"K\x03\x86")


@bad_input
@pytest.mark.parametrize(("write", "said"), [
    (lambda: zipped(lambda name, data: bytes(99 << 20) if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED),
     "it unpacks"),
    (lambda: zipped(sized), "."),
    (lambda: zipped(lambda name, data: b"\x80\x02" + b"(" * 1000 + b"." if name.endswith("pkl") else data), "."),
    (lambda: zipped(lambda name, data: b"\x80\x02cposix\nsystem\nU\x02ls\x85R." if name.endswith("pkl") else data),
     "posix.system"),
    (lambda: saved(STATE, _use_new_zipfile_serialization=False).replace(b"K\x06", b"\x8a\x07" + HUGE[:7]), "."),
    (lambda: zipped()[:-30], "cut off"), (lambda: zipped()[:200], "cut off"),
    (lambda: b"PK\3\4" + bytes(100), "cut off"),
])  # fmt: skip
def test_bombs_of_torch_save(tmp_path, write, said):
    (tmp_path / "weights.pt").write_bytes(write())
    message = refused(load_weights, tmp_path / "weights.pt", said=f"weights.pt cannot be read as tensors .*: .*{said}")
    assert "False" not in message  # torch's advice


def sealed(body):
    """A JSON object with a seal that is right."""
    digest = hashlib.sha256(body + b"\n}\n").hexdigest()
    return body + b',\n  "own_sha256": "' + digest.encode() + b'"\n}\n'


JSON = [
    b"",
    b"3",
    b"null",
    b"[]",
    b"{}{}",
    b"\0" * 100,
    b"\xff\xfe{\0}\0",
    b'"\\ud800"',
    b"[" * 100_000,
    b"9" * 5000,
    b'{"a":' * 100_000,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"format": NaN}',
    b'{"format": 1e999}',
    b'{"format": 1, "format": 2}',
    b'{"format": ' + b"9" * 4000 + b"}",
    b'{"' + b"a" * 3_000_000 + b'": 1}',
    b'{"own_sha256": 3}',
    b'{"own_sha256": "' + b"0" * 64 + b'"}',
]
READERS = {
    "snapshots": ("manifest.json", read_manifest), "bank": ("manifest.json", LogitBank.open),
    "settings": ("config.json", read_settings), "environment": ("environment.json", read_settings),
    "report": ("summary.json", page.report), "metrics": ("students/ce/metrics.jsonl", page.report),
    "student": ("students/ce/student.json", page.report),
}  # fmt: skip


@bad_input
@pytest.mark.parametrize("reader", READERS)
def test_json_bombs(tmp_path, reader):
    name, read = READERS[reader]
    run = a_run(tmp_path / "run")

    def check():
        for data in [*JSON, sealed(b'{\n  "format": ' + b"[" * 800 + b"]" * 800)]:
            (run / name).write_bytes(data + b"\n" * (reader == "metrics"))
            try:
                read(run)
            except (FileNotFoundError, ValueError) as error:
                assert str(run) in str(error)
            else:  # what is in the other files may be anything
                assert reader in ("environment", "metrics"), data[:40]

    assert contained(check) == (None, "None")


@bad_input
def test_json_too_large(tmp_path):
    for name in ("manifest.json", "config.json"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)
    for read in (read_manifest, LogitBank.open):
        refused(read, tmp_path, said="manifest.json must have at most 33554432 bytes, as JSON, got 1099511627776")
    refused(Config.load, tmp_path / "config.json", said="^.*/config.json must have at most 33554432 bytes")


@bad_input
@pytest.mark.parametrize(
    "read",
    [
        read_checked,
        load_weights,
        load_tensors,
        lambda path: formats.read_members(path, {"test_batch"}),
        formats.read_bytes,
    ],
    ids=["read_checked", "load_weights", "load_tensors", "read_members", "read_bytes"],
)
def test_files_that_never_end(tmp_path, read):
    """A terabyte of holes; a pipe that nobody writes to; a link to a device."""
    holes, pipe, device = (tmp_path / name for name in ("holes", "pipe", "device"))
    holes.touch()
    os.truncate(holes, 1 << 40)
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (holes, pipe, device):
        refused(read, path, said=f"{path} (has|is missing or not a file|must be a file of at most)")


@bad_input
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "environment.json",
        "teacher/manifest.json",
        "teacher/metrics.jsonl",
        "students/ce/student.json",
        "students/ce/metrics.jsonl",
    ],
)
def test_a_run_with_a_pipe_in_it(tmp_path, name):
    run = a_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    refused(page.report, run, said="not a (file|run)|must be a run folder")


@bad_input
@pytest.mark.parametrize("data", [
    png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), png(0, 0), png(8, 8)[:40], b"P6 0 0 255\n", b"BM" + b"\xff" * 60,
    b"P6 99999999 99999 255\n", b"GIF89a\xff\xff\xff\xff" + bytes(20), b"II*\0\x08\0\0\0" + b"\xff" * 100,
    b"RIFF\xff\xff\xff\xffWEBPVP8 ", pickle.dumps(Payload("x")),
])  # fmt: skip
def test_image_bombs(tmp_path, data):
    for i in range(12):
        for name in ("cat", "dog"):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / name / f"{i}.png").write_bytes(data)
    message = refused(lambda: load(str(tmp_path), image_size=8), room=1 << 30)
    assert "0.png is damaged or no image" in message


@bad_input
@pytest.mark.parametrize("item", [
    "/dev/zero", "/nowhere", "", None, 3, [1], {"bytes": None, "path": "/dev/zero"}, {}, b"", {"bytes": 5},
])  # fmt: skip
def test_cells_that_are_no_image(item):
    from eekd.data import Encoded

    refused(lambda: Encoded([item], channels=3, image_size=8).decode(0))
