"""Trainers: every option trains, from the same start, and twice the same."""

import dataclasses
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_runs import WEIGHTINGS, read, rows, small

from eekd import models
from eekd.data import Loader
from eekd.io.files import sha256_of
from eekd.io.tensors import load_tensors
from eekd.ops import reference
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.snapshots.features import LastFeatures
from eekd.train import prepare, train, train_student
from eekd.train.config import Config, Teacher
from eekd.train.session import Session


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
        fixed = dict(temperature=5.0, alpha=phase.alpha)
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


def test_the_library_needs_neither_rich_nor_tyro():
    code = "import sys; sys.modules |= {'rich': None, 'tyro': None}; import eekd.train"
    subprocess.run([sys.executable, "-c", code], check=True)
