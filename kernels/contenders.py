"""What the microbenchmarks time: the op and its baselines, their inputs, and the exact result they are held against."""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import eekd
from eekd.kernels.timing import rotation
from eekd.ops import reference
from eekd.ops.backend import namespace

BACKENDS, BASELINES = ("native", "triton"), ("eager", "compile", "liger")
TEMPERATURE, ALPHA = 5.0, 0.5  # the op's defaults
ERROR_LIMIT = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}


class Case(NamedTuple):
    """One row of the table."""

    shape: tuple[int, ...]  # (B, M, C), or (B, M, C, K) of sparse_ensemble_kd
    dtype: str
    fusion: str
    layout: str = "MBC"  # of the snapshots in memory


class Sparse(NamedTuple):
    """Snapshots as sparse_ensemble_kd takes them, the label's class among each row's `indices`."""

    logits: Tensor
    tail: Tensor
    indices: Tensor


def arguments(student, snapshots, labels) -> tuple[str, tuple]:
    """The op that takes such snapshots, and its arguments."""
    if isinstance(snapshots, Sparse):
        return "sparse_ensemble_kd", (student, *snapshots, labels)
    return "ensemble_kd", (student, snapshots, labels)


def fused(student, snapshots, labels, scores, fusion):
    op, given = arguments(student, snapshots, labels)
    out = getattr(eekd, op)(*given, scores=scores, fusion=fusion)
    return out.loss + out.attention_loss


def einsum(weights, x):
    return torch.einsum("bm,mbc->bc", weights, x.float())


def broadcast(weights, x):
    return (weights.t()[:, :, None] * x).sum(0)


def kl_div(log_q, p):
    return F.kl_div(log_q, p, reduction="batchmean")


def plain(student, snapshots, labels, scores, fusion, mix=einsum, kl=kl_div):
    weights, ce = scores.softmax(1), F.cross_entropy(student.float(), labels)
    if isinstance(snapshots, Sparse):  # from here on there are K + 1 columns
        z, tail, indices = snapshots
        rest = student.float().scatter(1, indices, -torch.inf) / TEMPERATURE
        rest = TEMPERATURE * rest.logsumexp(1, keepdim=True)
        student = torch.cat([student.gather(1, indices).float(), rest], 1)
        snapshots = torch.cat([z.float(), TEMPERATURE * tail[:, :, None]], 2)
        labels = (indices == labels[:, None]).byte().argmax(1)
    if fusion == "logit":
        log_p = F.log_softmax(mix(weights, snapshots) / TEMPERATURE, 1)
        p = log_p.detach().exp()
        attention_loss = F.nll_loss(log_p, labels)
    else:
        p = mix(weights, F.softmax(snapshots / TEMPERATURE, 2, dtype=torch.float32))
        attention_loss = -p.gather(1, labels[:, None]).log().mean()
        p = p.detach()
    log_q = F.log_softmax(student / TEMPERATURE, 1, dtype=torch.float32)
    return ALPHA * ce + (1 - ALPHA) * TEMPERATURE**2 * kl(log_q, p) + attention_loss


def contenders(
    cuda: bool, modes: list[str], only: list[str] | None = None
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Functions of (student, snapshots, labels, scores, fusion) by name, and why others are missing."""
    found, missing = {}, {}
    for name in BACKENDS if cuda else BACKENDS[:1]:  # on a CPU Triton is an interpreter
        try:
            with eekd.use_backend(name):
                namespace(torch.device("cuda" if cuda else "cpu"))
            found[name] = fused
        except RuntimeError as error:
            missing[name] = str(error)
    found["eager:einsum"] = plain
    if cuda:
        found["eager:sum"] = partial(plain, mix=broadcast)
        try:
            from liger_kernel.transformers.kl_div import LigerKLDIVLoss

            found["liger"] = partial(plain, kl=LigerKLDIVLoss(reduction="batchmean"))
        except ImportError as error:
            missing["liger"] = f"not timed ({error}); pip install liger-kernel"
    for mode in modes:
        found[f"compile:{mode}"] = torch.compile(partial(plain, mix=broadcast), mode=mode, dynamic=False)
    if only:
        found = {name: function for name, function in found.items() if name.split(":")[0] in only}
        missing = {name: why for name, why in missing.items() if name in only}
    return found, missing


def inputs(case: Case, device: torch.device, seed: int) -> list[tuple[Tensor, Tensor | Sparse, Tensor, Tensor]]:
    """Sets of student logits, snapshot logits (or `Sparse`), labels and scores."""
    (rows, snapshots, classes, *k), dtype = case.shape, getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, scale, dtype=dtype):
        return torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(scale)

    def one():
        student = normal(rows, classes, scale=2).requires_grad_()
        scores = normal(rows, snapshots, scale=1, dtype=torch.float32).requires_grad_()
        if k:
            indices = torch.rand(rows, classes, generator=generator, device=device).topk(*k, dim=1).indices
            tail = normal(snapshots, rows, scale=0.1, dtype=torch.float32) + math.log(classes - k[0])
            return student, Sparse(normal(snapshots, rows, *k, scale=3), tail, indices), indices[:, 0].clone(), scores
        if case.layout == "MBC":
            z = normal(snapshots, rows, classes, scale=3)
        else:
            z = normal(rows, snapshots, classes, scale=3).transpose(0, 1)
        labels = torch.randint(classes, (rows,), generator=generator, device=device)
        return student, z, labels, scores

    size = rows * (classes + snapshots * (k[0] if k else classes)) * dtype.itemsize
    return [one() for _ in range(rotation(size, device))]


def gradients(function: Callable, tensors, fusion: str, upstream: Tensor) -> tuple[Tensor, ...]:
    """Forward + backward. Not by .backward(): in training the logits are no leaves, nothing copies their gradients."""
    loss = function(*tensors, fusion)
    return loss, *torch.autograd.grad(loss, (tensors[0], tensors[3]), upstream)


def exact(tensors, fusion: str) -> list[Tensor]:
    """Loss, and d student and d scores of the sum over rows, by the reference in fp64."""
    student, snapshots, labels, scores = tensors
    parts = []
    sparse = isinstance(snapshots, Sparse)
    # rows, for fp64 takes memory
    at_once = max(1, 2**24 // (snapshots.logits if sparse else snapshots)[:, 0].numel())
    for first in range(0, len(student), at_once):
        part = slice(first, first + at_once)
        leaves = [x[part].detach().double().requires_grad_() for x in (student, scores)]
        if sparse:
            z = Sparse(snapshots.logits[:, part].double(), snapshots.tail[:, part].double(), snapshots.indices[part])
        else:
            z = snapshots[:, part].double()
        op, given = arguments(leaves[0], z, labels[part])
        loss, _, attention_loss = getattr(reference, op)(*given, scores=leaves[1], fusion=fusion, reduction="sum")
        total = loss + attention_loss
        parts.append([total.detach()[None], *torch.autograd.grad(total, leaves)])
    loss, *grads = (torch.cat(x) for x in zip(*parts, strict=True))
    return [loss.sum() / len(student), *grads]


def error(got: tuple[Tensor, ...], truth: list[Tensor], upstream: Tensor) -> float:
    """The largest error of loss and gradients, by maximum and by norm, relative to those of the truth."""
    errors = []
    for a, b in zip((got[0], *(d.double() * (len(d) / upstream) for d in got[1:])), truth, strict=True):
        difference = a.detach().double() - b
        # The gradient of an only snapshot's score is 0: it is held against a hundredth of what others are.
        largest, norm = b.abs().max().clamp(min=0.01), b.norm().clamp(min=0.01 * b.shape[:1].numel() ** 0.5)
        errors += [difference.abs().max() / largest, difference.norm() / norm]
    return torch.stack(errors).max().item()  # NaN if one is


def using(name: str):
    return eekd.use_backend(name) if name in BACKENDS else contextlib.nullcontext()
