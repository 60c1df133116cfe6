"""The promises of docs/reference/reliability.md: kill a run, go on, and the bits are those of an undisturbed run."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from eekd.bank import __main__ as bank
from eekd.data import load
from eekd.io import files
from eekd.io.files import read_checked, read_json, sha256_of
from eekd.io.lock import locked
from eekd.snapshots import read_manifest
from eekd.train import __main__ as cli
from eekd.train import checkpoints, prepare, resume, screen, teacher, train, train_student, train_teacher, trainer
from eekd.train.checkpoints import Checkpoints
from eekd.train.config import Config, Student, Teacher
from eekd.train.run_folder import read_settings
from eekd.train.session import Session
from eekd.train.signals import Stopped, signals

NETS = """
import random
import numpy as np
import torch
from torch import nn

class Noise(nn.Module):
    def forward(self, x):
        return x + 0.01 * (random.random() + np.random.randn() + torch.rand(())) if self.training else x

def net(num_classes, in_channels, image_size, width=12):
    body = [nn.Conv2d(in_channels, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1), Noise()]
    body.append(nn.Conv2d(width, width, 2))  # whose weights have an order in channels_last, which one channel has not
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def small(num_classes, in_channels, image_size):
    return net(num_classes, in_channels, image_size, width=5)
"""
VARIANTS = {"fp32": dict(), "fp16-channels_last": dict(precision="fp16", channels_last=True)}
EVERY_STEP = 1e-9  # for save_every


class Killed(BaseException):
    """Where a process would be gone, nothing is left to save."""


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module", autouse=True)
def a_scale_that_changes():
    """The gradient scaler doubles its scale after every step until one overflows, which else takes thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, growth_interval=1))
        yield


def config_of(nets, **more) -> Config:
    common = dict(epochs=2, batch_size=60)
    return Config(
        teacher=Teacher(model=f"{nets}:net", snapshots=2, **common),
        student=Student(model=f"{nets}:small", optimizer="adamw", lr=1e-3, schedule="cosine", **common),
        **dict(students=("ce", "attention"), train_limit=200, device="cpu", precision="fp32", channels_last=False)
        | more,
    )


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, nets, tmp_path_factory):
    """A session and a run of it that nothing disturbed, which tests only read."""
    session = prepare(config_of(nets, **VARIANTS[request.param]))
    return session, train(session.config, tmp_path_factory.mktemp("run") / "whole", session=session)


@pytest.fixture(scope="module")
def run(nets, tmp_path_factory):
    """The same in one variant."""
    session = prepare(config_of(nets))
    return session, train(session.config, tmp_path_factory.mktemp("run") / "whole", session=session)


def killer(*steps):
    """Progress that kills when the run has done so many steps, counted over all phases and processes."""
    seen = set()

    def progress(phase, done, total, known):
        seen.add((phase, done))
        if len(seen) in steps and (phase, done) not in killed:
            killed.add((phase, done))
            raise Killed

    killed = set()
    return progress


def go_on(run, session, progress) -> int:
    """Resumes until the run has ended; returns how often it was killed."""
    for kills in range(1000):
        try:
            resume(run, session=session, progress=progress)
            return kills
        except Killed:
            check_files(run)


def untimed(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def check_same(one: Path, two: Path) -> None:
    """The same files in both, the same bytes in each but for times and paths."""

    def names(run):
        return {path.relative_to(run) for path in run.rglob("*") if path.is_file()}

    assert names(one) == names(two)
    for path in names(one):
        if path.suffix == ".safetensors":
            assert sha256_of(one / path) == sha256_of(two / path), path
    for folder in one.glob("**/metrics.jsonl"):
        folder = folder.parent.relative_to(one)
        assert untimed(one / folder) == untimed(two / folder)
        tables = [(run / folder / "metrics.csv").read_text().splitlines() for run in (one, two)]
        assert len(tables[0]) == len(tables[1]) == 1 + len(untimed(one / folder)) and tables[0][0] == tables[1][0]
    for name in ("teacher/snapshots.json", "summary.json"):
        first, second = read_json(one / name), read_json(two / name)
        assert (first["val"], first["test"]) == (second["val"], second["test"]) if "val" in first else True
    rows = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in read_json(run / "summary.json")["rows"]]
        for run in (one, two)
    ]
    assert rows[0] == rows[1]


def check_files(run: Path) -> None:
    """Every file of an unfinished run is whole, or not yet marked as such."""
    for path in run.rglob("*.json"):
        if path.name != "config.json":
            read_json(path)
    for path in run.glob("**/checkpoints/*.json"):
        read_checked(path.with_suffix(".safetensors"), read_json(path)["sha256"])
        assert len(list(path.parent.glob("*.json"))) <= 4
    for path in run.glob("**/manifest.json"):
        for entry in read_manifest(path.parent)["snapshots"]:
            read_checked(path.parent / entry["file"], entry["sha256"])
    for path in run.glob("**/student.json"):
        read_checked(path.parent / "student.safetensors", read_json(path)["sha256"])
    for path in run.glob("**/metrics.jsonl"):
        assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] in ([], [1], [1, 2])


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """A kill is no damage: nothing is to be passed over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def test_killed_after_every_step(whole, tmp_path):
    session, undisturbed = whole
    session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)
    progress = killer(*range(1, 1000))
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=progress)
    assert go_on(tmp_path / "run", session, progress) >= 3 * 2 * 4 - 1
    check_same(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("steps", [(1,), (3, 9), (5, 14), (8, 17, 22), (2, 4, 6, 12, 20)])
def test_killed_between_checkpoints(run, tmp_path, steps):
    session, undisturbed = run
    session.config = dataclasses.replace(session.config, save_every=300.0)
    progress = killer(*steps)
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=progress)
    go_on(tmp_path / "run", session, progress)
    check_same(undisturbed, tmp_path / "run")


def test_a_students_bank_is_replayed_from_the_same_place(run, tmp_path):
    session, undisturbed = run
    earlier = shutil.copytree(undisturbed, tmp_path / "earlier")
    assert bank.main(["--teacher", str(earlier), "--views", "2"]) == 0
    torch.use_deterministic_algorithms(False)
    settings = dict(teacher_run=str(earlier), bank=str(earlier / "bank"), students=("attention",))
    session = prepare(dataclasses.replace(session.config, **settings, save_every=EVERY_STEP))
    one = train(session.config, tmp_path / "one", session=session)
    progress = killer(*range(1, 100))
    with pytest.raises(Killed):
        train(session.config, tmp_path / "two", session=session, progress=progress)
    assert go_on(tmp_path / "two", session, progress) == 7
    for path in ("students/attention/student.safetensors", "students/attention/attention.safetensors"):
        assert sha256_of(one / path) == sha256_of(tmp_path / "two" / path)
    assert untimed(one / "students/attention") == untimed(tmp_path / "two/students/attention")


def test_the_phases_resume_as_functions(run, tmp_path):
    session, undisturbed = run
    config = session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)

    def teach(**more):
        train_teacher(config, tmp_path / "teacher", session=session, **more)

    def learn(**more):
        train_student(config, tmp_path / "teacher", "attention", tmp_path / "student", session=session, **more)

    for phase in (teach, learn):
        with pytest.raises(Killed):
            phase(progress=killer(3))
        for _ in range(2):  # the second finds it finished
            phase(resume=True)
    for name in ("teacher/snapshot-2", "student/student", "student/attention"):
        there = f"{name}.safetensors".replace("student/", "students/attention/")
        assert sha256_of(tmp_path / f"{name}.safetensors") == sha256_of(undisturbed / there)


# Signals


def shout(number):
    os.kill(os.getpid(), number)
    for _ in range(1000):  # until the interpreter has seen it
        pass


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts the tests in the background has SIGINT ignored, as its children then do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["step", "last step", "validation", "diagnosis", "between"])
def test_a_signal_saves_and_says_how_to_go_on(run, tmp_path, monkeypatch, capsys, number, where):
    session, undisturbed = run
    config = dataclasses.replace(session.config, save_every=300.0)
    (tmp_path / "config.json").write_text(config.to_json())
    sent = []

    def send(here):
        if here and not sent:
            sent.append(number)
            shout(number)

    def progress(self, phase, done, total, known):
        send(phase == "ce" and (where, done) in (("step", 2), ("last step", 4)) and "val_loss" not in known)
        send(where == "between" and phase == "teacher" and done == 8 and "val_loss" in known)

    monkeypatch.setattr(screen.Display, "__call__", progress)
    for place, name, here in ((trainer, "evaluate", "validation"), (teacher, "diagnose", "diagnosis")):

        def watched(*args, here=here, then=vars(place)[name]):  # noqa: B008
            send(where == here)
            return then(*args)

        monkeypatch.setattr(place, name, watched)
    out = tmp_path / "run"
    assert cli.main(["--config", str(tmp_path / "config.json"), "--out", str(out)]) == 128 + number
    told = capsys.readouterr().err
    assert told == f"stopped by {number.name}; go on with: python -m eekd.train --resume {out}\n"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    saved = Checkpoints(out / ("students/ce" if "step" in where else "teacher"), {}, torch.device("cpu"))
    if where != "diagnosis":
        known = read_json(max(saved.folder.glob("*.json"), key=lambda path: int(path.stem)))
        place = {"step": (0, 3), "last step": (0, 4), "validation": (0, 4), "between": (2, 0)}[where]
        assert (known["epoch"], known["batch"]) == place
    check_files(out)
    assert cli.main(["--resume", str(out)]) == 0
    check_same(undisturbed, out)


@pytest.mark.parametrize("when", ["while agreeing", "in another process", "in another at the end of an epoch"])
def test_a_signal_is_agreed_on_and_not_lost(run, tmp_path, monkeypatch, when):
    session, undisturbed = run
    (tmp_path / "config.json").write_text(dataclasses.replace(session.config, save_every=300.0).to_json())
    sent = []

    def largest(*numbers):
        here = numbers == ((0,) if "epoch" in when else (0, False))
        if here and not sent:
            sent.append(here)
            if "another" in when:
                return [signal.SIGTERM, *numbers[1:]]
            shout(signal.SIGTERM)
        return [*numbers]

    monkeypatch.setattr(trainer.parallel, "max_across_processes", largest)
    out = tmp_path / "run"
    assert cli.main(["--config", str(tmp_path / "config.json"), "--out", str(out)]) == 128 + signal.SIGTERM
    [known] = map(read_json, (out / "teacher/checkpoints").glob("*.json"))
    place = {"while agreeing": (0, 2), "in another process": (0, 1)}.get(when, (1, 0))
    assert (known["epoch"], known["batch"]) == place
    assert cli.main(["--resume", str(out)]) == 0
    check_same(undisturbed, out)


def test_a_second_signal_is_not_held():
    with pytest.raises(KeyboardInterrupt) as stop, signals, signals.held():
        shout(signal.SIGINT)
        assert signals.received == signal.SIGINT
        shout(signal.SIGINT)
    assert type(stop.value) is KeyboardInterrupt


def test_under_torchrun_a_signal_comes_twice(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(Stopped) as stop, signals, signals.held():
            shout(signal.SIGTERM)
            shout(signal.SIGTERM)
        assert stop.value.args == (signal.SIGTERM,)
        shout(signal.SIGTERM)  # while Python ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What goes wrong


def refusing(file: Path, reason: int):
    """open(), but that no file of this name can be written."""

    def opened(path, mode, **more):
        if path == file and reason == errno.ENOSPC:  # a link under this name would be replaced
            path, mode = "/dev/full", mode.replace("x", "w")
        elif path == file:
            raise OSError(reason, os.strerror(reason), str(path))
        return open(path, mode, **more)

    return opened


@pytest.mark.bad_input
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    "file",
    [
        "teacher/metrics.csv",
        "teacher/metrics.jsonl",
        "teacher/.snapshot-1.safetensors.tmp",
        "teacher/.manifest.json.tmp",
        "teacher/checkpoints/.1.safetensors.tmp",
        "teacher/checkpoints/.1.json.tmp",
        "teacher/.snapshots.json.tmp",
        "students/attention/.student.safetensors.tmp",
        "students/attention/.student.json.tmp",
        ".summary.json.tmp",
    ],
)
def test_no_file_can_be_written_any_more(run, tmp_path, monkeypatch, capsys, file, reason):
    session, undisturbed = run
    (tmp_path / "config.json").write_text(dataclasses.replace(session.config, save_every=300.0).to_json())
    out = tmp_path / "run"

    def progress(self, phase, done, total, known):
        module = "io.files" if file.endswith(".tmp") else "train.metrics"
        monkeypatch.setattr(f"eekd.{module}.open", refusing(out / file, reason), raising=False)

    monkeypatch.setattr(screen.Display, "__call__", progress)
    assert cli.main(["--config", str(tmp_path / "config.json"), "--out", str(out)]) == 2
    monkeypatch.undo()
    name = file.replace("/.", "/").removeprefix(".").removesuffix(".tmp")
    told = f"error: {os.strerror(reason)}: {out / name}; go on with: python -m eekd.train --resume {out}\n"
    assert capsys.readouterr().err == told
    assert cli.main(["--resume", str(out)]) == 0
    check_same(undisturbed, out)


@pytest.mark.bad_input
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("name", ["environment.json", "config.json"])
def test_a_run_that_cannot_begin(run, tmp_path, monkeypatch, capsys, name, reason):
    (tmp_path / "config.json").write_text(run[0].config.to_json())
    out = tmp_path / "run"
    monkeypatch.setattr(files, "open", refusing(out / f".{name}.tmp", reason), raising=False)
    command = ["--config", str(tmp_path / "config.json"), "--out", str(out)]
    assert cli.main(command) == 2
    assert capsys.readouterr().err == f"error: {os.strerror(reason)}: {out / name}\n"
    monkeypatch.undo()
    assert cli.main(command) == 0
    check_same(run[1], out)


def test_a_lock_needs_no_room_on_the_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with locked(tmp_path), pytest.raises(BlockingIOError, match="by another process: wait"), locked(tmp_path):
        pass


def broken_off(run, out, step=6):
    """A run that was killed after so many steps."""
    session, _ = run
    session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)
    with pytest.raises(Killed):
        train(session.config, out, session=session, progress=killer(step))
    return out


def test_the_seconds_of_an_epoch_count_those_before_a_kill(run, tmp_path):
    out = broken_off(run, tmp_path / "run", 3)  # of the 4 steps of an epoch
    saved = read_json(out / "teacher/checkpoints/3.json")
    resume(out, session=run[0])
    row = json.loads((out / "teacher/metrics.jsonl").read_text().splitlines()[0])
    assert row["seconds"] > saved["seconds"] > 0 and saved["clock"].keys() >= {"forward", "backward"}
    assert all(row[f"seconds_{part}"] > seconds > 0 for part, seconds in saved["clock"].items())


@pytest.mark.bad_input
def test_a_read_only_folder(run, tmp_path, monkeypatch, capsys):
    out, opened = broken_off(run, tmp_path / "run"), os.open

    def refuse(path, flags, *more):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    assert cli.main(["--resume", str(out)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: Read-only file system: {out}/.lock") and told.count("\n") == 1
    monkeypatch.undo()
    assert cli.main(["--resume", str(out)]) == 0
    check_same(run[1], out)


@pytest.mark.bad_input
def test_a_second_process_on_the_same_run(run, tmp_path, capsys):
    out = broken_off(run, tmp_path / "run")
    with locked(out):
        assert cli.main(["--resume", str(out)]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {out} is in use by process {os.getpid()} on ") and told.count("\n") == 1
        child = os.fork()
        if not child:  # a worker of the loader, which outlives a kill by seconds
            time.sleep(30)
            os._exit(0)
    try:
        for _ in range(100):  # until the child has begun to run
            with contextlib.suppress(BlockingIOError), locked(out):
                break
            time.sleep(0.1)
        with locked(out):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.bad_input
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.full)])
def test_an_image_that_vanishes_while_training(nets, tmp_path, workers):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 30), ("val", 5), ("test", 5)):
        for c, n in itertools.product("ab", range(count)):
            (tmp_path / "data" / split / c).mkdir(parents=True, exist_ok=True)
            image.new("L", (8, 8), n).save(tmp_path / "data" / split / c / f"{n}.png")
    config = dataclasses.replace(config_of(nets), data=str(tmp_path / "data"), train_limit=None, workers=workers)
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, batch_size=4))
    session = Session(config, load(config.data, memory_budget=0))
    gone, moved = tmp_path / "data/train/a/3.png", tmp_path / "3.png"

    def progress(phase, done, total, known):
        if done == 2 and gone.exists():
            gone.rename(moved)

    with pytest.raises(FileNotFoundError) as caught:
        train(config, tmp_path / "run", session=session, progress=progress)
    assert "a/3.png" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__notes__ == [f"go on with: python -m eekd.train --resume {tmp_path / 'run'}"]
    moved.rename(gone)
    saved = read_json(max((tmp_path / "run/teacher/checkpoints").glob("*.json")))
    assert saved["batch"] >= 2  # nothing was lost
    resume(tmp_path / "run", session=session)
    check_same(train(config, tmp_path / "again", session=session), tmp_path / "run")


@pytest.mark.bad_input
def test_data_that_vanished_or_changed_before_going_on(nets, tmp_path, capsys):
    def write(split, count, value):
        def head(kind, *sizes):
            return bytes([0, 0, 8, kind]) + b"".join(n.to_bytes(4, "big") for n in sizes)

        pixels = bytes((value + 7 * i) % 256 for i in range(count * 64))
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(head(3, count, 8, 8) + pixels)
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(head(1, count) + bytes(i % 10 for i in range(count)))

    write("train", 300, 0)
    write("t10k", 40, 1)
    config = dataclasses.replace(config_of(nets), data="fashion-mnist", root=str(tmp_path))
    with pytest.raises(Killed):
        train(config, tmp_path / "run", progress=killer(5))
    write("train", 300, 3)
    assert cli.main(["--resume", str(tmp_path / "run")]) == 2
    assert "was trained on other images than fashion-mnist gives now" in capsys.readouterr().err
    (tmp_path / "train-images-idx3-ubyte").unlink()
    assert cli.main(["--resume", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "train-images-idx3-ubyte (or .gz) is not in it" in told and told.count("\n") == 1
    write("train", 300, 0)
    assert cli.main(["--resume", str(tmp_path / "run")]) == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--seed 3", "another seed"),
        ("--teacher.lr 0.2 --students ce", "another teacher.lr, students"),
        ("--preset digits", "another preset"),
        ("--out elsewhere", "another out"),
        ("teacher", "another teacher"),
    ],
)
def test_flags_that_would_change_the_run_are_refused(run, capsys, typed, told):
    words = typed.split()
    command, flags = (words[:1], words[1:]) if words[0] == "teacher" else ([], words)
    assert cli.main([*command, "--resume", str(run[1]), *flags]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_flags_that_change_nothing_pass(run):
    parsed = cli.parse(["--resume", str(run[1]), "--seed", "0", "--dry-run"])
    assert parsed.settings == read_settings(run[1])


@pytest.mark.bad_input
def test_what_cannot_go_on_says_why(run, tmp_path, capsys):
    assert cli.main(["--resume", str(tmp_path / "none")]) == 2
    assert "none is not a run that has begun: there is no config.json in it" in capsys.readouterr().err
    out = broken_off(run, tmp_path / "run")
    session = Session(dataclasses.replace(run[0].config, seed=1), run[0].data)
    with pytest.raises(ValueError, match=r"checkpoints/\d.json was written with settings.seed 0, and .* with 1"):
        train_teacher(session.config, out / "teacher", session=session, resume=True)


@pytest.mark.bad_input
def test_what_is_finished_is_not_taken_for_another(run, tmp_path):
    session, undisturbed = run
    other = Session(dataclasses.replace(session.config, teacher=Teacher(lr=0.5)), session.data)
    with pytest.raises(ValueError, match=r"snapshots.json was written with settings.\S+ .*, and cannot go on with"):
        train_teacher(other.config, undisturbed / "teacher", session=other, resume=True)
    with pytest.raises(ValueError, match="snapshots.json was written with schedule 'uniform'"):
        train_teacher(session.config, undisturbed / "teacher", session=session, resume=True, schedule=[2])
    students = undisturbed / "students"
    with pytest.raises(ValueError, match="student.json was written with phase 'ce'"):
        train_student(session.config, undisturbed / "teacher", "uniform", students / "ce", session=session, resume=True)
    with pytest.raises(ValueError, match="student.json was written with snapshots "):
        train_student(
            session.config,
            undisturbed / "teacher",
            "attention",
            students / "attention",
            session=session,
            which=[1],
            resume=True,
        )


@pytest.mark.bad_input
def test_a_student_does_not_go_on_under_a_teacher_that_was_trained_again(run, tmp_path):
    out = broken_off(run, tmp_path / "run", 22)
    assert (out / "students/attention/checkpoints").is_dir()
    shutil.rmtree(out / "teacher")
    session = Session(dataclasses.replace(run[0].config, seed=1), run[0].data)
    train_teacher(session.config, out / "teacher", session=session)
    with pytest.raises(ValueError, match=r"checkpoints/\d+.json was written with snapshots \["):
        train_student(
            run[0].config, out / "teacher", "attention", out / "students/attention", session=run[0], resume=True
        )


@pytest.mark.bad_input
@pytest.mark.parametrize("record", ["teacher/snapshots.json", "students/ce/student.json"])
def test_what_was_finished_is_not_trained_again_for_a_lost_record(run, tmp_path, record):
    copy = shutil.copytree(run[1], tmp_path / "run")
    (copy / record).unlink()
    before = {path: sha256_of(path) for path in copy.rglob("*.safetensors")}
    with pytest.raises(ValueError, match=r"metrics.jsonl tells of 2 epochs, and neither a checkpoint nor a record of "):
        resume(copy, session=run[0])
    assert before == {path: sha256_of(path) for path in copy.rglob("*.safetensors")}


@pytest.mark.bad_input
@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"format": 1}', '{"format": 1, "setup": []}'])
@pytest.mark.parametrize("record", ["summary.json", "teacher/snapshots.json", "students/ce/student.json"])
def test_a_record_of_something_else(run, tmp_path, capsys, record, text):
    copy = shutil.copytree(run[1], tmp_path / "run")
    (copy / record).write_text(text)
    assert cli.main(["--resume", str(copy)]) == 2
    told = capsys.readouterr().err
    assert f"{copy / record} must be an object with format 1 and " in told and told.count("\n") == 1


def test_nothing_but_checkpoints_is_removed(run, tmp_path):
    out = broken_off(run, tmp_path / "run")
    folder = out / "teacher/checkpoints"
    (folder / "backup").mkdir()
    (folder / "7.txt").write_text("mine")
    resume(out, session=run[0])
    assert sorted(path.name for path in folder.iterdir()) == ["7.txt", "backup"]


@pytest.mark.bad_input
def test_checkpoints_behind_a_link(run, tmp_path):
    out = broken_off(run, tmp_path / "run")
    folder = (out / "teacher/checkpoints").rename(tmp_path / "elsewhere")
    (out / "teacher/checkpoints").symlink_to(folder)
    there = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=r"teacher/checkpoints must be a folder, got a link to .*elsewhere"):
        resume(out, session=run[0])
    assert sorted(folder.iterdir()) == there


def test_validation_that_is_broken_off_draws_its_numbers_again(nets, tmp_path, monkeypatch):
    nets.with_name("noisy.py").write_text(NETS.replace(" if self.training else x", ""))
    config = config_of(nets)
    noisy = dataclasses.replace(config.teacher, model=f"{nets.with_name('noisy.py')}:net")
    config = dataclasses.replace(config, teacher=noisy)
    session = Session(config)

    def broken(*args, then=trainer.evaluate):
        then(*args)
        monkeypatch.undo()
        raise KeyboardInterrupt

    train_teacher(config, tmp_path / "one", session=session)
    monkeypatch.setattr(trainer, "evaluate", broken)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(config, tmp_path / "two", session=session)
    train_teacher(config, tmp_path / "two", session=session, resume=True)
    assert sha256_of(tmp_path / "one/snapshot-2.safetensors") == sha256_of(tmp_path / "two/snapshot-2.safetensors")


def test_another_setup_is_told(run, tmp_path, monkeypatch):
    out = broken_off(run, tmp_path / "run")
    made = checkpoints.provenance(torch.device("cpu"))
    monkeypatch.setattr(checkpoints, "provenance", lambda device: made | {"torch": "9.9"})
    with pytest.warns(RuntimeWarning, match=r"goes on with torch '9.9' for .*: the last bits may differ"):
        resume(out, session=run[0])


# Damage


def damage(path: Path, draw: random.Random) -> None:
    """Flips one bit of a file, or cuts it off."""
    data = bytearray(path.read_bytes())
    if draw.random() < 0.3:
        del data[draw.randrange(len(data)) :]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def files_of(run: Path) -> list[Path]:
    return sorted(
        path.relative_to(run)
        for path in run.rglob("*")
        if path.is_file() and path.stat().st_size and path.name != ".lock"
    )


def check_damage_to_a_finished_run(run, copy: Path, file: Path, draw: random.Random) -> None:
    damage(copy / file, draw)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        resume(copy, session=run[0])
    assert str(copy / file) in str(caught.value) and "\n" not in str(caught.value)
    shutil.copyfile(run[1] / file, copy / file)


def check_damage_to_an_unfinished_run(run, broken: Path, copy: Path, file: Path, draw: random.Random) -> None:
    """Named in an error, or in a warning before the same bits come out; what is never read need not be named."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(broken, copy)
    damage(copy / file, draw)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            resume(copy, session=run[0])
        except (ValueError, FileNotFoundError) as error:
            assert str(copy / file) in str(error)
            return
    named = any(str(copy / file) in str(warning.message) for warning in told)
    newest = max((int(path.stem) for path in (broken / file).parent.glob("*.json") if path.stem.isdecimal()), default=0)
    anew = file.name.startswith("metrics") or file.name == "manifest.json" and not list(broken.rglob("snapshot-*"))
    assert named or anew or file.parent.name == "checkpoints" and file.stem != str(newest)
    check_same(run[1], copy)


def test_damage_to_a_finished_run_is_named(run, tmp_path):
    copy, draw = shutil.copytree(run[1], tmp_path / "run"), random.Random(0)
    for file in 3 * files_of(copy):
        check_damage_to_a_finished_run(run, copy, file, draw)
    resume(copy, session=run[0])


def test_damage_to_an_unfinished_run_is_named_and_passed_over(run, tmp_path):
    broken, draw = broken_off(run, tmp_path / "broken", 12), random.Random(0)
    assert any(file.parent.name == "checkpoints" for file in files_of(broken))
    for file in files_of(broken):
        check_damage_to_an_unfinished_run(run, broken, tmp_path / "copy", file, draw)


def test_a_power_cut(run, tmp_path, monkeypatch):
    """The files that were not waited for are there, and empty."""
    monkeypatch.setattr(checkpoints, "SYNC", 1e9)
    out = broken_off(run, tmp_path / "run")
    first, *lost = sorted((out / "teacher/checkpoints").glob("*.json"), key=lambda path: int(path.stem))
    assert [int(path.stem) for path in (first, *lost)] == [1, 5, 6]
    for path in lost:
        path.write_bytes(b"")
        path.with_suffix(".safetensors").write_bytes(b"")
    with pytest.warns(RuntimeWarning) as told:
        resume(out, session=run[0])
    assert ["6.json is not JSON" in str(told[0].message), "5.json is not JSON" in str(told[1].message)] == [True, True]
    check_same(run[1], out)


def test_without_any_whole_checkpoint_one_sentence(run, tmp_path):
    out = broken_off(run, tmp_path / "run")
    for path in (out / "teacher/checkpoints").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^no checkpoint in .* is whole: .*safetensors was changed .*; remove .*"):
        resume(out, session=run[0])
    shutil.rmtree(out / "teacher")
    resume(out, session=run[0])
    check_same(run[1], out)


@pytest.mark.slow
def test_a_thousand_damages(run, tmp_path):
    copy, draw = shutil.copytree(run[1], tmp_path / "run"), random.Random(1)
    files = files_of(copy)
    for _ in range(800):
        check_damage_to_a_finished_run(run, copy, draw.choice(files), draw)
    session = run[0]
    session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)
    broken = [broken_off(run, tmp_path / f"broken-{step}", step) for step in (3, 6, 12, 14, 19, 23)]
    for _ in range(200):
        chosen = draw.choice(broken)
        check_damage_to_an_unfinished_run(run, chosen, tmp_path / "copy", draw.choice(files_of(chosen)), draw)


# kill -9


def kill_at_random(config: str, folder: str, kills: int) -> None:
    """Trains, in forks of this process, runs that are killed so often in all; the last one runs to its end.

    All that ended must be as the first, which nothing disturbed.
    """
    torch.set_num_threads(1)
    draw, folder, number = random.Random(0), Path(folder), 0
    prepare(Config.load(config))  # imports what the forks need
    checkpoints.provenance(torch.device("cpu"))  # nobody's commit may come between

    def start(out: Path) -> int:
        child = os.fork()
        if child:
            return child
        begun = (out / "config.json").exists()
        if not begun:
            shutil.rmtree(out, ignore_errors=True)  # killed before there was anything to keep
        arguments = ["--resume", str(out)] if begun else ["--config", config, "--out", str(out)]
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            os._exit(cli.main(arguments))

    begin = time.monotonic()
    assert os.waitpid(start(folder / "0"), 0)[1] == 0
    length, ended = time.monotonic() - begin, 0
    while kills or not ended:
        out = folder / str(number + 1)
        child = start(out)
        if kills:
            time.sleep(draw.uniform(0, length / 2))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            check_same(folder / "0", out)
            number, ended = number + 1, ended + 1
        else:
            assert os.WTERMSIG(status) == signal.SIGKILL, f"exit status {status}"
            kills -= 1
            check_files(out)
    print(f"{ended} runs ended")


def killed_at_random(nets, tmp_path, kills):
    config = config_of(nets, save_every=0.01)
    (tmp_path / "config.json").write_text(config.to_json())
    arguments = str(tmp_path / "config.json"), str(tmp_path), kills
    code = f"import test_resume; test_resume.kill_at_random{arguments}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.full)])
def test_kill_9(nets, tmp_path, kills):
    killed_at_random(nets, tmp_path, kills)


@pytest.mark.slow
def test_kill_9_sixty_times(nets, tmp_path):
    killed_at_random(nets, tmp_path, 60)
