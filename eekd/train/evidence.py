"""The files in which a phase keeps what was wrong with a step or a loss, for eekd.train.replay.

PHASE/non-finite-STEP.json, PHASE/loss-differs.json, and beside each a file of tensors:

tensors                  a batch (images, labels, index), or student_logits and student_features; what the
                         snapshots said of it; network.*, the weights before the step; random, the generators
format, sha256           of the file of tensors
phase, step, epoch, lr   which step it was (steps and epochs from 1)
loss, found              what the loss became; name of the first bad tensor, or what differs
spec, criterion          arguments of eekd.models.build and of EEKDLoss (null for cross-entropy)
method                   name of a rival, or of a method of the user's own, whose loss replay does not know; else absent
settings, made_with
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from eekd import parallel
from eekd.io.files import write_json_atomic
from eekd.io.tensors import save_tensors
from eekd.method.losses import EEKDLoss
from eekd.method.topk import TopKLogits
from eekd.train.checkpoints import provenance

FORMAT = 1


def keep_evidence(folder: Path, stem: str, tensors: dict, facts: dict, session, loss: EEKDLoss | None) -> Path:
    """Writes what replay reads, and returns the path of its JSON."""
    path = folder / (stem + f"-process-{parallel.rank()}" * (not parallel.is_main_process()) + ".json")
    sha256 = save_tensors(path.with_suffix(".safetensors"), tensors)
    classes = len(session.data.classes)
    write_json_atomic(path, {
        "format": FORMAT, "sha256": sha256, **facts, "classes": classes, "criterion": loss and loss_options(loss),
        "settings": dataclasses.asdict(session.config), "made_with": provenance(session.device),
    })  # fmt: skip
    return path


def loss_options(loss: EEKDLoss) -> dict:
    """The arguments of EEKDLoss that make this one."""
    options = {"weighting": loss.weighting, "detach_query": loss.detach_query, **loss.options}
    if maps := loss.attention:
        options |= dict(
            student_dim=maps.student.in_features,
            snapshot_dim=maps.snapshots.in_features,
            embed_dim=maps.student.out_features,
            normalize=maps.normalize,
            scale=maps.scale,
        )
    return options


def snapshot_tensors(snapshot_logits, snapshot_features: Tensor | None) -> dict[str, Tensor]:
    """The outputs of snapshots as named tensors."""
    z = snapshot_logits
    if isinstance(z, TopKLogits):
        tensors = {"snapshot_logits": z.logits, "snapshot_indices": z.indices, "snapshot_atoms": z.atoms}
    else:
        tensors = {"snapshot_logits": z if isinstance(z, Tensor) else torch.stack(tuple(z))}
    return tensors if snapshot_features is None else tensors | {"snapshot_features": snapshot_features}
