"""A student's loss is compared with its formula in fp64: a good one is never refused, and a wrong one is found."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from faults import NAN, after, assert_same, by_hand, faulty, start, taught

from eekd.io.files import read_json
from eekd.method import losses, weightings
from eekd.method.losses import EEKDLoss
from eekd.method.topk import top_k_logits
from eekd.ops.backend import backend_for
from eekd.train.config import Config
from eekd.train.loss_check import LossCheck, differs
from eekd.train.replay import replay
from eekd.train.session import Session
from eekd.train.watch import Watch


def inputs(rows=16, classes=10, snapshots=3, scale=3.0, dtype=torch.float32, seed=0, k=None) -> list:
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=draw)
    z = scale * torch.randn(snapshots, rows, classes, generator=draw)
    labels = torch.randint(classes, (rows,), generator=draw)
    v, u = torch.randn(rows, 6, generator=draw), torch.randn(snapshots, rows, 7, generator=draw)
    z = z.to(dtype)
    return [logits.to(dtype), top_k_logits(z, k, labels) if k else z, labels, v.to(dtype), u.to(dtype)]


def criterion(weighting: str, **options) -> EEKDLoss:
    torch.manual_seed(0)
    return EEKDLoss(weighting, **options, **dict(student_dim=6, snapshot_dim=7) if weighting == "attention" else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighting", weightings.names())
def test_a_good_loss_is_never_refused(backend, weighting, dtype):
    forms = itertools.product((None, 4), ("probability", "logit"), ("label", "kl"))
    for seed, (k, fusion, objective) in enumerate(forms):
        loss = criterion(weighting, fusion=fusion, attention_objective=objective, detach_query=objective == "label")
        for scale in (1.0, 10.0 ** (seed - 3)):
            assert differs(loss, *inputs(scale=scale, dtype=dtype, seed=seed, k=k)) is None
    if backend == "native":
        for rows, classes, snapshots in ((1, 2, 1), (64, 1000, 5), (257, 7, 2)):
            assert differs(criterion(weighting), *inputs(rows, classes, snapshots, dtype=dtype)) is None
    logits, z, *rest = inputs(dtype=dtype)
    assert differs(criterion(weighting, alpha=0), logits, logits.expand(3, -1, -1).contiguous(), *rest) is None
    z[..., 3] = logits[:, 3] = -math.inf
    rest[0][:] = torch.where(rest[0] == 3, 4, rest[0])
    rest[0][5] = -100
    assert differs(criterion(weighting, temperature=1.0), logits, z, *rest) is None


BROKEN = {
    "loss": ("loss with", lambda result: result._replace(loss=1.003 * result.loss)),
    "loss not a number": ("loss with the attention's", lambda result: result._replace(loss=math.nan * result.loss)),
    "attention_loss": ("loss with", lambda result: result._replace(attention_loss=result.attention_loss + 1e-2)),
    "weights": ("weight", lambda result: result._replace(weights=result.weights**2)),
    "student's gradient": ("d_student_logits", lambda result: result._replace(
        loss=result.loss.detach() + 1.05 * (result.loss - result.loss.detach()))),
    "attention's gradient": ("d_attention", lambda result: result._replace(
        attention_loss=0.02 * result.attention_loss.detach() + 0.98 * result.attention_loss)),
}  # fmt: skip


def broken(op, damage):
    """The op, damaged but in the reference."""

    def damaged(*args, **options):
        result = op(*args, **options)
        return result if backend_for(args[0].device) == "reference" else damage(result)

    return damaged


@pytest.mark.bad_input
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("wrong", BROKEN)
def test_a_wrong_loss_ends_the_phase(run, tmp_path, monkeypatch, wrong, precision):
    session, whole = taught(run, "small", precision=precision), run[1]
    named, damage = BROKEN[wrong]
    monkeypatch.setattr(losses, "ensemble_kd", broken(losses.ensemble_kd, damage))
    with pytest.raises(FloatingPointError) as caught:
        start(session, "attention", tmp_path / "phase", whole / "teacher")
    told = str(caught.value)
    wanted = rf"attention: {named}.* is \S+, and \S+ by its formula in fp64, with \S+ allowed, by backend native on cpu"
    assert re.match(wanted + r" \(\w+\) with torch 2\S+; build eekd again, or train .*; the inputs are in ", told)
    path = tmp_path / "phase/loss-differs.json"
    assert told.endswith(str(path)) and "\n" not in told
    assert replay(path) == read_json(path)["found"]
    monkeypatch.undo()
    assert replay(path) is None


@pytest.mark.parametrize("dtype, by", [
    (torch.float64, 5e-4), (torch.float32, 5e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("weighting", weightings.names())
def test_a_wrong_gradient_is_found_in_every_precision(monkeypatch, weighting, dtype, by):
    for name in ("ensemble_kd", "sparse_ensemble_kd"):
        monkeypatch.setattr(
            losses,
            name,
            broken(
                getattr(losses, name),
                lambda result: result._replace(
                    loss=result.loss.detach() + (1 + by) * (result.loss - result.loss.detach())
                ),
            ),
        )
    for seed, (k, fusion) in enumerate(itertools.product((None, 4), ("probability", "logit"))):
        for rows, classes, scale in ((16, 10, 3.0), (64, 200, 1.0), (257, 7, 10.0)):
            given = inputs(rows, classes, scale=scale, dtype=dtype, seed=seed, k=k)
            assert (differs(criterion(weighting, fusion=fusion), *given) or "").startswith("d_student_logits is ")


def test_the_first_batches_of_a_student_are_verified(run, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("eekd.train.loss_check.differs", lambda loss, *given: calls.append(given))
    for wanted, name in ((0, "uniform"), (1, "last"), (3, "attention"), (2, "attention_dkd"), (2, "ce")):
        session = Session(dataclasses.replace(run[0].config, verify_loss=wanted), run[0].data)
        start(session, name, tmp_path / name, run[1] / "teacher")
        assert len(calls) == (0 if name == "ce" else wanted)
        calls.clear()
    assert Config().verify_loss == 1


def test_a_bad_batch_is_run_again_while_losses_are_verified(run, tmp_path, mark):
    session, name, value = faulty(run, "gradient", non_finite="skip", verify_loss=9)
    mark(session, value, 1, 6)
    with pytest.warns(RuntimeWarning, match="the gradient of the output of 0.body.6 .*; the step is skipped$"):
        start(session, name, tmp_path / "phase", run[1] / "teacher")
    assert_same(by_hand(session, name, (1, 6), run[1] / "teacher")[0], after(tmp_path / "phase", name))


@pytest.mark.bad_input
def test_a_batch_that_is_not_finite_does_not_count_as_verified(run, tmp_path, mark, monkeypatch):
    session = taught(run, "small", non_finite="skip")
    mark(session, NAN, 0, 1)
    monkeypatch.setattr(losses, "ensemble_kd", broken(losses.ensemble_kd, BROKEN["loss"][1]))
    with (
        pytest.warns(RuntimeWarning, match="; the step is skipped$") as told,
        pytest.raises(FloatingPointError, match="^attention: loss with the attention's is"),
    ):
        start(session, "attention", tmp_path / "phase", run[1] / "teacher")
    assert len(told) == 2


def test_processes_stop_as_one_at_a_wrong_loss(run, tmp_path):
    loss, verify = criterion("uniform"), LossCheck(run[0], "uniform", tmp_path, 1)
    verify.agree = lambda flags: torch.tensor([0.0, 1.0])  # elsewhere the loss is not finite
    verify.check(loss, torch.tensor(1.0), *inputs())
    verify.agree = lambda flags: torch.tensor([1.0, 0.0])
    with pytest.raises(FloatingPointError, match="^uniform: in another process the loss differs from its formula$"):
        verify.check(loss, torch.tensor(1.0), *inputs())


def test_a_wrong_loss_of_a_bank_can_be_replayed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "sparse_ensemble_kd", broken(losses.sparse_ensemble_kd, BROKEN["loss"][1]))
    given = inputs(k=4)
    with pytest.raises(FloatingPointError, match="^entropy: loss"):
        LossCheck(run[0], "entropy", tmp_path, 1).check(criterion("entropy"), torch.tensor(1.0), *given)
    assert replay(tmp_path / "loss-differs.json").startswith("loss")
    monkeypatch.undo()
    assert replay(tmp_path / "loss-differs.json") is None


def test_a_class_that_does_not_exist_is_not_bad():
    loss = criterion("attention")
    logits, z, labels, v, u = inputs()
    logits[:, 3] = z[..., 3] = -math.inf
    labels[labels == 3] = 4
    u[1, 5, 2] = math.nan
    with Watch(loss, len(labels)) as watch:
        watch.run(loss(logits.requires_grad_(), z, labels, v, u)[0])
    assert watch.found.name == "the snapshot_features of the network (EEKDLoss)" and watch.found.rows == [5]
