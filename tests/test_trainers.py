"""Trainers: what a run leaves behind is what happened, twice the same, and mistakes leave nothing."""

import csv
import dataclasses
import json
import math
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from eekd import models
from eekd.data import Loader
from eekd.io.files import sha256_of
from eekd.io.tensors import load_tensors
from eekd.ops import reference
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.snapshots.features import LastFeatures
from eekd.train import prepare, train, train_student, train_teacher
from eekd.train.checked import student_names
from eekd.train.config import Config, Student, Teacher
from eekd.train.estimate import plan
from eekd.train.metrics import MetricsLogger, PhaseTimer, RunningMeans, evaluate
from eekd.train.optim import build_optimizer, clip_gradients, learning_rate
from eekd.train.run import table
from eekd.train.run_folder import new_folder
from eekd.train.session import Session
from eekd.train.teacher import diagnose

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture
def config(tiny):
    return small(tiny)


def small(tiny, teacher=None, student=None, **more) -> Config:
    common = dict(epochs=3, batch_size=60, milestones=())
    teacher = dict(common, model=f"{tiny}:tiny", snapshots=3) | (teacher or {})
    student = dict(common, model=f"{tiny}:tinier") | (student or {})
    rest = dict(train_limit=200, device="cpu", precision="fp32", channels_last=False) | more
    return Config(teacher=Teacher(**teacher), student=Student(**student), **rest)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run with every kind of student, which tests only read."""
    return train(small(tiny, students=WEIGHTINGS), tmp_path_factory.mktemp("run") / "tiny")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(path):
    return json.loads(path.read_text())


def test_learning_rate_steps_down_at_its_milestones():
    phase = Teacher(lr=0.5, epochs=10, milestones=(0.3, 0.6, 0.9))
    rates = [learning_rate(phase, step, 50) for step in range(50)]
    assert rates == pytest.approx([0.5] * 15 + [0.05] * 15 + [0.005] * 15 + [0.0005] * 5)


def test_one_cycle_is_torchs():
    phase, total = Student(lr=0.5, schedule="one_cycle"), 50
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=1000 * total)
    for step in range(1000 * total):
        if step % 1000 == 0:  # torch ends its phases a step early, which many steps hide
            assert learning_rate(phase, step // 1000, total) == pytest.approx(torchs.get_last_lr()[0], abs=1e-4)
        optimizer.step()
        torchs.step()


def test_a_warm_up_and_a_floor():
    phase = Student(lr=1.0, epochs=10, schedule="cosine", warmup_epochs=1, min_lr=0.1)
    rates = [learning_rate(phase, step, 40) for step in range(41)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[22] == pytest.approx(0.55) and min(rates[4:40]) >= 0.1 and rates[39] < 0.11
    assert rates[4:40] == sorted(rates[4:40], reverse=True)
    stepped = Student(lr=1.0, epochs=10, warmup_epochs=2, milestones=(0.5,))
    assert [learning_rate(stepped, step, 10) for step in range(10)] == pytest.approx(
        [1 / 3, 2 / 3] + [1] * 3 + [0.1] * 5
    )


def test_adamw_decays_neither_norms_nor_biases():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(2, 2))
    for optimizer, decays in (("adamw", {2: 0.05, 1: 0.0}), ("sgd", {2: 0.05, 1: 0.05})):
        built = build_optimizer(Student(optimizer=optimizer, weight_decay=0.05), network)
        found = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
        assert [found[id(p)] for p in network.parameters()] == [decays[min(2, p.ndim)] for p in network.parameters()]


def test_gradients_are_clipped_together(tiny, tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    network(torch.ones(2, 3)).sum().backward()
    before = torch.cat([p.grad.flatten() for p in network.parameters()])
    clip_gradients(network.parameters(), 0.5)
    after = torch.cat([p.grad.flatten() for p in network.parameters()])
    torch.testing.assert_close(after, before * 0.5 / before.norm(), rtol=1e-4, atol=0)
    clip_gradients(network.parameters(), 10.0)
    assert torch.equal(torch.cat([p.grad.flatten() for p in network.parameters()]), after)
    clip_gradients([], 1.0)
    # A step of SGD without momentum so far moves the weights by at most lr times the norm.
    moved = {}
    for clip in (None, 1e-3):
        config = small(
            tiny, student=dict(epochs=1, clip_grad=clip, lr=0.1), students=("ce",), teacher=dict(epochs=1, snapshots=1)
        )
        run = train(config, tmp_path / str(clip))
        start = prepare(config).network(config.student, 2 * config.seed + 1).state_dict()
        end = load_tensors(run / "students" / "ce" / "student.safetensors")
        moved[clip] = (
            sum((end[k] - start[k]).square().sum() for k in end if "num" not in k and "running" not in k) ** 0.5
        )
    assert moved[1e-3] < 0.1 * moved[None]


def test_processes_start_from_the_same_weights_and_draw_other_numbers(tiny, monkeypatch):
    session, drawn, weights = prepare(small(tiny)), [], None
    for rank in range(3):
        monkeypatch.setattr("eekd.parallel.rank", lambda rank=rank: rank)
        monkeypatch.setattr("eekd.parallel.is_main_process", lambda rank=rank: rank == 0)
        network = session.network(session.config.teacher, 0)
        drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
        weights = weights or network.state_dict()
        assert all(map(torch.equal, weights.values(), network.state_dict().values()))
    assert all(len(set(numbers)) == 3 for numbers in zip(*drawn, strict=True))


@pytest.mark.bad_input
def test_sync_batchnorm_of_another_class_is_refused(tiny, tmp_path):
    (tmp_path / "net.py").write_text("""
from torch import nn

class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()

def net(num_classes, in_channels, image_size):
    return nn.Sequential(NormAct(in_channels), nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
""")
    config = small(tiny, student=dict(model=f"{tmp_path / 'net.py'}:net"), sync_batchnorm=True)
    with pytest.raises(ValueError, match="0 must be nn.BatchNorm1d, 2d or 3d for sync_batchnorm, got NormAct"):
        prepare(config)


def test_learning_rate_cosine():
    phase = Student(lr=0.5, schedule="cosine")
    rates = [learning_rate(phase, step, 101) for step in range(101)]
    assert rates[0] == 0.5 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-3


@pytest.mark.parametrize(("total", "snapshots"), [(60, 5), (35, 5), (12, 1), (7, 7)])
def test_learning_rate_cyclic_is_that_of_snapshot_ensembles(total, snapshots):
    phase = Teacher(lr=0.2, schedule="cyclic", epochs=snapshots, snapshots=snapshots)
    cycle = math.ceil(total / snapshots)
    for t in range(1, total + 1):
        formula = 0.2 / 2 * (math.cos(math.pi * ((t - 1) % cycle) / cycle) + 1)
        assert learning_rate(phase, t - 1, total) == pytest.approx(formula)


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


def test_every_step_trains_in_training_mode(run):
    for path in run.rglob("s*.safetensors"):
        if (folder := path.parent).name != "teacher" or path.stem == "snapshot-3":
            assert load_tensors(path)["2.num_batches_tracked"] == rows(folder)[-1]["step"]


def test_every_epoch_has_its_own_order(config, tmp_path, monkeypatch):
    seen, set_epoch = [], Loader.set_epoch
    monkeypatch.setattr(Loader, "set_epoch", lambda self, epoch: seen.append(epoch) or set_epoch(self, epoch))
    train_student(config, None, "ce", tmp_path / "student")
    assert [epoch for epoch in seen if epoch] == [1, 2]


def test_fixed_weights_are_the_published_ones(run):
    def weights(name):
        return rows(run / "students" / name)[-1]["weights"]

    assert weights("last") == [1]
    assert weights("uniform") == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert weights("linear_increase") == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=1e-6)
    assert weights("linear_decrease") == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=1e-6)


def test_the_same_config_gives_the_same_bits(run, tmp_path):
    again = train(Config.load(run / "config.json"), tmp_path / "again")
    for folder in (run / "teacher", *(run / "students").iterdir()):
        for path in folder.glob("*.safetensors"):
            assert sha256_of(path) == sha256_of(again / path.relative_to(run))
        for one, two in zip(rows(folder), rows(again / folder.relative_to(run)), strict=True):
            assert all(one[k] == two[k] for k in one if not k.startswith("seconds"))


def test_another_seed_gives_another_network(config, run, tmp_path):
    other = train(dataclasses.replace(config, seed=1, students=()), tmp_path / "other")
    assert read_manifest(other / "teacher")["snapshots"] != read_manifest(run / "teacher")["snapshots"]


def test_students_start_alike_and_apart_from_the_teacher(tiny, run, tmp_path):
    still = small(tiny, student=dict(lr=1e-30, weight_decay=0.0, epochs=1), students=WEIGHTINGS)
    session = Session(still)
    for weighting in WEIGHTINGS:
        train_student(still, run / "teacher", weighting, tmp_path / weighting, session=session)
    start = session.network(still.student, 1).state_dict()
    for weighting in WEIGHTINGS:
        weights = load_tensors(tmp_path / weighting / "student.safetensors")
        for name in ("1.weight", "4.bias"):
            assert torch.equal(weights[name], start[name])
    assert not torch.equal(session.network(still.teacher, 0)[1].weight[:5], start["1.weight"])


def test_attention_trains_with_the_student(tiny, run, tmp_path):
    longer = small(tiny, student=dict(batch_size=10, optimizer="adamw", lr=0.01))
    train_student(longer, run / "teacher", "attention", tmp_path / "student")
    first, *_, last = rows(tmp_path / "student")
    assert first["weight_entropy"] > math.log(3) - 0.01 > last["weight_entropy"]
    assert last["weights"] == sorted(last["weights"])
    assert last["val_target_nll"] < last["val_target_nll_uniform"] - 1e-3


def test_would_uniform_have_been_better(run, config):
    """Against the formula in fp64, from nothing but the files of the run."""
    session = Session(config)
    folder, phase = run / "students" / "attention", config.student
    record, row = read(folder / "student.json"), rows(folder)[-1]
    student = models.build(**record["spec"])
    student.load_state_dict(load_tensors(folder / "student.safetensors", record["sha256"]))
    maps = load_tensors(folder / "attention.safetensors", record["attention_sha256"])
    images, labels, _ = next(iter(session.loader("val", dataclasses.replace(phase, batch_size=1000))))
    with torch.no_grad():
        logits, features = LastFeatures(student.eval())(images)
        z, u = SnapshotEnsemble.load(run / "teacher")(images)
        v, u = (torch.nn.functional.layer_norm(t, t.shape[-1:]) for t in (features, u))
        query = v @ maps["attention.student.weight"].T / math.sqrt(phase.embed_dim)
        keys = u @ maps["attention.snapshots.weight"].T
        fixed = dict(temperature=phase.temperature, alpha=phase.alpha)
        loss, _, nll = reference.ensemble_kd(
            logits.double(), z.double(), labels, query=query.double(), keys=keys.double(), **fixed
        )
        uniform_loss, _, uniform_nll = reference.ensemble_kd(logits.double(), z.double(), labels, **fixed)
    assert len(session.data.val) == len(labels)
    assert row["val_kd_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["val_kd_loss_uniform"] == pytest.approx(uniform_loss.item(), rel=1e-4)
    assert row["val_target_nll"] == pytest.approx(nll.item(), rel=1e-4)
    assert row["val_target_nll_uniform"] == pytest.approx(uniform_nll.item(), rel=1e-4)
    same = rows(run / "students" / "uniform")[-1]
    assert same["val_kd_loss"] == pytest.approx(same["val_kd_loss_uniform"], rel=1e-5)


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


def test_a_teacher_serves_later_students(config, run, tmp_path):
    later = dataclasses.replace(config, teacher=Teacher(), teacher_run=str(run), students=("attention",))
    out = train(later, tmp_path / "later")
    assert not (out / "teacher").exists()
    resolved = Config.load(out / "config.json")
    assert resolved.teacher == config.teacher and resolved.teacher_run == str(run)
    one, two = (read(folder / "students/attention/student.json") for folder in (run, out))
    assert one["sha256"] == two["sha256"]
    assert [row["name"] for row in read(out / "summary.json")["rows"]][:2] == ["teacher", "snapshot 1"]


@pytest.mark.parametrize("changes", [
    dict(precision="bf16"),
    dict(precision="fp16"),
    dict(channels_last=True, teacher=dict(model="resnet8_w4"), student=dict(model="resnet8_w4")),
    dict(teacher=dict(optimizer="adamw", lr=1e-3), student=dict(optimizer="adamw", schedule="cosine")),
    dict(teacher=dict(schedule="cyclic"), student=dict(fusion="logit", attention_objective="kl")),
    dict(student=dict(normalize=False, scale=1.0, detach_query=False)),
    dict(deterministic=True),
    dict(teacher=dict(batch_size=199, epochs=6)),
], ids=lambda changes: "-".join(f"{k}" for k in changes))  # fmt: skip
def test_options_train(tiny, tmp_path, device, changes):
    config = dataclasses.replace(small(tiny, **changes), device=device, students=("attention",))
    run = train(config, tmp_path / "run")
    torch.use_deterministic_algorithms(False)
    for folder in (run / "teacher", run / "students/attention"):
        assert rows(folder)[-1]["train_loss"] < rows(folder)[0]["train_loss"]
        dtypes = {t.dtype for path in folder.glob("*.safetensors") for t in load_tensors(path).values()}
        assert dtypes <= {torch.float32, torch.int64}


def test_compiled_training_follows_the_plain_one(tiny, run, tmp_path, device, monkeypatch):
    calls = []

    def compile(network):
        calls.append(network)
        return compiler(network, backend="eager")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    config = dataclasses.replace(small(tiny, compile=True), device=device)
    train_student(config, run / "teacher", "attention", tmp_path / "student")
    plain = rows(run / "students/attention")
    for one, two in zip(plain, rows(tmp_path / "student"), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-2)
    assert len(calls) == 1


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


def test_the_library_needs_neither_rich_nor_tyro():
    code = "import sys; sys.modules |= {'rich': None, 'tyro': None}; import eekd.train"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.bad_input
def test_a_loss_that_is_not_finite_stops_in_one_sentence(tiny, run, tmp_path):
    wild = small(tiny, teacher=dict(lr=1e30), student=dict(lr=1e30))
    with pytest.raises(FloatingPointError, match=r"^teacher: the loss became (nan|inf) in epoch 1 at"):
        train_teacher(wild, tmp_path / "teacher")
    with pytest.raises(FloatingPointError, match=r"^attention: the loss became (nan|inf) in epoch"):
        train_student(wild, run / "teacher", "attention", tmp_path / "student")
    assert not list(tmp_path.rglob("s*.safetensors")) and not (tmp_path / "student/student.json").exists()


@pytest.mark.bad_input
def test_a_folder_in_use_is_refused(config, run):
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(FileExistsError, match="already holds something"):
        train(config, run)
    with pytest.raises(FileExistsError, match="already holds something"):
        train(config, run / "config.json")
    with pytest.raises(FileExistsError, match="snapshots"):
        train_teacher(config, run / "teacher")
    with pytest.raises(FileExistsError, match="already holds a trained network"):
        train_student(config, run / "teacher", "ce", run / "students" / "ce")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))


@pytest.mark.bad_input
@pytest.mark.parametrize(("changes", "error", "wanted"), [
    (dict(data="digit"), (ValueError, FileNotFoundError), "digit"),
    (dict(data="fashion-mnist", root="/nowhere"), FileNotFoundError, "/nowhere"),
    (dict(data="cifar10", root="/nowhere"), FileNotFoundError, "/nowhere"),
    (dict(teacher=dict(model="resnet21")), ValueError, "resnet2"),
    (dict(student=dict(model="resnet7")), ValueError, "resnet"),
    (dict(student=dict(model="TINY:gone")), AttributeError, "gone"),
    (dict(student=dict(model="TINY:headless")), ValueError, "linear"),
    (dict(student=dict(model="nowhere.py:net")), FileNotFoundError, "nowhere.py"),
    (dict(device="cuda:99"), ValueError, "cuda:99"),
    (dict(device="tpu"), ValueError, "tpu"),
    (dict(teacher_run="nowhere"), FileNotFoundError, "nowhere"),
    (dict(teacher_run="RUN", train_limit=100), ValueError, "other images"),
    (dict(teacher_run="RUN", split_seed=5), ValueError, "other images"),
    (dict(train_limit=10**9), ValueError, "train_limit"),
], ids=lambda value: str(value) if isinstance(value, dict) else None)  # fmt: skip
def test_mistakes_leave_nothing_behind(tiny, run, tmp_path, monkeypatch, changes, error, wanted):
    monkeypatch.chdir(tmp_path)
    filled = json.dumps(changes).replace("TINY", str(tiny)).replace("RUN", str(run))
    with pytest.raises(error) as caught:
        train(small(tiny, **json.loads(filled)))
    assert wanted in str(caught.value).lower() and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.bad_input
def test_a_damaged_teacher_is_refused(config, tmp_path):
    run = train(dataclasses.replace(config, students=()), tmp_path / "run")
    later = dataclasses.replace(config, teacher_run=str(run))
    snapshot = run / "teacher" / "snapshot-2.safetensors"
    data = bytearray(snapshot.read_bytes())
    data[-1] ^= 1
    snapshot.write_bytes(data)
    with pytest.raises(ValueError, match="snapshot-2.safetensors"):
        prepare(later)
    snapshot.unlink()
    with pytest.raises(FileNotFoundError, match="snapshot-2.safetensors"):
        prepare(later)


@pytest.mark.bad_input
def test_processes_that_have_not_joined_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"torchrun started 2 processes, .* in eekd\.parallel\.process_group\(\)"):
        train(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.bad_input
def test_tensorboard_missing_is_said_before_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'eekd\[tensorboard\]'"):
        train(small(tiny, tensorboard=True), tmp_path / "run")
    assert not list(tmp_path.iterdir())
