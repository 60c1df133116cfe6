"""Steps that are not finite move nothing, and the same seed gives the same bits."""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from killed import EVERY_STEP, Killed, check_same, killer, untimed

from eekd.bank import __main__ as bank
from eekd.data import Loader, load
from eekd.io.files import read_json, sha256_of, write_json_atomic
from eekd.io.tensors import load_tensors
from eekd.method.losses import EEKDLoss
from eekd.snapshots import SnapshotEnsemble
from eekd.snapshots.features import LastFeatures
from eekd.train import TeacherTrainer, prepare, train, train_student, train_teacher
from eekd.train import __main__ as cli
from eekd.train.config import Config, Student, Teacher
from eekd.train.nonfinite import NonFiniteGuard, overflow
from eekd.train.optim import build_optimizer, learning_rate
from eekd.train.replay import replay
from eekd.train.runtime import Runtime
from eekd.train.session import Session

NETS = """
import random
import numpy as np
import torch
from torch import nn

class Noise(nn.Module):
    def forward(self, x):
        return x + 0.01 * (random.random() + np.random.randn() + torch.rand(())) if self.training else x

class Burst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, marked):
        ctx.marked = marked
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(ctx.marked[:, None], float("inf")), None

class Trap(nn.Module):
    def forward(self, x, marked):
        return x.masked_fill(marked[:, None], float("inf"))

class Net(nn.Module):
    # An image that is marked is black to see, and does what `fault` says.
    def __init__(self, num_classes, in_channels, width, fault):
        super().__init__()
        body = [nn.Conv2d(in_channels, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1), Noise()]
        body = body[:3] if fault == "overflow" else body  # which a compiler takes whole
        self.body = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head, self.trap = nn.Linear(width, num_classes), Trap()
        self.fault = fault

    def forward(self, x):
        x = x.to(self.head.weight.dtype)
        marked = x.amax((1, 2, 3)) > (500 if self.fault == "logits" else 100)
        x = self.body(torch.where(marked[:, None, None, None], 0, x))
        if self.training and self.fault == "gradient":
            x = Burst.apply(x, marked)
        if self.training and self.fault == "root":
            x = x + 0 * (x - x.detach()).abs().sqrt()  # whose gradient is NaN
        if self.training and self.fault == "overflow":
            x = self.trap(x, marked)
        x = self.head(x)
        return x.masked_fill(marked[:, None], float("inf")) if self.fault == "logits" and not self.training else x

def net(num_classes, in_channels, image_size, width=12, fault=""):
    return Net(num_classes, in_channels, width, fault)

def small(num_classes, in_channels, image_size):
    return net(num_classes, in_channels, image_size, width=5)

def bursting(num_classes, in_channels, image_size):
    return net(num_classes, in_channels, image_size, width=5, fault="gradient")

def overflowing(num_classes, in_channels, image_size):
    return net(num_classes, in_channels, image_size, width=5, fault="overflow")

def doubled(num_classes, in_channels, image_size):
    return net(num_classes, in_channels, image_size, width=5).double()

def halves(num_classes, in_channels, image_size):
    made = net(num_classes, in_channels, image_size, width=5)
    made.many = nn.Parameter(torch.full((70000,), 2.0, dtype=torch.half))  # finite, but not their sum
    made.register_forward_hook(lambda made, args, output: output + made.many.float().mean())
    return made

def rooted(num_classes, in_channels, image_size):
    return net(num_classes, in_channels, image_size, width=5, fault="root")

def scripted(num_classes, in_channels, image_size):
    made = overflowing(num_classes, in_channels, image_size)
    made.body[0] = torch.jit.script(made.body[0])
    return made

def spare(num_classes, in_channels, image_size):
    made = bursting(num_classes, in_channels, image_size)
    made.spare = nn.Linear(2, 2)  # the last linear layer, which nobody runs
    return made

def blowing(num_classes, in_channels, image_size):
    return net(num_classes, in_channels, image_size, fault="logits")
"""
EACH = 4  # steps of an epoch
NAN = math.nan
FAULTS = {"image": ("teacher", "small", NAN), "logits": ("attention", "small", 1000.0),
          "gradient": ("attention", "bursting", 200.0), "overflow": ("attention", "overflowing", 200.0)}  # fmt: skip


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


def config_of(nets, teacher="net", student="small", **more) -> Config:
    common = dict(epochs=2, batch_size=60)
    return Config(
        teacher=Teacher(model=f"{nets}:{teacher}", snapshots=2, **common),
        student=Student(model=f"{nets}:{student}", optimizer="adamw", lr=1e-3, schedule="cosine", **common),
        **dict(students=("attention",), train_limit=200, device="cpu", precision="fp32", channels_last=False) | more,
    )


@pytest.fixture(scope="module")
def run(nets, tmp_path_factory):
    """A session and a run of it that nothing disturbed, which tests only read."""
    session = prepare(config_of(nets, teacher="blowing"))
    return session, train(session.config, tmp_path_factory.mktemp("run") / "whole", session=session)


@pytest.fixture
def mark(monkeypatch):
    """mark(session, value, *steps) puts the value into a pixel of one image of each step; returns their indices."""
    batch = Loader._batch
    yield_of = {}

    def mark(session, value, *steps):
        loader = session.loader("train", session.config.teacher, train=True)
        for step in steps:
            loader.set_epoch(step // EACH)
            yield_of[step // EACH, loader.indices()[step % EACH][3].item()] = value

        def marked(self, *args):
            made = batch(self, *args)
            for (epoch, sample), value in yield_of.items() if self.train else ():
                if self.epoch == epoch:
                    made.images[made.index == sample, :, 1, 1] = value
            return made

        monkeypatch.setattr(Loader, "_batch", marked)
        return [sample for _, sample in yield_of]

    return mark


def by_hand(session, name="teacher", without=(), teacher=None, stop=None) -> tuple[dict, list[float]]:
    """Weights of a phase, as `trained` names them, in which some steps do not happen, up to `stop`; and its losses."""
    config = session.config
    phase = config.teacher if name == "teacher" else config.student
    trained = network = session.network(phase, 2 * config.seed + (name != "teacher"))
    if name == "attention":
        ensemble, capture = SnapshotEnsemble.load(teacher), LastFeatures(network)
        options = dict(temperature=phase.temperature, alpha=phase.alpha, embed_dim=phase.embed_dim)
        loss = EEKDLoss(student_dim=capture.dim, snapshot_dim=ensemble.feature_dim, **options)
        trained = torch.nn.ModuleList([network, loss])
    options = dict(lr=phase.lr, weight_decay=phase.weight_decay, fused=True)
    if phase.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained.parameters(), momentum=0.9, nesterov=True, **options)
    else:
        matrices, others = ([p for p in trained.parameters() if (p.ndim > 1) == many] for many in (True, False))
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, **options)
    scaler = torch.amp.GradScaler("cpu", enabled=config.precision == "fp16")
    loader, found = session.loader("train", phase, train=True), []
    trained.train()
    for epoch in range(phase.epochs):
        loader.set_epoch(epoch)
        for step, batch in enumerate(loader, EACH * epoch):
            if step in without or step == stop:
                continue
            if stop is not None and step > stop:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(phase, step, EACH * phase.epochs)
            if name == "attention":
                z, u = session.run(ensemble, batch.images)
                logits, features = session.run(capture, batch.images)
                total, _ = loss(logits, z, batch.labels, features, u)
            else:
                total = F.cross_entropy(session.run(network, batch.images).float(), batch.labels)
            found.append(total.item())
            optimizer.zero_grad()
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
    return trained.state_dict(), found


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def kept(folder) -> tuple[dict, dict]:
    """The one JSON that lies beside a phase, and the weights that it keeps."""
    [path] = folder.glob("non-finite-*.json")
    known, tensors = read_json(path), load_tensors(path.with_suffix(".safetensors"))
    return known, {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("network.")}


def parameters(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if "running" not in name and "batches" not in name}


def faulty(run, fault: str, **more):
    """A session, the name of a phase that takes that fault from a marked image, and what to mark it with."""
    name, model, value = FAULTS[fault]
    return taught(run, model, **more), name, value


def taught(run, model: str, **more) -> Session:
    """A session whose student is that model."""
    config = run[0].config
    student = dataclasses.replace(config.student, model=config.student.model.replace("small", model))
    return Session(dataclasses.replace(config, student=student, **more), run[0].data)


def start(session, name: str, folder, teacher, **more):
    if name == "teacher":
        return train_teacher(session.config, folder, session=session, **more)
    return train_student(session.config, teacher, name, folder, session=session, **more)


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


def after(folder, name: str) -> dict:
    """The weights that a phase left."""
    if name == "teacher":
        return load_tensors(folder / "snapshot-2.safetensors")
    parts = {"0.": "student", "1.": "attention"}
    return {
        start + key: tensor
        for start, file in parts.items()
        for key, tensor in load_tensors(folder / f"{file}.safetensors").items()
    }


@pytest.mark.parametrize("steps", [(0,), (2, 5), (3, 7), (4, 5, 6, 7)], ids=str)
@pytest.mark.parametrize("fault", ["image", "logits", "gradient"])
def test_skip_is_a_run_in_which_the_step_was_left_out(run, tmp_path, mark, fault, steps):
    session, name, value = faulty(run, fault, non_finite="skip")
    mark(session, value, *steps)
    with pytest.warns(RuntimeWarning, match="; the step is left out$") as told:
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
    told += rf"gradient of the output of body.6 \(Flatten\), nan in .*no scale of the loss down to {re.escape(scale)} "
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


@pytest.mark.parametrize("fault", ["image", "logits", "gradient"])
def test_what_was_kept_shows_the_bad_tensor(run, tmp_path, mark, fault):
    session, name, value = faulty(run, fault)
    [sample] = mark(session, value, 1)
    with pytest.raises(FloatingPointError):
        start(session, name, tmp_path / "phase", run[1] / "teacher")
    torch.manual_seed(99)
    path, draws = tmp_path / "phase/non-finite-2.json", torch.get_rng_state()
    found, known = replay(path), read_json(path)
    assert str(found) == known["found"] and not found.tensor.isfinite().all()
    tensors = load_tensors(path.with_suffix(".safetensors"))
    assert tensors["index"][found.rows].tolist() == [sample]
    assert torch.equal(draws, torch.get_rng_state())
    assert known["settings"]["train_limit"] == 200 and known["made_with"]["torch"] == torch.__version__
    if name == "attention":
        assert ("snapshot_logits" in tensors) and tensors["snapshot_features"].shape == (2, 60, 12)
    data = bytearray(path.with_suffix(".safetensors").read_bytes())
    data[-1] ^= 1
    path.with_suffix(".safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="non-finite-2.safetensors was changed or damaged"):
        replay(path)


def test_a_replay_reads_the_features_of_the_layer_that_was_named(run, tmp_path, mark):
    session = taught(run, "spare")
    student = dataclasses.replace(session.config.student, layer="head")
    session = Session(dataclasses.replace(session.config, student=student), run[0].data)
    mark(session, 200.0, 1)
    with pytest.raises(FloatingPointError):
        start(session, "attention", tmp_path / "phase", run[1] / "teacher")
    assert replay(tmp_path / "phase/non-finite-2.json").name == "the gradient of the output of 0.body.6 (Flatten)"


@pytest.mark.bad_input
@pytest.mark.parametrize("content, told", [
    ([], "must be an object, got a list"), ("x", "must be an object, got a str"), ({}, "must have format 1, got None"),
    ({"format": 2}, "must have format 1, got 2"), ({"format": 1}, "must have sha256, classes, criterion, settings"),
], ids=str)  # fmt: skip
def test_a_file_that_cannot_be_replayed_is_named(tmp_path, content, told):
    write_json_atomic(tmp_path / "kept.json", content)
    with pytest.raises(ValueError) as caught:
        replay(tmp_path / "kept.json")
    assert str(caught.value).startswith(f"{tmp_path}/kept.json {told}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_replay_runs_as_the_training_did(run, tmp_path, mark, monkeypatch, precision):
    session, name, value = faulty(run, "overflow", precision=precision, channels_last=True)
    mark(session, value, 1)
    ran = []
    monkeypatch.setattr(Runtime, "run", lambda self, *args, then=Runtime.run: ran.append(self) or then(self, *args))
    with pytest.raises(FloatingPointError):
        start(session, name, tmp_path / "phase", run[1] / "teacher")
    ran.clear()
    assert replay(tmp_path / "phase/non-finite-2.json").name.startswith("the output of 0.trap")
    assert [(forward.dtype, forward.layout) for forward in ran] == [(session.dtype, torch.channels_last)]


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
    assert told.count("warning: ") == told.count("; the step is left out\n") == told.count("\n") == 2
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


# The same bits


@pytest.fixture
def deterministic():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def pictures(tmp_path):
    """A folder of image files."""
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 100), ("val", 5), ("test", 5)):
        for c, n in itertools.product("ab", range(count)):
            (tmp_path / "data" / split / c).mkdir(parents=True, exist_ok=True)
            picture = image.new("L", (8, 8), n)
            picture.putpixel((n % 8, n // 8 % 8), 200 if c == "a" else 20)
            picture.save(tmp_path / "data" / split / c / f"{n}.png")
    return tmp_path / "data"


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


RUN = """
import sys, torch
from eekd.train.config import Config
from eekd.train import train
torch.set_num_threads(1)
train(Config.load(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_of_two_processes_are_the_same(nets, tmp_path, precision):
    config = config_of(nets, deterministic=True, students=("ce", "last", "attention"), precision=precision)
    (tmp_path / "config.json").write_text(config.to_json())
    for name, seed in (("one", "1"), ("two", "2")):
        command = [sys.executable, "-c", RUN, str(tmp_path / "config.json"), str(tmp_path / name)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_deterministic_runs_from_files_are_the_same(nets, tmp_path, pictures, workers, threads, deterministic):
    threads(1)
    config = config_of(nets, data=str(pictures), train_limit=None, deterministic=True, workers=workers)
    data = load(config.data, memory_budget=0)
    one, two = (train(config, tmp_path / name, session=Session(config, data)) for name in ("one", "two"))
    check_same(one, two)


@pytest.mark.full
def test_deterministic_runs_from_a_bank_are_the_same(nets, tmp_path, threads, deterministic):
    threads(1)
    config = config_of(nets, deterministic=True, students=())
    teacher = train(config, tmp_path / "teacher")
    made = []
    for name in ("one", "two"):
        assert bank.main(["--teacher", str(teacher), "--views", "2", "--out", str(tmp_path / f"bank-{name}")]) == 0
        taught = dict(teacher_run=str(teacher), bank=str(tmp_path / f"bank-{name}"))
        made.append(train(dataclasses.replace(config, students=("attention", "entropy"), **taught), tmp_path / name))
    for path in made[0].rglob("*.safetensors"):
        assert sha256_of(path) == sha256_of(made[1] / path.relative_to(made[0]))
    for weighting in ("attention", "entropy"):
        assert untimed(made[0] / "students" / weighting) == untimed(made[1] / "students" / weighting)
