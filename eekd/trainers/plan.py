"""What a run would cost, without running it: networks, steps, memory and disk."""

import torch
from torch import Tensor

from eekd import models
from eekd.data import Split
from eekd.trainers.loop import Session


def plan(session: Session) -> list[dict]:
    """A row per phase: name, model, parameters, epochs, steps, and bytes of memory and disk, both estimates.

    Memory is weights, gradients and moments, what the forward of one batch keeps for the backward, images that
    live on the device and, for a student, the snapshots; workspaces and fragmentation come on top.
    """
    config, data = session.config, session.data
    images = sum(_bytes(split) for split in (data.train, data.val, data.test))
    taught = {"teacher": 0, "ce": 0, "last": 1}
    rows = []
    for name in (() if config.teacher_run else ("teacher",)) + config.students:
        phase = config.teacher if name == "teacher" else config.student
        with torch.device("meta"):
            network, snapshot = (models.build(**session.spec(p)) for p in (phase, config.teacher))
        weights, of_snapshot = (sum(t.nbytes for t in m.state_dict().values()) for m in (network, snapshot))
        moments = 2 if phase.optimizer == "adamw" else 1
        kept: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.setdefault(id(t), t), lambda t: t):
            network(torch.empty(phase.batch_size, data.channels, data.image_size, data.image_size, device="meta"))
        activations = sum({t.untyped_storage()._cdata: t.nbytes for t in kept.values()}.values())
        teaching = of_snapshot * taught.get(name, config.teacher.snapshots)
        rows.append({
            "name": name,
            "model": phase.model,
            "parameters": sum(p.numel() for p in network.parameters()),
            "epochs": phase.epochs,
            "steps": phase.epochs * len(session.loader("train", phase, train=True)),
            "memory": weights * (2 + moments) + activations * session.dtype.itemsize // 4 + teaching + images,
            "disk": weights * (config.teacher.snapshots if name == "teacher" else 1),
        })  # fmt: skip
    return rows


def _bytes(split: Split) -> int:
    return split.images.nbytes if isinstance(split.images, Tensor) else 0
