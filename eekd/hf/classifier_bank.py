"""What M teachers say of every sample of a data set, computed once: classifiers then train without running them.

Beside the files of `eekd.hf.banks`, a row being a sample, or of token classifiers a token that is no padding:

    rows-0.safetensors …   logits (rows, M, C) and, unless left out, features (rows, M, D)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import default_data_collator

from eekd.hf.banks import CLASSIFIER, INPUTS, TOKEN_CLASSIFIER, Bank, Writer, batches, known_by, sample_keys
from eekd.hf.teachers import Teachers


@torch.no_grad()
def write_classifier_bank(
    folder: str | Path,
    teachers: Teachers | str | Path | Sequence[str | Path],
    dataset,
    data_collator: Callable = default_data_collator,
    *,
    processing_class=None,
    features: bool = True,
    feature_layer: str | None = None,
    dtype: str = "float16",
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> "ClassifierBank":
    """Runs the teachers over the samples of a dataset and stores their logits and features.

        bank = write_classifier_bank("bank", "teacher-run", train_dataset, collator)

    `teachers` are Teachers, or the checkpoints that `Teachers.load` takes.
    A sample, or of token classifiers a token, takes 2 M (C + D) bytes (4 M (C + D) in float32), or without `features`
    2 M C, for C classes and features of width D. Only the weighting "attention" needs features: the input of the last
    layer, or of `feature_layer`, as in `EEKDConfig`. `processing_class` is the tokenizer. If it is given, a trainer
    must have an equal one.

    Raises ValueError for other dtypes, batches with neither `input_ids` nor `pixel_values`, values out of the range of
    `dtype`, features of several widths, and what `ClassifierHead` raises; FileExistsError if the folder holds a bank.
    """
    writer = Writer(folder, dtype)
    teachers = (teachers if isinstance(teachers, Teachers) else Teachers.load(teachers)).to(device)
    heads, names, longest, width = None, [], 1, 0
    for number, batch in enumerate(batches(teachers, dataset, data_collator, batch_size, device)):
        if number == 0:
            names = known_by(teachers, batch)
            if not {"input_ids", "pixel_values"} & {*names}:
                raise ValueError(f"a batch must have input_ids or pixel_values for a bank, got {', '.join(batch)}")
            if features:
                heads = teachers.classifier_heads(feature_layer)
                teachers.verify(heads, torch.no_grad, batch)
                if len(widths := sorted({str(head.dim) for head in heads})) > 1:
                    raise ValueError(f"features must be False for teachers of several widths, got {', '.join(widths)}")
                width = heads[0].dim
        logits, kept = teachers.logits_and_features(heads, batch, torch.no_grad)
        for name, z, config in zip(teachers.names, logits, teachers.configs(), strict=True):
            if z.shape[1] != config.num_labels:
                raise ValueError(f"{name} must give logits of its {config.num_labels} classes, got {z.shape[1]}")
        each = len(logits[0]) // len(batch[names[0]])
        mask, longest = _mask(batch, each), max(longest, each)
        outputs = {"logits": writer.cast("logits", torch.stack(logits, 1)[mask.flatten()])}
        if kept is not None:
            outputs["features"] = writer.cast("features", torch.stack(kept, 1)[mask.flatten()])
        writer.add(sample_keys(batch, names), mask.sum(1).tolist(), outputs)
    config, kind = teachers.configs()[0], CLASSIFIER if longest == 1 else TOKEN_CLASSIFIER
    writer.end(
        None, teachers, processing_class, kind=kind, classes=config.num_labels, width=width,
        inputs=names, labels={str(i): str(name) for i, name in config.id2label.items()},
        feature_layer=feature_layer if features else None,
    )  # fmt: skip
    return ClassifierBank(folder)


class ClassifierBank(Bank):
    """A finished bank of `write_classifier_bank`. `EEKDTrainer(..., bank="bank")` reads it instead of running teachers.

    Attributes: `manifest`; `names` of the snapshots; `len(bank)` is M.

    Raises FileNotFoundError or ValueError if a file is missing, was changed, or has another format.
    """

    def configs(self) -> list[SimpleNamespace]:
        """The classes of each teacher."""
        manifest = self.manifest
        labels = {int(i): name for i, name in (manifest.labels or {}).items()}
        return [SimpleNamespace(num_labels=manifest.classes, id2label=labels, problem_type=None)] * len(self)

    def classifier_heads(self, layer: str | None = None) -> list[SimpleNamespace]:
        """The width of each one's features; ValueError where none are stored, or those of another `layer`."""
        if not self.manifest.width:
            raise ValueError(f"{self.folder} must hold features for this weighting, got a bank without: write another")
        if layer not in (None, stored := self.manifest.feature_layer):
            raise ValueError(f"{self.folder} must hold features of feature_layer {layer!r}, got those of {stored!r}")
        return [SimpleNamespace(dim=self.manifest.width)] * len(self)

    def logits_and_features(self, heads, inputs: dict, context) -> tuple[list[Tensor], list[Tensor] | None]:
        """As of `Teachers`."""
        each = inputs["input_ids"].shape[1] if self.manifest.kind == TOKEN_CLASSIFIER else 1
        names = ["logits", "features"] if heads else ["logits"]
        mask = _mask(inputs, each).to(self.device)
        outputs = {name: x.flatten(0, 1) for name, x in self.rows(inputs, names, mask).items()}
        logits, *features = ([x[:, m] for m in self.snapshots] for x in outputs.values())
        return logits, features[0] if heads else None


def _mask(inputs: dict, each: int) -> Tensor:
    """Which of the rows of each sample there are: (B, each) bool."""
    first = next(inputs[name] for name in INPUTS if name in inputs)
    mask = inputs.get("attention_mask")
    return first.new_ones(len(first), each, dtype=torch.bool) if each == 1 or mask is None else mask.bool()
