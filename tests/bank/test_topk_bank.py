"""A bank of the top K logits."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from banks import CONFIG, TAUGHT, bad_input, content, edit, flip_a_bit, make, rows, taught_from
from safetensors import safe_open

from eekd import EEKDLoss, LogitBank, SnapshotEnsemble, top_k_logits
from eekd.bank import __main__ as cli
from eekd.io.files import read_json, write_json_atomic
from eekd.train import train, train_student, write_bank
from eekd.train.session import Session


@pytest.fixture(scope="module")
def topk(run):
    """A bank of the same views with 3 of the 10 classes."""
    assert cli.main(["--teacher", str(run), "--views", "3", "--out", str(run.parent / "topk"), "--top-k", "3"]) == 0
    return LogitBank.open(run.parent / "topk")


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


@pytest.mark.parametrize(("classes", "dtype"), [(65_536, "I16"), pytest.param(70_000, "I32", marks=pytest.mark.full)])
def test_class_numbers_beyond_two_bytes(run, tmp_path, monkeypatch, classes, dtype):
    class Wide(Session):
        def __init__(self, config, data=None):
            super().__init__(config, data)
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
    for flags, wanted in ((["--top-k", "4"], "got 4"), ([], "got None")):
        assert cli.main([*command, *flags]) == 2
        shard = topk.path / "view-0-shard-0.safetensors"
        assert f"top_k must be 3, with which {shard} was made, {wanted}" in capsys.readouterr().err


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
