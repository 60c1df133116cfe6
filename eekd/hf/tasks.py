"""The two kinds of students: language models, whose logits are never all in memory, and classifiers."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eekd.hf import checks
from eekd.hf.banks import Bank
from eekd.hf.classifier_bank import ClassifierBank
from eekd.hf.heads import ClassifierHead, LanguageHead, only
from eekd.hf.teachers import Teachers
from eekd.hf.token_bank import TokenBank
from eekd.method import weightings
from eekd.method.losses import EEKDLoss
from eekd.method.topk import TopKLogits
from eekd.ops import linear_ensemble_kd, sparse_ensemble_kd
from eekd.snapshots.wrappers import logits_of

IGNORED = -100
LABELS = "labels", "shift_labels"  # of a batch, what models are not given
WEIGHED = 64 << 20  # logits that a weighting by logits looks at at once, in all snapshots
CHECKED = 64  # tokens whose logits are compared on the first batch


class LanguageModelling:
    """Every token whose label is not -100 is a row; with `shift` its label is the next token.

    A batch's own `shift_labels` are taken as they are. With a bank, tokens that are padding are no rows.
    """

    temperature = 1.0

    def __init__(self, student: nn.Module, teachers: Teachers | TokenBank, args, tokenizer, *, shift: bool):
        self.student, self.teachers, self.shift = student, teachers, shift
        self.head = LanguageHead(student, "the student")
        self.heads: list = teachers.language_heads()
        named = dict(zip(teachers.names, self.heads, strict=True))
        self.top_k_bank = teachers if isinstance(teachers, TokenBank) and teachers.keeps_top_k else None
        if self.top_k_bank and args.weighting == "attention":
            raise ValueError("weighting must be one without features for a top-k bank, got 'attention'")
        if self.top_k_bank and len(self.head.weight) < self.top_k_bank.manifest.classes:
            got = len(self.head.weight)
            raise ValueError(f"the student must have the bank's {self.top_k_bank.manifest.classes} tokens, got {got}")
        checks.check_vocabularies({"the student": self.head, **named}, tokenizer)
        self.student_dim = self.head.weight.shape[1]
        widths = {head.weight.shape[1] for head in self.heads}
        if args.weighting == "attention" and len(widths) > 1:
            raise ValueError(f"teachers must have one width for weighting 'attention', got {sorted(widths)}")
        self.snapshot_dim = max(widths)

    def targets(self, inputs: dict) -> Tensor:
        """The labels of a batch in the shape of the hidden states, those that do not count being -100."""
        if "shift_labels" in inputs:
            labels = inputs["shift_labels"]
        else:
            labels = inputs["labels"]
            labels = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED) if self.shift else labels
        return _known(self.teachers, labels, inputs)

    def verify(self, inputs: dict, context, half: bool) -> None:
        """Compares every head with its model's own logits; one soft-cap for all is wanted."""
        labels = self.targets(inputs)
        rows = (labels != IGNORED).flatten().nonzero()[:CHECKED, 0]
        rows = rows if len(rows) else torch.arange(min(CHECKED, labels.numel()), device=labels.device)
        batch = model_inputs(inputs)
        self.head.verify(self.student, batch, rows, half)
        if self.top_k_bank:
            return
        self.teachers.verify(self.heads, context, batch, rows, half)
        for head in self.heads:
            if head.softcap != self.head.softcap:
                raise ValueError(
                    f"{head.name} must have the student's soft-cap {self.head.softcap}, got {head.softcap}"
                )

    def teach(self, inputs: dict, context) -> dict:
        """What the teachers say of a batch: their hidden states (N, H_m) at the rows that count."""
        labels = self.targets(inputs)
        rows = (labels != IGNORED).flatten().nonzero()[:, 0]

        def select(hidden: Tensor) -> Tensor:
            if hidden.shape[:-1] != labels.shape:
                raise ValueError(
                    f"hidden states must be one for each label {tuple(labels.shape)}, got {tuple(hidden.shape[:-1])}"
                )
            return hidden.flatten(0, -2).index_select(0, rows)

        taught = {"labels": labels.flatten()[rows], "select": select}
        if self.top_k_bank:
            return taught | {"top_k": self.top_k_bank.top_k(model_inputs(inputs), select)}
        return taught | {"hidden": self.teachers.hidden_states(self.heads, model_inputs(inputs), select, context)}

    def tap(self):
        """See `LanguageHead.tap`."""
        return self.head.tap()

    def loss(
        self, criterion: EEKDLoss, output, tapped: list[Tensor], taught: dict, items: Tensor
    ) -> tuple[Tensor, dict]:
        """The sum over the rows that count, divided by `items`; and what was measured, without gradient."""
        hidden, labels = taught["select"](only(tapped, "the student")), taught["labels"]
        if "top_k" in taught:
            return self._sparse_loss(criterion, hidden, taught["top_k"], labels, items)
        keys = taught["hidden"]
        factors = [head.scale / self.head.scale for head in self.heads]
        shared = all(head.weight is self.heads[0].weight for head in self.heads) and len(set(factors)) == 1
        heads = self.heads[:1] if shared else self.heads
        states = [u if f == 1 else u * f for u, f in zip(keys, factors, strict=True)]
        biases = None
        if any(head.bias is not None for head in heads):
            zero = [head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias for head in heads]
            biases = [b.detach() * f for b, f in zip(zero, factors, strict=not shared)]
        weights = [head.weight.detach() for head in heads]
        result = linear_ensemble_kd(
            hidden,
            self.head.weight,
            states,
            weights[0] if shared else weights,
            labels,
            student_bias=self.head.bias,
            snapshot_biases=biases[0] if shared and biases else biases,
            scores=self._scores(criterion, hidden, keys, states, heads, biases, labels),
            logit_scale=self.head.scale,
            softcap=self.head.softcap,
            denominator=items,
            **criterion.options,
        )
        loss = result.loss
        if criterion.attention is not None and criterion.options["attention_objective"] == "label":
            loss = loss + result.attention_loss
        return loss, {
            "distillation_loss": result.loss.detach(),
            "attention_loss": result.attention_loss.detach(),
            "weights": result.weights.sum(0) / items,
        }

    def _sparse_loss(self, criterion, hidden, kept: TopKLogits, labels, items) -> tuple[Tensor, dict]:
        """The same of logits kept at K tokens; the student's are made some rows at a time, in the backward again."""

        def part(hidden, logits, indices, atoms, labels):
            z = TopKLogits(logits, indices, atoms, kept.classes)
            scores = weightings.log_weights(criterion.entry, z, labels)
            tail, options = z.tail(criterion.options["temperature"]), criterion.options | {"reduction": "sum"}
            return sparse_ensemble_kd(
                self.head.project(hidden, kept.classes), logits, tail, indices, labels, scores=scores, **options
            )

        size = max(1, WEIGHED // (4 * kept.classes))
        loss, weights = hidden.sum() * 0, torch.zeros(len(kept), device=hidden.device)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            part_kept = kept.logits[:, rows], kept.indices[rows], kept.atoms[:, rows]
            result = checkpoint(part, hidden[rows], *part_kept, labels[rows], use_reentrant=False)
            loss, weights = loss + result.loss, weights + result.weights.sum(0)
        return loss / items, {
            "distillation_loss": (loss / items).detach(),
            "attention_loss": torch.zeros_like(loss).detach(),
            "weights": weights / items,
        }

    def _scores(self, criterion, hidden, keys, states, heads, biases, labels) -> Tensor | None:
        """(N, M), by the attention or by what the weighting says of the logits, some rows at a time."""
        if criterion.attention is not None:
            query = hidden.detach() if criterion.detach_query else hidden
            query, keys = criterion.attention(query, torch.stack(keys))
            return torch.einsum("nd,mnd->nm", query, keys)
        with torch.no_grad():
            count, rows = len(states), len(hidden)
            if not weightings.get(criterion.weighting).per_sample or count == 1 or not rows:
                return weightings.log_weights(criterion.entry, hidden.new_zeros(count, rows, 1), None)
            classes = min(len(self.head.weight), *(len(head.weight) for head in heads))
            size, scores = max(1, WEIGHED // (4 * classes * count)), []
            for part in range(0, rows, size):
                logits = []
                for m, state in enumerate(states):
                    k = m if len(heads) > 1 else 0
                    z = state[part : part + size].float() @ heads[k].weight[:classes].float().t()
                    z = (z if biases is None else z + biases[k][:classes].float()) * self.head.scale
                    logits.append(
                        z if self.head.softcap is None else self.head.softcap * (z / self.head.softcap).tanh()
                    )
                log_w = weightings.log_weights(criterion.entry, logits, labels[part : part + size])
                if log_w is None:
                    return None
                scores.append(log_w)
            return torch.cat(scores)


class Classification:
    """Every sample, or every token of a token classifier, whose label is not -100 is a row.

    With a bank, tokens that are padding are no rows.
    """

    temperature = 5.0

    def __init__(self, student: nn.Module, teachers: Teachers | ClassifierBank, args, tokenizer):
        self.student, self.teachers = student, teachers
        checks.check_classes(student.config, dict(zip(teachers.names, teachers.configs(), strict=True)))
        self.classes: int = student.config.num_labels  # pyright: ignore
        self.head: ClassifierHead | None = None
        self.heads: list | None = None
        self.student_dim = self.snapshot_dim = None
        if weightings.get(args.weighting).needs_features:
            self.head = ClassifierHead(student, "the student", args.feature_layer, self.classes)
            self.heads = teachers.classifier_heads(args.feature_layer)
            self.student_dim, self.snapshot_dim = self.head.dim, self.heads[0].dim
            if len(widths := sorted({str(head.dim) for head in self.heads})) > 1:
                raise ValueError(f"teachers must have one width, got {', '.join(widths)}")

    def targets(self, inputs: dict) -> Tensor:
        """The labels of a batch, those that do not count being -100."""
        return _known(self.teachers, inputs["labels"], inputs)

    def verify(self, inputs: dict, context, half: bool) -> None:
        """Compares logits that are taken with features to the models' own."""
        if self.head is None or self.heads is None:
            return
        batch = model_inputs(inputs)
        self.head.verify(self.student, batch)
        self.teachers.verify(self.heads, context, batch)

    def teach(self, inputs: dict, context) -> dict:
        """The teachers' logits and features of a batch, at the rows that count."""
        labels = self.targets(inputs)
        rows = (labels != IGNORED).flatten().nonzero()[:, 0]
        logits, features = self.teachers.logits_and_features(self.heads, model_inputs(inputs), context)
        shape = labels.numel(), self.classes
        for name, z in zip(self.teachers.names, logits, strict=True):
            if z.shape != shape:
                raise ValueError(f"{name} must give logits {shape}, a row for each label, got {tuple(z.shape)}")
        return {
            "labels": labels.flatten()[rows],
            "rows": rows,
            "logits": [z[rows] for z in logits],
            "features": None if features is None else torch.stack([u[rows] for u in features]),
        }

    def tap(self):
        """See `ClassifierHead.tap`."""
        return self.head.tap() if self.head else nullcontext([])

    def loss(
        self, criterion: EEKDLoss, output, tapped: list[Tensor], taught: dict, items: Tensor
    ) -> tuple[Tensor, dict]:
        """The sum over the rows that count, divided by `items`; and what was measured, without gradient."""
        logits, rows = logits_of(output), taught["rows"]
        logits, features = self.head.split(logits, tapped) if self.head else (logits.flatten(0, -2), None)
        features = None if features is None else features[rows]
        loss, measured = criterion(logits[rows], taught["logits"], taught["labels"], features, taught["features"])
        share = len(rows) / items  # the criterion's loss is a mean
        names = {"distillation_loss": "loss", "attention_loss": "attention_loss", "weights": "weights"}
        return loss * share, {name: measured[key] * share for name, key in names.items()}


def model_inputs(inputs: dict) -> dict:
    """A batch without its labels."""
    return {name: value for name, value in inputs.items() if name not in LABELS}


def _known(teachers: Teachers | Bank, labels: Tensor, inputs: dict) -> Tensor:
    """Labels, with a bank -100 at padding, of which it holds nothing."""
    mask = inputs.get("attention_mask")
    if not isinstance(teachers, Bank) or mask is None or mask.shape != labels.shape:
        return labels
    return labels.masked_fill(~mask.bool(), IGNORED)


def first_samples(inputs: dict, count: int = 2) -> dict:
    """The first samples of a batch."""
    size = len(inputs["labels"])
    return {k: v[:count] if isinstance(v, Tensor) and v.ndim and len(v) == size else v for k, v in inputs.items()}
