"""The weightings of snapshots, in one registry: what each is called, how it is drawn and what it computes.

An entry is all there is to a weighting: `EEKDLoss`, the command lines, tables and reports know it from here. torch is
imported by the functions only, because a command line needs the names at once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eekd.io.files import nearest
from eekd.method.rivals import RIVALS
from eekd.user_code import is_file_name, load, own_name

if TYPE_CHECKING:
    from torch import Tensor

    from eekd.method.topk import TopKLogits


@dataclass(frozen=True)
class Weighting:
    """An entry of the registry.

    Attributes:
        name: what settings and folders call it, a Python identifier.
        title: what tables and plots call it.
        colours: of its lines on a light page and on a dark one, as #rrggbb.
        log_weights: (snapshot_logits, labels) -> logarithms of the weights (B, M), or None where all are equal. The
            entry "attention" has none: a SnapshotAttention learns its weights from features.
        per_sample: whether the samples of a batch have different weights.
    """

    name: str
    title: str
    colours: tuple[str, str]
    log_weights: Callable[..., "Tensor | None"] | None
    per_sample: bool = True

    @property
    def needs_features(self) -> bool:
        """Whether the student and the snapshots must give features."""
        return self.log_weights is None


def _last(snapshot_logits, labels):
    import torch

    rows, m = len(snapshot_logits[0]), len(snapshot_logits)
    weights = torch.arange(1, m + 1, device=snapshot_logits[0].device) == m
    return weights.float().log().expand(rows, m)


def _uniform(snapshot_logits, labels):
    return None


def _linear_increase(snapshot_logits, labels):
    import torch

    rows, m = len(snapshot_logits[0]), len(snapshot_logits)
    return torch.arange(1, m + 1, device=snapshot_logits[0].device).float().log().expand(rows, m)


def _linear_decrease(snapshot_logits, labels):
    return _linear_increase(snapshot_logits, labels).flip(1)


def _entropy(snapshot_logits, labels):
    import torch

    # float32 and one snapshot at a time: no copy of (M, B, C), whatever its strides
    probabilities = (z.softmax(1, dtype=torch.float32) for z in snapshot_logits)
    entropy = torch.stack([torch.special.entr(p).sum(1) for p in probabilities], 1)
    total = entropy.sum(1, keepdim=True).clamp(min=torch.finfo(entropy.dtype).tiny)
    return (1 - entropy / total).log()


def _confidence(snapshot_logits, labels):
    import torch

    from eekd.ops.checks import is_soft

    rows, classes = snapshot_logits[0].shape
    soft = is_soft(labels)
    shape = (rows, classes) if soft else (rows,)
    if labels is None or labels.shape != shape:
        got = None if labels is None else tuple(labels.shape)
        raise ValueError(f"labels must have shape {shape} for weighting 'confidence', got {got}")
    likelihoods = (z.log_softmax(1, dtype=torch.float32) for z in snapshot_logits)
    if soft:
        ce = torch.stack([-torch.where(labels == 0, 0, labels * log_p).sum(1) for log_p in likelihoods], 1)
    else:  # clamped: an ignored row is not used, and a label out of range is for ensemble_kd to refuse
        y = labels.long().clamp(0, classes - 1)[:, None]
        ce = torch.cat([-log_p.gather(1, y) for log_p in likelihoods], 1)
    return (1 - ce.softmax(1)).log()


_ENTRIES = [
    Weighting("last", "KD (last)", ("#0072b2", "#4aa8f0"), _last, per_sample=False),
    Weighting("uniform", "uniform", ("#00916a", "#2cc295"), _uniform, per_sample=False),
    Weighting("linear_increase", "linear increase", ("#3a93c9", "#8fd0f5"), _linear_increase, per_sample=False),
    Weighting("linear_decrease", "linear decrease", ("#948000", "#e0cf4b"), _linear_decrease, per_sample=False),
    Weighting("entropy", "entropy (EBKD)", ("#b5609a", "#de9bc4"), _entropy),
    Weighting("confidence", "confidence (CA-MKD)", ("#bd7b00", "#f0b030"), _confidence),
    Weighting("attention", "EEKD (attention)", ("#d55e00", "#ff8040"), None),
]
_REGISTRY = {entry.name: entry for entry in _ENTRIES}
_OWN = frozenset(_REGISTRY)
# Students, and colours of other things.
_RESERVED = {"ce", *RIVALS, "teacher", "page", "ink", "quiet", "faint", "early", "late"}


def register(
    name: str,
    title: str,
    log_weights: Callable[..., "Tensor | None"],
    *,
    colours: tuple[str, str] = ("#6f5bd0", "#a898ff"),
    per_sample: bool = True,
) -> Weighting:
    """Adds a weighting of your own, which `EEKDLoss`, command lines, tables and reports then know; returns its entry.

        def sharp(snapshot_logits, labels):  # the most confident snapshot alone, for each sample
            best = torch.stack([z.log_softmax(1).amax(1) for z in snapshot_logits], 1)  # (B, M)
            return 20 * best

        register("sharp", "most confident", sharp)

    `log_weights(snapshot_logits, labels)` gives the logarithms of the weights, (B, M), up to a constant for each row,
    or None where all are equal. It is given M tensors (B, C), one tensor (M, B, C) or a list, and labels (B,), soft
    labels (B, C) or None.
    It runs without gradient. Where a bank keeps K classes only, the others come as one class more, the last.
    `Weighting` says what the other arguments are. The name of an own weighting can be registered again.

    Raises ValueError for a name that is no identifier or belongs to eekd, and for other colours; TypeError.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"name must be an identifier, got {name!r}")
    if name in _OWN | _RESERVED:
        raise ValueError(f"name must be one that eekd does not use itself, got {name!r}")
    if not isinstance(title, str) or not title:
        raise TypeError(f"title must be some text, got {title!r}")
    if not callable(log_weights):
        raise TypeError(f"log_weights must be a function, got {type(log_weights).__name__}")
    if len(colours) != 2 or not all(isinstance(c, str) and re.fullmatch("#[0-9a-fA-F]{6}", c) for c in colours):
        raise ValueError(f"colours must be two of the form #rrggbb, for a light page and a dark one, got {colours!r}")
    _REGISTRY[name] = entry = Weighting(name, title, colours, log_weights, per_sample)
    return entry


def registered() -> tuple[Weighting, ...]:
    """All entries: eekd's own, then those that `register` added."""
    return tuple(_REGISTRY.values())


def names() -> tuple[str, ...]:
    """The names of all entries."""
    return tuple(_REGISTRY)


def get(name: str) -> Weighting:
    """The entry called `name`, or that of `path/to/file.py:NAME`, whose code is run.

    NAME is a function as `register` wants it, or what the file itself registers. Raises ValueError for an unknown
    name, naming the nearest; what `eekd.user_code.load` and `register` raise.
    """
    if is_file_name(name):
        own = own_name(name)
        function = load(name, "a function of (snapshot_logits, labels) that returns log weights (B, M) or None")
        entry = _REGISTRY.get(own)
        return entry if entry and entry.log_weights is function else register(own, own, function)
    if name not in _REGISTRY:
        wanted = f"{', '.join(_REGISTRY)} or path/to/file.py:NAME"
        raise ValueError(f"weighting must be one of {wanted}, got {name!r}{nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


def log_weights(
    weighting: str | Weighting, snapshot_logits: "Tensor | list[Tensor] | TopKLogits", labels: "Tensor | None" = None
) -> "Tensor | None":
    """Logarithm of the weights by a name or an entry, up to a constant for each row: `scores` (B, M) of `ensemble_kd`.

        uniform           1, returned as None
        last              1 for the final snapshot, else 0: plain distillation
        linear_increase   m = 1 … M
        linear_decrease   M + 1 - m
        entropy           1 - H(p_m) / Σ_j H(p_j)                EBKD (Kwon et al., ICASSP 2020)
        confidence        1 - softmax_m(CE(p_m, y))              CA-MKD (Zhang et al., ICASSP 2022)

    with p_m = softmax(z_m), at temperature 1. A single snapshot always has weight 1.

    snapshot_logits (M, B, C), a list of M (B, C), or TopKLogits; labels (B,) or soft ones (B, C), which only
    "confidence" reads. In H the classes that TopKLogits leave out count as one, which lowers it. Raises ValueError for
    other shapes or weightings, and where a weighting of your own returns another shape.
    """
    import torch

    from eekd.method.topk import TopKLogits

    entry = weighting if isinstance(weighting, Weighting) else get(weighting)
    if entry.log_weights is None:
        fixed = ", ".join(other.name for other in registered() if other.log_weights)
        raise ValueError(f"weighting must be one of {fixed}, got {entry.name!r}")
    if len(snapshot_logits) < 2:
        return None
    with torch.no_grad():
        if isinstance(snapshot_logits, TopKLogits):
            snapshot_logits, labels = _classes_kept(snapshot_logits, labels, entry.per_sample)
        snapshots, first = len(snapshot_logits), snapshot_logits[0]
        if first.ndim != 2:
            raise ValueError(f"snapshot_logits must hold M tensors of shape (B, C), got {tuple(first.shape)}")
        scores = entry.log_weights(snapshot_logits, labels)
    if scores is not None and getattr(scores, "shape", None) != (len(first), snapshots):
        got = tuple(scores.shape) if hasattr(scores, "shape") else type(scores).__name__
        raise ValueError(
            f"weighting {entry.name!r} must return log weights (B, M) = ({len(first)}, {snapshots}) or None, got {got}"
        )
    return scores


def _classes_kept(z: "TopKLogits", labels: "Tensor | None", per_sample: bool):
    """Logits (M, B, K + 1) whose last class is all that were left out, and labels among these classes.

    Where no weight depends on a logit the (M, B, K) alone, and the labels as they are.
    """
    import torch
    from torch.nn import functional as F

    from eekd.ops.checks import is_soft

    if not per_sample:
        return z.logits, labels
    if is_soft(labels) and labels.shape == (len(z.indices), z.classes):
        rest = labels.scatter(1, z.indices, 0).sum(1, keepdim=True)
        labels = torch.cat((labels.gather(1, z.indices), rest), 1)
    elif labels is not None and labels.shape == z.indices.shape[:1]:
        kept = F.pad(z.indices == labels[:, None], (0, 1), value=True)
        labels = kept.to(torch.uint8).argmax(1)
    return torch.cat((z.logits, z.tail(1)[..., None]), 2), labels
