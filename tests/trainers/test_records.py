"""What a run leaves behind, and said before it began, is what happened."""

import csv
import dataclasses
import math
import time

import pytest
import torch
from small_runs import WEIGHTINGS, read, rows, small

from eekd import models
from eekd.io.files import sha256_of
from eekd.io.tensors import load_tensors
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.train import estimate, prepare, train, train_student
from eekd.train.estimate import plan
from eekd.train.metrics import MetricsLogger, PhaseTimer, RunningMeans, evaluate
from eekd.train.run import table
from eekd.train.run_folder import new_folder
from eekd.train.session import Session
from eekd.train.teacher import diagnose


def test_run_folder_is_complete(run):
    expected = {".lock", "config.json", "environment.json", "summary.json", "teacher", "students"}
    assert {path.name for path in run.iterdir()} == expected
    assert {path.name for path in (run / "teacher").iterdir()} == {
        "manifest.json",
        "model.py",
        "metrics.csv",
        "metrics.jsonl",
        "snapshots.json",
        "snapshot-1.safetensors",
        "snapshot-2.safetensors",
        "snapshot-3.safetensors",
    }
    for weighting in WEIGHTINGS:
        files = {"metrics.csv", "model.py", "metrics.jsonl", "student.json", "student.safetensors"}
        files |= {"attention.safetensors"} if weighting == "attention" else set()
        assert {path.name for path in (run / "students" / weighting).iterdir()} == files
    environment = read(run / "environment.json")
    assert environment["torch"] == torch.__version__
    assert environment["data"]["train"] == 200


def test_metrics_of_every_epoch(run):
    common = {
        "epoch",
        "step",
        "lr",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "seconds",
        "seconds_teacher",
        "seconds_forward",
        "seconds_backward",
    }
    taught = {
        "train_attention_loss",
        "weights",
        "weight_entropy",
        "val_target_nll",
        "val_target_nll_uniform",
        "val_kd_loss",
        "val_kd_loss_uniform",
    }
    for folder in (run / "teacher", *(run / "students").iterdir()):
        plain = folder.name in ("teacher", "ce")
        for epoch, row in enumerate(rows(folder), 1):
            assert row.keys() == (common if plain else common | taught)
            assert (row["epoch"], row["step"]) == (epoch, 4 * epoch)
            parts = row["seconds_teacher"] + row["seconds_forward"] + row["seconds_backward"]
            assert 0 < parts < row["seconds"] and (row["seconds_teacher"] > 0) != plain
            if not plain:
                assert len(row["weights"]) == (1 if folder.name == "last" else 3)
                assert sum(row["weights"]) == pytest.approx(1, abs=1e-5)
        with open(folder / "metrics.csv", newline="") as file:
            table = list(csv.DictReader(file))
        assert [float(line["val_loss"]) for line in table] == [row["val_loss"] for row in rows(folder)]
    assert "weights_3" in table[0] or folder.name in ("ce", "last")


def test_diagnosis_is_what_the_snapshots_predict(run, config):
    session = Session(config)
    loader = session.loader("val", config.teacher)
    ensemble = SnapshotEnsemble.load(run / "teacher")
    known = read(run / "teacher" / "snapshots.json")["val"]
    p, y = [], []
    for images, labels, _ in loader:
        p.append(ensemble(images)[0].double().softmax(-1))
        y.append(labels)
    p, y = torch.cat(p, 1), torch.cat(y)
    everyone = [*p, p.mean(0)]
    assert [m["name"] for m in known["members"]] == ["snapshot 1", "snapshot 2", "snapshot 3", "ensemble"]
    for member, q in zip(known["members"], everyone, strict=True):
        confidence, predicted = q.max(-1)
        assert member["accuracy"] == pytest.approx((predicted == y).double().mean().item())
        assert member["nll"] == pytest.approx(-q[range(len(y)), y].log().mean().item())
        ece = 0.0
        for b in range(15):
            inside = (confidence >= b / 15) & ((confidence < (b + 1) / 15) | (b == 14))
            count = int(inside.sum())
            bars = member["reliability"]
            assert bars["count"][b] == count
            if count:
                hits, mean = (predicted == y)[inside].double().mean().item(), confidence[inside].mean().item()
                assert (bars["accuracy"][b], bars["confidence"][b]) == pytest.approx((hits, mean))
                ece += count / len(y) * abs(hits - mean)
            else:
                assert bars["accuracy"][b] is None and bars["confidence"][b] is None
        assert member["ece"] == pytest.approx(ece)
    predicted = p.argmax(-1)
    for i in range(3):
        for j in range(3):
            differ = (predicted[i] != predicted[j]).double().mean().item()
            assert known["disagreement"][i][j] == pytest.approx(differ)


def test_diagnosis_does_not_depend_on_the_batch_size(run, config):
    session, ensemble = Session(config), SnapshotEnsemble.load(run / "teacher")
    phases = (dataclasses.replace(config.teacher, batch_size=size) for size in (7, 359))
    one, two = (diagnose(session, ensemble, session.loader("test", phase)) for phase in phases)
    assert one["disagreement"] == two["disagreement"]
    assert [m["accuracy"] for m in one["members"]] == [m["accuracy"] for m in two["members"]]


def test_what_is_reported_is_the_last_epoch_on_test_images_seen_once(config, tmp_path, monkeypatch):
    events = []
    loader = Session.loader

    def watched(self, split, phase, train=False):
        if split == "test":
            events.append("test")
        return loader(self, split, phase, train)

    monkeypatch.setattr(Session, "loader", watched)

    def progress(name, done, total, known):
        events.append((name, done == total))

    run = train(config, tmp_path / "run", progress=progress)
    kept = [event for i, event in enumerate(events) if i == 0 or event != events[i - 1]]
    phases = ["teacher", *config.students]
    assert kept == [event for name in phases for event in ((name, False), (name, True), "test")]
    monkeypatch.undo()
    session = Session(config)
    for row in read(run / "summary.json")["rows"]:
        if row["kind"] == "student":
            folder = run / "students" / row["name"]
            student = models.build(**session.spec(config.student))
            student.load_state_dict(load_tensors(folder / "student.safetensors"))
            for split in ("val", "test"):
                found = evaluate(session, student, session.loader(split, config.student))
                assert found["accuracy"] == pytest.approx(row[f"{split}_accuracy"])


def test_summary_rows(run):
    summary = read(run / "summary.json")["rows"]
    kinds = ["teacher"] + ["snapshot"] * 3 + ["ensemble"] + ["student"] * len(WEIGHTINGS)
    assert [row["kind"] for row in summary] == kinds
    assert [row["epochs"] for row in summary[:5]] == [3, 1, 2, 3, 3]
    assert summary[0]["test_accuracy"] == summary[3]["test_accuracy"]
    assert summary[4]["parameters"] == 3 * summary[0]["parameters"]
    alone = next(row["test_accuracy"] for row in summary if row["name"] == "ce")
    for row in summary[5:]:
        assert row["gain"] == pytest.approx(row["test_accuracy"] - alone)
        assert row["seconds_per_epoch"] > 0
    assert table(run / "teacher", [run / "students" / "last"])[-1]["gain"] is None


def test_provenance_names_what_taught(run):
    entries = read_manifest(run / "teacher")["snapshots"]
    for weighting in WEIGHTINGS:
        folder = run / "students" / weighting
        record = read(folder / "student.json")
        assert record["sha256"] == sha256_of(folder / "student.safetensors")
        if weighting == "ce":
            assert record["teacher"] is None and record["loss"] is None
            continue
        assert (folder / record["teacher"]["run"]).resolve() == (run / "teacher").resolve()
        taught = [entry["sha256"] for entry in record["teacher"]["snapshots"]]
        assert taught == [entry["sha256"] for entry in (entries[-1:] if weighting == "last" else entries)]
        assert record["loss"]["temperature"] == 5
        assert ("embed_dim" in record["loss"]) == (weighting == "attention")


def test_tensorboard_events_only_when_asked(tiny, run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_student(small(tiny, tensorboard=True), run / "teacher", "uniform", tmp_path / "student")
    assert not list(run.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(tmp_path / "student")).Reload()
    assert [e.value for e in events.Scalars("weights_2")] == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_the_loss_is_read_rarely(config, run, tmp_path, monkeypatch):
    """Each read makes a GPU wait: one per epoch and measurement, not one per step."""
    reads = []
    get = RunningMeans.__getitem__
    monkeypatch.setattr(RunningMeans, "__getitem__", lambda self, name: reads.append(name) or get(self, name))
    long = dataclasses.replace(config, student=dataclasses.replace(config.student, batch_size=2, epochs=1))
    train_student(long, run / "teacher", "attention", tmp_path / "student")
    assert rows(tmp_path / "student")[0]["step"] == 100 and reads.count("loss") <= 4


def test_means_weigh_batches_by_their_rows():
    means = RunningMeans()
    means.add(3, loss=torch.tensor(1.0), weights=torch.tensor([1.0, 0.0]))
    means.add(1, loss=torch.tensor(5.0), weights=torch.tensor([0.0, 1.0]))
    assert means.all() == {"loss": 2.0, "weights": [0.75, 0.25]}


def test_clock(device):
    clock = PhaseTimer(torch.device(device))
    for _ in range(2):
        with clock("sleep"):
            time.sleep(0.02)
    assert 0.03 < clock.seconds("sleep") < 1 and clock.seconds("nothing") == 0


def test_log_writes_what_is_not_finite_as_null(tmp_path):
    log = MetricsLogger(tmp_path / "phase")
    log.open()
    log.write({"epoch": 1, "a": math.inf, "b": [1.0, math.nan]})
    log.write({"epoch": 2, "a": 0.5, "b": [0.0, 1.0]})
    assert rows(tmp_path / "phase")[0] == {"epoch": 1, "a": None, "b": [1.0, None]}
    lines = (tmp_path / "phase" / "metrics.csv").read_text().split()
    assert lines == ["epoch,a,b_1,b_2", "1,,1.0,", "2,0.5,0.0,1.0"]


def test_new_folder_takes_the_first_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [new_folder(None, "digits").name for _ in range(3)] == ["digits-1", "digits-2", "digits-3"]
    (tmp_path / "empty").mkdir()
    assert new_folder(tmp_path / "empty", "x") == tmp_path / "empty"


def test_plan_agrees_with_the_run(run, config):
    later = dataclasses.replace(config, students=WEIGHTINGS)
    for row in plan(prepare(later)):
        folder = run / "teacher" if row["name"] == "teacher" else run / "students" / row["name"]
        files = [p for p in folder.glob("*.safetensors") if not p.name.startswith("attention")]
        assert row["steps"] == rows(folder)[-1]["step"]
        size = sum(path.stat().st_size for path in files)
        assert row["disk"] <= size <= row["disk"] + 1000 * len(files)
    known = {row["name"]: row for row in plan(prepare(later))}
    assert known["ce"]["memory"] < known["last"]["memory"] < known["attention"]["memory"]
    assert known["ce"]["parameters"] == 64 * 5 + 5 + 2 * 5 + 5 * 10 + 10
    snapshot = known["last"]["memory"] - known["ce"]["memory"]
    host = {row["name"]: row for row in plan(prepare(dataclasses.replace(later, snapshots_on="cpu")))}
    assert host["attention"]["memory"] == known["attention"]["memory"]  # all on a CPU
    assert known["attention"]["memory"] == known["ce"]["memory"] + snapshot * later.teacher.snapshots


def test_the_time_of_a_run_is_told_from_a_batch(config, monkeypatch):
    """With a stand-in for the clock: forward and backward take 3 s a batch, the snapshots 1 s each, files nothing."""
    monkeypatch.setattr(estimate, "_time", lambda session, call, *args: 1.0 if call is estimate._ask else 3.0)
    session = prepare(dataclasses.replace(config, students=("ce", "last", "attention"), augment="none"))
    told = estimate.seconds(session)
    phase, images = session.config.student, len(session.data.train)
    rows, snapshots = session.loader("train", phase, train=True).rows(0), session.config.teacher.snapshots
    assert told["ce"] == pytest.approx(3 * phase.epochs * images / rows, rel=0.3)  # the last batch is smaller
    assert told["last"] - told["ce"] == pytest.approx(images / rows)  # asked once, for the images stay the same
    assert told["attention"] - told["ce"] == pytest.approx(snapshots * images / rows)
    session = prepare(dataclasses.replace(config, students=("attention",), augment="crop"))
    changing = estimate.seconds(session)["attention"]
    assert changing - told["ce"] == pytest.approx(snapshots * phase.epochs * images / rows, rel=0.3)


def test_plan_is_of_one_of_several_processes(config, monkeypatch):
    def planned(**changes) -> dict:
        session = prepare(
            dataclasses.replace(
                config, teacher=dataclasses.replace(config.teacher, snapshots=3), students=("ce", "uniform"), **changes
            )
        )
        return {row["name"]: row for row in plan(session)}

    alone, parts = planned(), planned(accumulate=2)
    weights = 4 * (alone["ce"]["parameters"] + 2 * 5) + 8  # and a batch norm's statistics
    snapshot = (alone["uniform"]["memory"] - alone["ce"]["memory"]) // 3
    assert parts["ce"]["steps"] == alone["ce"]["steps"]
    assert parts["ce"]["memory"] < alone["ce"]["memory"]
    monkeypatch.setattr("eekd.parallel.world_size", lambda: 2)
    ranks = planned(snapshots_on="ranks")
    assert ranks["ce"]["steps"] == alone["ce"]["steps"]
    assert ranks["ce"]["memory"] == parts["ce"]["memory"]
    assert ranks["uniform"]["memory"] - ranks["ce"]["memory"] == 2 * snapshot
    assert planned(parallel="fsdp")["ce"]["memory"] == ranks["ce"]["memory"] + weights // 2  # 3 / 2 + 2 for 3
