"""The student's loss: how the snapshots are weighted, and `ensemble_kd`, or `sparse_ensemble_kd`, with the weights."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eekd import parallel
from eekd.method import weightings
from eekd.method.attention import SnapshotAttention
from eekd.method.topk import TopKLogits
from eekd.ops import ensemble_kd, sparse_ensemble_kd
from eekd.ops.checks import are_probabilities, as_number, in_one_dimension


class EEKDLoss(nn.Module):
    """Distils M snapshots of one teacher into a student.

        L = α CE(s, y) + (1 - α) τ² KL(p || softmax(s / τ)),    p = Σ_m w_m softmax(z_m / τ)

    Weighting "attention" learns w with a SnapshotAttention of the given sizes (`student_dim`, `snapshot_dim`,
    `embed_dim`, `normalize`, `scale`): optimise this module's parameters with the student's. `attention_objective`
    says what it minimises: "label", the negative log-likelihood of the label under the target p, which is then
    detached in L; or "kl", L itself. `detach_query` keeps its gradient from the student's features. The other
    weightings are those of `eekd.method.weightings`, whose `register` adds your own; `path/to/file.py:NAME` runs a file
    with one. `fusion` "logit" averages logits instead of probabilities.

    forward takes student_logits (B, C); snapshot_logits (M, B, C), a list of M tensors (B, C), or TopKLogits, whose
    other classes then count as one (`sparse_ensemble_kd`); labels (B,), soft labels (B, C) such as mixup's, or None
    for pure distillation; and for "attention" student_features (B, student_dim) and snapshot_features
    (M, B, snapshot_dim). Except with TopKLogits, B may be several dimensions, (B, T).
    It returns `(loss, measurements)`. The loss is the mean over the rows whose label is not `ignore_index`, or over all
    rows if labels are soft. Backpropagate it alone: it is L plus, with objective "label", the attention's own loss.
    The measurements are detached and stay on the device: "loss" is L alone, to compare weightings;
    "attention_loss" is -log p_y; "weights" (M,) is the mean weight of each snapshot; "weight_entropy" is the
    mean entropy of a row's weights, from 0 to log M. Each is computed when it is first read.

    Attributes:
        check_wrapper: whether to raise RuntimeError if a student is wrapped in DistributedDataParallel or FSDP and the
            attention is trained outside of one. Set it to False if you average its gradients over the processes
            yourself.

    Raises ValueError for options out of range, missing features for "attention", missing labels for "confidence",
    a single class, which leaves nothing to learn, and probabilities in place of the first logits; else what
    `ensemble_kd` raises.
    Source: Wang et al., arXiv 2202.12488; objective "label" is this project's.
    """

    def __init__(
        self,
        weighting: str = "attention",
        *,
        student_dim: int | None = None,
        snapshot_dim: int | None = None,
        embed_dim: int = 8,
        normalize: bool = True,
        scale: float | None = None,
        temperature: float = 5.0,
        alpha: float = 0.5,
        fusion: str = "probability",
        attention_objective: str = "label",
        detach_query: bool = True,
        ignore_index: int = -100,
    ):
        super().__init__()
        for name, value, choices in (
            ("fusion", fusion, ("probability", "logit")),
            ("attention_objective", attention_objective, ("label", "kl")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        temperature, alpha = as_number(temperature), as_number(alpha)
        if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a number above 0, got {temperature!r}")
        if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be a number from 0 to 1, got {alpha!r}")
        entry = weightings.get(weighting)
        self.attention = None
        if entry.needs_features:
            # SnapshotAttention refuses None.
            self.attention = SnapshotAttention(student_dim, snapshot_dim, embed_dim, normalize, scale)  # pyright: ignore
        self.weighting, self.entry = entry.name, entry  # which a later file of that name does not change
        self.detach_query = detach_query
        self.check_wrapper, self._looks, self._first = True, 0, True
        self.options = {
            "temperature": temperature,
            "alpha": alpha,
            "fusion": fusion,
            "attention_objective": attention_objective,
            "ignore_index": as_number(ignore_index),
        }

    def forward(
        self,
        student_logits: Tensor,
        snapshot_logits: Tensor | list[Tensor] | TopKLogits,
        labels: Tensor | None = None,
        student_features: Tensor | None = None,
        snapshot_features: Tensor | None = None,
    ) -> tuple[Tensor, "Measurements"]:
        if isinstance(student_logits, Tensor) and student_logits.ndim > 1:
            if student_logits.shape[-1] == 1:
                raise ValueError(
                    "student_logits must have 2 classes or more, got 1, whose softmax is 1 whatever is learned; "
                    "for a single logit z give the classes (0, z)"
                )
            if student_logits.ndim > 2:
                rows, student_logits = student_logits.shape[:-1], student_logits.flatten(0, -2)
                snapshot_logits, labels, student_features, snapshot_features = in_one_dimension(
                    rows,
                    snapshot_logits=snapshot_logits,
                    labels=labels,
                    student_features=student_features,
                    snapshot_features=snapshot_features,
                )
        if self.attention is None:
            by = {"scores": weightings.log_weights(self.entry, snapshot_logits, labels)}
        elif student_features is None or snapshot_features is None:
            name = "student_features" if student_features is None else "snapshot_features"
            raise ValueError(f"{name} must be given, for weighting {self.weighting!r} compares features")
        else:
            if not torch.compiler.is_compiling():
                self._check_wrapper(student_logits, student_features)
            if self.detach_query:
                student_features = student_features.detach()
            query, keys = self.attention(student_features, snapshot_features)
            by = {"query": query, "keys": keys}
        if isinstance(snapshot_logits, TopKLogits):
            z = snapshot_logits
            if student_logits.shape[1:] != (z.classes,):
                raise ValueError(f"student_logits must have shape (B, {z.classes}), got {tuple(student_logits.shape)}")
            tail = z.tail(self.options["temperature"])
            result = sparse_ensemble_kd(student_logits, z.logits, tail, z.indices, labels, **by, **self.options)
        else:
            result = ensemble_kd(student_logits, snapshot_logits, labels, **by, **self.options)
        if self._first and not torch.compiler.is_compiling():
            self._check_logits(student_logits, snapshot_logits)
        learns_by_label = self.attention is not None and self.options["attention_objective"] == "label"
        loss = result.loss + result.attention_loss if learns_by_label else result.loss
        measured = {"loss": result.loss.detach(), "attention_loss": result.attention_loss.detach()}
        return loss, Measurements(measured, result.weights)

    def _check_logits(self, student_logits: Tensor, snapshot_logits: Tensor | list[Tensor] | TopKLogits) -> None:
        """ValueError where the first logits are probabilities; to look at later ones would wait for the GPU."""
        capturing = student_logits.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch._C._are_functorch_transforms_active() or capturing or student_logits.is_meta:
            return
        snapshots = snapshot_logits[0] if isinstance(snapshot_logits, list | tuple) else snapshot_logits
        for name, rows in (("student_logits", student_logits), ("snapshot_logits", snapshots)):
            if isinstance(rows, Tensor) and are_probabilities(rows):
                raise ValueError(f"{name} must be logits, got probabilities, which sum to 1: leave out the softmax")
        self._first = False

    def _check_wrapper(self, *outputs: Tensor) -> None:
        """RuntimeError where the attention is trained outside what averages the student's gradients."""
        if (
            not self.check_wrapper
            or parallel.world_size() == 1
            or parallel.in_ddp()
            or not (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()))
        ):
            return
        self._looks += 1
        if self._looks & (self._looks - 1):  # to look is slow
            return
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        replicated = parallel.wrappers_alive(DistributedDataParallel)
        sharded = parallel.wrappers_alive(FullyShardedDataParallel, FSDPModule)
        if parallel.around(self, sharded):
            return
        trained = set().union(*map(_parameters_of, outputs)) if replicated or sharded else set()
        if (
            parallel.around(self, replicated)
            or any(id(parameter) in trained for wrapper in replicated for parameter in wrapper.parameters())
            or (any(p.requires_grad for wrapper in sharded for p in wrapper.parameters()) and trained - _held(sharded))
        ):
            raise RuntimeError(
                "EEKDLoss must run inside DistributedDataParallel or FSDP, as its student does, for nothing averages "
                "the attention's gradients outside: wrap it too, or wrap Distilled(student, ensemble, loss) as one"
            )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in {"weighting": self.weighting, **self.options}.items())


def _parameters_of(output: Tensor) -> set[int]:
    """The id of every leaf to which backward from `output` brings a gradient."""
    seen, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += (following for following, _ in node.next_functions)
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


def _held(sharded: Iterable[nn.Module]) -> set[int]:
    """The id of every parameter of a module outside of the shards, whose modules compute with parameters not theirs."""
    inside = {id(module) for wrapper in sharded for module in wrapper.modules()}
    outside = (module for module in parallel.wrappers_alive(nn.Module) if id(module) not in inside)
    return {id(parameter) for module in outside for parameter in vars(module).get("_parameters", {}).values()}


class Measurements(Mapping):
    """The measurements of `EEKDLoss` for a batch, by name. Each is computed when it is first read.

    Attributes:
        row_weights: the weights (B, M) of each row.
    """

    NAMES = "loss", "attention_loss", "weights", "weight_entropy"

    def __init__(self, values: Mapping[str, Tensor], row_weights: Tensor | None = None):
        self._values, self.row_weights = {**values}, row_weights

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.NAMES:
            raise KeyError(name)
        if name not in self._values:
            weights = self.row_weights
            rows = weights.sum().clamp(min=1)  # an ignored row has no weight, any other a total of 1
            self._values["weights"] = weights.sum(0) / rows
            self._values["weight_entropy"] = torch.special.entr(weights).sum() / rows
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.NAMES)

    def __len__(self) -> int:
        return len(self.NAMES)

    def __or__(self, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**self, **others}

    def __repr__(self) -> str:
        return repr(dict(self))
