"""A small classifier of texts learns from the checkpoints of a larger one: which file is this line from?

    python examples/hf_classification.py FILE FILE ...  # one class each

The teacher is trained by a plain Trainer that saves four snapshots; then two students of one size: one by
cross-entropy, one from the snapshots. Needs the extra hf.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from eekd.hf import EEKDConfig, EEKDTrainer, SnapshotCallback

VOCABULARY, LONGEST = 1024, 32
logging.disable_progress_bar()


def main(files: list[Path], steps: int = 100) -> dict[str, float]:
    """Accuracies on every fifth line, by name."""
    bpe = ByteLevelBPETokenizer()
    bpe.train([*map(str, files)], vocab_size=VOCABULARY, special_tokens=["[PAD]"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="[PAD]")
    rows = [
        {"input_ids": tokenizer(line, truncation=True, max_length=LONGEST)["input_ids"], "label": label}
        for label, file in enumerate(files)
        for line in file.read_text().splitlines()
        if len(line) >= 20
    ]
    train, val = [row for i, row in enumerate(rows) if i % 5], rows[::5]

    def model(width: int, layers: int) -> BertForSequenceClassification:
        set_seed(0)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                num_attention_heads=4, max_position_embeddings=LONGEST, num_labels=len(files),  # pyright: ignore
            )
        )  # fmt: skip

    folder = Path(tempfile.mkdtemp())
    common: dict[str, Any] = dict(
        max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-3, save_strategy="no", report_to="none",
        disable_tqdm=True, logging_steps=steps,
    )  # fmt: skip
    data: dict[str, Any] = dict(
        train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer,
        compute_metrics=lambda outputs: {"accuracy": (outputs.predictions.argmax(1) == outputs.label_ids).mean()},
    )  # fmt: skip
    trainers = {
        "teacher": lambda: Trainer(
            model(64, 2), TrainingArguments(str(folder / "teacher"), save_only_model=True, **common),
            callbacks=[SnapshotCallback(4)], **data,
        ),
        "student by cross-entropy": lambda: Trainer(
            model(16, 1), TrainingArguments(str(folder / "alone"), **common), **data
        ),
        "student by EEKD": lambda: EEKDTrainer(
            model(16, 1), EEKDConfig(str(folder / "student"), weighting="attention", temperature=2.0, **common),
            teacher_checkpoints=folder / "teacher", **data,
        ),
    }  # fmt: skip
    accuracies = {}
    for name, make in trainers.items():
        trainer = make()
        trainer.train()
        accuracies[name] = float(trainer.evaluate(val)["eval_accuracy"])
        print(f"{name}: accuracy {accuracies[name]:.1%}")
    return accuracies


if __name__ == "__main__":
    main([*map(Path, sys.argv[1:])])
