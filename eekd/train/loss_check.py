"""Compares a student's loss with its formula in fp64."""

import dataclasses
import inspect
import math
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from eekd import parallel
from eekd.method.losses import EEKDLoss
from eekd.method.topk import TopKLogits
from eekd.ops import use_backend
from eekd.ops.backend import backend_for
from eekd.train.callbacks import Callback
from eekd.train.checkpoints import provenance
from eekd.train.evidence import keep_evidence, loss_options, snapshot_tensors
from eekd.train.watch import float_tensors

# How far a loss may be from its formula, of the largest true value. What is kept in 16 bits was rounded when it was
# written and again when it was scaled: two units in the last place. Sums over classes and rows cost float32 three of
# its seven digits at most, and a kernel that is wrong is further off; of float64 too, in which not all is computed.
RTOL = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class LossCheck(Callback):
    """Compares every EEKDLoss of a trainer with its formula, on its first `count` batches of finite loss.

    FloatingPointError, one sentence, where they differ; what the loss was given is then kept in `folder`.
    """

    def __init__(self, session, name: str, folder: Path, count: int):
        self.session, self.name, self.folder, self.left = session, name, folder, count
        self.agree = parallel.all_reduce_max

    @contextmanager
    def running(self, trainer):
        with ExitStack() as stack:
            for module in trainer.trained.modules():
                if isinstance(module, EEKDLoss) and self.left:
                    stack.enter_context(module.register_forward_hook(self._after, with_kwargs=True))
            yield

    def _after(self, loss: EEKDLoss, args: tuple, kwargs: dict, output: tuple) -> None:
        if torch.is_grad_enabled():
            given = inspect.signature(loss.forward).bind(*args, **kwargs).arguments
            names = "student_logits", "snapshot_logits", "labels", "student_features", "snapshot_features"
            self.check(loss, output[0], *(given.get(name) for name in names))

    def check(self, loss: EEKDLoss, total: Tensor, *given) -> None:
        """Compares `total`, which the loss made of what it was given."""
        if not self.left:
            return
        difference, device = differs(loss, *given), given[0].device
        flags = torch.stack([torch.tensor(difference is not None, device=device), ~total.isfinite()])
        wrong, bad = self.agree(flags.float()).tolist()
        self.left -= not bad
        if not wrong:
            return
        if not difference:
            raise FloatingPointError(f"{self.name}: in another process the loss differs from its formula")
        logits, snapshot_logits, labels, features, snapshot_features = given
        tensors = {"student_logits": logits, "labels": labels, "student_features": features}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        tensors |= snapshot_tensors(snapshot_logits, snapshot_features)
        tensors |= {f"network.{name}": tensor for name, tensor in loss.state_dict().items()}
        facts = {"phase": self.name, "found": difference}
        path = keep_evidence(self.folder, "loss-differs", tensors, facts, self.session, loss)
        place, backend = provenance(device), backend_for(device)
        raise FloatingPointError(
            f"{self.name}: {difference}, by backend {backend} on {place['device']} ({place['cpu_capability']}) with "
            f"torch {place['torch']}; build eekd again, or train in Python within eekd.use_backend of another backend; "
            f"the inputs are in {path}"
        )


def differs(loss: EEKDLoss, *given) -> str | None:
    """What of an EEKDLoss is further from its formula in fp64 than rounding takes it, for what it was given.

    Compared are the loss, its measurements, and its gradients by the student's logits, by features that get one and
    by the attention's parameters. Rounding is 8 times what the same formula in torch loses in the same dtypes, RTOL
    of the largest true value, and 1e-6 of what cancels. With r, the larger of log C and max |z| / τ, for the range of
    a logarithm, that is τ² r in the loss, and in a gradient 1 / B of it; in the attention's, 1 / B of how the loss
    changes with a weight (by the label r, by the KL τ² r, and r times that for logits that are averaged) times the
    largest entry of query and keys, and of features that are not normalised.
    """
    got = _evaluate(loss, given)
    with torch.device("meta"):  # where no random number is drawn
        exact = EEKDLoss(**loss_options(loss))
    exact.load_state_dict({name: x.double() for name, x in loss.state_dict().items()}, assign=True)
    with use_backend("reference"):
        torchs = _evaluate(loss, given)
        truth = _evaluate(exact, [_double(value) for value in given])
    rows, classes = given[0].shape
    tau = loss.options["temperature"]
    span = max(math.log(max(classes, 3)), *(_largest(z) / tau for z in float_tensors(given[:2])))
    cancels = max(1, tau**2) * span
    through = cancels if loss.options["attention_objective"] == "kl" else span
    through *= span if loss.options["fusion"] == "logit" else 1
    if loss.attention:
        through *= max(map(_largest, loss.attention(*given[3:])))
        through *= 1 if loss.attention.normalize else max(1, *map(_largest, given[3:]))
    for name, want in truth.items():
        have, near = got[name].double(), torchs[name].double()
        finite = want.isfinite() & near.isfinite()
        error = torch.where(finite, (have - want).abs(), 0)
        error = error.masked_fill(finite & ~have.isfinite(), math.inf)
        scale, rounding = (torch.where(finite, x.abs(), 0).max() for x in (want, near - want))
        size = cancels if name[:2] != "d_" else (cancels if name == "d_student_logits" else through) / rows
        allowed = 8 * rounding + RTOL[got[name].dtype] * scale + 1e-6 * size
        if (error > allowed).any():
            worst = error.flatten().argmax()
            have, want = (x.flatten()[worst].item() for x in (have, want))
            return f"{name} is {have:.6g}, and {want:.6g} by its formula in fp64, with {allowed.item():.1g} allowed"
    return None


def _evaluate(loss: EEKDLoss, given) -> dict[str, Tensor]:
    """Outputs of a loss, and its gradients as "d_NAME"."""
    logits, snapshot_logits, labels, features, snapshot_features = given
    leaves = {"student_logits": logits.detach().requires_grad_()}
    if features is not None:
        features = features.detach()
        if loss.attention is not None and not loss.detach_query:
            leaves["student_features"] = features.requires_grad_()
    with torch.enable_grad():
        total, measured = loss.forward(leaves["student_logits"], snapshot_logits, labels, features, snapshot_features)
        leaves |= dict(loss.named_parameters())
        gradients = torch.autograd.grad(total, [*leaves.values()], allow_unused=True, materialize_grads=True)
    outputs = {"loss with the attention's": total.detach(), **measured}
    return outputs | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _largest(x: Tensor) -> float:
    return x.detach().nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0.0


def _double(value):
    if isinstance(value, TopKLogits):
        return dataclasses.replace(value, logits=value.logits.double(), atoms=value.atoms.double())
    if isinstance(value, (list, tuple)):
        return [_double(entry) for entry in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
