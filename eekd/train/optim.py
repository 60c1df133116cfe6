"""Learning rates, optimizers, and when gradients are exchanged between processes."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eekd import parallel
from eekd.train.config import Phase, Teacher


def learning_rate(phase: Phase, step: int, total: int) -> float:
    """The learning rate of step 0 <= step < total.

    step: lr / 10^(milestones passed);  cosine: lr/2 (cos(pi step/total) + 1);
    cyclic: the cosine over each of the M stages (Huang et al., "Snapshot Ensembles", 2017).
    """
    if phase.schedule == "step":
        return phase.lr * 0.1 ** sum(step / total >= m for m in phase.milestones)
    cycles = phase.snapshots if isinstance(phase, Teacher) and phase.schedule == "cyclic" else 1
    return phase.lr / 2 * (math.cos(math.pi * (step * cycles % total) / total) + 1)


def build_optimizer(phase: Phase, trained: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a phase for all parameters of `trained`."""
    # fused: the one that GradScaler steps without asking the GPU for the gradients' state
    options = dict(lr=phase.lr, weight_decay=phase.weight_decay, fused=True)
    kinds = {False: [], True: []}  # no fused optimizer takes sharded parameters
    for parameter in trained.parameters():
        kinds[parallel.is_sharded(parameter)].append(parameter)
    groups = [{"params": kind, "fused": not sharded, "foreach": sharded} for sharded, kind in kinds.items() if kind]
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=phase.nesterov, **options)
    for parameter in trained.parameters():  # else, where the first step is skipped, torch takes what lies in memory
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def sync_gradients(replicas: Iterable[nn.Module | None], now: bool) -> None:
    """Whether the next backward exchanges gradients: of a step's parts the last one does, for all."""
    for module in replicas:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = now
        elif hasattr(module, "set_requires_gradient_sync"):  # fully_shard
            module.set_requires_gradient_sync(now)
