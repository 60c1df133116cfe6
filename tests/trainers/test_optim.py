"""Learning rates, weight decay and clipping are those of the publications."""

import math

import pytest
import torch
from small_runs import small

from eekd.io.tensors import load_tensors
from eekd.train import prepare, train
from eekd.train.config import Student, Teacher
from eekd.train.optim import build_optimizer, clip_gradients, learning_rate


def test_learning_rate_steps_down_at_its_milestones():
    phase = Teacher(lr=0.5, epochs=10, milestones=(0.3, 0.6, 0.9))
    rates = [learning_rate(phase, step, 50) for step in range(50)]
    assert rates == pytest.approx([0.5] * 15 + [0.05] * 15 + [0.005] * 15 + [0.0005] * 5)


def test_one_cycle_is_torchs():
    phase, total = Student(lr=0.5, schedule="one_cycle"), 50
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=1000 * total)
    for step in range(1000 * total):
        if step % 1000 == 0:  # torch ends its phases a step early, which many steps hide
            assert learning_rate(phase, step // 1000, total) == pytest.approx(torchs.get_last_lr()[0], abs=1e-4)
        optimizer.step()
        torchs.step()


def test_a_warm_up_and_a_floor():
    phase = Student(lr=1.0, epochs=10, schedule="cosine", warmup_epochs=1, min_lr=0.1)
    rates = [learning_rate(phase, step, 40) for step in range(41)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[22] == pytest.approx(0.55) and min(rates[4:40]) >= 0.1 and rates[39] < 0.11
    assert rates[4:40] == sorted(rates[4:40], reverse=True)
    stepped = Student(lr=1.0, epochs=10, warmup_epochs=2, milestones=(0.5,))
    assert [learning_rate(stepped, step, 10) for step in range(10)] == pytest.approx(
        [1 / 3, 2 / 3] + [1] * 3 + [0.1] * 5
    )


def test_adamw_decays_neither_norms_nor_biases():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(2, 2))
    for optimizer, decays in (("adamw", {2: 0.05, 1: 0.0}), ("sgd", {2: 0.05, 1: 0.05})):
        built = build_optimizer(Student(optimizer=optimizer, weight_decay=0.05), network)
        found = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
        assert [found[id(p)] for p in network.parameters()] == [decays[min(2, p.ndim)] for p in network.parameters()]


def test_gradients_are_clipped_together(tiny, tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    network(torch.ones(2, 3)).sum().backward()
    before = torch.cat([p.grad.flatten() for p in network.parameters()])
    clip_gradients(network.parameters(), 0.5)
    after = torch.cat([p.grad.flatten() for p in network.parameters()])
    torch.testing.assert_close(after, before * 0.5 / before.norm(), rtol=1e-4, atol=0)
    clip_gradients(network.parameters(), 10.0)
    assert torch.equal(torch.cat([p.grad.flatten() for p in network.parameters()]), after)
    clip_gradients([], 1.0)
    # A step of SGD without momentum so far moves the weights by at most lr times the norm.
    moved = {}
    for clip in (None, 1e-3):
        config = small(
            tiny, student=dict(epochs=1, clip_grad=clip, lr=0.1), students=("ce",), teacher=dict(epochs=1, snapshots=1)
        )
        run = train(config, tmp_path / str(clip))
        start = prepare(config).network(config.student, 2 * config.seed + 1).state_dict()
        end = load_tensors(run / "students" / "ce" / "student.safetensors")
        moved[clip] = (
            sum((end[k] - start[k]).square().sum() for k in end if "num" not in k and "running" not in k) ** 0.5
        )
    assert moved[1e-3] < 0.1 * moved[None]


def test_learning_rate_cosine():
    phase = Student(lr=0.5, schedule="cosine")
    rates = [learning_rate(phase, step, 101) for step in range(101)]
    assert rates[0] == 0.5 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-3


@pytest.mark.parametrize(("total", "snapshots"), [(60, 5), (35, 5), (12, 1), (7, 7)])
def test_learning_rate_cyclic_is_that_of_snapshot_ensembles(total, snapshots):
    phase = Teacher(lr=0.2, schedule="cyclic", epochs=snapshots, snapshots=snapshots)
    cycle = math.ceil(total / snapshots)
    for t in range(1, total + 1):
        formula = 0.2 / 2 * (math.cos(math.pi * ((t - 1) % cycle) / cycle) + 1)
        assert learning_rate(phase, t - 1, total) == pytest.approx(formula)
