"""Full disks, vanished data, other settings: what cannot go on says why, and loses nothing."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from killed import NETS, Killed, broken_off, check_same, config_of, killer

from eekd.data import load
from eekd.io import files
from eekd.io.files import read_json, sha256_of
from eekd.io.lock import locked
from eekd.train import __main__ as cli
from eekd.train import checkpoints, resume, screen, train, train_student, train_teacher, trainer
from eekd.train.config import Teacher
from eekd.train.run_folder import read_settings
from eekd.train.session import Session


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
    told = f"error: {os.strerror(reason)}: {out / name}; continue with: python -m eekd.train --resume {out}\n"
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
    hint, way_on = caught.value.__notes__
    assert "--bad-images skip" in hint and way_on == f"continue with: python -m eekd.train --resume {tmp_path / 'run'}"
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
    assert "must hold fashion-mnist, got no train-images-idx3-ubyte (or .gz) in it" in told and told.count("\n") == 1
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
    assert "none is not the folder of a run: it has no config.json" in capsys.readouterr().err
    out = broken_off(run, tmp_path / "run")
    session = Session(dataclasses.replace(run[0].config, seed=1), run[0].data)
    with pytest.raises(ValueError, match=r"settings.seed must be 0, .*checkpoints/\d.json was written, got 1"):
        train_teacher(session.config, out / "teacher", session=session, resume=True)


@pytest.mark.bad_input
def test_what_is_finished_is_not_taken_for_another(run, tmp_path):
    session, undisturbed = run
    other = Session(dataclasses.replace(session.config, teacher=Teacher(lr=0.5)), session.data)
    with pytest.raises(ValueError, match=r"settings.\S+ must be .*, with which .*snapshots.json was written, got"):
        train_teacher(other.config, undisturbed / "teacher", session=other, resume=True)
    with pytest.raises(ValueError, match="schedule must be 'uniform', with which .*snapshots.json was written"):
        train_teacher(session.config, undisturbed / "teacher", session=session, resume=True, schedule=[2])
    students = undisturbed / "students"
    with pytest.raises(ValueError, match="phase must be 'ce', with which .*student.json was written"):
        train_student(session.config, undisturbed / "teacher", "uniform", students / "ce", session=session, resume=True)
    with pytest.raises(ValueError, match="snapshots must be .*, with which .*student.json was written"):
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
    with pytest.raises(ValueError, match=r"snapshots must be \[.*, with which .*checkpoints/\d+.json was written"):
        train_student(
            run[0].config, out / "teacher", "attention", out / "students/attention", session=run[0], resume=True
        )


@pytest.mark.bad_input
@pytest.mark.parametrize("record", ["teacher/snapshots.json", "students/ce/student.json"])
def test_what_was_finished_is_not_trained_again_for_a_lost_record(run, tmp_path, record):
    copy = shutil.copytree(run[1], tmp_path / "run")
    (copy / record).unlink()
    before = {path: sha256_of(path) for path in copy.rglob("*.safetensors")}
    with pytest.raises(ValueError, match=r"metrics.jsonl has 2 epochs, but neither a checkpoint nor a record of "):
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
    with pytest.warns(RuntimeWarning, match=r"continues with torch '9.9' for .*: the last bits may differ"):
        resume(out, session=run[0])
