"""Mistakes end in one sentence, and leave nothing behind."""

import dataclasses
import json
import sys

import pytest
from small_runs import small

from eekd.train import prepare, train, train_student, train_teacher


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
