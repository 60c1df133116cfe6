"""What the snapshots of a teacher say of the batches that a student sees, whoever computes it."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eekd.bank import LogitBank
from eekd.data import Batch, Loader
from eekd.method.topk import TopKLogits
from eekd.snapshots import read_manifest
from eekd.train.metrics import PhaseTimer
from eekd.train.session import SPLIT, Session

REMEMBERED = 2**30  # bytes of snapshots' outputs that a student may keep in memory


class TeacherOutputs(NamedTuple):
    """Of M snapshots: logits (M, B, C), a tensor or TopKLogits, and last features (M, B, D), or None."""

    logits: Tensor | TopKLogits
    features: Tensor | None

    def map(self, change: Callable[[Any], Any]) -> "TeacherOutputs":
        """`change` of the logits, and of the features where there are some."""
        return TeacherOutputs(change(self.logits), None if self.features is None else change(self.features))

    def of(self, which: Sequence[int] | slice) -> "TeacherOutputs":
        """The outputs of some of the snapshots."""
        return self.map(lambda x: x[which if isinstance(which, slice) else [*which]])


class TaughtBatch(NamedTuple):
    """A batch (eekd.data.Batch) and what the teacher says of it, None where there is no teacher."""

    images: Tensor
    labels: Tensor
    index: Tensor
    teacher: TeacherOutputs | None = None


class Teacher:
    """Gives the batches of a loader the outputs of M snapshots. A subclass says what the outputs of a batch are.

    Attributes: `feature_dim` D; `val`, the outputs for each batch of the validation images, which never change.
    """

    feature_dim: int | None
    val: Sequence[TeacherOutputs]

    def __call__(self, batch: Batch) -> TeacherOutputs:
        raise NotImplementedError

    def batches(self, loader: Loader, timer: PhaseTimer) -> Iterator[TaughtBatch]:
        """The loader's next epoch; the time it takes to have the outputs counts as "teacher"."""
        return self._each(iter(loader), timer)

    def _each(self, batches: Iterator[Batch], timer: PhaseTimer) -> Iterator[TaughtBatch]:
        for batch in batches:
            with timer("teacher"):
                outputs = self(batch)
            yield TaughtBatch(*batch, outputs)


class RunningTeacher(Teacher):
    """The snapshots of an ensemble, or what else returns logits and features of M, run on every batch."""

    def __init__(self, session: Session, ensemble: Callable, val: Iterable[Batch]):
        self.session, self.ensemble = session, ensemble
        self.val = [_copied(self._run(batch)) for batch in val]
        self.feature_dim = None if self.val[0].features is None else self.val[0].features.shape[-1]

    def __call__(self, batch):
        outputs = self._run(batch)
        return _copied(outputs) if self.session.config.accumulate > 1 else outputs  # else the next part overwrites it

    def _run(self, batch: Batch) -> TeacherOutputs:
        return TeacherOutputs(*self.session.run(self.ensemble, batch.images))


class RememberedTeacher(Teacher):
    """Outputs for all training images (M, N, ...), looked up."""

    def __init__(self, outputs: TeacherOutputs, val: Sequence[TeacherOutputs]):
        self.outputs, self.val = outputs, val
        self.feature_dim = None if outputs.features is None else outputs.features.shape[-1]

    def __call__(self, batch):
        return self.outputs.map(lambda x: x[:, batch.index])


class BankTeacher(Teacher):
    """The rows of a bank, read ahead of the batches, of the snapshots `which` (None: all)."""

    def __init__(self, bank: LogitBank, which: Sequence[int] | None, features: bool, val: Sequence[TeacherOutputs]):
        self.bank, self.which, self.features = bank, which, features
        self.feature_dim = bank.feature_dim
        self.val = [TeacherOutputs(z, None if u is None else bank.project(u)) for z, u in val]

    def batches(self, loader, timer):
        rows = self.bank.prefetch(loader.view, loader.indices(), loader.device, self.features)
        return self._read(iter(loader), rows, timer)

    def _read(self, batches: Iterator[Batch], rows: Generator, timer: PhaseTimer) -> Iterator[TaughtBatch]:
        with closing(rows):
            for batch in batches:
                with timer("teacher"):
                    outputs = TeacherOutputs(*next(rows))
                yield TaughtBatch(*batch, outputs if self.which is None else outputs.of(self.which))


def load_teacher(
    session: Session,
    folder,
    which: Sequence[int] | None,
    loader: Loader,
    val: Loader,
    *,
    features: bool = True,
    validates: bool = True,
) -> Teacher:
    """The snapshots in `folder`, or those of the indices `which`, as teachers of the images of `loader` and `val`.

    With a bank the session's bank speaks. The snapshots then run on validation images only; if `validates` is false,
    not at all. Without a bank they run once where every epoch shows the same images, in one process. `features` says
    whether there are features.
    """
    if session.bank and not validates:
        return BankTeacher(session.bank, which, features, ())
    running = RunningTeacher(session, session.load_snapshots(folder, which, features), val)
    if session.bank:
        return BankTeacher(session.bank, which, features, running.val)  # and frees the snapshots
    return remembered(running, loader) or running


def remembered(teacher: RunningTeacher, loader: Loader) -> RememberedTeacher | None:
    """The teacher, run once over the loader's images; None where these change, are shared out or are too many.

    Each output is computed in one fixed order before training, so that a resumed run has the same bits.
    """
    if loader.varies or loader.world_size > 1:
        return None
    count, kept = len(loader.split), None
    for index in torch.arange(count, device=loader.device).split(loader.batch_size):
        (batch,) = loader.replay([(0, index)])
        outputs = teacher(batch)
        if kept is None:
            row = sum(x[:, 0].numel() * x.element_size() for x in outputs if isinstance(x, Tensor))
            if count * row > REMEMBERED:
                return None
            kept = outputs.map(lambda x: x.new_empty(len(x), count, *x.shape[2:]))
        for all_rows, rows in zip(kept, outputs, strict=True):
            if isinstance(all_rows, Tensor) and isinstance(rows, Tensor):
                all_rows[:, index] = rows
    return kept and RememberedTeacher(kept, teacher.val)


def _copied(outputs: TeacherOutputs) -> TeacherOutputs:
    return outputs.map(Tensor.clone)


def check_bank(session: Session, loader: Loader, teacher: str | Path | None, needs_features: str | None) -> None:
    """ValueError, one sentence, unless the session's bank has its images and teacher, and the features a student needs.

    `needs_features` is the name of such a student, None where there is none.
    """
    config, bank = session.config, session.bank
    split = {name: getattr(config, name) for name in SPLIT}
    hashes = [entry["sha256"] for entry in read_manifest(teacher)["snapshots"]] if teacher else None
    bank.check(session.data, loader, hashes, **split)
    if config.student.repeats > 1:
        raise ValueError(f"student.repeats must be 1 with a bank, got {config.student.repeats}")
    if bank.top_k and loader.smoothing:
        raise ValueError(
            f"student.label_smoothing must be 0 with {bank.path}, which keeps {bank.top_k} classes of each image, got "
            f"{loader.smoothing}"
        )
    if needs_features and not bank.feature_dim:
        raise ValueError(f"{bank.path} must hold features for student {needs_features}, got --features none")
