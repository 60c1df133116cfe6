"""What a run would cost, without running it: networks, steps, memory and disk."""

import torch
from torch import Tensor, nn

from eekd import models
from eekd.trainers.loop import Session


def plan(session: Session) -> list[dict]:
    """A row per phase: name, model, parameters, epochs, steps, and estimated bytes of memory and disk.

    Memory is weights, gradients and moments, what the forward of a batch keeps for the backward, the images
    that live on the device and, for a student, the snapshots; workspaces come on top.
    """
    config, data = session.config, session.data
    splits = data.train, data.val, data.test
    images = sum(split.images.nbytes for split in splits if isinstance(split.images, Tensor))
    snapshot = _bytes(models.build(**session.spec(config.teacher)))
    taught = {"teacher": 0, "ce": 0, "last": 1}
    rows = []
    for name in (() if config.teacher_run else ("teacher",)) + config.students:
        phase = config.teacher if name == "teacher" else config.student
        network = models.build(**session.spec(phase))
        weights, moments = _bytes(network), 2 if phase.optimizer == "adamw" else 1
        two = torch.zeros(2, data.channels, data.image_size, data.image_size)
        activations = _kept(network, two) * phase.batch_size // 2 * session.dtype.itemsize // 4
        teaching = 0 if session.bank else taught.get(name, config.teacher.snapshots)
        teaching = snapshot * (min(teaching, 2) if config.snapshots_on == "cpu" else teaching)
        rows.append({
            "name": name,
            "model": phase.model,
            "parameters": sum(p.numel() for p in network.parameters()),
            "epochs": phase.epochs,
            "steps": phase.epochs * len(session.loader("train", phase, train=True)),
            "memory": weights * (2 + moments) + activations + teaching + images,
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
