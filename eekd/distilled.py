"""A student, its snapshots and its loss as one module, which any trainer can train."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from eekd.method import weightings
from eekd.method.losses import EEKDLoss
from eekd.method.rival_losses import AttentionDKDLoss
from eekd.snapshots import LastFeatures, SnapshotEnsemble

OTHER_PROBLEMS = "multi_label_classification", "regression"  # of a Hugging Face config: their loss is not ours


class Distilled(nn.Module):
    """A student whose forward returns its distillation loss: one module for any trainer.

        distilled = eekd.Distilled(student, eekd.SnapshotEnsemble.load("runs/teacher"))
        distilled(images, labels=labels).loss.backward()
        Trainer(distilled, args, train_dataset=...).train()  # or Lightning, accelerate, DistributedDataParallel

    forward passes its arguments to the student and to the snapshots, except the keyword `labels`. It returns the
    student's output with `loss` and `logits` (B, C): an output of the same class for a Hugging Face model, a tuple
    (loss, *output), a dict, else an `Output`. The loss is the criterion's, over the N rows whose label counts:

        (1 / num_items_in_batch) Σ_b L_b        or, if that is not given,        (1 / N) Σ_b L_b

    num_items_in_batch is the number of labels that count in all parts of an accumulated batch; Hugging Face's Trainer
    gives it. With it the gradients of the parts add up to those of the whole batch. Without it each part's loss is the
    mean over that part, and a loop that divides by the number of parts gives rows of small parts more weight.
    In eval mode there is a loss only if there are labels; without labels only the student runs. In training labels may
    be missing only for an EEKDLoss whose `alpha` is 0.

    Wrap this module (DistributedDataParallel, accelerator.prepare), not the student. Its parameters are the student's
    and the attention's. A checkpoint of it restores both. It does not hold the snapshots, which are frozen, M times as
    large, and in their own folder. `to`, `cuda` and casts also move or cast the snapshots.

    Args:
        student: the nn.Module to train, as for `LastFeatures`. It has a hook only while it runs, so it can be saved,
            exported and scripted at any time.
        ensemble: the snapshots, which run without gradient.
        criterion: an EEKDLoss or AttentionDKDLoss; or "attention_dkd" or the name of a weighting, of which such a loss
            is then made with `options` and the widths of the features.
        layer: the layer whose input is the student's feature, see `LastFeatures`.

    Attributes:
        student, ensemble, criterion: the three parts.
        measurements: those of the last loss, see EEKDLoss; None before the first loss.

    Raises TypeError for parts of another type; ValueError for a wrapped student, widths that do not fit the criterion,
    a Hugging Face student for regression or several labels, logits that are not (B, C) or that are probabilities, and
    missing labels; else what the parts raise.
    Source: Wang et al., arXiv 2202.12488.
    """

    accepts_loss_kwargs = True  # by which Hugging Face's Trainer knows that num_items_in_batch is divided by

    def __init__(
        self,
        student: nn.Module,
        ensemble: SnapshotEnsemble,
        criterion: EEKDLoss | AttentionDKDLoss | str = "attention",
        *,
        layer: str | None = None,
        **options,
    ):
        super().__init__()
        for name, value, kind in (("student", student, nn.Module), ("ensemble", ensemble, SnapshotEnsemble)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be an instance of {kind.__name__}, got {type(value).__name__}")
        if isinstance(student, DistributedDataParallel | DataParallel):
            raise ValueError(f"student must be bare, got a {type(student).__name__}: wrap Distilled in its place")
        problem = getattr(getattr(student, "config", None), "problem_type", None)
        if problem in OTHER_PROBLEMS:
            raise ValueError(f"student must choose one of C classes, got problem_type {problem!r}")
        dkd = criterion == "attention_dkd"
        if isinstance(criterion, str):
            needs_features = dkd or weightings.get(criterion).needs_features
        elif not isinstance(criterion, EEKDLoss | AttentionDKDLoss):
            wanted = "an EEKDLoss, an AttentionDKDLoss, attention_dkd or a weighting's name"
            raise TypeError(f"criterion must be {wanted}, got {type(criterion).__name__}")
        elif options:
            raise ValueError(f"options must be left out beside an {type(criterion).__name__}, got {', '.join(options)}")
        else:
            needs_features = criterion.attention is not None
        self._capture = LastFeatures(student, layer, features=needs_features, leave_hook=False)
        widths = {}
        if needs_features:
            widths = {"student_dim": self._capture.dim, "snapshot_dim": ensemble.feature_dim}
        if isinstance(criterion, str):
            criterion = AttentionDKDLoss(**widths, **options) if dkd else EEKDLoss(criterion, **widths, **options)
        for (name, width), linear in zip(widths.items(), criterion.attention.children() if widths else (), strict=True):
            if linear.in_features != width:
                raise ValueError(f"criterion must have {name}={width}, got {linear.in_features}")
        self.student, self.ensemble, self.criterion = student, ensemble, criterion
        self.measurements: Mapping[str, Tensor] | None = None
        self._name_inputs()

    def forward(self, *inputs, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **named):
        output, logits, features = self._capture.run(*inputs, **named)
        if labels is None and not self.training:
            return output
        if labels is None and self.criterion.options.get("alpha", 1):
            raise ValueError(
                "labels must be given in training, unless the criterion has alpha=0, got None; a Trainer's "
                "label_smoothing_factor keeps them back"
            )
        if logits.ndim != 2:
            raise ValueError(
                f"student must give logits (B, C), got {tuple(logits.shape)}: eekd.hf is for language models"
            )
        snapshot_logits, snapshot_features = self.ensemble(*inputs, **named)
        loss, self.measurements = self.criterion(logits, snapshot_logits, labels, features, snapshot_features)
        if num_items_in_batch is not None:
            hard = labels is not None and labels.ndim == 1
            rows = (labels != self.criterion.options["ignore_index"]).sum() if hard else len(logits)
            loss = loss * (rows / num_items_in_batch)
        return _with_loss(output, loss, logits)

    def _name_inputs(self) -> None:
        """Gives forward the student's signature, by which a Trainer chooses the columns of a data set."""

        def forward(module: "Distilled", *inputs, **named):
            return type(module).forward(module, *inputs, **named)

        student = getattr(self.student, "get_base_model", lambda: self.student)()  # of peft
        try:
            inputs = inspect.signature(student.forward).parameters
        except (TypeError, ValueError):  # not written in Python
            return
        own = inspect.signature(Distilled.forward).parameters
        named = {**inputs, **{name: own[name] for name in ("labels", "num_items_in_batch")}}.values()
        forward.__signature__ = inspect.Signature([own["self"], *sorted(named, key=lambda p: p.kind)])
        self.__dict__["forward"] = MethodType(forward, self)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "forward"} | {"measurements": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._name_inputs()

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # which a Trainer asks for with label_smoothing_factor, and would leave the snapshots out
            raise AttributeError(
                "Distilled must be trained without label_smoothing_factor, and its student's config is "
                "distilled.student.config"
            )
        return super().__getattr__(name)

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            "Distilled must run under DistributedDataParallel, as torchrun and accelerate launch start it: "
            "nn.DataParallel does not copy the snapshots"
        )


class Output(dict):
    """Loss and logits, by name or as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"Output must have {name!r}, got {', '.join(self)}")


def _with_loss(output, loss: Tensor, logits: Tensor):
    """A student's output with the loss in it, first as Hugging Face wants it."""
    if isinstance(output, tuple | list) and not hasattr(output, "_asdict"):
        return loss, *output
    if isinstance(output, Mapping):
        fields = output
    else:
        fields = getattr(output, "_asdict", lambda: getattr(output, "__dict__", {}))()
    fields = {"loss": loss, "logits": logits} | {k: x for k, x in fields.items() if k not in ("loss", "logits")}
    if isinstance(output, Mapping):
        with suppress(TypeError):  # a kind that has no place for a loss
            return type(output)(**fields)
    return Output(fields)
