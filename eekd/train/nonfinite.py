"""Numbers that can be trusted: a step that is not finite moves nothing, and a loss is checked against its formula.

What was wrong lies in PHASE/non-finite-STEP.json and PHASE/loss-differs.json, tensors beside it, for `replay`:

    tensors                  a batch (images, labels, index), or student_logits and student_features; what the
                             snapshots said of it; network.*, the weights before the step; random, the generators
    format, sha256           of the file of tensors
    phase, step, epoch, lr   which step it was (steps and epochs from 1)
    loss, found              what the loss became; name of the first bad tensor, or what differs
    spec, criterion          arguments of eekd.models.build and of EEKDLoss (null for cross-entropy)
    settings, made_with
"""

import dataclasses
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eekd import parallel
from eekd.io.files import read_json, write_json_atomic
from eekd.io.tensors import load_state, load_tensors, save_tensors
from eekd.method.losses import EEKDLoss
from eekd.method.topk import TopKLogits
from eekd.ops import use_backend
from eekd.ops.backend import backend_for
from eekd.snapshots.features import LastFeatures
from eekd.train.checkpoints import State, made_with, random_state, set_random_state
from eekd.train.config import Phase
from eekd.train.runtime import Placement

FORMAT = 1
# How far a loss may be from its formula, of the largest true value. What is kept in 16 bits was rounded when it was
# written and again when it was scaled: two units in the last place. Sums over classes and rows cost float32 three of
# its seven digits at most, and a kernel that is wrong is further off; of float64 too, in which not all is computed.
RTOL = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# Of a loss in fp16: the first scale, torch's own, and the least, at which a gradient of 1 is still a normal number.
SCALES = 2.0**16, 2.0**-14


class Guard:
    """Keeps a step whose loss or gradients are not finite from the weights, then ends the phase or leaves the step out.

    The loop calls `begin`, `see` for each loss it differentiates, `update`, and `left_out`. Whether the step is bad is
    a number on the device, the largest of all processes, which the fused optimizers obey as they do a GradScaler's; by
    policy "stop" it stays, so that a GPU need be asked only now and then (at every step where parameters are sharded,
    for no fused optimizer takes these). In precision fp16 gradients are the scaler's business until no scale mends
    them, which ends the phase by either policy; no scale mends a loss that is not finite.

    objective(batch, clock) gives a loss, batches_from(step) the batches from the first of `step` on, as often as
    asked; a step takes config.accumulate of them, and the phase takes `total` steps.
    """

    def __init__(
        self,
        name: str,
        session,
        phase: Phase,
        state: State,
        folder: Path,
        objective: Callable,
        batches_from: Callable[[int], Iterator],
        total: int,
    ):
        self.name, self.session, self.phase, self.state, self.folder = name, session, phase, state, folder
        self.total = total
        self.objective, self.batches_from, self.agree = objective, batches_from, parallel.all_reduce_max
        self.skip, self.budget = session.config.non_finite == "skip", session.config.skip_budget
        self.fused = all(group["fused"] for group in state.optimizer.param_groups)
        self.looks = self.skip or not self.fused or state.device.type == "cpu"
        self.step, self.begun = 0, {}  # what is known of the steps that were not looked at yet
        self._clear()
        if self.fused:
            state.optimizer.register_step_pre_hook(self._before_update)  # in a scaler's step when that has unscaled

    def begin(self, step: int, lr: float) -> None:
        """Before the first forward of a step."""
        self.step, self.begun[step] = step, (lr, random_state(self.state.device))
        if self.skip:
            self.before = [buffer.clone() for buffer in self.state.trained.buffers()], self.state.scaler.state_dict()

    def see(self, loss: Tensor) -> None:
        """After each forward, with what is to be differentiated."""
        loss = loss.detach().float()
        self.loss = torch.where(self.bad == 0, loss, self.loss)
        self.bad = torch.maximum(self.bad, (~loss.isfinite()).float())

    def update(self) -> None:
        """The optimizer's step, which moves nothing where this or an earlier one is bad."""
        if self.fused:
            self.state.scaler.step(self.state.optimizer)
            self.state.scaler.update()
            return
        self._judge()
        if not self.bad.item():
            self.state.optimizer.step()

    def _before_update(self, optimizer: torch.optim.Optimizer, *_) -> None:
        self._judge()
        scaled = self.state.scaler.is_enabled()
        optimizer.found_inf = torch.maximum(self.bad, optimizer.found_inf) if scaled else self.bad

    def _judge(self) -> None:
        bad, groups = self.bad, self.state.optimizer.param_groups
        if not self.state.scaler.is_enabled():
            bad = torch.maximum(bad, _overflow(p.grad for group in groups for p in group["params"]))
        self.bad = self.agree(bad)
        self.first = torch.where((self.bad == 1) & (self.first < 0), self.step, self.first)

    def left_out(self, pause: bool = True) -> bool:
        """After a step, or where a state shall be saved (a `pause`): whether the step was bad and did not happen.

        All is then as before it, but for the place in the data. FloatingPointError, one sentence, by policy "stop",
        where the budget is used up, and where weights have left the range of their dtype or gradients every scale.
        """
        if not (pause or self.looks):
            return False
        if self.bad.item():
            self._tell()
            return True
        if pause:
            if self.begun and self.state.scaler.is_enabled() and self._unscalable():
                self._tell(self.state.scaler.get_scale())
            weights = dict(self.state.trained.named_parameters())
            if parallel.all_reduce_max(_overflow(p for p in weights.values() if p.is_floating_point())).item():
                bad = (f"the parameter {x}" for x, p in weights.items() if not parallel.to_local(p).isfinite().all())
                bad = next(bad, "a parameter in another process")
                raise FloatingPointError(f"{self.name}: {bad} is not finite after step {self.step + 1}; try a lower lr")
        self.begun.clear()
        return False

    def _unscalable(self) -> bool:
        """Whether scaled gradients were out of range at every scale worth a try, or at every step of the phase."""
        first, least = SCALES
        if self.step + 1 == self.total:  # each step out of range has halved the scale
            least = max(least, first * 0.5 ** (self.total - self.state.skips) * 2)
        return bool(parallel.max_across_processes(self.state.scaler.get_scale() < least)[0])

    def rows(self, rows: list[dict]) -> list[dict]:
        """The rows of a phase that may have gone on with another policy, all with the same columns."""
        return [row | {"skipped": row.get("skipped", 0)} for row in rows] if self.skip else rows

    def row(self, rows: list[dict]) -> dict:
        """What the row of an epoch says of the steps left out, where any may be; `rows` are those before."""
        if self.skip or self.state.skips or any("skipped" in row for row in rows):
            return {"skipped": self.state.skips - sum(row.get("skipped", 0) for row in rows)}
        return {}

    def _clear(self) -> None:
        device = self.state.device
        self.bad, self.loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self.first = torch.full((), -1, device=device)
        self.begun.clear()

    def _restore(self, generators: Tensor) -> None:
        set_random_state(generators, self.state.device)
        if self.skip:
            buffers, scaler = self.before
            with torch.no_grad():
                for buffer, before in zip(self.state.trained.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            if scaler:
                self.state.scaler.load_state_dict(scaler)

    def _tell(self, scale: float | None = None) -> None:
        step, loss = self.first.item() if scale is None else self.step, self.loss.item()
        lr, generators = self.begun[step]
        self._restore(generators)
        known = {"phase": self.name, "step": step + 1, "epoch": self.state.epoch + 1, "lr": lr, "loss": str(loss)}
        found, index, path = self._find(known)
        self._restore(generators)
        what = f"a gradient is not finite at loss {loss:.4g}" if math.isfinite(loss) else f"the loss became {loss}"
        where = f"epoch {known['epoch']} at learning rate {lr:.3g}, step {step + 1}, samples {_some(index)}"
        if found:
            first = f"the first bad tensor is {found}"
            first += f", of sample {_some(index[found.rows])}" if found.rows else ""
        else:
            first = "nothing was bad when the batch was run again" + " by this process" * (parallel.world_size() > 1)
        told = f"{self.name}: {what} in {where}: {first}; saved in {path}"
        if scale is not None:
            raise FloatingPointError(
                f"{told}; no scale of the loss down to {scale:.2g} mends it: try a lower lr or precision bf16 or fp32"
            )
        if not self.skip:
            raise FloatingPointError(
                f"{told}; try a lower lr or precision fp32, or leave such steps out by non_finite skip"
            )
        self.state.skips += 1
        if self.state.skips > self.budget:
            raise FloatingPointError(f"{told}; skip_budget {self.budget} is used up: try a lower lr or precision fp32")
        self._clear()
        warnings.warn(f"{told}; the step is left out", RuntimeWarning, stacklevel=4)

    def _find(self, known: dict) -> tuple["Found | None", Tensor, Path]:
        """Runs the batches of a step again until one is bad, and keeps all that this takes."""
        session, trained, kept = self.session, self.state.trained, None
        for part in itertools.islice(self.batches_from(known["step"] - 1), session.config.accumulate):
            weights = {f"network.{name}": parallel.full_tensor(x).clone() for name, x in trained.state_dict().items()}
            generators = random_state(self.state.device)
            # Compiled code does not run what watches.
            eager = torch.compiler.set_stance("force_eager") if session.config.compile else nullcontext()
            with eager, Watch(trained, len(part.index)) as watch:
                watch.look("the images", part.images)
                watch.run(self.objective(part, lambda name: nullcontext())[0])
            if not (kept and kept[0].found):  # every process runs all parts, since they may exchange something in each
                kept = watch, part, weights | {"random": generators}
        watch, batch, tensors = kept
        tensors |= batch._asdict()
        loss = next((module for module in trained.modules() if isinstance(module, EEKDLoss)), None)
        if loss:
            tensors |= _said(watch.given["snapshot_logits"], watch.given["snapshot_features"])
        known |= {"found": watch.found and str(watch.found), "spec": session.spec(self.phase)}
        path = _keep(self.folder, f"non-finite-{known['step']}", tensors, known, session, loss)
        return watch.found, batch.index, path


class Found(NamedTuple):
    """A tensor that is not finite, its name and, where it is so for some of the batch only, for which rows."""

    name: str
    tensor: Tensor
    rows: list[int]

    def __str__(self):
        kinds = {"nan": self.tensor.isnan(), "inf": self.tensor.isinf()}
        counts = " and ".join(f"{kind} in {count}" for kind, bad in kinds.items() if (count := bad.sum().item()))
        return f"{self.name}, {counts} of {self.tensor.numel()} values"


class Watch:
    """Looks, while a network runs on `size` rows and is differentiated within `with`, at all that goes through it.

    `found` is, in the order in which it runs, the first tensor that is not finite: a parameter, what goes into or
    comes out of a module, the loss, or the gradient of a module's output or of a parameter. `given` are the arguments
    of an EEKDLoss.
    """

    def __init__(self, trained: nn.Module, size: int):
        self.trained, self.size, self.found, self.given, self._handles = trained, size, None, {}, []

    def __enter__(self) -> "Watch":
        for name, parameter in self.trained.named_parameters():
            self.look(f"the parameter {name}", parameter, size=0)
            if parameter.requires_grad:
                self._watch_gradient(name, parameter, size=0)
        for name, module in self.trained.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no such hooks
                continue
            title = f"{name} ({type(module).__name__})" if name else f"the network ({type(module).__name__})"
            before, after = partial(self._before, title), partial(self._after, title)
            self._handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, loss: Tensor) -> None:
        """Differentiates what the network's outputs came to."""
        self.look("the loss", loss)
        self.trained.zero_grad()
        loss.backward()
        self.trained.zero_grad()

    def look(self, name: str, value, size: int | None = None) -> None:
        for tensor in map(parallel.to_local, _tensors(value)):
            if self.found or tensor.isfinite().all():
                continue
            bad = ~tensor.isfinite()
            size = self.size if size is None else size
            dim = next((dim for dim, rows in enumerate(bad.shape[:2]) if rows == size), None)  # (B, ...), (M, B, ...)
            rows = [] if dim is None else bad.movedim(dim, 0).flatten(1).any(1).nonzero()[:, 0].tolist()
            self.found = Found(name, tensor.detach().clone(), rows if len(rows) < size else [])

    def _watch_gradient(self, name: str, tensor: Tensor, size: int | None = None) -> None:
        self._handles.append(tensor.register_hook(partial(self.look, f"the gradient of {name}", size=size)))

    def _before(self, title: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        for name, value in given.items():
            if isinstance(module, EEKDLoss):  # to which a class of -inf is one that does not exist
                value = [tensor.clamp(min=torch.finfo(tensor.dtype).min) for tensor in _tensors(value)]
            self.look(f"the {name} of {title}", value)
        if isinstance(module, EEKDLoss):
            self.given = given

    def _after(self, title: str, module: nn.Module, args: tuple, output) -> None:
        if isinstance(module, EEKDLoss):
            total, measured = output
            for name, value in reversed(measured.items()) if not total.isfinite() else ():
                self.look(f"the {name} of {title}", value)
            return
        self.look(f"the output of {title}", output)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                self._watch_gradient(f"the output of {title}", tensor)


class Verifier:
    """Compares an EEKDLoss with its formula in fp64, on its first `verify_loss` batches of finite loss since the start.

    Called with the loss and what it was given. FloatingPointError, one sentence, where they differ.
    """

    def __init__(self, name: str, loss: EEKDLoss, session, folder: Path):
        self.name, self.loss, self.session, self.folder = name, loss, session, folder
        self.agree = parallel.all_reduce_max
        self.left = session.config.verify_loss

    def __call__(self, total: Tensor, *given) -> None:
        if not self.left:
            return
        found, device = differs(self.loss, *given), given[0].device
        flags = torch.stack([torch.tensor(found is not None, device=device), ~total.isfinite()])
        wrong, bad = self.agree(flags.float()).tolist()
        self.left -= not bad
        if not wrong:
            return
        if not found:
            raise FloatingPointError(f"{self.name}: in another process the loss differs from its formula")
        logits, snapshot_logits, labels, features, snapshot_features = given
        tensors = {"student_logits": logits, "labels": labels, "student_features": features}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        tensors |= _said(snapshot_logits, snapshot_features)
        tensors |= {f"network.{name}": tensor for name, tensor in self.loss.state_dict().items()}
        known = {"phase": self.name, "found": found}
        path = _keep(self.folder, "loss-differs", tensors, known, self.session, self.loss)
        made, backend = made_with(device), backend_for(device)
        raise FloatingPointError(
            f"{self.name}: {found}, by backend {backend} on {made['device']} ({made['cpu_capability']}) with torch "
            f"{made['torch']}; build eekd again, or train in Python within eekd.use_backend of another backend; the "
            f"inputs are in {path}"
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
        exact = EEKDLoss(**_options(loss))
    exact.load_state_dict({name: x.double() for name, x in loss.state_dict().items()}, assign=True)
    with use_backend("reference"):
        torchs = _evaluate(loss, given)
        truth = _evaluate(exact, [_double(value) for value in given])
    rows, classes = given[0].shape
    tau = loss.options["temperature"]
    span = max(math.log(max(classes, 3)), *(_largest(z) / tau for z in _tensors(given[:2])))
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


def replay(path: str | Path, device: str = "cpu") -> "Found | str | None":
    """What is wrong with what was kept in `path`, on this machine: the first bad tensor, or what of the loss differs.

    None where nothing is. ValueError or FileNotFoundError where a file is damaged, missing or of another format.
    """
    generators = random_state(torch.device(device))
    try:
        return _replay(Path(path), device)
    finally:
        set_random_state(generators, torch.device(device))


def _replay(path: Path, device: str) -> "Found | str | None":
    known = read_json(path)
    if not isinstance(known, dict):
        raise ValueError(f"{path} must be an object, got a {type(known).__name__}")
    if known.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {known.get('format')!r:.100}")
    if missing := [name for name in ("sha256", "classes", "criterion", "settings") if name not in known]:
        raise ValueError(f"{path} must have {', '.join(missing)}, got {', '.join(known):.100}")
    tensors = load_tensors(path.with_suffix(".safetensors"), known["sha256"])
    weights = {name.removeprefix("network."): tensors.pop(name) for name in [*tensors] if name.startswith("network.")}
    generators = tensors.pop("random", None)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    criterion, settings = known["criterion"], known["settings"]
    loss = criterion and EEKDLoss(**criterion).to(device)
    snapshot_logits, snapshot_features = tensors.get("snapshot_logits"), tensors.get("snapshot_features")
    if "snapshot_atoms" in tensors:
        rest = tensors["snapshot_indices"], tensors["snapshot_atoms"]
        snapshot_logits = TopKLogits(snapshot_logits, *rest, known["classes"])
    if "images" not in tensors:
        load_state(loss, weights, path)
        given = tensors["student_logits"], snapshot_logits, tensors.get("labels"), tensors.get("student_features")
        return differs(loss, *given, snapshot_features)
    placement = Placement(settings["precision"], settings["channels_last"], torch.device(device))
    network = placement.build(known["spec"])
    trained = nn.ModuleList([network, loss]) if loss else network
    load_state(trained, weights, path)
    capture = LastFeatures(network.train()) if loss else network
    set_random_state(generators, torch.device(device))
    with Watch(trained.train(), len(tensors["images"])) as watch:
        watch.look("the images", tensors["images"])
        output = placement.run(capture, tensors["images"])
        if loss:
            logits, features = output
            watch.run(loss(logits, snapshot_logits, tensors["labels"], features, snapshot_features)[0])
        else:
            watch.run(F.cross_entropy(output.float(), tensors["labels"]))
    return watch.found


def _keep(folder: Path, stem: str, tensors: dict, known: dict, session, loss: EEKDLoss | None) -> Path:
    """Writes what `replay` reads, and returns the path of its JSON."""
    path = folder / (stem + f"-process-{parallel.rank()}" * (not parallel.is_main_process()) + ".json")
    sha256 = save_tensors(path.with_suffix(".safetensors"), tensors)
    classes = len(session.data.classes)
    write_json_atomic(path, {
        "format": FORMAT, "sha256": sha256, **known, "classes": classes, "criterion": loss and _options(loss),
        "settings": dataclasses.asdict(session.config), "made_with": made_with(session.device),
    })  # fmt: skip
    return path


def _options(loss: EEKDLoss) -> dict:
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


def _said(snapshot_logits, snapshot_features: Tensor | None) -> dict[str, Tensor]:
    """What snapshots said, as named tensors."""
    z = snapshot_logits
    if isinstance(z, TopKLogits):
        said = {"snapshot_logits": z.logits, "snapshot_indices": z.indices, "snapshot_atoms": z.atoms}
    else:
        said = {"snapshot_logits": z if isinstance(z, Tensor) else torch.stack(tuple(z))}
    return said if snapshot_features is None else said | {"snapshot_features": snapshot_features}


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
        gradients = torch.autograd.grad(total, leaves.values(), allow_unused=True, materialize_grads=True)
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


def _tensors(value) -> list[Tensor]:
    """The floating-point tensors anywhere in what goes into a module or comes out."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, TopKLogits):
        return [value.logits, value.atoms]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for entry in value for tensor in _tensors(entry)]


def _some(index: Tensor) -> str:
    first = ", ".join(map(str, index[:5].tolist()))
    return first + (f" and {len(index) - 5} more" if len(index) > 5 else "")


def _overflow(tensors: Iterable[Tensor | None]) -> Tensor:
    """1 where any number in them, as far as this process holds them, is not finite, else 0."""
    parts = [part for x in tensors if x is not None and (part := parallel.to_local(x)).numel()]
    # Extremes, for a sum can leave the range of what it is of; on a CPU a norm takes ten times as long as these.
    if not parts or parts[0].is_cuda:
        return (~nn.utils.get_total_norm(parts, math.inf).isfinite()).float()
    extremes = torch.stack([extreme.isfinite() for part in parts for extreme in part.aminmax()])
    return (~extremes.all()).float()
