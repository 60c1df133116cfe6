"""A student in a plain Hugging Face Trainer, without a subclass.

    pip install transformers accelerate
    python examples/with_transformers.py

The Trainer accumulates, evaluates, saves and resumes as it does for its own models; the attention is in its
checkpoints. For language models there is eekd.hf, which never holds all logits.
"""

import sys
import tempfile

from digits import accuracy, data_sets, snapshots, student
from transformers import Trainer, TrainingArguments

import eekd


def main(epochs: int = 6) -> float:
    """Trains a student and returns its accuracy on the validation images."""
    train, val = data_sets()
    distilled = eekd.Distilled(student(), snapshots(train))
    options = TrainingArguments(
        tempfile.mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
    )
    Trainer(distilled, options, train_dataset=train, eval_dataset=val).train()  # pyright: ignore
    return accuracy(distilled.student, val)


if __name__ == "__main__":
    print(f"validation accuracy {main(*map(int, sys.argv[1:])):.1%}")
