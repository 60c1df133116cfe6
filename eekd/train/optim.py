"""Learning rates, optimizers, and when gradients are exchanged between processes."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eekd import parallel
from eekd.train.config import Phase, Teacher


def learning_rate(phase: Phase, step: int, total: int) -> float:
    """The learning rate of step 0 <= step < total.

    step: lr / 10^(milestones passed);  cosine: from lr to min_lr by half a cosine, after the warm-up;
    one_cycle: up from lr/25 to lr in the first 30 % of training, then down to lr/250,000, both by half a cosine (Smith
    and Topin, "Super-Convergence", 2018, with torch's numbers);
    cyclic: the cosine over each of the M stages (Huang et al., "Snapshot Ensembles", 2017).
    Warm-up: with step and cosine, lr rises linearly over warmup_epochs.
    """
    warmup = round(phase.warmup_epochs * total / phase.epochs)
    if step < warmup:
        return phase.lr * (step + 1) / (warmup + 1)
    if phase.schedule == "step":
        return phase.lr * 0.1 ** sum(step / total >= m for m in phase.milestones)
    if phase.schedule == "one_cycle":
        top, least = 0.3 * total, phase.lr / 25
        if step < top:
            return _half_cosine(least, phase.lr, step / top)
        return _half_cosine(phase.lr, least / 1e4, (step - top) / (total - top))
    cycles = phase.snapshots if isinstance(phase, Teacher) and phase.schedule == "cyclic" else 1
    total, step = total - warmup, step - warmup
    return _half_cosine(phase.lr, phase.min_lr, step * cycles % total / total)


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * part) + 1)


def build_optimizer(phase: Phase, trained: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a phase for all parameters of `trained`; AdamW's does not decay biases and norms."""
    # fused: the one that GradScaler steps without asking the GPU for the gradients' state
    options = dict(lr=phase.lr, weight_decay=phase.weight_decay, fused=True)
    kinds = defaultdict(list)
    for parameter in trained.parameters():
        decays = phase.optimizer != "adamw" or parameter.ndim > 1
        kinds[parallel.is_sharded(parameter), decays].append(parameter)
    groups = [
        {"params": kind, "fused": not sharded, "foreach": sharded}  # no fused optimizer takes sharded parameters
        | ({} if decays else {"weight_decay": 0.0})
        for (sharded, decays), kind in sorted(kinds.items(), key=lambda entry: (entry[0][0], not entry[0][1]))
    ]
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=phase.nesterov, **options)
    for parameter in trained.parameters():  # else, where the first step is skipped, torch takes what lies in memory
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scales all gradients so that the norm of all together, shards of all processes included, is at most `largest`."""
    kinds = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            kinds[parallel.is_sharded(parameter.grad)].append(parameter)
    norms = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds.values()]
    if norms:
        norm = torch.stack([norm.full_tensor() if parallel.is_sharded(norm) else norm for norm in norms]).norm()
        for kind in kinds.values():
            nn.utils.clip_grads_with_norm_(kind, largest, norm)


def sync_gradients(replicas: Iterable[nn.Module | None], now: bool) -> None:
    """Whether the next backward exchanges gradients: of a step's parts the last one does, for all."""
    for module in replicas:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = now
        elif hasattr(module, "set_requires_gradient_sync"):  # fully_shard
            module.set_requires_gradient_sync(now)
