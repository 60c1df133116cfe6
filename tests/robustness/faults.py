"""Networks with faults, the phases of a run that meet them, and a training loop by hand that leaves steps out."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from recipes import ADAMW, small_run

from eekd.io.files import read_json
from eekd.io.tensors import load_tensors
from eekd.method.losses import EEKDLoss
from eekd.snapshots import SnapshotEnsemble
from eekd.snapshots.features import LastFeatures
from eekd.train import StudentTrainer, train_student, train_teacher
from eekd.train.config import Config
from eekd.train.optim import learning_rate
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


def config_of(nets, teacher="net", student="small", **more) -> Config:
    models = dict(model=f"{nets}:{teacher}"), dict(model=f"{nets}:{student}", schedule="cosine", **ADAMW)
    return small_run(*models, **dict(students=("attention",)) | more)


def by_hand(session, name="teacher", without=(), teacher=None, stop=None) -> tuple[dict, list[float]]:
    """Weights of a phase, as `trained` names them, in which some steps do not happen, up to `stop`; and its losses."""
    config = session.config
    phase = config.teacher if name == "teacher" else StudentTrainer.settings(config)
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
