"""Why attention over the snapshots gains, or does not: students and their targets, by validation images alone.

python results/attention.py  # writes attention.json beside it, and goes on from what that already holds

A student for every cell and seed, on Fashion-MNIST reduced to 10,000 training images of half the side. Of the images
held out of them 10,000 are there to learn weights from where a cell says so, and 20,000 to validate on. Test images are
not read.

Over 350 lines, for one study is one file.
"""

import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from eekd import ensemble_kd
from eekd.data import ImageData
from eekd.info import commit, environment
from eekd.method.attention import SnapshotAttention
from eekd.method.weightings import log_weights
from eekd.train import Callback, Session, StudentTrainer, TeacherTrainer
from eekd.train.config import Config, Student, Teacher
from eekd.train.metrics import accuracy
from eekd.train.optim import learning_rate
from eekd.train.teacher import Snapshots
from eekd.train.teaching import RememberedTeacher, TeacherOutputs

HERE = Path(__file__).parent
RECORD = HERE / "attention.json"
WORK = HERE.parent / "runs" / "attention"  # what teachers and students say, kept for the next start
HELD = 10_000  # of the images held out; the others validate
CONFIG = Config(
    data="fashion-mnist",
    train_limit=10_000,
    val_fraction=0.5,
    augment="none",
    precision="bf16",
    channels_last=True,
    teacher=Teacher(model="resnet8", epochs=20, batch_size=128, schedule="cosine"),
    student=Student(model="resnet8_w4", epochs=10, batch_size=128, schedule="cosine"),
)


@cache
def half_size() -> ImageData:
    """The data of CONFIG, every 2 x 2 pixels of a training or validation image averaged: 4 times cheaper."""

    def half(split):
        images = F.avg_pool2d(split.images.float(), 2).round().to(torch.uint8)
        return replace(split, images=images)

    data = Session(CONFIG).data
    return replace(data, train=half(data.train), val=half(data.val))


class Unvalidated:
    """Of a trainer: validation images are asked at the end only."""

    def validate(self):
        return {}


class UnvalidatedTeacher(Unvalidated, TeacherTrainer):
    pass


def sgd(phase, *groups: dict) -> torch.optim.Optimizer:
    options = dict(lr=phase.lr, momentum=0.9, nesterov=phase.nesterov, weight_decay=phase.weight_decay)
    return torch.optim.SGD(groups, **options, fused=True)


def teacher(seed: int) -> dict:
    """Logits, features (M, N, ...) and labels of a teacher's snapshots on training and validation images."""
    folder = WORK / f"teacher-{seed}"
    known = folder / "known.safetensors"
    if known.is_file():
        return load_file(known)
    shutil.rmtree(folder, ignore_errors=True)  # half trained
    session, phase = Session(replace(CONFIG, seed=seed), half_size()), CONFIG.teacher
    UnvalidatedTeacher(session, callbacks=[Snapshots(folder, "uniform", session.spec(phase))]).fit()
    ensemble, said = session.load_snapshots(folder), {}
    for split in ("train", "val"):
        batches = [
            (*(x.float().clone() for x in session.run(ensemble, images)), labels)
            for images, labels, _ in session.loader(split, phase)
        ]
        logits, features, labels = zip(*batches, strict=True)
        said |= {
            f"{split}_logits": torch.cat(logits, 1),
            f"{split}_features": torch.cat(features, 1),
            f"{split}_labels": torch.cat(labels),
        }
    save_file(said, known)
    return said


@torch.no_grad()
def quality(log_w: Tensor, logits: Tensor, labels: Tensor, temperature: float) -> dict:
    """What the target Σ w softmax(z / τ) of log-weights (N, M) knows of labels; nll_1 is at τ = 1, weights the same.

    nll_mean is that of the weights' mean over samples, for all samples alike: what is lost without attention to each.
    """
    w, y = log_w.exp(), labels[:, None]
    found = {}
    for name, tau, lw in (
        ("nll", temperature, log_w),
        ("nll_mean", temperature, w.mean(0).log().expand_as(log_w)),
        ("nll_1", 1.0, log_w),
    ):
        log_p = (lw.t()[:, :, None] + (logits / tau).log_softmax(-1)).logsumexp(0)
        found[name] = -log_p.gather(1, y).mean().item()
        if name == "nll":
            found["accuracy"] = (log_p.argmax(1) == labels).double().mean().item()
            found["confidence"] = log_p.exp().amax(1).mean().item()
    return found | {
        "weights": w.mean(0).tolist(),
        "weights_std": w.std(0).tolist(),
        "weight_entropy": torch.special.entr(w).sum(1).mean().item(),
    }


def attention_loss(scores: Tensor, logits: Tensor, labels: Tensor, cell: "Cell") -> Tensor:
    """-log p_y at the temperature the attention learns by, labels smoothed, minus a share of the weights' entropy."""
    log_w = scores.log_softmax(1)
    log_each = (logits / (cell.learn_temperature or cell.temperature)).log_softmax(-1)
    log_p = (log_w.t()[:, :, None] + log_each).logsumexp(0)
    entropy = torch.special.entr(log_w.exp()).sum(1).mean()
    return F.cross_entropy(log_p, labels, label_smoothing=cell.smoothing) - cell.entropy * entropy


def best_fixed(logits: Tensor, labels: Tensor, temperature: float, rounds: int = 300) -> Tensor:
    """The weights (M,), alike for all samples, of the least mean -log p_y, by expectation maximisation."""
    p_y = (logits.double() / temperature).softmax(-1).gather(2, labels.expand(len(logits), -1)[..., None])[..., 0]
    w = torch.full((len(logits), 1), 1 / len(logits), dtype=torch.float64)
    for _ in range(rounds):
        w = (w * p_y / (w * p_y).sum(0)).mean(1, keepdim=True)
    return w[:, 0].float()


def scores_for(attention: SnapshotAttention, v: Tensor, u: Tensor) -> Tensor:
    """Scores (B, M) of the student's features (B, D) and the snapshots' (M, B, D)."""
    query, keys = attention(v, u)
    return torch.einsum("bd,mbd->bm", query, keys)


def scores_of(cell: "Cell", logits: Tensor, labels: Tensor) -> Tensor:
    """Log-weights (N, M) of a target that is not learned."""
    rows, many = logits.shape[1], len(logits)
    if cell.target == "oracle":  # no weights make the label likelier
        p_y = (logits / cell.temperature).log_softmax(-1).gather(2, labels.expand(many, -1)[..., None])[..., 0]
        return F.one_hot(p_y.argmax(0), many).float().log()
    if cell.target == "last two":
        return (torch.arange(many) >= many - 2).float().div(2).log().expand(rows, -1)
    scores = log_weights("uniform" if cell.target == "teachers" else cell.target, logits, labels)
    return (torch.zeros(rows, many) if scores is None else scores).log_softmax(1)


@dataclass(frozen=True)
class Cell:
    """What a student, or an attention to features that no longer change, learns from."""

    target: str  # ce, attention, a weighting, oracle (by label), last two, teachers
    temperature: float = 5.0
    alpha: float = 0.5
    objective: str = "label"
    learn_temperature: float | None = None  # of the attention's own loss; none: temperature
    smoothing: float = 0.0  # of the labels in it
    entropy: float = 0.0  # weight of the weights' entropy in it
    held_out: bool = False  # it is taken on images that no network was trained on
    lr: float = 1.0  # times the student's
    warmup: int = 0  # epochs in which the student is taught by uniform weights
    embed_dim: int = 8
    scale: float | None = None
    normalize: bool = True
    detach_query: bool = True

    def attention(self, student_dim: int, snapshot_dim: int) -> SnapshotAttention:
        return SnapshotAttention(student_dim, snapshot_dim, self.embed_dim, self.normalize, self.scale)


REFERENCES = {
    "ce": Cell("ce"), "last": Cell("last"), "uniform": Cell("uniform"), "attention": Cell("attention"),
    "linear increase": Cell("linear_increase"), "confidence": Cell("confidence"), "oracle": Cell("oracle"),
    "three teachers": Cell("teachers"), "last two": Cell("last two"),
}  # fmt: skip
VARIANTS = {
    "held-out, temperature 1": Cell("attention", held_out=True, learn_temperature=1.0),
    "learned at temperature 1": Cell("attention", learn_temperature=1.0),
    "kl, literal": Cell("attention", objective="kl", normalize=False, scale=1.0, detach_query=False),
    "last, temperature 2": Cell("last", temperature=2.0),
    "uniform, temperature 2": Cell("uniform", temperature=2.0),
    "attention, temperature 2": Cell("attention", temperature=2.0),
    "warm-up 5": Cell("attention", warmup=5),
    "entropy 0.3": Cell("attention", entropy=0.3),
}
FITS = {
    "as by default": Cell("attention"),
    "temperature 1": Cell("attention", learn_temperature=1.0),
    "held-out images": Cell("attention", held_out=True),
    "held-out images, temperature 1": Cell("attention", held_out=True, learn_temperature=1.0),
    "learning rate x 0.1": Cell("attention", lr=0.1),
    "learning rate x 10": Cell("attention", lr=10.0),
    "width 64": Cell("attention", embed_dim=64),
    "width 2": Cell("attention", embed_dim=2),
    "scale x 4": Cell("attention", scale=4 * 8**-0.5),
    "no normalisation, scale 1": Cell("attention", normalize=False, scale=1.0),
    "labels smoothed by 0.1": Cell("attention", smoothing=0.1),
    "entropy 0.3": Cell("attention", entropy=0.3),
    "held-out images, temperature 1, learning rate x 10": Cell(
        "attention", held_out=True, learn_temperature=1.0, lr=10.0
    ),
}
CELLS = REFERENCES | VARIANTS
EXPLORE, CONFIRM = (0, 1, 2), (3, 4, 5)  # seeds of the students; there is a teacher for each of the first three
CONFIRMED = "last", "uniform", "attention", "last two"  # what the first seeds leave open


def parts(said: dict) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Logits, features and labels of training, held-out and validation images."""
    found = {}
    for name, split, rows in (
        ("train", "train", slice(None)),
        ("held", "val", slice(HELD)),
        ("val", "val", slice(HELD, None)),
    ):
        found[name] = (
            said[f"{split}_logits"][:, rows],
            said[f"{split}_features"][:, rows],
            said[f"{split}_labels"][rows],
        )
    return found


def snapshots(known: dict) -> dict:
    """What each snapshot, and the best weights that all images share, know of training and validation images."""
    found = {}
    for split in ("train", "val"):
        logits, _, labels = known[split]
        ones = torch.eye(len(logits)).log()
        weights = {"members": [one.expand(len(labels), -1) for one in ones]}
        weights |= {name: [scores_of(Cell(name), logits, labels)] for name in ("oracle", "uniform")}
        found[split] = {name: [quality(w, logits, labels, 5.0) for w in ws] for name, ws in weights.items()}
        found[split]["best_fixed"] = {str(t): best_fixed(logits, labels, t).tolist() for t in (1.0, 2.0, 5.0)}
    return found


class CellTrainer(Unvalidated, StudentTrainer):
    """A student of what the snapshots say of all training images."""

    weighting, needs_features = "uniform", True

    def __init__(self, session: Session, cell: Cell, known: dict, **options):
        self.cell, self.known = cell, known
        super().__init__(session, RememberedTeacher(TeacherOutputs(*known["train"][:2]), val=[]), **options)

    def build_criterion(self):
        return self.cell.attention(self.student_dim, self.teacher_dim) if self.cell.target == "attention" else None

    def build_optimizer(self):
        parts = [(self.network, 1.0)] + [(self.own_criterion, self.cell.lr)] * bool(self.own_criterion)
        return sgd(self.phase, *({"params": [*part.parameters()], "lr_scale": lr} for part, lr in parts))

    def compute_loss(self, batch):
        cell, attention, (z, u), labels = self.cell, self.criterion, batch.teacher, batch.labels
        s, v = (x.float() for x in self.forward_features(batch.images))
        options = dict(temperature=cell.temperature, alpha=cell.alpha)
        if cell.target == "ce":
            return F.cross_entropy(s, labels), {}
        if cell.objective == "kl":
            query, keys = attention(v.detach() if cell.detach_query else v, u)
            result = ensemble_kd(s, z, labels, query=query, keys=keys, attention_objective="kl", **options)
            return result.loss, {"weights": result.weights.mean(0)}
        scores = scores_for(attention, v.detach(), u) if attention else scores_of(cell, z, labels)
        taught = torch.zeros_like(scores) if self.epoch < cell.warmup else scores.detach()
        loss = ensemble_kd(s, z, labels, scores=taught, **options).loss
        if attention:
            loss = loss + attention_loss(*(held_out(self) if cell.held_out else (scores, z, labels)), cell)
        return loss, {"weights": scores.detach().softmax(1).mean(0)}


def held_out(trainer: CellTrainer) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, logits and labels of images that no network was trained on."""
    index, (z, u, labels) = torch.randint(HELD, (trainer.phase.batch_size,)), trainer.known["held"]
    trainer.network.eval()
    with torch.no_grad():
        _, v = trainer.infer(images_of(trainer.session, "val")[index])
    trainer.network.train()
    return scores_for(trainer.criterion, v.float(), u[:, index]), z[:, index], labels[index]


class Norms(Callback):
    """Of an attention that is trained: its mean weights in each epoch, and norms of gradients and weights."""

    def __init__(self):
        self.curve, self.weights, self.norms = [], [], []

    def on_update(self, trainer):
        if trainer.criterion:
            parts = trainer.network, trainer.criterion
            if len(self.weights) % 10 == 0:
                self.norms.append([norm(p.grad for p in part.parameters()) for part in parts])
                self.norms[-1] += [norm(part.parameters()) for part in parts]
            self.weights.append(trainer.measured[0][1]["weights"])
        return True

    def on_epoch_end(self, trainer, row):
        if trainer.criterion:
            names = "grad_student", "grad_attention", "norm_student", "norm_attention"
            means = dict(zip(names, map(mean, zip(*self.norms, strict=True)), strict=True))
            self.curve.append({"weights": torch.stack(self.weights).mean(0).tolist()} | means)
        self.weights, self.norms = [], []


def student(seed: int, cell: Cell, known: dict) -> dict:
    """Trains one student, and measures it and its target on training and validation images."""
    session, norms = Session(replace(CONFIG, seed=seed), half_size()), Norms()
    trainer = CellTrainer(session, cell, known, callbacks=[norms])
    trainer.fit()
    attention = trainer.criterion

    trainer.network.eval()
    found, said = {"curve": norms.curve}, {}
    with torch.no_grad():
        for split, images in (("train", images_of(session, "train")), ("val", images_of(session, "val"))):
            outputs = [trainer.infer(part) for part in images.split(500)]
            s, v = (torch.cat([x.float() for x in xs]) for xs in zip(*outputs, strict=True))
            if split == "val":
                said["held"], s, v = v[:HELD], s[HELD:], v[HELD:]
            said[split] = v
            z, u, labels = known[split]
            found[split] = {"accuracy": accuracy(s, labels).item(), "nll": F.cross_entropy(s, labels).item()}
            if cell.target != "ce":
                log_w = scores_for(attention, v, u) if attention else scores_of(cell, z, labels)
                found[split]["target"] = quality(log_w.log_softmax(1), z, labels, cell.temperature)
                equal = torch.zeros(len(labels), len(z)).log_softmax(1)
                found[split]["uniform"] = quality(equal, z, labels, cell.temperature)
    if cell == REFERENCES["uniform"]:
        save_file({name: x.contiguous() for name, x in said.items()}, WORK / f"features-{seed}.safetensors")
    return found


def fit(seed: int, cell: Cell, known: dict, phase: Student) -> dict:
    """Trains an attention alone, to the last features of the student that uniform weights taught."""
    features = WORK / f"features-{seed}.safetensors"
    if not features.is_file():
        student(seed, REFERENCES["uniform"], known)
    said = load_file(features)
    split = "held" if cell.held_out else "train"
    (z, u, y), v = known[split], said[split]
    torch.manual_seed(seed)
    attention = cell.attention(v.shape[1], u.shape[-1])
    optimizer, steps = sgd(phase, {"params": attention.parameters()}), len(y) // phase.batch_size
    total, batch = phase.epochs * steps, phase.batch_size

    for epoch in range(phase.epochs):
        order = torch.randperm(len(y))
        for step in range(steps):
            index = order[step * batch : (step + 1) * batch]
            optimizer.param_groups[0]["lr"] = cell.lr * learning_rate(phase, epoch * steps + step, total)
            optimizer.zero_grad()
            attention_loss(scores_for(attention, v[index], u[:, index]), z[:, index], y[index], cell).backward()
            optimizer.step()
    with torch.no_grad():
        return {
            name: quality(scores_for(attention, said[name], u).log_softmax(1), z, y, cell.temperature)
            for name, (z, u, y) in known.items()
            if name != "held"
        }


def norm(tensors) -> float:
    return torch.stack([x.detach().norm() for x in tensors]).norm().item()


def images_of(session: Session, split: str) -> Tensor:
    """All images of a split, in order, as the loader gives them."""
    if split not in _IMAGES:
        index = torch.arange(len(getattr(session.data, split)))
        _IMAGES[split] = next(session.loader(split, session.config.student).replay([(0, index)])).images
    return _IMAGES[split]


_IMAGES = {}  # the same for all seeds


def main() -> None:
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {
        "command": ["python", "results/attention.py"], "environment": environment(),
        "config": json.loads(CONFIG.to_json()), "explored_on": EXPLORE, "confirmed_on": CONFIRM,
        "teachers": [], "cells": [], "fits": [],
    }  # fmt: skip
    started_from = commit()

    @cache
    def known_of(seed: int) -> dict:
        return parts(teacher(EXPLORE[seed % len(EXPLORE)]))

    def once(kind: str, make, *args, **key) -> None:
        key = json.loads(json.dumps(key))
        same = [done for done in record[kind] if key.items() <= done.items()]
        if any(not done["commit"].endswith("+") for done in same):  # else it was made beside uncommitted changes
            return
        start = time.perf_counter()
        found = make(*args)
        record[kind] = [done for done in record[kind] if done not in same]
        record[kind].append(key | found | {"commit": started_from})
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        what = f"{kind} {key.get('name', '')} seed {key['seed']}: {found['val'].get('accuracy', '')}"
        print(f"{what}, {time.perf_counter() - start:.0f} s", flush=True)

    def students(seeds: tuple[int, ...], names: Iterable[str]) -> None:
        for name, seed in itertools.product(names, seeds):
            known = known_of(seed)
            if CELLS[name].target == "teachers":  # the finished teachers of three seeds
                of = [known_of(s) for s in EXPLORE]
                known = {
                    split: (torch.stack([x[split][0][-1] for x in of]), features, labels)
                    for split, (_, features, labels) in known.items()
                }
            once(
                "cells",
                student,
                seed,
                CELLS[name],
                known,
                name=name,
                seed=seed,
                settings=dataclasses.asdict(CELLS[name]),
            )

    def fits(names: Iterable[str]) -> None:
        for name, seed in itertools.product(names, EXPLORE):
            once(
                "fits",
                fit,
                seed,
                FITS[name],
                known_of(seed),
                CONFIG.student,
                name=name,
                seed=seed,
                settings=dataclasses.asdict(FITS[name]),
            )

    for seed in EXPLORE:
        once("teachers", snapshots, known_of(seed), seed=seed)
    students(EXPLORE, ["uniform"])  # whose features the fits are given
    fits(FITS)
    students(EXPLORE, CONFIRMED)
    students(CONFIRM, CONFIRMED)
    students(EXPLORE, ["three teachers", "held-out, temperature 1", "oracle"])
    students(EXPLORE, CELLS)
    students(CONFIRM, REFERENCES)


if __name__ == "__main__":
    main()
