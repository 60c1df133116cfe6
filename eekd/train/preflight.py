"""One batch through every network and loss before anything is trained: what does not fit is found in seconds."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eekd import parallel, user_code
from eekd.data import Batch
from eekd.io.files import first_line
from eekd.method.losses import EEKDLoss
from eekd.models.normalization import Renormalize
from eekd.models.outputs import outputs_of
from eekd.ops.checks import are_probabilities
from eekd.snapshots.features import LastFeatures, classifiers, same_rows, watched
from eekd.snapshots.wrappers import logits_of
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
            notes += _check_logits(session, config.teacher, teacher, batch.images)
            if trains_teacher:
                trainer = TeacherTrainer(session)
                notes += _check_logits(session, config.teacher, trainer.network, batch.images, training=True)
                _step(trainer, TaughtBatch(*batch))
            if finished:
                notes += _guesses(session, teacher)
        if methods:
            batch = _batch(session, config.student)
            notes += _looks(session, config.student, batch.images)
        for method in methods:
            with _running(session, config.teacher):
                outputs = None if method.weighting == "ce" else _outputs(session, teacher, method, batch)
            with _running(session, config.student, method):
                speaker = teacher if method.reads_maps else outputs and Preview(outputs)
                # Of a network FeatureMaps make a Teacher.
                trainer = method.trainer(session, speaker, method.weighting, name=method.name)  # pyright: ignore
                for training in (False, True):
                    notes += _check_logits(session, config.student, trainer.network, batch.images, training)
                outputs = trainer.teacher(batch) if method.reads_maps else outputs
                _step(trainer, TaughtBatch(*batch, outputs))
    finally:
        set_random_state(generators, session.device)
    return list(dict.fromkeys(notes))


def _batch(session: Session, phase: Phase) -> Batch:
    """The first images of the first view, decoded by this process."""
    loader = session.loader("train", phase, train=True)
    rows = min(ROWS, loader.batch_size, len(loader.split))
    [batch] = loader.replay([(0, torch.arange(rows))])
    return batch


@contextmanager
def _running(session: Session, phase: Phase, method: Method | None = None) -> Iterator[None]:
    """Errors of a network's own code, or of a method's, as one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        places = user_code.places(error)
        if isinstance(error, RuntimeError) and parallel.is_peer_failure(error):
            raise
        if "layer=" in str(error) and user_code.is_eekds(error):
            message = str(error).replace("layer=", f"--{phase._prefix}layer")
            raise ValueError(f"{phase._prefix}model {phase.model}: {message}") from error
        if not isinstance(error, RuntimeError) and not places and user_code.is_eekds(error):
            raise  # a sentence of eekd's
        data = session.data
        size = f"{data.channels} x {data.image_size} x {data.image_size}"
        who = f"{phase._prefix}model {phase.model} fails on images of {size}"
        if method and method.file and places and places[-1].startswith(f"{method.file},"):
            who = f"the student {method.name} fails"
        cause = first_line(error) if type(error) is RuntimeError and not places else user_code.place_and_cause(error)
        raise ValueError(f"{who}: {cause}") from error


@torch.no_grad()
def _check_logits(
    session: Session, phase: Phase, network: nn.Module, images: Tensor, training: bool = False
) -> list[str]:
    """A sentence on what is taken for the logits where several outputs could be meant.

    ValueError unless the network gives a logit for each class, and where it is not clear which output holds them.
    """
    classes, who = len(session.data.classes), f"{phase._prefix}model {phase.model}"
    try:
        modules = dict(network.named_modules())
        sigmoids = {name: module for name, module in modules.items() if isinstance(module, nn.Sigmoid)}
        with watched(classifiers(modules, classes)) as given, watched(sigmoids) as squashed:
            output = session.run(network.train(training), images)
    except ValueError as error:
        if not user_code.is_eekds(error):
            raise
        raise ValueError(f"{who}: {error}") from error
    names = {id(x): name for name, x in outputs_of(output).items() if x.shape == (len(images), classes)}
    hint = f"; --{phase._prefix}output {next(iter(names.values()))} would take one that fits" if names else ""
    try:
        logits = logits_of(output)
    except ValueError as error:
        raise ValueError(f"{who}: {error}{hint}") from None
    if logits.shape != (len(images), classes):
        raise ValueError(
            f"{who} must give {classes} logits an image, one for each class of {session.data.name}, got outputs of "
            f"shape {tuple(logits.shape)} for {len(images)} images{hint}"
        )
    if are_probabilities(logits):
        raise ValueError(
            f"{who} must give logits, got probabilities, which sum to 1 for each image: leave out its softmax, for the "
            "losses apply their own"
        )
    if not logits.isfinite().all():
        raise ValueError(f"{who} must give finite logits, got NaN or infinity{' in training' * training}")
    if squashers := [name for name, rows in squashed.items() if same_rows(rows, logits)]:
        raise ValueError(f"{who} must give logits, got what the sigmoid {squashers[0]!r} makes of them: leave it out")
    taken = names.get(id(logits), "logits")
    if len(names) < 2 or taken == "logits":
        return []
    heads = [names[id(x)] for x in outputs_of(output).values() if any(same_rows(rows, x) for rows in given.values())]
    if heads and taken not in heads:
        raise ValueError(
            f"{who} must say which of its outputs {', '.join(names.values())} of {classes} values are the logits, for "
            f"{taken} would be taken and {heads[0]} comes from a layer of {classes} outputs: give "
            f"--{phase._prefix}output"
        )
    return [
        f"Of the {type(phase).__name__.lower()}'s {len(names)} outputs of {classes} values "
        f"({', '.join(names.values())}), {taken} is taken for the logits; {phase._prefix}output takes another."
    ]


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
