"""Distilled: the formula, in anybody's loop, with any output, saved and restored with its attention."""

import copy
import inspect
import pickle
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import eekd
from eekd.io.tensors import load_state, load_tensors, save_tensors

Pair = namedtuple("Pair", "logits aux")
CRITERION = "criterion must be an EEKDLoss, an AttentionDKDLoss, attention_dkd or a weighting's name, got MSEL"


class Net(nn.Module):
    """Features of width 5, three classes, and an output of any kind."""

    def __init__(self, seed=0, output=lambda logits: logits):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.body, self.head, self.output = nn.Linear(4, 5), nn.Linear(5, 3), output
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=self.generator)
        del self.generator

    def forward(self, tokens, mask=None):
        x = self.body(tokens).relu()
        return self.output(self.head(x if mask is None else x * mask))


def ensemble(**options):
    return eekd.SnapshotEnsemble([Net(seed) for seed in (1, 2, 3)], **options)


def batch(rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("name, options", [("attention", {"alpha": 0.3}), ("attention_dkd", {"beta": 3.0})])
def test_the_loss_is_that_of_the_three_objects(name, options):
    torch.manual_seed(0)
    distilled = eekd.Distilled(Net(), ensemble(), name, temperature=1.5, **options)
    twin = copy.deepcopy(distilled)
    x, labels = batch()
    output = distilled(x, labels=labels)
    output.loss.backward()
    capture, criterion = eekd.LastFeatures(twin.student), twin.criterion
    logits, features = capture(x)
    z, u = ensemble()(x)
    loss, measured = criterion(logits, z, labels, features, u)
    loss.backward()
    torch.testing.assert_close((output.loss, output["logits"]), (loss, logits))
    torch.testing.assert_close(gradients(distilled), gradients(twin))
    torch.testing.assert_close(distilled.measurements["weights"], measured["weights"])
    assert next(criterion.attention.parameters()).grad.abs().max() > 0
    settings = vars(criterion) | criterion.options
    assert {key: settings[key] for key in options} == options and settings["temperature"] == 1.5


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 1, 3)])
@pytest.mark.parametrize("name", ["attention", "attention_dkd"])
def test_parts_of_a_batch_add_up_to_the_whole(name, sizes):
    torch.manual_seed(0)
    whole = eekd.Distilled(Net(), ensemble(), name)
    parts = copy.deepcopy(whole)
    x, labels = batch()
    labels[2] = -100
    count = (labels != -100).sum()
    whole(x, labels=labels).loss.backward()
    losses = [
        parts(part, labels=some, num_items_in_batch=count).loss
        for part, some in zip(x.split(sizes), labels.split(sizes), strict=True)
    ]
    sum(losses).backward()
    torch.testing.assert_close(gradients(parts), gradients(whole))
    torch.testing.assert_close(sum(losses), whole(x, labels=labels).loss)


def test_parts_with_soft_labels_add_up_too():
    whole = eekd.Distilled(Net(), ensemble(), "uniform")
    x, soft = batch()[0], torch.rand(6, 3, generator=torch.Generator().manual_seed(2)).softmax(1)
    parts = [whole(x[part], labels=soft[part], num_items_in_batch=6).loss for part in (slice(2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), whole(x, labels=soft).loss)


def test_a_mask_reaches_student_and_snapshots_and_labels_reach_neither():
    x, labels = batch()
    mask = torch.rand(6, 1, generator=torch.Generator().manual_seed(1))
    distilled = eekd.Distilled(Net(), ensemble(), "uniform").eval()
    by_name = distilled(tokens=x, mask=mask, labels=labels)
    torch.testing.assert_close(by_name.logits, Net()(x, mask))
    z = torch.stack([Net(seed)(x, mask) for seed in (1, 2, 3)]).detach()
    torch.testing.assert_close(by_name.loss, eekd.EEKDLoss("uniform")(Net()(x, mask), z, labels)[0])
    assert by_name.loss != distilled(x, labels=labels).loss


@pytest.mark.parametrize(
    ("kind", "is_right"),
    [
        (lambda z: z, lambda out, loss: out == {"loss": loss, "logits": out.logits}),
        (lambda z: (z, z + 1), lambda out, loss: len(out) == 3 and out[0] is loss),
        (lambda z: {"out": z}, lambda out, loss: type(out) is dict and [*out] == ["loss", "logits", "out"]),
        (lambda z: {"logits": z, "loss": None}, lambda out, loss: [*out] == ["loss", "logits"]),
        (lambda z: Pair(z, z + 1), lambda out, loss: out.aux is not None and [*out] == ["loss", "logits", "aux"]),
        (lambda z: SimpleNamespace(logits=z, loss=None), lambda out, loss: out.loss is loss),
    ],
    ids=["tensor", "tuple", "dict", "dict with a place", "named tuple", "object"],
)
def test_the_output_is_of_the_students_kind(kind, is_right):
    distilled = eekd.Distilled(Net(output=kind), ensemble())
    x, labels = batch()
    output = distilled(x, labels=labels)
    loss = output[0] if isinstance(output, tuple) else output["loss"]
    loss.backward()
    assert is_right(output, loss)
    assert type(distilled.eval()(x)) is type(kind(torch.ones(1, 3)))  # without labels it is the student's own


def test_evaluation_has_a_loss_where_there_are_labels():
    x, labels = batch()
    distilled = eekd.Distilled(Net(), ensemble()).eval()
    with torch.no_grad():
        loss = distilled(x, labels=labels).loss
        torch.testing.assert_close(distilled(x), Net()(x))
    assert loss.isfinite() and not loss.requires_grad


def test_labels_may_be_missing_only_where_they_count_for_nothing():
    x, labels = batch()
    unlabelled = eekd.Distilled(Net(), ensemble(), "uniform", alpha=0.0)
    torch.testing.assert_close(unlabelled(x).loss, unlabelled(x, labels=labels).loss)
    torch.testing.assert_close(unlabelled(x, num_items_in_batch=12).loss, unlabelled(x).loss / 2)
    with pytest.raises(
        ValueError, match="^labels must be given in training, unless the criterion has alpha=0, got None;"
    ):
        eekd.Distilled(Net(), ensemble())(x)


def test_a_checkpoint_holds_student_and_attention_and_no_snapshot(tmp_path):
    torch.manual_seed(0)
    distilled = eekd.Distilled(Net(), ensemble())
    state = distilled.state_dict()
    assert sorted(state) == [
        "criterion.attention.snapshots.weight",
        "criterion.attention.student.weight",
        *(f"student.{layer}.{kind}" for layer in ("body", "head") for kind in ("bias", "weight")),
    ]
    assert {name for name, _ in distilled.named_parameters()} == {*state}
    save_tensors(tmp_path / "model.safetensors", state)
    torch.manual_seed(1)
    other = eekd.Distilled(Net(7), ensemble())
    other.load_state_dict(load_tensors(tmp_path / "model.safetensors"))
    x, labels = batch()
    assert other(x, labels=labels).loss == distilled(x, labels=labels).loss
    with pytest.warns(UserWarning, match="took the entries under 'student.', and 2 others were left out"):
        load_state(bare := Net(8), state, "model.safetensors")
    torch.testing.assert_close(bare(x), Net()(x))


def test_the_student_comes_out_as_it_went_in():
    net = Net()
    distilled = eekd.Distilled(net, ensemble())
    x, labels = batch()
    distilled(x, labels=labels).loss.backward()
    assert distilled.student is net and not any(m._forward_pre_hooks for m in net.modules())
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x))
    broken = eekd.Distilled(Net(), ensemble())
    with pytest.raises(RuntimeError):
        broken(torch.randn(6, 9), labels=labels)
    assert not any(m._forward_pre_hooks for m in broken.student.modules())


def test_the_teacher_stays_frozen_and_moves_along():
    distilled = eekd.Distilled(Net(), ensemble()).double().train()
    x, labels = batch()
    distilled(x.double(), labels=labels).loss.backward()
    for model in distilled.ensemble.models:
        assert not model.training
        assert all(p.dtype == torch.float64 and p.grad is None and not p.requires_grad for p in model.parameters())


def copied(distilled):
    return copy.deepcopy(distilled)


def pickled(distilled):
    return pickle.loads(pickle.dumps(distilled))


class Plain(Net):
    """A Net that pickle can read again."""

    def __init__(self, seed=0):
        super().__init__(seed)
        del self.output
        self.output = nn.Identity()


@pytest.mark.parametrize("again", [copied, pickled])
def test_copies_train_by_themselves(again):
    distilled = eekd.Distilled(Plain(), eekd.SnapshotEnsemble([Plain(1), Plain(2)]))
    x, labels = batch()
    loss = distilled(x, labels=labels).loss
    other = again(distilled)
    other(x, labels=labels).loss.backward()
    assert distilled.student.body.weight.grad is None and other.student.body.weight.grad is not None
    with torch.no_grad():
        other.student.head.bias.add_(3)
    assert other(x, labels=labels).loss != loss and distilled(x, labels=labels).loss == loss
    assert list(inspect.signature(other.forward).parameters) == ["tokens", "mask", "labels", "num_items_in_batch"]


def test_forward_is_signed_as_the_students_with_labels():
    class Many(Net):
        def forward(self, inputs, *more, labels=None, scale=1.0, **named):
            return super().forward(inputs * scale)

    forward = inspect.signature(eekd.Distilled(Many(), ensemble(), "uniform").forward)
    assert list(forward.parameters) == ["inputs", "more", "labels", "scale", "num_items_in_batch", "named"]
    assert "labels" in inspect.signature(eekd.Distilled.forward).parameters  # of the class, where a Trainer looks too


def test_it_compiles():
    torch.manual_seed(0)
    distilled = eekd.Distilled(Net(), ensemble())
    x, labels = batch()
    eager = distilled(x, labels=labels).loss
    torch.testing.assert_close(torch.compile(distilled, backend="eager")(x, labels=labels).loss, eager)


def test_autocast():
    x, labels = batch()
    distilled = eekd.Distilled(Net(), ensemble())
    full = distilled(x, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = distilled(x, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0.05)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((Net, ensemble), TypeError, "student must be an instance of Module, got type"),
        ((Net(), nn.Identity()), TypeError, "ensemble must be an instance of SnapshotEnsemble, got Identity"),
        ((nn.DataParallel(Net()), ensemble()), ValueError, "student must be bare, got a DataParallel: wrap Distilled"),
        ((Net(), ensemble(), nn.MSELoss()), TypeError, CRITERION),
        ((Net(), ensemble(), "atention"), ValueError, "weighting must be one of .*; did you mean 'attention'"),
        (
            (Net(), ensemble(), eekd.EEKDLoss(student_dim=4, snapshot_dim=5)),
            ValueError,
            "criterion must have student_dim=5, got 4",
        ),
        (
            (Net(), ensemble(), eekd.EEKDLoss(student_dim=5, snapshot_dim=6)),
            ValueError,
            "criterion must have snapshot_dim=5, got 6",
        ),
        ((Net(), ensemble(features=False)), RuntimeError, "the width of the features is not known: features=False"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        eekd.Distilled(*arguments)


@pytest.mark.bad_input
def test_what_is_no_choice_of_one_class_is_refused():
    for problem in ("multi_label_classification", "regression"):
        net = Net()
        net.config = SimpleNamespace(problem_type=problem)
        with pytest.raises(ValueError, match=f"^student must choose one of C classes, got problem_type '{problem}'$"):
            eekd.Distilled(net, ensemble())
    x, labels = batch()
    with pytest.raises(ValueError, match=r"^student must give logits \(B, C\), got \(6, 1, 3\)"):
        eekd.Distilled(Net(output=lambda z: z[:, None]), ensemble(), "uniform")(x, labels=labels)
    with pytest.raises(ValueError, match="^options must be left out beside an EEKDLoss, got alpha$"):
        eekd.Distilled(Net(), ensemble(), eekd.EEKDLoss("uniform"), alpha=0.1)


@pytest.mark.bad_input
def test_what_would_leave_the_snapshots_out_is_refused():
    distilled = eekd.Distilled(Net(), ensemble())
    with pytest.raises(AttributeError, match="^Distilled must be trained without label_smoothing_factor"):
        distilled.config  # noqa: B018
    assert not hasattr(distilled, "config") and not hasattr(distilled, "nothing")
    with pytest.raises(RuntimeError, match="^Distilled must run under DistributedDataParallel"):
        distilled._replicate_for_data_parallel()
