"""A run that was killed goes on to the bits it would have had."""

import dataclasses
import shutil

import pytest
import torch
from killed import EVERY_STEP, Killed, check_same, go_on, killer, untimed

from eekd.bank import __main__ as bank
from eekd.io.files import sha256_of
from eekd.train import prepare, train, train_student, train_teacher


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
