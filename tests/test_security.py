"""Nothing in a data file is run, and a hostile one ends in a sentence, in bounded memory and time: SECURITY.md."""

import ast
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import struct
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from rich.console import Console
from torch import nn

from eekd.bank import LogitBank
from eekd.bank.reader import shard_names
from eekd.compare import __main__ as compare
from eekd.compare import runner
from eekd.data import formats, load
from eekd.data.annotations import read_table
from eekd.data.classes import read_classes
from eekd.data.images import decode_image
from eekd.io.files import printable, read_checked, read_json, write_atomic, write_json_atomic
from eekd.io.lock import locked
from eekd.io.tensors import load_tensors, load_weights, save_tensors
from eekd.report import __main__ as report_command
from eekd.report import page
from eekd.snapshots import SnapshotEnsemble, SnapshotRecorder, read_manifest
from eekd.train import __main__ as train_command
from eekd.train import screen
from eekd.train.config import Config, Student, Teacher
from eekd.train.replay import replay
from eekd.train.run_folder import check_metrics, read_settings

ROOT = Path(__file__).resolve().parent.parent
bad_input = pytest.mark.bad_input


# ---- the source: there is no way from data to code but the factories that a setting names ----

PARTS = "eekd", "kernels", "results"
SOURCES = [ROOT / "setup.py", *(path for part in PARTS for path in sorted((ROOT / part).rglob("*.py")))]
MODULES = {
    "pickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "runpy",
    "code",
    "codeop",
    "imp",
    "ctypes",
    "urllib",
    "requests",
    "ftplib",
    "xmlrpc",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.jit.load",
    "torch.hub.load",
    "torch.export.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "numpy.lib.format.read_array",
}
METHODS = {
    "exec_module",
    "load_module",
    "import_module",
    "spec_from_file_location",
    "SourceFileLoader",
    "extractall",
    "unpack_archive",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
# Where a setting names a Python file; and the archive's own unpickler, which finds nothing to call.
ALLOWED = {
    "eekd/user_code.py": {"exec_module", "spec_from_file_location"},
    "eekd/data/formats.py": {"pickle"},
    "eekd/__main__.py": {"import_module"},  # of its own verbs
    "eekd/lazy.py": {"import_module"},  # of its own names
    "kernels/bench.py": {"os.execve"},  # of Python with the same command line
}


def ways_to_code(source: str) -> set[str]:
    """What in a source could turn data into code, or let a shell do it."""
    tree, found, names = ast.parse(source), set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        found |= {module.split(".")[0] for module in modules} & MODULES

    def dotted(node) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in METHODS:
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found |= {names.get(node.id, "").split(".")[-1]} & METHODS
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        literal = {key: getattr(value, "value", "?") for key, value in given.items()}
        first = node.args[0] if node.args else None
        if name in CALLS or re.match(r"os\.(exec|spawn|posix_spawn)|(_?pickle)\.(load|Unpickler)", name):
            found.add(name)
        if name in ("torch.load", "torch.serialization.load") and literal.get("weights_only") is not True:
            found.add(name)
        if name == "numpy.load" and literal.get("allow_pickle", False) is not False:
            found.add(name)
        if name.startswith("subprocess.") and (
            literal.get("shell", False) is not False
            or not (isinstance(first, ast.List) or name.endswith("output") and isinstance(first, ast.Constant))
        ):  # a list is no shell's business, and a constant no file's
            found.add(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_turns_data_into_code(path):
    assert ways_to_code(path.read_text()) == ALLOWED.get(str(path.relative_to(ROOT)), set())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", {"pickle"}),
        ("from cloudpickle import loads", {"cloudpickle"}),
        ("import pickle as p\np.loads(x)", {"pickle", "pickle.loads"}),
        ("import marshal, yaml", {"marshal", "yaml"}),
        ("eval(x)", {"eval"}),
        ("def f():\n    exec(x)", {"exec"}),
        ("__import__(x)", {"__import__"}),
        ("import torch\ntorch.load(x)", {"torch.load"}),
        ("import torch as t\nt.load(x, weights_only=False)", {"torch.load"}),
        ("from torch import load\nload(x, weights_only=w)", {"torch.load"}),
        ("import torch\ntorch.load(x, weights_only=True)", set()),
        ("import torch\ntorch.compile(x)\nmodel.eval()", set()),
        ("import numpy as np\nnp.load(x, allow_pickle=True)", {"numpy.load"}),
        ("import numpy as np\nnp.load(x, allow_pickle=False)", set()),
        ("import subprocess\nsubprocess.run('ls ' + x, shell=True)", {"subprocess.run"}),
        ("import subprocess\nsubprocess.run(['ls', x], shell=True)", {"subprocess.run"}),
        ("import subprocess\nsubprocess.getoutput(f'ls {x}')", {"subprocess.getoutput"}),
        ("from subprocess import Popen\nPopen(x)", {"subprocess.Popen"}),
        ("import subprocess\nsubprocess.run(['ls', x])", set()),
        ("import os\nos.system(x)\nos.execv(x, y)", {"os.system", "os.execv"}),
        ("from torch import distributed\ndistributed.all_gather_object(x, y)", {"all_gather_object"}),
        ("from torch.distributed import broadcast_object_list\nbroadcast_object_list(x)", {"broadcast_object_list"}),
        ("import importlib\nimportlib.import_module(x)", {"import_module"}),
        ("tar.extractall(x)", {"extractall"}),
    ],
)
def test_the_search_finds_what_it_is_for(source, found):
    assert ways_to_code(source) == found


# ---- hostile files ----

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


@pytest.fixture
def marker(tmp_path):
    """What code in a data file would leave; never there at the end."""
    path = tmp_path / "was run"
    yield path
    assert not path.exists()


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


def test_the_payload_would_be_seen(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "seen")))
    assert (tmp_path / "seen").is_dir()


def legacy_tar(marker):
    """What torch.save wrote before version 0.1.10."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("pickle", "storages", "tensors"):
            data = pickle.dumps(Payload(marker))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def saved(content, **how):
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


@bad_input
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "write",
    [
        lambda marker: pickle.dumps(Payload(marker)),
        lambda marker: pickle.dumps({"state_dict": {"weight": Payload(marker)}}, protocol=2),
        lambda marker: saved(Payload(marker)),
        lambda marker: saved(STATE | {"x": Payload(marker)}),
        lambda marker: saved({"model": STATE, "epoch": Payload(marker)}, _use_new_zipfile_serialization=False),
        legacy_tar,
    ],
)
def test_weights_with_a_payload(tmp_path, marker, write, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(write(marker))
    refused(load_weights, path, said="weights")
    refused(lambda: SnapshotEnsemble.from_files([path], lambda: nn.Linear(3, 2)), said="weights")


def cifar(root, **files):
    x = np.zeros((4, 3072), np.uint8)
    batch = pickle.dumps({"data": x, "labels": [0, 1, 2, 3]}, protocol=2)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, data in (dict.fromkeys(names, batch) | files).items():
        (root / name.replace("meta", "batches.meta")).write_bytes(data)
    return root


@bad_input
@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "meta"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_cifar_with_a_payload(tmp_path, marker, file, protocol):
    root = cifar(tmp_path, **{file: pickle.dumps({"labels": Payload(marker)}, protocol=protocol)})
    refused(load, "cifar10", root, said=f"{file} is no pickle of plain values .*it asks for 'posix.mkdir'")


@bad_input
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "environment.json",
        "summary.json",
        "teacher/manifest.json",
        "teacher/snapshots.json",
        "students/ce/student.json",
        "students/ce/metrics.jsonl",
    ],
)
def test_a_run_whose_json_is_a_pickle(tmp_path, marker, name, capsys):
    run = a_run(tmp_path / "run")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_bytes(pickle.dumps(Payload(marker), protocol=0) + b"\n")
    assert report_command.main([str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.full
@bad_input
def test_a_folder_for_hugging_face_with_code_in_it(tmp_path, marker, monkeypatch):
    pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from PIL import Image

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, png = tmp_path / "evil", io.BytesIO()
    folder.mkdir()
    Image.new("L", (8, 8)).save(png, "PNG")
    # A type of one's own, which some versions of Arrow unpickled as soon as they saw it (CVE-2023-47248).
    kind = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    cells = arrow.array([{"bytes": png.getvalue(), "path": None}] * 40)
    fields = [arrow.field("image", cells.type), arrow.field("label", arrow.int64(), metadata=kind)]
    table = arrow.table([cells, arrow.array([0, 1] * 20)], schema=arrow.schema(fields))
    parquet.write_table(table, folder / "train.parquet")
    evil(folder, marker)
    for name in ("evil.py", "train.py"):  # a script named as the folder was run by datasets before version 4
        if not (folder / name).exists():
            shutil.copy(folder / "evil.py", folder / name)
    (folder / "state.pkl").write_bytes(pickle.dumps(Payload(marker)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    try:
        assert len(load(str(folder)).train) > 0
    except ValueError as error:
        assert "cannot be read as parquet" in str(error)


@bad_input
def test_an_image_that_is_a_program(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: ran.append(arguments))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch x) (w) file\nshowpage\n"
    with pytest.raises(ValueError, match="cat.png is damaged or no image"):
        decode_image(program, "cat.png", "RGB")
    assert not ran


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


def test_reports_and_banks_run_no_factory(tmp_path, marker, capsys):
    run = a_run(tmp_path / "run", evil(tmp_path, marker))
    assert report_command.main([str(run)]) == 0
    bank = LogitBank.open(a_bank(run / "bank", spec={"name": evil(tmp_path, marker)}))
    assert bank.rows(1, torch.tensor([0, 5]))[0].shape == (2, 2, 4)
    ensemble = SnapshotEnsemble.load(run / "teacher", lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    assert len(ensemble) == 2
    read_settings(run)


def test_a_factory_that_a_setting_names_is_code_by_intention(tmp_path):
    """And the payload of the test before works."""
    run = a_run(tmp_path / "run", evil(tmp_path, tmp_path / "ran"))
    SnapshotEnsemble.load(run / "teacher")
    assert (tmp_path / "ran").is_dir()


def test_replay_runs_the_factory_that_was_trained(tmp_path):
    """As SECURITY.md says, whose search finds it."""
    spec = {"name": evil(tmp_path, tmp_path / "ran"), "num_classes": 2, "in_channels": 1, "image_size": 2}
    path = tmp_path / "run" / "teacher" / "non-finite-1.json"
    sha256 = save_tensors(path.with_suffix(".safetensors"), {"images": torch.zeros(1, 1, 2, 2)})
    settings = {"channels_last": False, "precision": "fp32"}
    write_json_atomic(path, {"format": 1, "sha256": sha256, "classes": 2, "criterion": None, "spec": spec,
                             "settings": settings})  # fmt: skip
    assert search(path.parent.parent).returncode == 0
    with contextlib.suppress(ValueError):  # of weights that are not there
        replay(path)
    assert (tmp_path / "ran").is_dir()
    assert "eekd.train.replay.replay" in (ROOT / "SECURITY.md").read_text()


def search(folder):
    """The search that SECURITY.md advises."""
    command = re.search(r"```bash\n(grep .*) RUN\n```", (ROOT / "SECURITY.md").read_text())[1]
    return subprocess.run([*shlex.split(command), folder], capture_output=True, text=True)


@pytest.mark.parametrize(
    "hide",
    [
        lambda path: None,
        lambda path: path.write_text(path.read_text().replace(".py:", r"\u002epy:")),
        lambda path: path.write_text(path.read_text().replace(".py:", r".p\u0079:")),
        lambda path: path.rename(path.with_suffix(".txt")) and path.symlink_to(path.with_suffix(".txt")),
    ],
)
def test_the_search_for_factories_in_security_md(tmp_path, hide):
    bad = a_run(tmp_path / "bad", evil(tmp_path, tmp_path / "ran"))
    for name in ("config.json", "teacher/manifest.json"):
        hide(bad / name)
    good = a_run(tmp_path / "good")
    found = [search(run) for run in (bad, good)]
    assert {"config.json", "manifest.json"} == set(re.findall(r"^/.*/(\w+.json)", found[0].stdout, re.MULTILINE))
    assert not found[1].stdout and not found[0].stderr + found[1].stderr


@bad_input
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_json_is_utf_8(tmp_path, encoding):
    """Or that search would not see what is in it."""
    run = a_run(tmp_path / "run", "evil+.py:f")
    for name, read in (
        ("teacher/manifest.json", lambda: read_manifest(run / "teacher")),
        ("config.json", lambda: Config.load(run / "config.json")),
    ):
        text = json.dumps(read_json(run / name))  # without its seal
        (run / name).write_bytes(text.encode(encoding))
        refused(read, said=name)


# ---- bombs ----


def gz(data, count=1):
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1, mtime=0) as out:
        for _ in range(count):
            out.write(data)
    return file.getvalue()


MEGABYTE = bytes(1 << 20)


@bad_input
@pytest.mark.parametrize(("data", "said"), [
    (gz(MEGABYTE, 200), "unpacks to more than"),
    (gz(b"\0\0\x08\x03" + struct.pack(">3I", 200, 1024, 1024)) + gz(MEGABYTE, 200), "unpacks to more than"),
    (b"\0\0\x08\x04" + b"\xff" * 16, "its header says"),
    (gz(b"\0\0\x08\x04" + b"\xff" * 16), "its header says"),
    (b"\0\0\x08\xff" + b"\xff" * 1020, "is no idx file"),
    (gz(b"")[:-8] * 1000, "damaged gzip|is no idx"),
])  # fmt: skip
def test_idx_bombs(tmp_path, data, said):
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(data)
    refused(load, "fashion-mnist", tmp_path, said=said)


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
     data=b"1\n0\n1125899906842624\n"), "has no cifar10"),  # holes of 2^50 bytes
    (block(size=octal(512), kind=b"S", data=bytes(512)), "is refused"),
    (block("x", octal(1 << 20), b"x", b"1" * (1 << 20)) + block(), "has no cifar10"),  # CVE-2024-6232
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
    refused(load, "cifar10", cifar(tmp_path, test_batch=data), said="wanted 0 to 9")


def tensors_of(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def zipped(change=lambda name, data: data, how=zipfile.ZIP_STORED, content=STATE):
    """A file of torch.save with other content or packing."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(content))) as whole, zipfile.ZipFile(file, "w", how) as out:
        for name in whole.namelist():
            out.writestr(name, change(name, whole.read(name)))
    return file.getvalue()


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
    (lambda: zipped()[:-30], "zip"), (lambda: zipped()[:200], "zip"), (lambda: b"PK\3\4" + bytes(100), "zip"),
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


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib_crc(kind + data))

    from zlib import compress
    from zlib import crc32 as zlib_crc

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", compress(bytes(1000))) + chunk(b"IEND", b"")


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


# ---- lies and ways out ----


def a_table(folder, path):
    """Parquet of 40 images that lie in one file."""
    datasets = pytest.importorskip("datasets")
    table = {"image": [{"bytes": None, "path": path}] * 40, "label": [0, 1] * 20}
    folder.mkdir()
    datasets.Dataset.from_dict(table).to_parquet(str(folder / "t.parquet"))
    return folder


def an_image():
    from PIL import Image

    data = io.BytesIO()
    Image.new("L", (8, 8), 7).save(data, "PNG")
    return data.getvalue()


@pytest.mark.full
@bad_input
@pytest.mark.parametrize("path", ["../secret.png", "/secret.png", "x/../../secret.png"])
def test_a_table_reads_no_file_outside_its_folder(tmp_path, monkeypatch, path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(an_image())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = str(secret) if path.startswith("/") else path
    evil, good = a_table(tmp_path / "evil", path), a_table(tmp_path / "good", "mine.png")
    (evil / "x").mkdir()
    monkeypatch.chdir(evil)
    for source in (evil, evil / "t.parquet"):
        refused(lambda source=source: load(str(source)), said=f"is '{path}', wanted bytes or a path in {evil}")
    (good / "mine.png").write_bytes(an_image())
    assert len(load(str(good / "t.parquet")).train) > 0


@pytest.mark.full
@bad_input
def test_a_table_of_the_hub_reads_files_of_the_cache_only(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    evil = a_table(tmp_path / "evil", str(tmp_path / "evil" / "mine.png"))
    (evil / "mine.png").write_bytes(an_image())
    table = datasets.Dataset.from_parquet(str(evil / "t.parquet"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=table.select(range(20))))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "elsewhere"))
    refused(lambda: load("some/thing"), said=f"mine.png', wanted bytes or a path in {tmp_path}/elsewhere")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(evil))
    assert len(load("some/thing").train) > 0


@bad_input
@pytest.mark.parametrize(
    "file",
    [
        "../snapshot-1.safetensors",
        "/etc/passwd.safetensors",
        "a/b.safetensors",
        "..safetensors",
        ".safetensors",
        "x.pt",
        "x.safetensors\n",
        "x\0.safetensors",
        "~.safetensors",
        3,
        None,
    ],
)
def test_a_manifest_that_leads_out_of_its_folder(tmp_path, file):
    run = a_run(tmp_path / "run")
    manifest = read_json(run / "teacher/manifest.json")
    manifest["snapshots"][0]["file"] = file
    write_json_atomic(run / "teacher/manifest.json", manifest)
    refused(read_manifest, run / "teacher", said="must be the name of a .safetensors file in its folder")


@bad_input
@pytest.mark.parametrize("metrics", [{"../../secret": "0" * 64}, {"/etc/passwd": ""}, [], "metrics.jsonl", {"": ""}])
def test_a_record_that_leads_out_of_its_folder(tmp_path, metrics):
    run = a_run(tmp_path / "run")
    write_json_atomic(run / "students/ce/student.json", {"format": 1, "metrics": metrics})
    refused(page.report, run, said="must have a record with metrics of metrics.jsonl and metrics.csv")
    refused(check_metrics, run / "students/ce", {"metrics": metrics})


@bad_input
@pytest.mark.parametrize("spec", [
    {}, {"x": 1}, {"name": "resnet8"}, {"name": ["resnet8"], "num_classes": 2},
    {"name": "resnet8", "num_classes": 1 << 50, "in_channels": 3, "image_size": 32},
    {"name": "resnet8", "num_classes": 10**30, "in_channels": 3, "image_size": 32},
])  # fmt: skip
def test_a_spec_that_cannot_be_built(tmp_path, spec):
    run = a_run(tmp_path / "run")
    write_json_atomic(run / "teacher/manifest.json", read_json(run / "teacher/manifest.json") | {"spec": spec})
    refused(SnapshotEnsemble.load, run / "teacher", said="manifest.json has a spec that cannot be built")


@bad_input
@pytest.mark.parametrize(("how", "said"), [
    ({"classes": 1 << 30}, "must have logits"), ({"classes": 1 << 60}, "its classes cannot be"),
    ({"classes": 5}, "must have logits"), ({"shape": (4, 1, 4)}, "must have logits"),
    ({"shape": (1,)}, "must have logits"), ({"dtype": "bfloat16"}, "must have logits"),
    ({"features": 128}, "cannot be read"), ({"snapshots": 1 << 30}, "teacher cannot"),
    ({"indices": 4}, "indices below 4, got 4"), ({"indices": -1}, "indices below 4, got 65535"),
    ({"views": 1 << 30}, "its shards cannot be"), ({"shard_rows": 1 << 62}, "its shard_rows cannot be"),
    ({"images": {"fingerprint": "", "augment": "", "seed": 1 << 70, "augmented_sha256": ""}}, "its images cannot be"),
])  # fmt: skip
def test_a_bank_whose_manifest_lies(tmp_path, how, said):
    a_bank(tmp_path / "bank", **how)
    refused(lambda: LogitBank.open(tmp_path / "bank").rows(0, torch.tensor([0, 3, 5])), said=said)


@bad_input
def test_a_projection_of_another_width(tmp_path):
    a_bank(tmp_path / "bank", projection={"width": (1 << 31) - 1, "seed": 0}, features=4)
    refused(lambda: LogitBank.open(tmp_path / "bank").project(torch.zeros(2, 8)), said="2147483647 features, got 8")


@bad_input
def test_settings_of_a_teacher_are_checked_by_train_too(tmp_path):
    run = a_run(tmp_path / "run")
    write_json_atomic(run / "environment.json", {"format": 1, "config_sha256": "0" * 64})
    a_bank(run / "bank")
    for flags in (["--teacher", str(run)], ["--bank", str(run / "bank")]):
        with pytest.raises(ValueError, match="config.json was changed or damaged since the run began"):
            train_command.parse(["student", *flags])


def test_what_is_written_follows_no_link_out(tmp_path, capsys):
    """A folder may hold links under the names that are written to."""
    secret, run = tmp_path / "secret", a_run(tmp_path / "run")
    secret.write_text("mine")
    (run / ".report.html.tmp").symlink_to(secret)
    (run / "report.html").symlink_to(secret)
    (run / ".lock").symlink_to(secret)
    assert report_command.main([str(run)]) == 0
    with pytest.raises(OSError, match=".lock"), locked(run):
        pass
    assert secret.read_text() == "mine" and not (run / "report.html").is_symlink()


@bad_input
@pytest.mark.parametrize(
    "flags",
    [
        lambda run: (report_command.main, [str(run)]),
        lambda run: (train_command.main, ["--resume", str(run)]),
        lambda run: (train_command.main, ["--config", str(run / "config.json")]),
    ],
)
def test_what_a_file_says_does_not_speak_to_the_terminal(tmp_path, capsys, flags):
    run = a_run(tmp_path / "run")
    write_atomic(run / "config.json", json.dumps({"a\x1b]0;title\x07\u202e\x9b2J\nerror: none": 1}).encode())
    command, arguments = flags(run)
    assert command(arguments) == 2
    out, error = capsys.readouterr()
    assert not out and error.endswith("\n") and error[:-1].isprintable() and r"a\x1b]0;title\x07\u202e\x9b2J\n" in error


HOSTILE = "a\x1b]0;title\x07\u202e\x9b2J\nb"


def printed(what):
    console = Console(file=io.StringIO(), width=999)
    console.print(what)
    return console.file.getvalue()


def test_tables_do_not_speak_to_the_terminal(monkeypatch):
    scores = {"val_accuracy": 0.5, "test_accuracy": 0.5, "gain": None, "seconds_per_epoch": None}
    rows = [{"kind": "student", "name": HOSTILE, "model": HOSTILE, "parameters": 1, "epochs": HOSTILE, **scores}]
    found = printed(screen.results(rows))
    assert found.count(printable(HOSTILE)) == 3 and all(line.isprintable() for line in found.splitlines())
    row = {"name": "ce", "model": HOSTILE, "parameters": 1, "epochs": 1, "steps": 1, "memory": 1, "disk": 1}
    monkeypatch.setattr("eekd.train.estimate.plan", lambda session: [row])
    data = dataclasses.replace(load("digits"), name=HOSTILE)
    found = printed(screen.plan(SimpleNamespace(data=data, asked=Config(), config=Config())))
    assert found.count(printable(HOSTILE)) == 2 and all(line.isprintable() for line in found.splitlines())


def test_lines_do_not_speak_to_the_terminal(tmp_path, monkeypatch, capsys):
    class Seed:
        def __init__(self, out, config, names, views, augmented, data, say, progress):
            self.run = lambda: say(HOSTILE)

    monkeypatch.setattr(runner, "keep_settings", lambda *known: None)
    monkeypatch.setattr(runner, "Seed", Seed)
    monkeypatch.setattr("eekd.compare.study.gather", lambda out, *known: out / "study.json")
    compare.run(compare.Flags(methods=("ce",), settings=Config(data="digits", seeds=1), out=HOSTILE), [])
    found = capsys.readouterr().out
    assert found.count(printable(HOSTILE)) == 2 and all(line.isprintable() for line in found.splitlines())


@bad_input
def test_names_of_tensors_are_printable_and_short():
    from eekd.io.tensors import load_state

    with pytest.raises(ValueError, match="does not fit this Linear") as caught:
        load_state(nn.Linear(3, 2), {"\x1b[2J" + "x" * 10**6: torch.ones(1)}, "file")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_report_is_nothing_but_text_and_drawings(tmp_path):
    hostile = "</title><script src=x onerror=alert(1)>\"'&\u202e"
    run = a_run(tmp_path / "run")
    config = Config(data=hostile, teacher=Teacher(model=hostile, epochs=2, snapshots=2), student=Student(model=hostile))
    write_atomic(run / "config.json", config.to_json().encode())
    (run / "students/ce").rename(run / "students" / "<img onload='x'>")
    facts = {"format": 1, "command": [hostile], "data": {"test": 9}, hostile: {hostile: [hostile]}}
    write_json_atomic(run / "environment.json", facts)
    text = page.report(run).read_text()
    assert "<script" not in text and "<img" not in text and text.count("</title>") == text.count("<title>")
    assert "default-src 'none'" in text and "&lt;script" in text


# ---- fuzz ----


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
    "metrics": (rewritten({"epoch": 1, "weights": [0.5]}).map(lambda data: data + b"\n"), inside(page._rows)),
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


# ---- what is installed ----


def requirements() -> dict[str, list[Requirement]]:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = {
        "build": known["build-system"]["requires"],
        "": known["project"]["dependencies"],
        **known["project"]["optional-dependencies"],
    }
    return {name: [Requirement(text) for text in texts] for name, texts in groups.items()}


def test_dependencies_have_lower_bounds_and_no_others():
    for group in requirements().values():
        for needed in group:
            assert needed.name == "eekd" or [bound.operator for bound in needed.specifier] == [">="], str(needed)


def test_ci_installs_versions_that_are_written_down():
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    names = [pin.name.lower() for pin in pinned]
    assert names == sorted(set(names))
    assert all([bound.operator for bound in pin.specifier] == ["=="] for pin in pinned)
    # CI runs two versions of torch, each with the libraries that it asks for.
    assert not [name for name in names if re.match("eekd|torch|triton|nvidia|cuda", name)]
    versions = {pin.name.lower(): next(iter(pin.specifier)).version for pin in pinned}
    for group, needs in requirements().items():
        for needed in needs if group != "bench" else ():
            if needed.name not in ("eekd", "torch", "triton"):
                assert needed.specifier.contains(versions[needed.name.lower()]), str(needed)
    assert "PIP_CONSTRAINT=$PWD/.ci/constraints.txt" in (ROOT / ".ci/run").read_text()
    assert "constraint" not in (ROOT / "Makefile").read_text()
