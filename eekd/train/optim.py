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
    and Topin, "Super-Convergence", 2018, with torch's numbers; momentum stays);
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


def build_optimizer(phase: Phase, trained: nn.Module, network: nn.Module | None = None) -> torch.optim.Optimizer:
    """The optimizer of a phase for all parameters of `trained`, among them those of `network` (None: all are).

    AdamW does not decay biases and norms, and what the network names in `no_weight_decay()`, as timm's do. With
    phase.layer_decay d, layer l of L of the network has the rate lr d^(L - l), by the groups that timm makes.
    """
    network = trained if network is None else network
    scales, named = layer_scales(phase, network), getattr(network, "no_weight_decay", ())
    named = named() if callable(named) else named
    exempt = {id(parameter) for name, parameter in network.named_parameters() if name in named}
    # fused: the one that GradScaler steps without asking the GPU for the gradients' state
    options: dict = dict(lr=phase.lr, weight_decay=phase.weight_decay, fused=True)
    kinds = defaultdict(list)
    for parameter in trained.parameters():
        decays = phase.optimizer != "adamw" or parameter.ndim > 1 and id(parameter) not in exempt
        kinds[parallel.is_sharded(parameter), not decays, -scales.get(id(parameter), 1.0)].append(parameter)
    groups = [
        {"params": kind, "fused": not sharded, "foreach": sharded}  # no fused optimizer takes sharded parameters
        | ({"weight_decay": 0.0} if exempted else {})
        | ({"lr_scale": -scale} if scale > -1 else {})
        for (sharded, exempted, scale), kind in sorted(kinds.items(), key=lambda entry: entry[0])
    ]
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=phase.nesterov, **options)
    for parameter in trained.parameters():  # else, where the first step is skipped, torch takes what lies in memory
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def layer_scales(phase: Phase, network: nn.Module) -> dict[int, float]:
    """What multiplies the learning rate of each parameter of the network, by its id; ValueError where it has no layers.

    Source: Bao et al., "BEiT" (2022), by timm's groups.
    """
    if phase.layer_decay == 1:
        return {}
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ValueError(
            f"{phase._prefix}layer_decay must be 1 for {phase.model}, which names no layers as timm's models do, got "
            f"{phase.layer_decay}"
        )
    from timm.models import group_parameters

    layers: dict[str, int] = {**group_parameters(network, matcher(coarse=False), reverse=True)}  # pyright: ignore
    last = max(layers.values())
    return {id(x): phase.layer_decay ** (last - layers.get(name, last)) for name, x in network.named_parameters()}


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scales all gradients so that the norm of all together, shards of all processes included, is at most `largest`."""
    kinds = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            kinds[parallel.is_sharded(parameter.grad)].append(parameter)
    norms = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds.values()]
    if norms:
        whole = (getattr(norm, "full_tensor", norm.clone)() for norm in norms)  # of shards and of others
        norm = torch.stack([*whole]).norm()
        for kind in kinds.values():
            nn.utils.clip_grads_with_norm_(kind, largest, norm)


def sync_gradients(replicas: Iterable[nn.Module | None], now: bool) -> None:
    """Whether the next backward exchanges gradients: of a step's parts the last one does, for all."""
    for module in replicas:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = now
        elif shards := getattr(module, "set_requires_gradient_sync", None):  # of fully_shard
            shards(now)
