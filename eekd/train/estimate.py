"""What a run would cost, without running it: networks, steps, memory, disk and time."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from eekd import models, parallel
from eekd.data.encoded import Encoded
from eekd.snapshots.wrappers import logits_of
from eekd.train.config import Phase
from eekd.train.random_state import random_state, set_random_state
from eekd.train.session import Session, checkpoint_gradients
from eekd.train.student import method_of

TIMED = 32 * 64**2  # pixels of the images that are timed together


def plan(session: Session) -> list[dict]:
    """A row per phase: name, model, parameters, epochs, steps, and estimated bytes of memory and disk.

    Memory is that of one process: weights, gradients and moments, what the forward of a micro-batch keeps for the
    backward, the images that live on the device and, for a student, the snapshots; workspaces come on top.
    """
    config, data, processes = session.config, session.data, parallel.world_size()
    splits = data.train, data.val, data.test
    images = sum(split.images.nbytes for split in splits if isinstance(split.images, Tensor))
    snapshot = _bytes(models.build(**session.spec(config.teacher)))
    rows = []
    for name, phase, teaching in _phases(session):
        network = models.build(**session.spec(phase))
        if phase.grad_checkpointing:
            checkpoint_gradients(network, phase)
        weights, moments = _bytes(network), 2 if phase.optimizer == "adamw" else 1
        two = torch.zeros(2, data.channels, data.image_size, data.image_size)
        activations = _kept(network, two) * session.micro_batch(phase) // 2 * session.dtype.itemsize // 4
        training = weights * (2 + moments + bool(phase.ema))
        if config.parallel == "fsdp" and processes > 1:  # a step gathers weights and gradients
            training = training // processes + 2 * weights
        few = teaching if session.device.type == "cpu" else min(teaching, 2)
        here = {"device": teaching, "cpu": few, "ranks": math.ceil(teaching / processes)}
        batches = len(session.loader("train", phase, train=True))
        rows.append({
            "name": name,
            "model": phase.model,
            "parameters": sum(p.numel() for p in network.parameters()),
            "epochs": phase.epochs,
            "steps": phase.epochs * math.ceil(batches / config.accumulate),
            "memory": training + activations + snapshot * here[config.snapshots_on] + images,
            "disk": weights * (config.teacher.snapshots if name == "teacher" else 1),
        })  # fmt: skip
    return rows


def seconds(session: Session) -> dict[str, float]:
    """About how long each phase trains on this device, by name: from one batch through its networks, measured now.

    Forward and backward, the snapshots, and decoding, where files are decoded; not validation, losses, and checkpoints.
    """
    config, size, generators = session.config, session.data.image_size, random_state(session.device)
    teacher, times = session.build(session.spec(config.teacher)).eval(), {}
    for name, phase, teaching in _phases(session):
        network, loader = session.build(session.spec(phase)).train(), session.loader("train", phase, train=True)
        rows = min(loader.batch_size, max(4, TIMED // size**2))
        images = torch.randn(rows, session.data.channels, size, size, device=session.device)
        step = _time(session, _step, session, network, images)
        ask = _time(session, _ask, session, teacher, images) if teaching else 0.0
        read = 0.0 if loader.encoded is None else _time(session, _read, loader.encoded, rows)
        shown = phase.epochs * loader.rows(0) * len(loader) / parallel.world_size()
        asked = shown if loader.varies or parallel.world_size() > 1 else len(loader.split)  # see teaching.remembered
        learning, reading = shown * step + asked * teaching * ask, shown * read / max(config.workers, 1)
        times[name] = (max(learning, reading) if config.workers else learning + reading) / rows
    set_random_state(generators, session.device)
    return times


def _step(session: Session, network: nn.Module, images: Tensor) -> None:
    logits_of(session.run(network, images)).float().sum().backward()


@torch.no_grad()
def _ask(session: Session, teacher: nn.Module, images: Tensor) -> None:
    session.run(teacher, images)


def _read(files: Encoded, count: int) -> None:
    for number in range(count):
        files.decode_or_skip(number % len(files))


def _phases(session: Session) -> Iterator[tuple[str, Phase, int]]:
    """What is trained: name, phase, and how many snapshots run in each of its steps."""
    config, taught = session.config, {"ce": 0, "last": 1}
    if not (config.teacher_run or config.checkpoints):
        yield "teacher", config.teacher, 0
    for name in config.students or ():
        snapshots = taught.get(method_of(name).weighting, config.teacher.snapshots)
        yield name, config.student, 0 if session.bank else snapshots


def _time(session: Session, call: Callable, *args) -> float:
    """Seconds of a second call, for the first also sets things up."""
    wait = torch.cuda.synchronize if session.device.type == "cuda" else lambda: None
    call(*args)
    wait()
    start = time.perf_counter()
    call(*args)
    wait()
    return time.perf_counter() - start


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def _kept(network: nn.Module, images: Tensor) -> int:
    """Bytes that the forward keeps for the backward, its own weights apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    return sum({s.data_ptr(): s.nbytes() for s in kept if s.data_ptr() not in own}.values())
