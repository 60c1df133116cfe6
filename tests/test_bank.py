"""The logit bank: what is stored is what the snapshots said, a kill costs nothing but time, and nothing else fits."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from eekd import EEKDLoss, LogitBank, SnapshotEnsemble, ensemble_kd, top_k_logits
from eekd.bank import __main__ as cli
from eekd.bank import writer
from eekd.bank.reader import projection
from eekd.data import Loader
from eekd.io.files import read_json, sha256_of, write_json_atomic
from eekd.io.lock import locked
from eekd.train import __main__ as train_cli
from eekd.train import prepare, student, train, train_student, write_bank
from eekd.train.config import Config, Student, Teacher, student_names
from eekd.train.estimate import plan
from eekd.train.run import table
from eekd.train.session import Session

bad_input = pytest.mark.bad_input
TAUGHT = [weighting for weighting in student_names() if weighting != "ce"]
COMMON = dict(model="resnet8_w4", batch_size=50, milestones=(), lr=0.02)
CONFIG = Config(
    train_limit=150,
    device="cpu",
    precision="fp32",
    channels_last=False,
    students=("last",),
    teacher=Teacher(epochs=3, snapshots=3, **COMMON),
    student=Student(epochs=3, **COMMON),
)


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """150 images make three shards, of 64, 64 and 22."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_ROWS", 64)
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A teacher's run with a bank of three views in it, which tests only read."""
    run = train(dataclasses.replace(CONFIG, students=()), tmp_path_factory.mktemp("bank") / "run")
    assert cli.main(["--teacher", str(run), "--views", "3"]) == 0
    return run


@pytest.fixture(scope="module")
def bank(run):
    return LogitBank.open(run / "bank")


@pytest.fixture
def copy(run, tmp_path):
    """A run of one's own to break."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="module")
def topk(run):
    """A bank of the same views with 3 of the 10 classes."""
    assert cli.main(["--teacher", str(run), "--views", "3", "--out", str(run.parent / "topk"), "--top-k", "3"]) == 0
    return LogitBank.open(run.parent / "topk")


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


# ---- what is stored ----


def test_rows_are_what_the_snapshots_say(run, bank):
    """To the last bit of the stored dtype, where the ensemble sees the same batches as when the bank was written."""
    session = Session(CONFIG)
    ensemble = SnapshotEnsemble.load(run / "teacher")
    loader = session.loader("train", CONFIG.teacher, train=True)
    parts = torch.arange(150).split(64)
    assert (bank.views, len(bank), bank.snapshots, bank.classes, bank.feature_dim) == (3, 150, 3, 10, 16)
    for view in range(3):
        for batch in loader.replay([(view, part) for part in parts]):
            for stored, online in zip(bank.rows(view, batch.index), ensemble(batch.images), strict=True):
                assert stored.dtype == torch.float16 and torch.equal(stored, online.half())
    index = torch.tensor([149, 0, 70, 70, 3, 128])
    (batch,) = loader.replay([(2, index)])
    for stored, online in zip(bank.rows(2, index), ensemble(batch.images), strict=True):
        torch.testing.assert_close(stored.float(), online, rtol=1e-3, atol=1e-3)
    assert not torch.equal(bank.rows(0, index)[0], bank.rows(1, index)[0])


def test_the_op_takes_rows_without_a_copy(bank):
    logits, features = bank.rows(1, torch.arange(7))
    assert logits.shape == (3, 7, 10) and logits.stride() == (10, 30, 1)
    assert features.shape == (3, 7, 16) and features.stride() == (16, 48, 1)
    student = torch.randn(7, 10, requires_grad=True)
    labels = torch.arange(7)
    ensemble_kd(student, logits, labels).loss.backward()
    other = student.detach().clone().requires_grad_()
    ensemble_kd(other, logits.float().contiguous(), labels).loss.backward()
    torch.testing.assert_close(student.grad, other.grad)


def test_prefetched_batches_are_those_of_rows(bank, device):
    for block in (1, 4 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("eekd.bank.reader.BLOCK", block)
            indices = torch.randperm(150, generator=torch.Generator().manual_seed(0)).split(40)
            got = list(bank.prefetch(1, indices, device))
            assert len(got) == 4
            for index, (logits, features) in zip(indices, got, strict=True):
                want, keys = bank.rows(1, index.to(device))
                assert torch.equal(logits, want) and torch.equal(features, keys)
                assert logits.device.type == device and logits.stride() == want.stride()
    assert [features for _, features in bank.prefetch(1, indices, features=False)] == [None] * 4
    assert list(bank.prefetch(1, ())) == []


def test_a_reader_that_stops_early_leaves_no_thread(bank):
    reader = bank.prefetch(0, torch.arange(150).split(1))
    next(reader)
    assert any(thread.name.startswith("eekd.bank") for thread in threading.enumerate())
    reader.close()
    assert not any(thread.name.startswith("eekd.bank") for thread in threading.enumerate())


@pytest.mark.parametrize("features", ["none", "all", "5"])
def test_features_whole_projected_or_left_out(run, bank, tmp_path, features):
    make(run, "--views", 1, "--out", tmp_path / "bank", "--features", features)
    other, index = LogitBank.open(tmp_path / "bank"), torch.arange(150)
    logits, stored = other.rows(0, index)
    whole = bank.rows(0, index)[1]
    assert torch.equal(logits, bank.rows(0, index)[0])
    if features == "none":
        assert stored is None and other.feature_dim is None
    elif features == "all":
        assert torch.equal(stored, whole) and other.project(whole) is whole
    else:
        assert other.manifest["projection"] == {"width": 16, "seed": 0} and stored.shape == (3, 150, 5)
        torch.testing.assert_close(stored.float(), other.project(whole), rtol=2e-3, atol=2e-3)


def test_the_projection_keeps_products_on_average():
    u, v = torch.randn(2, 500, generator=torch.Generator().manual_seed(1))
    v = v + u
    found = torch.stack([(u @ r) @ (v @ r) for r in (projection(500, 100, seed) for seed in range(100))])
    scale = u.norm() * v.norm()
    assert (found.mean() - u @ v).abs() < 0.03 * scale and 0.05 * scale < found.std() < 0.2 * scale
    assert (2 * projection(3, 4, 0)).tolist() == [[1, 1, -1, -1], [1, 1, 1, 1], [-1, 1, 1, 1]]  # for ever


def test_bfloat16(run, bank, tmp_path):
    make(run, "--views", 1, "--out", tmp_path / "bank", "--dtype", "bfloat16")
    logits, features = LogitBank.open(tmp_path / "bank").rows(0, torch.arange(150))
    assert logits.dtype == features.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), bank.rows(0, torch.arange(150))[0].float(), rtol=1e-2, atol=1e-2)


@bad_input
def test_logits_beyond_float16_are_refused(run, tmp_path, monkeypatch, capsys):
    forward = SnapshotEnsemble.forward
    monkeypatch.setattr(SnapshotEnsemble, "forward", lambda self, x: tuple(1e6 * y for y in forward(self, x)))
    command = ["--teacher", str(run), "--views", "1", "--out", str(tmp_path / "bank")]
    assert cli.main(command) == 2
    assert "logits of the snapshots are too large for torch.float16: use --dtype bfloat16" in capsys.readouterr().err
    assert cli.main([*command, "--dtype", "bfloat16"]) == 0


# ---- the top k of the logits ----


def same(one, two):
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("logits", "indices", "atoms"))


def test_a_top_k_bank_is_the_top_k_of_the_logits(run, bank, topk):
    """Where the ensemble sees the same batches as when the bank was written; the label is always inside."""
    assert (topk.top_k, topk.classes, topk.manifest["format"]) == (3, 10, 2)
    assert (bank.top_k, bank.manifest["format"]) == (None, 1)
    loader = Session(CONFIG).loader("train", CONFIG.teacher, train=True)
    ensemble = SnapshotEnsemble.load(run / "teacher")
    for batch in loader.replay([(view, part) for view in range(3) for part in torch.arange(150).split(64)]):
        index = batch.index
        want = top_k_logits(ensemble(batch.images)[0], 3, batch.labels)
        for view in range(3):
            got, features = topk.rows(view, index)
            assert torch.equal(features, bank.rows(view, index)[1]) and got.indices.dtype == torch.int64
            assert (got.indices == batch.labels[:, None]).any(1).all()
            dense = bank.rows(view, index)[0]
            assert torch.equal(got.logits, dense.gather(2, got.indices.expand(3, *got.indices.shape)))
            out = dense.float().scatter(2, got.indices.expand(3, *got.indices.shape), -torch.inf)
            for temperature in (1, 5, 20):
                torch.testing.assert_close(got.tail(temperature), (out / temperature).logsumexp(2), rtol=0, atol=4e-3)
            assert got.logits.stride() == (3, 9, 1)
        assert sum(torch.equal(topk.rows(view, index)[0].indices, want.indices) for view in range(3)) == 1


def test_prefetched_top_k_is_that_of_rows(topk, device):
    indices = torch.randperm(150, generator=torch.Generator().manual_seed(0)).split(40)
    for features in (True, False):
        for index, (got, keys) in zip(indices, topk.prefetch(1, indices, device, features), strict=True):
            want, other = topk.rows(1, index.to(device))
            assert same(got, want) and got.logits.device.type == device
            assert torch.equal(keys, other) if features else keys is None
    assert topk.rows(0, torch.zeros(0, dtype=torch.long))[0].tail(5).shape == (3, 0)


def test_all_classes_train_as_a_dense_bank_does(run, bank, tmp_path):
    make(run, "--views", 3, "--top-k", 10, "--out", tmp_path / "bank")
    config = dataclasses.replace(CONFIG, student=dataclasses.replace(CONFIG.student, epochs=1))
    for weighting in ("attention", "entropy"):
        for name, path in (("dense", bank.path), ("all", tmp_path / "bank")):
            train_student(
                dataclasses.replace(config, bank=str(path)),
                run / "teacher",
                weighting,
                tmp_path / f"{weighting}-{name}",
            )
        dense, whole = (rows(tmp_path / f"{weighting}-{name}")[0] for name in ("dense", "all"))
        for name in ("train_loss", "val_loss", "val_kd_loss", "weights"):
            assert whole[name] == pytest.approx(dense[name], rel=1e-5), (weighting, name)


@pytest.mark.parametrize("fusion", ["probability", "logit"])
def test_students_train_from_the_top_k(topk, tmp_path, fusion):
    """Every weighting; and the loss is no more than that of all classes, which merging classes can only lower."""
    phase = dataclasses.replace(CONFIG.student, epochs=1, fusion=fusion)
    students = ("ce", *TAUGHT) if fusion == "probability" else ("attention", "last")
    out = train(taught_from(topk, students=students, student=phase), tmp_path / "run")
    for weighting in students:
        (row,) = rows(out / "students" / weighting)
        assert row["train_loss"] > 0 and row["val_accuracy"] > 0
        known = read_json(out / "students" / weighting / "student.json")["teacher"]
        assert known is None or known["bank"]["sha256"] == topk.sha256
    assert rows(out / "students" / "last")[0]["weights"] == [1]


def test_a_top_k_bank_goes_on_to_the_same_bytes(run, topk):
    """After damage, and with views added. (The manifest names the run relative to the bank.)"""
    out = Path(shutil.copytree(topk.path, topk.path.with_name("again")))
    (out / "manifest.json").unlink()
    (out / "view-2-shard-1.safetensors").unlink()
    flip_a_bit(out / "view-0-shard-1.safetensors")
    os.truncate(out / "view-1-shard-0.safetensors", 100)
    make(run, "--views", 2, "--top-k", 3, "--out", out)
    make(run, "--views", 3, "--top-k", 3, "--out", out)
    assert content(out) == content(topk.path)


def test_the_size_of_a_top_k_bank(run, tmp_path, capsys):
    make(run, "--views", 1, "--top-k", 2, "--features", "none", "--out", tmp_path / "bank")
    row = 3 * 2 * 2 + 2 * 2 + 3 * 12 * 4  # logits, classes, atoms
    assert f"{150 * row / 1000} kB: 150 of 150 rows" in capsys.readouterr().out
    size = sum(path.stat().st_size for path in (tmp_path / "bank").glob("view-*"))
    assert 150 * row <= size < 150 * row + 3 * 2500


@pytest.mark.parametrize(("classes", "dtype"), [(65_536, "I16"), (70_000, "I32")])
def test_class_numbers_beyond_two_bytes(run, tmp_path, monkeypatch, classes, dtype):
    class Wide(Session):
        def __init__(self, config):
            super().__init__(config)
            self.data = dataclasses.replace(self.data, classes=tuple(map(str, range(classes))))

    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2), torch.nn.Linear(2, classes))] * 2
    ensemble = SnapshotEnsemble(models)
    ensemble.hashes = ("0" * 64,) * 2
    monkeypatch.setattr(write_bank, "Session", Wide)
    monkeypatch.setattr(SnapshotEnsemble, "load", lambda *args, **kwargs: ensemble)
    run = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("bank")))
    few = dataclasses.replace(CONFIG, train_limit=20)
    monkeypatch.setattr(write_bank, "read_settings", lambda run: few)
    monkeypatch.setattr(write_bank, "check_data", lambda session, run: None)
    make(run, "--views", 1, "--top-k", 40)
    wide, index = LogitBank.open(run / "bank"), torch.arange(20)
    with safe_open(run / "bank" / "view-0-shard-0.safetensors", "pt") as file:
        assert file.get_slice("indices").get_dtype() == dtype
    (batch,) = Session(few).loader("train", CONFIG.teacher, train=True).replay([(0, index)])
    got, want = wide.rows(0, index)[0], top_k_logits(ensemble(batch.images)[0], 40, batch.labels)
    assert torch.equal(got.indices, want.indices) and torch.equal(got.logits, want.logits.half())
    assert 65_000 < got.indices.max() < classes and got.indices.min() >= 0
    torch.testing.assert_close(got.tail(5), want.tail(5))
    EEKDLoss("entropy")(torch.randn(20, classes), got, batch.labels)


@bad_input
@pytest.mark.parametrize(("field", "value"), [
    ("top_k", None), ("top_k", 0), ("top_k", 11), ("top_k", "3"), ("atoms", 8), ("atoms", None), ("format", 1),
    ("format", 3),
])  # fmt: skip
def test_a_damaged_manifest_of_a_top_k_bank_is_refused(topk, tmp_path, field, value):
    out = Path(shutil.copytree(topk.path, tmp_path / "bank"))
    edit(out, **{field: value})
    with pytest.raises(ValueError, match="manifest.json (must have format 1 or 2|is damaged: its [a-z_]+ cannot be)"):
        LogitBank.open(out)


@bad_input
def test_another_top_k_is_refused(run, topk, capsys):
    command = ["--teacher", str(run), "--views", "3", "--out", str(topk.path)]
    for flags, wanted in ((["--top-k", "4"], "top_k 3, got 4"), ([], "top_k 3, got None")):
        assert cli.main([*command, *flags]) == 2
        assert f"view-0-shard-0.safetensors was made with {wanted}" in capsys.readouterr().err


@bad_input
def test_a_damaged_top_k_shard_is_refused_by_name(topk, tmp_path):
    out = Path(shutil.copytree(topk.path, tmp_path / "bank"))
    flip_a_bit(out / "view-1-shard-2.safetensors")
    with pytest.raises(ValueError, match="view-1-shard-2.safetensors was changed or damaged"):
        LogitBank.open(out).rows(1, torch.tensor([128]))


def test_a_bank_without_the_field_is_dense(copy, bank):
    """As the first versions of format 1 wrote it."""
    manifest = read_json(copy / "bank" / "manifest.json")
    del manifest["top_k"]
    write_json_atomic(copy / "bank" / "manifest.json", manifest)
    old = LogitBank.open(copy / "bank")
    assert old.top_k is None and torch.equal(old.rows(1, torch.arange(9))[0], bank.rows(1, torch.arange(9))[0])


# ---- writing, and going on ----

COMMAND = """import sys
from eekd.bank import __main__ as cli, writer
writer.SHARD_ROWS = 8
sys.exit(cli.main(sys.argv[1:]))"""


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(run, tmp_path):
    """19 shards a view, 8 views, of the top 3 logits; killed three times, once while it still starts."""
    chance = random.Random()
    command = [sys.executable, "-c", COMMAND, "--teacher", str(run), "--top-k", "3", "--out"]
    start = partial(subprocess.Popen, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert start([*command, str(tmp_path / "whole")]).wait() == 0
    out = tmp_path / "killed"
    for share in (0, 0.2, 0.6):
        process = start([*command, str(out)])
        while process.poll() is None and len(list(out.glob("view-*"))) < share * 152:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        assert not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("view-*")}
    assert 0.6 * 152 <= len(kept) < 152
    assert start([*command, str(out)]).wait() == 0
    assert content(out) == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == was for path, was in kept.items())


def test_what_is_missing_or_damaged_is_written_again(run, copy, capsys):
    folder = copy / "bank"
    before = content(folder)
    (folder / "view-0-shard-1.safetensors").unlink()
    flip_a_bit(folder / "view-1-shard-0.safetensors")
    os.truncate(folder / "view-2-shard-2.safetensors", 100)
    shutil.copy(folder / "view-0-shard-2.safetensors", folder / "view-1-shard-2.safetensors")
    renamed = (folder / "view-2-shard-0.safetensors").read_bytes().replace(b'"logits"', b'"mogits"')
    (folder / "view-2-shard-0.safetensors").write_bytes(renamed)
    kept = (folder / "view-0-shard-0.safetensors").stat().st_mtime_ns
    make(copy, "--views", 3)
    assert "9 shards" in (told := capsys.readouterr().out) and "236 of 450 rows to write" in told
    assert content(folder) == before and (folder / "view-0-shard-0.safetensors").stat().st_mtime_ns == kept
    make(copy, "--views", 3)
    assert "rows to write" not in capsys.readouterr().out and content(folder) == before


def test_more_views_are_added_to_a_bank(copy, bank):
    make(copy, "--views", 4)
    more = LogitBank.open(copy / "bank")
    assert more.views == 4 and bank.manifest["shards"].items() <= more.manifest["shards"].items()
    assert not torch.equal(more.rows(3, torch.arange(9))[0], more.rows(0, torch.arange(9))[0])


@pytest.mark.parametrize(
    "kind", [pytest.param((), marks=pytest.mark.full, id="all classes"), pytest.param(("--top-k", "3"), id="top-k")]
)
def test_processes_share_the_shards(run, tmp_path, kind):
    """By torchrun, two of them; the bytes are those of one."""
    flags = ["-m", "eekd.bank", "--teacher", str(run), "--views", "3", *kind, "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = subprocess.run([*launch, *flags, str(tmp_path / "two")], env=environment, check=True, capture_output=True)
    subprocess.run([sys.executable, *flags, str(tmp_path / "one")], env=environment, check=True, capture_output=True)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert told.stdout.count(b"is whole") == 1 and len(LogitBank.open(tmp_path / "two").rows(2, torch.arange(150))) == 2


@bad_input
def test_a_shard_that_another_process_lost_is_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer.parallel, "long_barrier", lambda: None)
    for name in writer.parallel.TORCHRUN:
        monkeypatch.setenv(name, "2" if "SIZE" in name else "0")
    assert cli.main(["--teacher", str(run), "--views", "1", "--out", str(tmp_path / "bank")]) == 2
    assert "view-0-shard-1.safetensors is missing or damaged: start again" in capsys.readouterr().err
    assert not (tmp_path / "bank" / "manifest.json").exists()


def test_what_it_says_before_it_starts(run, tmp_path, capsys):
    make(run, "--views", 2, "--out", tmp_path / "bank")
    told = capsys.readouterr().out
    size = sum(path.stat().st_size for path in (tmp_path / "bank").glob("view-*"))
    first = r"2 views x 150 images x 3 snapshots in 6 shards, 46.8 kB: 300 of 300 rows to write, in about \d+ s\n"
    assert re.match(first, told)
    assert 46_800 <= size < 46_800 + 6 * 2000
    assert told.endswith("is whole\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(run, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(writer, "save_tensors", lambda *_: signal.raise_signal(number))
    assert cli.main(["--teacher", str(run), "--out", str(tmp_path / "bank")]) == 128 + number
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


@bad_input
@pytest.mark.parametrize(("flags", "wanted"), [
    ("", "--teacher"),
    ("--teacher nowhere", "nowhere is not a run that has begun"),
    ("--teacher RUN --views 0", "views must be at least 1, got 0"),
    ("--teacher RUN --views many", "--views"),
    ("--teacher RUN --view 3", "--views"),
    ("--teacher RUN --dtype float32", "--dtype"),
    ("--teacher RUN --top-k 11", "top-k must be at most 10, the number of classes, got 11"),
    ("--teacher RUN --top-k -1", "top-k must be at least 1, or 0 for all classes, got -1"),
    ("--teacher RUN --top-k few", "--top-k"),
    ("--teacher RUN --top-k 3", "shard-0.safetensors was made with top_k None, got 3"),
    ("--teacher RUN --features some", "features must be none, all or a width of at least 1, got 'some'"),
    ("--teacher RUN --features 0", "features must be none, all or a width of at least 1, got '0'"),
    ("--teacher RUN --features -3", "features"),
    ("--teacher RUN --dtype bfloat16", "shard-0.safetensors was made with dtype 'float16', got 'bfloat16'"),
    ("--teacher RUN --features none", "was made with features 16, got 0"),
    ("--teacher RUN --out RUN/config.json", "config.json"),
])  # fmt: skip
def test_bad_flags_of_the_writer(run, tmp_path, monkeypatch, capsys, flags, wanted):
    monkeypatch.chdir(tmp_path)
    before = content(run / "bank")
    try:
        code = cli.main(flags.replace("RUN", str(run)).split())
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    told = re.sub(r"[\s│╭╮╰╯─]+", " ", told.err + told.out)
    assert code == 2 and wanted in told and "Traceback" not in told
    assert content(run / "bank") == before and not list(tmp_path.iterdir())


@bad_input
def test_a_full_disk_is_said_before_it_starts(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    assert cli.main(["--teacher", str(run), "--out", str(tmp_path / "bank")]) == 2
    assert "has 1.0 kB left, and the bank needs 187.2 kB more" in capsys.readouterr().err
    assert not content(tmp_path / "bank")


@bad_input
def test_two_writers_do_not_mix(run, tmp_path, capsys):
    with locked(tmp_path):
        assert cli.main(["--teacher", str(run), "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path} is in use by process ") and told.count("\n") == 1
    assert not content(tmp_path)


@bad_input
def test_other_data_than_the_teachers_is_refused_by_the_writer(copy, capsys):
    config = dataclasses.replace(CONFIG, split_seed=4)
    (copy / "config.json").write_text(config.to_json())
    assert cli.main(["--teacher", str(copy), "--out", str(copy / "other")]) == 2
    assert "config.json was changed or damaged" in capsys.readouterr().err
    path = copy / "environment.json"
    write_json_atomic(path, read_json(path) | {"config_sha256": sha256_of(copy / "config.json")})
    assert cli.main(["--teacher", str(copy), "--out", str(copy / "other")]) == 2
    assert "was trained on other images" in capsys.readouterr().err and not (copy / "other").exists()


@bad_input
def test_without_rich_and_tyro_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None; import eekd.bank.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "pip install 'eekd[train]'" in done.stderr


# ---- students ----


def test_students_see_the_images_that_the_snapshots_saw(run, bank, monkeypatch):
    """Bit for bit, whatever the student's own seed, which still decides the order."""
    seen = []
    forward = SnapshotEnsemble.forward
    monkeypatch.setattr(SnapshotEnsemble, "forward", lambda self, x: seen.append(x.clone()) or forward(self, x))
    monkeypatch.setattr(writer, "_whole", lambda path, settings: None)
    monkeypatch.setattr(writer, "save_tensors", lambda *args: "its hash")
    monkeypatch.setattr(writer, "write_json_atomic", lambda *args: "")
    make(run, "--views", 3)
    shown = torch.cat(seen[2:]).view(3, 150, *seen[0].shape[1:])  # the first two calls measure the time
    orders = set()
    for seed in (0, 1):
        loader = Session(taught_from(bank, seed=seed)).loader("train", CONFIG.student, train=True)
        for epoch in range(5):
            loader.set_epoch(epoch)
            batches = list(loader)
            assert all(torch.equal(b.images, shown[epoch % 3][b.index]) for b in batches)
            orders.add(tuple(torch.cat([b.index for b in batches]).tolist()))
    assert len(orders) == 10


@pytest.fixture(scope="module")
def online(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("online") / "run"
    return train(dataclasses.replace(CONFIG, teacher_run=str(run), students=tuple(TAUGHT)), out)


def test_a_student_from_the_bank_is_the_online_student(bank, online, tmp_path, monkeypatch):
    """With as many views as epochs both see the same batches, so they differ by the rounding of what was stored."""
    calls = []
    forward = SnapshotEnsemble.forward
    monkeypatch.setattr(SnapshotEnsemble, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    out = train(taught_from(bank, students=tuple(TAUGHT)), tmp_path / "run")
    val = len(Session(CONFIG).data.val)
    assert sum(calls) == val * len(TAUGHT)  # once each, to validate
    for weighting in TAUGHT:
        one, two = online / "students" / weighting, out / "students" / weighting
        for was, row in zip(rows(one), rows(two), strict=True):
            assert row.keys() == was.keys()
            for name in row.keys() - {"seconds", "seconds_teacher", "seconds_forward", "seconds_backward"}:
                tolerance = dict(abs=0.02) if "accuracy" in name else dict(rel=5e-5)
                assert row[name] == pytest.approx(was[name], **tolerance), (weighting, name)
            assert 0 < row["seconds_teacher"] < row["seconds"]
        known = read_json(two / "student.json")
        assert known["teacher"]["bank"]["sha256"] == bank.sha256 == sha256_of(bank.path / "manifest.json")
        assert (two / known["teacher"]["bank"]["path"]).resolve() == bank.path.resolve()
        assert known["teacher"]["snapshots"] == read_json(one / "student.json")["teacher"]["snapshots"]
        assert read_json(one / "student.json")["teacher"]["bank"] is None
    assert [row["name"] for row in table(bank.run / "teacher", [out / "students" / "last"])][-1] == "last"


def test_validation_uses_features_as_they_are_stored(copy, tmp_path, monkeypatch):
    make(copy, "--views", 1, "--out", copy / "narrow", "--features", 4)
    known, load_teacher = [], student.load_teacher

    def watched(*args, **options):
        teacher = load_teacher(*args, **options)
        known.extend(teacher.val)
        return teacher

    monkeypatch.setattr(student, "load_teacher", watched)
    config = dataclasses.replace(CONFIG, bank=str(copy / "narrow"))
    train_student(config, copy / "teacher", "attention", tmp_path / "student")
    ensemble, session = SnapshotEnsemble.load(copy / "teacher"), Session(config)
    for (_, features), batch in zip(known, session.loader("val", config.student), strict=True):
        assert torch.equal(features, session.bank.project(ensemble(batch.images)[1]))


def test_the_command_line_from_end_to_end(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make("copy", "--views", 2, "--out", "bank", "--features", 4)
    command = ["student", "--bank", "bank", "--students", "ce", "attention", "confidence", "--out", "out"]
    assert train_cli.main([*command, "--dry-run"]) == 0
    assert train_cli.main([*command, "--student.epochs", "2"]) == 0
    config = Config.load("out/config.json")
    assert (config.bank, config.teacher_run, config.teacher) == (
        str(tmp_path / "bank"),
        str(tmp_path / "copy"),
        CONFIG.teacher,
    )
    summary = read_json("out/summary.json")["rows"]
    assert [row["name"] for row in summary][-3:] == ["ce", "attention", "confidence"]
    assert read_json("out/students/attention/student.json")["loss"]["snapshot_dim"] == 4
    capsys.readouterr()
    assert subprocess.run([sys.executable, "-m", "eekd.report", "out"], capture_output=True).returncode == 0
    assert train_cli.main(["--config", "out/config.json", "--out", "again"]) == 0
    for weighting in ("ce", "attention"):
        first, again = (read_json(f"{out}/students/{weighting}/student.json") for out in ("out", "again"))
        assert first["sha256"] == again["sha256"]


def test_bank_and_run_may_move(copy, tmp_path):
    moved = tmp_path / "elsewhere"
    (copy / "bank").rename(moved)
    with pytest.raises(FileNotFoundError, match="config.json"):
        prepare(dataclasses.replace(CONFIG, bank=str(moved)))
    assert train_cli.parse(["student", "--bank", str(moved), "--teacher", str(copy)]).settings.teacher_run == str(copy)
    train_student(dataclasses.replace(CONFIG, bank=str(moved)), copy / "teacher", "last", tmp_path / "student")
    assert rows(tmp_path / "student")[0]["weights"] == [1]


def test_the_teacher_is_not_counted_into_memory(bank):
    session = prepare(taught_from(bank, students=("ce", "uniform")))
    ce, uniform = plan(session)
    assert ce["memory"] == uniform["memory"]


# ---- what does not fit ----


@bad_input
@pytest.mark.parametrize(("changes", "wanted"), [
    (dict(split_seed=3), "split_seed 0, got 3"),
    (dict(val_fraction=0.2), "val_fraction 0.1, got 0.2"),
    (dict(train_limit=140), "train_limit 150, got 140"),
    (dict(image_size=10), "image_size 8, got 10"),
    (dict(augment="none"), "augment 'crop', got 'none'"),
    (dict(augment="crop-flip"), "augment 'crop', got 'crop-flip'"),
], ids=str)  # fmt: skip
def test_other_images_are_refused(bank, tmp_path, changes, wanted):
    config = taught_from(bank, **changes)
    for call in (
        lambda: train(config, tmp_path / "run"),
        lambda: train_student(config, bank.run / "teacher", "ce", tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{bank.path} was made with {wanted}") + "$"):
            call()
    assert not (tmp_path / "run").exists()


@bad_input
@pytest.mark.parametrize(("changes", "wanted"), [
    (dict(data="fashion-mnist", fingerprint="0" * 64), "data 'fashion-mnist', got 'digits'"),
    (dict(fingerprint="0" * 64), f"fingerprint '{'0' * 64}', got"),
    (dict(augmented_sha256="0" * 64), f"augmented_sha256 '{'0' * 64}', got"),
    (dict(seed=5), "augmented_sha256"),
], ids=str)  # fmt: skip
def test_changed_images_are_refused(copy, changes, wanted):
    edit(copy / "bank", images=read_json(copy / "bank/manifest.json")["images"] | changes)
    with pytest.raises(ValueError, match="was made with " + wanted):
        prepare(dataclasses.replace(CONFIG, bank=str(copy / "bank")))


@bad_input
def test_other_snapshots_are_refused(bank, tmp_path):
    other = train(dataclasses.replace(CONFIG, seed=1), tmp_path / "other")
    config = dataclasses.replace(CONFIG, bank=str(bank.path), teacher_run=str(other))
    with pytest.raises(ValueError, match="was made with a snapshot 1 of SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}$"):
        prepare(config)
    fewer = train(dataclasses.replace(CONFIG, teacher=dataclasses.replace(CONFIG.teacher, snapshots=1)), tmp_path / "1")
    with pytest.raises(ValueError, match="was made with"):
        prepare(dataclasses.replace(config, teacher_run=str(fewer)))


@bad_input
def test_attention_without_features_is_refused(run, tmp_path, capsys):
    make(run, "--views", 1, "--out", tmp_path / "bank", "--features", "none")
    command = ["student", "--bank", str(tmp_path / "bank"), "--out", str(tmp_path / "out"), "--students"]
    assert train_cli.main([*command, "uniform", "attention"]) == 2
    assert "student attention needs features" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert train_cli.main([*command, "uniform", "--student.epochs", "1"]) == 0


@bad_input
@pytest.mark.parametrize("damage", ["a bit", "the end"])
def test_a_damaged_shard_is_refused_by_name(copy, damage, tmp_path, capsys):
    name = "view-1-shard-2.safetensors"
    path = copy / "bank" / name
    flip_a_bit(path) if damage == "a bit" else os.truncate(path, path.stat().st_size - 10)
    bank = LogitBank.open(copy / "bank")
    bank.rows(1, torch.arange(128))
    with pytest.raises(ValueError, match=f"{name} was changed or damaged"):
        bank.rows(1, torch.tensor([128]))
    with pytest.raises(ValueError, match=f"{name} was changed or damaged"):
        list(bank.prefetch(1, torch.arange(150).split(30)))
    command = ["student", "--bank", str(copy / "bank"), "--students", "uniform", "--out", str(tmp_path / "out")]
    assert train_cli.main(command) == 2
    assert f"{name} was changed or damaged" in capsys.readouterr().err


@bad_input
def test_a_missing_shard_or_manifest_is_refused_by_name(copy):
    (copy / "bank" / "view-2-shard-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="view-2-shard-0.safetensors is missing"):
        LogitBank.open(copy / "bank")
    (copy / "bank" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json is missing: no bank, or one that eekd.bank has not"):
        LogitBank.open(str(copy / "bank"))
    assert train_cli.main(["student", "--bank", str(copy / "bank")]) == 2


@bad_input
@pytest.mark.parametrize(("field", "value"), [
    ("format", 2), ("format", None), ("views", 0), ("views", 2), ("views", 10**12), ("views", True), ("samples", 99),
    ("samples", "150"), ("snapshots", 2), ("classes", 1.5), ("features", -1), ("features", None),
    ("dtype", "float32"), ("dtype", []), ("run", 3), ("shard_rows", 0), ("projection", 3), ("projection", {"width": 3}),
    ("teacher", None), ("teacher", {"sha256": ["x"] * 3}), ("images", {}), ("images", []), ("shards", {}),
    ("shards", {"../../secret.safetensors": "0" * 64}),
])  # fmt: skip
def test_a_damaged_manifest_is_refused(copy, field, value):
    edit(copy / "bank", **{field: value})
    wanted = "manifest.json (must have format 1|is damaged: its [a-z_]+ cannot be)"
    with pytest.raises(ValueError, match=wanted) as caught:
        LogitBank.open(copy / "bank")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@bad_input
def test_rows_that_are_not_there_are_refused(bank):
    index = torch.arange(3)
    for view in (-1, 3, 10**9):
        with pytest.raises(ValueError, match="view must be from 0 to 2, got"):
            bank.rows(view, index)
    for index in (torch.tensor([0, 150]), torch.tensor([-1, 4])):
        with pytest.raises(ValueError, match="index must be from 0 to 149, got"):
            bank.rows(0, index)
    for index in (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2), [0, 1]):
        with pytest.raises(TypeError, match=r"index must be int64 of shape \(B,\), got"):
            bank.rows(0, index)
    assert bank.rows(0, torch.zeros(0, dtype=torch.long))[0].shape == (3, 0, 10)


def test_the_loader_is_needed_for_nothing_but_order_and_views(bank):
    """A bank belongs to anybody's loop: check() says so, or what differs."""
    session = Session(CONFIG)
    data = session.data
    bank.check(data, Loader(data.train, batch_size=9, augment=bank.augment, seed=3, view_seed=bank.seed))
    with pytest.raises(ValueError, match="was made with augment 'crop', got 'none'"):
        bank.check(data, Loader(data.train, batch_size=9, augment="none"))
    with pytest.raises(ValueError, match="was made with seed 0, got 3"):
        bank.check(data, Loader(data.train, batch_size=9, augment=bank.augment, seed=3))
