"""One batch through every network and loss before anything is trained: what does not fit is found in seconds."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eekd import parallel
from eekd.data import Batch
from eekd.io.files import first_line
from eekd.method.losses import EEKDLoss
from eekd.models.normalization import Renormalize
from eekd.snapshots.features import LastFeatures
from eekd.snapshots.wrappers import are_probabilities, logits_of
from eekd.train.config import Phase
from eekd.train.findings import guesses
from eekd.train.random_state import random_state, set_random_state
from eekd.train.session import Session
from eekd.train.student import Method
from eekd.train.teacher import TeacherTrainer
from eekd.train.teaching import TaughtBatch, Teacher, TeacherOutputs

ROWS, VALIDATED = 8, 64  # images
USUAL = 3.0, 0.1, 10.0  # of normalised images: the largest mean, the least and the largest standard deviation


class _Alone(Session):
    """A session of this process alone, without what takes its time: other processes, workers and compilers."""

    def __init__(self, session: Session):
        vars(self).update(vars(session))
        self.config = dataclasses.replace(session.config, workers=0, compile=False, sync_batchnorm=False)

    def parallelize(self, network: nn.Module, kind: str | None = None) -> nn.Module:
        return network


class Preview(Teacher):
    """Speaks for M snapshots by one network."""

    def __init__(self, outputs: TeacherOutputs):
        self.outputs, self.val = outputs, []
        self.feature_dim = None if outputs.features is None else outputs.features.shape[-1]

    def __call__(self, batch: Batch) -> TeacherOutputs:
        return self.outputs


def preflight(
    session: Session, methods: Sequence[Method], teacher: nn.Module, trains_teacher: bool, finished: bool = False
) -> list[str]:
    """Runs a few images through all that will be trained, forward, loss and backward, and forgets what that changed.

    `teacher` is the teacher's network, or a snapshot of it, the last one where it is `finished`; it is asked for all
    snapshots. Returns what looks wrong and can be meant, a sentence each. ValueError, one sentence, for a network that
    cannot run on the images or does not give a logit for each class; else what a loss raises.
    """
    session, notes = _Alone(session), []
    config, generators = session.config, random_state(session.device)
    try:
        batch = _batch(session, config.teacher)
        teacher = teacher.to(session.device).to(memory_format=session.layout)
        notes += _looks(session, config.teacher, batch.images)
        with _running(session, config.teacher):
            _check_logits(session, config.teacher, teacher, batch.images)
            if trains_teacher:
                _step(TeacherTrainer(session), TaughtBatch(*batch))
            if finished:
                notes += _guesses(session, teacher)
        if methods:
            batch = _batch(session, config.student)
            notes += _looks(session, config.student, batch.images)
        for method in methods:
            with _running(session, config.student):
                outputs = None if method.weighting == "ce" else _outputs(session, teacher, method, batch)
                speaker = teacher if method.reads_maps else outputs and Preview(outputs)
                # Of a network FeatureMaps make a Teacher.
                trainer = method.trainer(session, speaker, method.weighting, name=method.name)  # pyright: ignore
                _check_logits(session, config.student, trainer.network, batch.images)
                outputs = trainer.teacher(batch) if method.reads_maps else outputs
                _step(trainer, TaughtBatch(*batch, outputs))
    finally:
        set_random_state(generators, session.device)
    return notes


def _batch(session: Session, phase: Phase) -> Batch:
    """The first images of the first view, decoded by this process."""
    loader = session.loader("train", phase, train=True)
    rows = min(ROWS, loader.batch_size, len(loader.split))
    [batch] = loader.replay([(0, torch.arange(rows))])
    return batch


@contextmanager
def _running(session: Session, phase: Phase) -> Iterator[None]:
    """Errors of a network's own code as one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if parallel.is_peer_failure(error):
            raise
        data = session.data
        size = f"{data.channels} x {data.image_size} x {data.image_size}"
        raise ValueError(
            f"{phase._prefix}model {phase.model} fails on images of {size}: {first_line(error)}"
        ) from error


@torch.no_grad()
def _check_logits(session: Session, phase: Phase, network: nn.Module, images: Tensor) -> None:
    """ValueError unless the network gives a logit for each class, in eval mode, as it is validated."""
    logits, classes = logits_of(session.run(network.eval(), images)), len(session.data.classes)
    if logits.shape != (len(images), classes):
        raise ValueError(
            f"{phase._prefix}model {phase.model} must give {classes} logits an image, one for each class of "
            f"{session.data.name}, got outputs of shape {tuple(logits.shape)} for {len(images)} images"
        )
    if are_probabilities(logits):
        raise ValueError(
            f"{phase._prefix}model {phase.model} must give logits, got probabilities, which sum to 1 for each image: "
            "leave out its softmax, for the losses apply their own"
        )


@torch.no_grad()
def _guesses(session: Session, teacher: nn.Module) -> list[str]:
    """A sentence where a finished teacher is no better than chance on some validation images."""
    split, phase = session.data.val, session.config.teacher
    index = torch.linspace(0, len(split) - 1, min(VALIDATED, len(split))).long()
    right = 0
    for batch in session.loader("val", phase).replay([(0, part) for part in index.split(ROWS)]):
        right += (logits_of(session.run(teacher.eval(), batch.images)).argmax(1) == batch.labels).sum().item()
    if not guesses(right / len(index), len(session.data.classes), len(index)):
        return []
    return [
        f"The finished teacher is no better than chance: {right} of {len(index)} validation images are right. Look at "
        "teacher.mean and teacher.std, at the order of the classes (classes), and at channels."
    ]


@torch.no_grad()
def _outputs(session: Session, teacher: nn.Module, method: Method, batch: Batch) -> TeacherOutputs:
    """What the teacher says of a batch, as M snapshots or the rows of a bank would."""
    if session.bank:
        outputs = TeacherOutputs(*session.bank.rows(0, batch.index))
        return outputs.of([-1]) if method.weighting == "last" else outputs
    count = 1 if method.weighting == "last" else session.config.teacher.snapshots
    with LastFeatures(teacher.eval(), session.config.teacher.layer, features=method.needs_features) as capture:
        each = session.run(capture, batch.images)
    return TeacherOutputs(*each).map(lambda x: x.expand(count, *x.shape).contiguous())


def _step(trainer, batch: TaughtBatch) -> None:
    trainer.trained.train()
    for module in trainer.trained.modules():
        if isinstance(module, EEKDLoss):  # which another run of this process may have wrapped for its students
            module.check_wrapper = False
    trainer.compute_loss(batch)[0].backward()


def _looks(session: Session, phase: Phase, images: Tensor) -> list[str]:
    """A sentence where the images, as the network sees them, are far from mean 0 and standard deviation 1."""
    own, _ = session.normalization(phase)
    [images] = Renormalize(**own)(None, (images,)) if own else [images]  # pyright: ignore[reportArgumentType]
    mean, std = images.float().mean().item(), images.float().std().item()
    if abs(mean) <= USUAL[0] and USUAL[1] <= std <= USUAL[2]:
        return []
    return [
        f"The {type(phase).__name__.lower()} sees images with mean {mean:.1f} and standard deviation {std:.2g}, where "
        f"0 and 1 are usual: look at {phase._prefix}mean and {phase._prefix}std."
    ]
