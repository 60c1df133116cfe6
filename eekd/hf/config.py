"""The settings of a distillation, in addition to those of a Trainer."""

from dataclasses import dataclass, field
from numbers import Integral, Real

from transformers import TrainingArguments

from eekd.method import weightings


@dataclass
class EEKDArguments:
    """The settings that `EEKDConfig` adds. With them any subclass of TrainingArguments configures an `EEKDMixin`.

        @dataclass
        class SFT(EEKDArguments, SFTConfig): ...

    ValueError for an unknown weighting and numbers out of range.
    """

    teacher_checkpoints: str | None = field(
        default=None, metadata={"help": "Folder of a Trainer's run, whose checkpoint-* folders are the teachers."}
    )
    bank: str | None = field(
        default=None, metadata={"help": "Folder of a bank of the teachers' outputs, in place of running them."}
    )
    snapshots: int | None = field(
        default=None, metadata={"help": "How many of the checkpoints, evenly spaced, the last among them (None: all)."}
    )
    weighting: str = field(
        default="attention", metadata={"help": f"How they are weighted: {', '.join(weightings.names())}."}
    )
    temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of both softmaxes; None: 1 for language models, 5 for classifiers."},
    )
    alpha: float = field(default=0.5, metadata={"help": "Weight of the cross-entropy, from 0 to 1."})
    fusion: str = field(default="probability", metadata={"help": "What is averaged: probability or logit."})
    attention_objective: str = field(
        default="label", metadata={"help": "The loss that trains the attention: label or kl."}
    )
    embed_dim: int = field(default=8, metadata={"help": "Width of the attention's queries and keys."})
    feature_layer: str | None = field(
        default=None, metadata={"help": "Layer of a classifier whose input the attention reads (None: the last head)."}
    )

    def __post_init__(self):
        if (after := getattr(super(), "__post_init__", None)) is not None:
            after()
        weightings.get(self.weighting)
        numbers = {
            "temperature": (self.temperature is None or _is(self.temperature, Real, 0), "a number above 0 or None"),
            "alpha": (_is(self.alpha, Real, -1) and 0 <= self.alpha <= 1, "a number from 0 to 1"),
            "snapshots": (self.snapshots is None or _is(self.snapshots, Integral, 0), "a whole number above 0 or None"),
            "embed_dim": (_is(self.embed_dim, Integral, 0), "a whole number above 0"),
            "fusion": (self.fusion in ("probability", "logit"), "probability or logit"),
            "attention_objective": (self.attention_objective in ("label", "kl"), "label or kl"),
            "label_smoothing_factor": (
                not getattr(self, "label_smoothing_factor", 0),
                "0, for the teachers' targets are smooth themselves",
            ),
        }
        for name, (right, wanted) in numbers.items():
            if not right:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


def _is(value, kind: type, above: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and above < value < float("inf")


@dataclass
class EEKDConfig(EEKDArguments, TrainingArguments):
    """TrainingArguments, and the settings of the distillation.

        EEKDConfig("student-run", weighting="uniform", temperature=2.0, alpha=0.3, per_device_train_batch_size=8)

    `teacher_checkpoints`: a folder of checkpoint-* folders; `snapshots`: how many of them (None: all); `weighting`,
    `temperature`, `alpha`, `fusion`, `attention_objective`, `embed_dim`: as in `eekd.EEKDLoss`, but the temperature is
    1 for language models unless it is given; `feature_layer`: the layer whose input the attention reads, for a
    classifier with several heads.
    ValueError for an unknown weighting and numbers out of range.
    """
