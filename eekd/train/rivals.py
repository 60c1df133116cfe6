"""Students taught in other ways: each is a StudentTrainer, by the name that eekd.method.rivals gives it."""

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from eekd import parallel
from eekd.method.rival_losses import (
    AttentionDISTLoss,
    AttentionDKDLoss,
    Contrast,
    Hint,
    LearnedAtOne,
    at_loss,
    attention_map,
    dist_loss,
    dkd_loss,
)
from eekd.snapshots import read_manifest
from eekd.train.maps import FeatureMaps, SpeakingMaps
from eekd.train.metrics import accuracy
from eekd.train.student import StudentTrainer
from eekd.train.teaching import RunningTeacher, Teacher, remembered


class Curriculum(StudentTrainer):
    """Plain distillation from one snapshot at a time, in the order of their age, each for as many epochs.

    In epoch e of E, from 0, snapshot ((e + 1) M - 1) // E of M, from 0, teaches: the last one at the end.
    Source: Jin et al., "Knowledge Distillation via Route Constrained Optimization" (ICCV 2019), arXiv 1904.09149.
    """

    weighting = "uniform"
    epoch: int = 0
    _snapshots: Any = None  # the folder, and the indices of its snapshots

    def make_teacher(self, folder, which):
        self._snapshots = folder, [*(which or range(len(read_manifest(folder)["snapshots"])))]
        return self._next_teacher()

    def batches_from(self, step):
        if self._snapshots and self._stage(len(self._snapshots[1])) != self._taught_by:
            self.teacher = self._next_teacher()
        return super().batches_from(step)

    def compute_loss(self, batch):
        if (m := len(batch.teacher.logits)) > 1:  # of a Teacher that was given, not a folder
            batch = batch._replace(teacher=batch.teacher.of([self._stage(m)]))
        return super().compute_loss(batch)

    def _stage(self, m: int) -> int:
        return ((self.epoch + 1) * m - 1) // self.phase.epochs

    def _next_teacher(self) -> Teacher:
        folder, which = self._snapshots
        self._taught_by = self._stage(len(which))
        return super().make_teacher(folder, [which[self._taught_by]])


class AttentionTau1(StudentTrainer):
    """EEKD whose attention is learned at temperature 1: `LearnedAtOne`."""

    weighting, validates_target = "attention", False

    def setup(self):
        super().setup()
        _need_all_classes(self)

    def build_criterion(self):
        return LearnedAtOne(**_learned_at_one(self))


class Added(StudentTrainer):
    """L = CE(s, y) + β added: a subclass says what is added."""

    weighting, validates_target = "last", False

    def setup(self):
        super().setup()
        _need_all_classes(self)
        self.temperature, self.beta = cast(float, self.phase.temperature), cast(float, self.phase.beta)

    def build_criterion(self) -> nn.Module | None:
        return None

    def compute_loss(self, batch):
        logits, features = self.forward_features(batch.images)
        label, added = F.cross_entropy(logits.float(), batch.labels), self.added(logits, features, batch)
        return label + added, {"added": added.detach(), "accuracy": accuracy(logits, batch.labels)}

    def added(self, logits: Tensor, features: Tensor | None, batch) -> Tensor:
        """What is added, β included."""
        raise NotImplementedError


class DKD(Added):
    """Adds r (TCKD + β NCKD), `dkd_loss`, where r is `risen`."""

    rival = "dkd"

    def setup(self):
        super().setup()
        _need_one_class(self, self.loader.mixes or self.loader.smoothing)

    def added(self, logits, features, batch):
        return risen(self) * dkd_loss(logits, batch.teacher.logits[-1], batch.labels, self.temperature, self.beta)


class DIST(Added):
    """Adds β `dist_loss`; its columns are those of the rows that one process sees at once."""

    rival = "dist"

    def added(self, logits, features, batch):
        return self.beta * dist_loss(logits, batch.teacher.logits[-1], self.temperature)


class AttentionDIST(StudentTrainer):
    """Taught by AttentionDISTLoss."""

    weighting, rival, loss, validates_target = "attention", "attention_dist", AttentionDISTLoss, False

    def setup(self):
        super().setup()
        _need_all_classes(self)

    def build_criterion(self):
        options: dict[str, Any] = _learned_at_one(self) | {"beta": self.phase.beta}
        del options["alpha"]
        return self.loss(**options)


class AttentionDKD(AttentionDIST):
    """Taught by AttentionDKDLoss, whose r rises as in `DKD`."""

    rival, loss = "attention_dkd", AttentionDKDLoss

    def setup(self):
        super().setup()
        _need_one_class(self, self.loader.mixes or self.loader.smoothing)

    def compute_loss(self, batch):
        cast(AttentionDKDLoss, self.own_criterion).risen = risen(self)
        return super().compute_loss(batch)


class CRD(Added):
    """Adds β `Contrast`, on the last features of student and snapshot, in one process."""

    rival, needs_features = "crd", True

    def setup(self):
        super().setup()
        _need_one_class(self, self.loader.mixes)
        if parallel.world_size() > 1:
            raise ValueError(f"{self.name} must be trained by one process, got {parallel.world_size()}")

    def build_criterion(self):
        return Contrast(self.student_dim, self.teacher_dim, self.session.data.train.labels)

    def added(self, logits, features, batch):
        return self.beta * self.criterion(features, batch.teacher.features[-1], batch.index)


class OfMaps(Added):
    """Reads feature maps of the last snapshot, which runs in every step, or once where images do not vary.

    Maps are compared where both networks have some of one size. `teacher` may also be the snapshot's network.
    """

    reads_maps = True

    def make_teacher(self, folder, which):
        snapshot = self.session.load_snapshots(folder, which, features=False).models[-1]
        return self._speaking(snapshot.to(self.device))

    def setup(self):
        super().setup()
        if isinstance(self.teacher, nn.Module):
            self.teacher = self._speaking(self.teacher)

    def _speaking(self, snapshot: nn.Module) -> Teacher:
        first = next(iter(self.val_loader))
        self.own = FeatureMaps(self.network, self.session.run, first.images[:1])
        theirs = FeatureMaps(snapshot, self.session.run, first.images[:1])
        both = [size for size in theirs.shapes if size in self.own.shapes]
        if not both:
            sizes = [[f"{h} x {w}" for h, w in maps.shapes] or ["none"] for maps in (self.own, theirs)]
            raise ValueError(
                f"student.model must have feature maps of a size that the teacher's has for {self.name}, got "
                f"{', '.join(sizes[0])} in {self.phase.model} and {', '.join(sizes[1])} in {self.config.teacher.model}"
            )
        self.sizes, self.shapes = self.choose(both), theirs.shapes
        running = RunningTeacher(self.session, SpeakingMaps(snapshot, theirs, self.sizes, self.keep), [first])
        return remembered(running, self.loader) or running

    def choose(self, sizes: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """Of which of the sizes the maps are compared."""
        return sizes

    def keep(self, maps: Tensor) -> Tensor:
        """What is needed of the snapshot's maps (B, C, H, W)."""
        return maps


class FitNet(OfMaps):
    """Adds β `Hint`, on the maps in the middle of the network."""

    rival = "fitnet"

    def choose(self, sizes):
        return [sizes[len(sizes) // 2]]

    def build_criterion(self):
        [size] = self.sizes
        return Hint(self.own.shapes[size][0], self.shapes[size][0])

    def added(self, logits, features, batch):
        [size] = self.sizes
        theirs = batch.teacher.features[-1].unflatten(1, self.shapes[size])
        return self.beta * self.criterion(self.own.take()[size], theirs)


class AT(OfMaps):
    """Adds β `at_loss`, on the maps of every size."""

    rival = "at"

    def keep(self, maps):
        return attention_map(maps)

    def added(self, logits, features, batch):
        own, theirs = self.own.take(), batch.teacher.features[-1].split([h * w for h, w in self.sizes], 1)
        return self.beta * at_loss([own[size] for size in self.sizes], theirs)


TRAINERS: dict[str, type[StudentTrainer]] = {
    "curriculum": Curriculum,
    "attention_tau1": AttentionTau1,
    **{str(trainer.rival): trainer for trainer in (DKD, DIST, AttentionDKD, AttentionDIST, FitNet, AT, CRD)},
}


def risen(trainer: StudentTrainer) -> float:
    """What rises to 1 in the first twelfth of training, 20 of the 240 epochs of DKD."""
    return min(1.0, 12 * (trainer.epoch + 1) / trainer.phase.epochs)


def _learned_at_one(trainer: StudentTrainer) -> dict:
    """The options of a loss whose attention is learned from the label at temperature 1."""
    phase = trainer.phase
    if phase.attention_objective != "label" or not phase.detach_query:
        raise ValueError(
            f"{trainer.name} learns its weights from the label alone: student.attention_objective must be 'label' and "
            f"student.detach_query true, got {phase.attention_objective!r} and {str(phase.detach_query).lower()}"
        )
    return trainer.loss_options()


def _need_all_classes(trainer: StudentTrainer) -> None:
    bank = trainer.session.bank
    if bank and bank.top_k:
        raise ValueError(f"{trainer.name} needs the logits of all classes, and {bank.path} keeps {bank.top_k} of them")


def _need_one_class(trainer: StudentTrainer, soft: object) -> None:
    if soft:
        raise ValueError(f"{trainer.name} needs one class for each image: leave out mixup, cutmix and label_smoothing")
