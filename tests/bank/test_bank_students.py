"""Students that a bank teaches are those that running snapshots teach."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from banks import CONFIG, TAUGHT, make, rows, taught_from

from eekd import SnapshotEnsemble
from eekd.bank import writer
from eekd.io.files import read_json, sha256_of
from eekd.train import __main__ as train_cli
from eekd.train import prepare, student, train, train_student
from eekd.train.config import Config
from eekd.train.estimate import plan
from eekd.train.run import table
from eekd.train.session import Session


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
