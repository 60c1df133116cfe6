"""A run that skips a step is the run in which the step was left out."""

import contextlib
import dataclasses
import re
import warnings

import pytest
import torch
from faults import EACH, NAN, after, assert_same, by_hand, config_of, faulty, start, taught
from killed import EVERY_STEP, Killed, killer, untimed

from eekd.bank import __main__ as bank
from eekd.data import load
from eekd.io.files import read_json, sha256_of
from eekd.io.tensors import load_tensors
from eekd.train import __main__ as cli
from eekd.train import prepare, train
from eekd.train.nonfinite import NonFiniteGuard
from eekd.train.optim import build_optimizer
from eekd.train.replay import replay
from eekd.train.session import Session


@pytest.mark.parametrize("steps", [(0,), (2, 5), (3, 7), (4, 5, 6, 7)], ids=str)
@pytest.mark.parametrize("fault", ["image", "logits", "gradient"])
def test_skip_is_a_run_in_which_the_step_was_left_out(run, tmp_path, mark, fault, steps):
    session, name, value = faulty(run, fault, non_finite="skip")
    mark(session, value, *steps)
    with pytest.warns(RuntimeWarning, match="; the step is skipped$") as told:
        start(session, name, tmp_path / "phase", run[1] / "teacher")
    assert len(told) == len(steps) == len(list((tmp_path / "phase").glob("non-finite-*.json")))
    state, found = by_hand(session, name, steps, run[1] / "teacher")
    assert_same(state, after(tmp_path / "phase", name))
    rows = untimed(tmp_path / "phase")
    assert [row["skipped"] for row in rows] == [sum(step // EACH == epoch for step in steps) for epoch in (0, 1)]
    assert [row["step"] for row in rows] == [4, 8]
    first = [loss for loss, step in zip(found, [s for s in range(8) if s not in steps], strict=True) if step < EACH]
    sizes = [60 if step < 3 else 20 for step in range(EACH) if step not in steps]
    mean = sum(loss * size for loss, size in zip(first, sizes, strict=True)) / sum(sizes)
    assert rows[0]["train_loss"] + (name == "attention") * rows[0].get("train_attention_loss", 0) == pytest.approx(mean)
    if len(steps) == 4:
        assert rows[1]["train_loss"] is None and rows[1]["val_loss"] > 0


def test_fp16_leaves_gradients_to_its_scaler_and_no_loss(run, tmp_path, mark):
    session, name, value = faulty(run, "gradient", non_finite="skip", precision="fp16")
    mark(session, value, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        start(session, name, tmp_path / "scaled", run[1] / "teacher")
    assert [row["skipped"] for row in untimed(tmp_path / "scaled")] == [0, 0]
    assert_same(by_hand(session, name, teacher=run[1] / "teacher")[0], after(tmp_path / "scaled", name))
    session, name, value = faulty(run, "logits", non_finite="skip", precision="fp16", save_every=EVERY_STEP)
    mark(session, value, 2)
    scales = []

    def progress(phase, done, total, known):
        for path in (tmp_path / "phase/checkpoints").glob("*.json"):
            scales.append(read_json(path)["scaler"]["scale"])

    with pytest.warns(RuntimeWarning, match=r"the loss became nan in epoch 1 .* snapshot_logits of 1 \(EEKDLoss\)"):
        start(session, name, tmp_path / "phase", run[1] / "teacher", progress=progress)
    assert set(scales) == {65536.0}
    assert_same(by_hand(session, name, [2], run[1] / "teacher")[0], after(tmp_path / "phase", name))


@pytest.mark.bad_input
@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("rows, step, scale", [(60, 8, "2.6e+02"), (4, 31, "3.1e-05")], ids=["short", "long"])
def test_fp16_ends_where_no_scale_mends_the_gradients(run, tmp_path, policy, rows, step, scale):
    session = taught(run, "rooted", precision="fp16", non_finite=policy, save_every=EVERY_STEP)
    student = dataclasses.replace(session.config.student, batch_size=rows)
    session.config = dataclasses.replace(session.config, student=student)
    told = rf"^ce: a gradient is not finite at loss [\d.]+ in epoch \d .* step {step}, .*: the first bad tensor is the "
    told += rf"gradient of the output of body.6 \(Flatten\), nan in .*no loss scale down to {re.escape(scale)} "
    for kill, ends in ((5, Killed), (99, FloatingPointError)):
        with pytest.raises(ends) as caught:
            start(session, "ce", tmp_path / "phase", None, resume=True, progress=killer(kill))
    assert re.match(told, str(caught.value)) and str(caught.value).endswith("try a lower lr or precision bf16 or fp32")
    assert replay(tmp_path / f"phase/non-finite-{step}.json").name == "the gradient of the output of body.6 (Flatten)"


def test_a_first_step_that_is_skipped_leaves_a_momentum_of_nothing(run):
    """torch takes what lies in memory."""
    network = Session(run[0].config, run[0].data).network(run[0].config.teacher, 0)
    garbage = [torch.full((1 << 12,), 1e30) for _ in range(100)]
    del garbage
    optimizer = build_optimizer(run[0].config.teacher, network)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(not optimizer.state[parameter]["momentum_buffer"].any() for parameter in network.parameters())


@pytest.mark.bad_input
@pytest.mark.parametrize("budget", [0, 2])
def test_a_budget_that_is_used_up_stops(run, tmp_path, mark, budget):
    session, name, value = faulty(run, "image", non_finite="skip", skip_budget=budget)
    mark(session, value, 1, 4, 6)
    with warnings.catch_warnings(record=True) as told, pytest.raises(FloatingPointError) as caught:
        warnings.simplefilter("always")
        start(session, name, tmp_path / "phase", None)
    assert len([warning for warning in told if warning.category is RuntimeWarning]) == budget
    step = {0: 2, 2: 7}[budget]
    assert f"step {step}, " in str(caught.value)
    assert f"; skip_budget {budget} is used up: try a lower lr or precision fp32" in str(caught.value)


@pytest.mark.parametrize("budget", [1, 2])
def test_what_was_skipped_survives_a_kill(run, tmp_path, mark, budget):
    session, name, value = faulty(run, "gradient", non_finite="skip", skip_budget=budget, save_every=EVERY_STEP)
    mark(session, value, 1, 6)
    progress = killer(*range(1, 100))

    def phase():
        for _ in range(20):
            try:
                return start(session, name, tmp_path / "phase", run[1] / "teacher", resume=True, progress=progress)
            except Killed:
                pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if budget == 1:
            with pytest.raises(FloatingPointError, match="step 7, .*skip_budget 1 is used up"):
                phase()
            return
        phase()
    assert_same(by_hand(session, name, (1, 6), run[1] / "teacher")[0], after(tmp_path / "phase", name))
    assert [row["skipped"] for row in untimed(tmp_path / "phase")] == [1, 1]


def test_epochs_count_their_own_skips_whatever_the_policy(run, tmp_path, mark):
    session, name, value = faulty(run, "image", save_every=EVERY_STEP)
    mark(session, value, 1)
    for policy, kill in (("skip", 3), ("stop", 3), ("skip", 99)):
        session.config = dataclasses.replace(session.config, non_finite=policy)
        ends = contextlib.nullcontext() if kill == 99 else pytest.raises(Killed)
        with ends, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            start(session, name, tmp_path / "phase", None, resume=True, progress=killer(kill))
    assert [row["skipped"] for row in untimed(tmp_path / "phase")] == [1, 0]
    lines = (tmp_path / "phase/metrics.csv").read_text().splitlines()
    assert [line.rsplit(",", 1)[1] for line in lines] == ["skipped", "1", "0"]


def test_processes_leave_out_the_same_steps(run, tmp_path, monkeypatch):
    """Here nothing is bad, but elsewhere."""
    session, name, _ = faulty(run, "image", non_finite="skip")
    made = NonFiniteGuard.__init__

    def with_others(self, *args):
        made(self, *args)
        self.agree = lambda flag: torch.ones(()) if self.step == 3 else flag

    monkeypatch.setattr(NonFiniteGuard, "__init__", with_others)
    with pytest.warns(RuntimeWarning, match="step 4, .*: nothing was bad when the batch was run again; saved in"):
        start(session, name, tmp_path / "phase", None)
    assert_same(by_hand(session, name, [3])[0], after(tmp_path / "phase", name))


@pytest.mark.bad_input
def test_the_command_line(run, tmp_path, mark, capsys):
    session = run[0]
    mark(session, NAN, 5)
    (tmp_path / "config.json").write_text(session.config.to_json())
    out = tmp_path / "run"
    assert cli.main(["--config", str(tmp_path / "config.json"), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: teacher: the loss became nan in epoch 2 ") and told.count("\n") == 1
    assert cli.main(["--resume", str(out), "--seed", "1"]) == 2
    assert "another seed" in capsys.readouterr().err
    assert cli.main(["--resume", str(out), "--non-finite", "skip"]) == 0
    told = capsys.readouterr().err
    assert told.count("warning: ") == told.count("; the step is skipped\n") == told.count("\n") == 2
    assert_same(by_hand(session, without=[5])[0], load_tensors(out / "teacher/snapshot-2.safetensors"))
    for folder in (out / "teacher", out / "students/attention"):
        assert [row["skipped"] for row in untimed(folder)] == [0, 1]
        lines = (folder / "metrics.csv").read_text().splitlines()
        assert lines[0].endswith(",skipped") and [line.rsplit(",", 1)[1] for line in lines[1:]] == ["0", "1"]


def test_a_run_that_skips_nothing_has_the_bits_of_one_that_stops(run, tmp_path):
    session, whole = run
    session = Session(dataclasses.replace(session.config, non_finite="skip", verify_loss=3), session.data)
    out = train(session.config, tmp_path / "run", session=session)
    for path in whole.rglob("*.safetensors"):
        assert sha256_of(path) == sha256_of(out / path.relative_to(whole))
    for folder in ("teacher", "students/attention"):
        assert [row | {"skipped": 0} for row in untimed(whole / folder)] == untimed(out / folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skip_begins_again_with_files_and_their_workers(run, nets, tmp_path, mark, pictures, workers):
    config = config_of(nets, data=str(pictures), train_limit=None, workers=workers, non_finite="skip")
    session = Session(config, load(config.data, memory_budget=0))
    mark(session, NAN, 1, 2)
    with pytest.warns(RuntimeWarning, match="the images, nan in 1 of"):
        start(session, "teacher", tmp_path / "phase", None)
    assert_same(by_hand(session, without=(1, 2))[0], after(tmp_path / "phase", "teacher"))


def test_a_skip_reads_a_bank_from_the_same_place(run, tmp_path, mark):
    session, whole = run
    whole = whole.parent / "whole"
    assert bank.main(["--teacher", str(whole), "--views", "2", "--out", str(tmp_path / "bank")]) == 0
    torch.use_deterministic_algorithms(False)
    config = dataclasses.replace(session.config, bank=str(tmp_path / "bank"), teacher_run=str(whole), non_finite="skip")
    session = prepare(config)
    mark(session, NAN, 1)
    with pytest.warns(RuntimeWarning, match="the images, nan in 1 of"):
        start(session, "attention", tmp_path / "phase", whole / "teacher")
    tensors = load_tensors(tmp_path / "phase/non-finite-2.safetensors")
    wanted, features = session.bank.rows(0, tensors["index"])
    assert torch.equal(tensors["snapshot_features"], features.to(tensors["snapshot_features"].dtype))
    assert replay(tmp_path / "phase/non-finite-2.json").name == "the images"
    torch.manual_seed(0)
    again = dataclasses.replace(config, save_every=EVERY_STEP)
    session, progress = Session(again, session.data), killer(*range(1, 100))
    for _ in range(20):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                start(session, "attention", tmp_path / "killed", whole / "teacher", resume=True, progress=progress)
            break
        except Killed:
            pass
    assert_same(after(tmp_path / "phase", "attention"), after(tmp_path / "killed", "attention"))
