"""Steps that are not finite stop a run, and move nothing."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from faults import FAULTS, NAN, after, assert_same, by_hand, faulty, kept, parameters, start, taught
from killed import EVERY_STEP

from eekd.data import Loader
from eekd.io.files import read_json
from eekd.io.tensors import load_tensors
from eekd.train import TeacherTrainer
from eekd.train.nonfinite import NonFiniteGuard, overflow
from eekd.train.replay import replay

TOLD = {
    "image": ("the loss became nan", "the images, nan in 1 of 3840 values"),
    "logits": ("the loss became nan", "the snapshot_logits of 1 (EEKDLoss), inf in 20 of 1200 values"),
    "gradient": (r"a gradient is not finite at loss [\d.]+",
                 "the gradient of the output of 0.body.6 (Flatten), inf in 5 of 300 values"),
    "overflow": ("the loss became nan", "the output of 0.trap (Trap), inf in 5 of 300 values"),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize("looks", ["every step", "now and then"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_not_finite_stops_and_moves_no_weight(run, tmp_path, mark, monkeypatch, fault, looks):
    session, name, value = faulty(run, fault, save_every=EVERY_STEP if looks == "every step" else 300.0)
    if looks == "now and then":  # as on a GPU, which goes on for three steps before it is asked
        begin = NonFiniteGuard.on_step_begin

        def on_step_begin(self, trainer):
            self.looks = False
            begin(self, trainer)

        monkeypatch.setattr(NonFiniteGuard, "on_step_begin", on_step_begin)
    [sample] = mark(session, value, 4)
    with pytest.raises(FloatingPointError) as caught:
        start(session, name, tmp_path / "phase", run[1] / "teacher")
    at = r"epoch 2 at learning rate \S+, step 5, samples \d+, \d+, \d+, " + f"{sample}" + r", \d+ and 55 more"
    told = str(caught.value)
    what, first = TOLD[fault]
    wanted = f"{name}: {what} in {at}: the first bad tensor is {re.escape(first)}, of sample {sample}; saved in "
    assert re.match(wanted, told), told
    assert f"saved in {tmp_path}/phase/non-finite-5.json; try a lower lr" in told and "\n" not in told
    known, weights = kept(tmp_path / "phase")
    assert (known["phase"], known["step"], known["epoch"]) == (name, 5, 2)
    before, _ = by_hand(session, name, teacher=run[1] / "teacher", stop=4)
    assert_same(parameters(weights), parameters(before))
    saved = max((tmp_path / "phase/checkpoints").glob("*.json"), key=lambda path: int(path.stem))
    assert (read_json(saved)["epoch"], read_json(saved)["batch"]) == (1, 0)
    tensors = load_tensors(saved.with_suffix(".safetensors"))
    assert_same(before, {key[8:]: tensor for key, tensor in tensors.items() if "network." in key})
    monkeypatch.undo()  # and it goes on as if nothing had been
    start(session, name, tmp_path / "phase", run[1] / "teacher", resume=True)
    assert_same(by_hand(session, name, teacher=run[1] / "teacher")[0], after(tmp_path / "phase", name))


@pytest.mark.bad_input
def test_weights_that_are_not_finite_are_never_saved(run, tmp_path, monkeypatch):
    session, name, _ = faulty(run, "image")
    step, steps = torch.optim.SGD.step, itertools.count(1)

    def overflow(self, *args):
        step(self, *args)
        if next(steps) == 8:
            self.param_groups[0]["params"][0].data.view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim.SGD, "step", overflow)
    with pytest.raises(FloatingPointError, match=r"^teacher: the parameter body.0.weight is not finite after step 8"):
        start(session, name, tmp_path / "phase", None)
    saved = {path.stem for path in (tmp_path / "phase").rglob("*.safetensors")}
    assert "snapshot-1" in saved and "snapshot-2" not in saved


@pytest.mark.parametrize("model", ["halves", "doubled"])
def test_networks_of_another_dtype_are_finite_too(run, tmp_path, model):
    session = taught(run, model, verify_loss=2)
    for name in ("ce", "attention"):
        start(session, name, tmp_path / name, run[1] / "teacher")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_number_is_finite_and_none_beyond(dtype):
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert not overflow([None, large, -large, torch.ones(3), large[:0]])
    for value, place in itertools.product((NAN, math.inf, -math.inf), (0, 500, 999)):
        bad = large.index_fill(0, torch.tensor(place), value)
        assert overflow([large, bad, torch.ones(3)])


@pytest.mark.bad_input
def test_no_checkpoint_hides_a_bad_step(run, tmp_path, mark, monkeypatch):
    """A batch that cannot be had saves what there is: here nothing, for a GPU was not asked yet."""
    session, name, value = faulty(run, "image")
    mark(session, value, 1)
    then = NonFiniteGuard.left_out
    monkeypatch.setattr(NonFiniteGuard, "left_out", lambda self, pause=True: pause and then(self, pause))
    marked = Loader._batch

    def lost(self, images, present, index, view):
        if self.train and len(index) < 60:
            raise FileNotFoundError("gone")
        return marked(self, images, present, index, view)

    monkeypatch.setattr(Loader, "_batch", lost)
    with pytest.raises(FloatingPointError, match="^teacher: the loss became nan in epoch 1 .* step 2, "):
        start(session, name, tmp_path / "phase", None)
    assert not list((tmp_path / "phase").glob("checkpoints/*"))


def test_compiled_networks_are_watched_too(run, tmp_path, mark, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compiler(network, backend="eager"))
    session, _, value = faulty(run, "overflow", compile=True)
    teacher = dataclasses.replace(session.config.teacher, model=session.config.student.model)
    session.config = dataclasses.replace(session.config, teacher=teacher)
    mark(session, value, 1)
    with pytest.raises(FloatingPointError, match=r"the output of trap \(Trap\), inf in 5 of 300"):
        start(session, "teacher", tmp_path / "phase", None)


def test_a_step_of_several_batches_is_watched_to_the_bad_one(run, tmp_path, mark):
    session, name, value = faulty(run, "image")
    session.config = dataclasses.replace(session.config, accumulate=2)
    [sample] = mark(session, value, 1)
    trainer = TeacherTrainer(session, callbacks=[NonFiniteGuard(tmp_path)])
    before = {name: parameter.clone() for name, parameter in trainer.network.named_parameters()}
    with pytest.raises(FloatingPointError, match=f"step 1, .*: the first bad tensor is the images.* sample {sample};"):
        trainer.fit()
    assert_same(before, dict(trainer.network.named_parameters()))
    assert replay(tmp_path / "non-finite-1.json").name == "the images"


@pytest.mark.filterwarnings("ignore:.*jit.script:FutureWarning", "ignore:.*jit.script:DeprecationWarning")
def test_scripted_modules_are_passed_over(run, tmp_path, mark):
    session = taught(run, "scripted")
    mark(session, 200.0, 1)
    with pytest.raises(FloatingPointError, match=r"the first bad tensor is the output of 0.trap \(Trap\), "):
        start(session, "attention", tmp_path / "phase", run[1] / "teacher")
