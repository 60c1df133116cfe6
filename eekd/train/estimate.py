"""What a run would cost, without running it: networks, steps, memory and disk."""

import math

import torch
from torch import Tensor, nn

from eekd import models, parallel
from eekd.train.session import Session, checkpoint_gradients
from eekd.train.student import method_of


def plan(session: Session) -> list[dict]:
    """A row per phase: name, model, parameters, epochs, steps, and estimated bytes of memory and disk.

    Memory is that of one process: weights, gradients and moments, what the forward of a micro-batch keeps for the
    backward, the images that live on the device and, for a student, the snapshots; workspaces come on top.
    """
    config, data, processes = session.config, session.data, parallel.world_size()
    splits = data.train, data.val, data.test
    images = sum(split.images.nbytes for split in splits if isinstance(split.images, Tensor))
    snapshot = _bytes(models.build(**session.spec(config.teacher)))
    taught = {"ce": 0, "last": 1}
    rows = []
    for name in (() if config.teacher_run or config.checkpoints else ("teacher",)) + config.students:
        phase = config.teacher if name == "teacher" else config.student
        network = models.build(**session.spec(phase))
        if phase.grad_checkpointing:
            checkpoint_gradients(network, phase)
        weights, moments = _bytes(network), 2 if phase.optimizer == "adamw" else 1
        two = torch.zeros(2, data.channels, data.image_size, data.image_size)
        activations = _kept(network, two) * session.micro_batch(phase) // 2 * session.dtype.itemsize // 4
        training = weights * (2 + moments + bool(phase.ema))
        if config.parallel == "fsdp" and processes > 1:  # a step gathers weights and gradients
            training = training // processes + 2 * weights
        weighting = "ce" if name == "teacher" else method_of(name).weighting
        teaching = 0 if session.bank else taught.get(weighting, config.teacher.snapshots)
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
