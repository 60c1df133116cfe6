"""A small language model learns from the checkpoints of a larger one, on a text of yours.

    python examples/hf_causal_lm.py TEXT [STEPS]

The teacher is trained by a plain Trainer that saves four snapshots; then two students of one size: one by
cross-entropy, one from the snapshots. Needs the extra hf.
"""

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from eekd.hf import EEKDConfig, EEKDTrainer, SnapshotCallback

VOCABULARY, BLOCK, VALIDATION = 512, 64, 128
logging.disable_progress_bar()


def blocks(text: Path) -> tuple[list[dict], list[dict]]:
    """Blocks of tokens to train on, and others from the text's end to validate on."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text)], vocab_size=VOCABULARY, show_progress=False)
    tokens = torch.tensor(tokenizer.encode(text.read_text()).ids)
    rows = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    rows = [{"input_ids": row, "labels": row} for row in rows]
    val = min(VALIDATION, len(rows) // 10)
    return rows[:-val], rows[-val:]


def model(width: int, layers: int) -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=BLOCK,
        )
    )  # fmt: skip


def main(text: Path, steps: int = 150) -> dict[str, float]:
    """Perplexities on the validation blocks, by name."""
    train, val = blocks(text)
    folder = Path(tempfile.mkdtemp())
    common: dict[str, Any] = dict(
        max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3, warmup_steps=10, logging_steps=steps,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainers = {
        "teacher": lambda: Trainer(
            model(96, 3), TrainingArguments(str(folder / "teacher"), save_only_model=True, **common),
            train_dataset=train, callbacks=[SnapshotCallback(4)],  # pyright: ignore
        ),
        "student by cross-entropy": lambda: Trainer(
            model(32, 1), TrainingArguments(str(folder / "alone"), **common), train_dataset=train  # pyright: ignore
        ),
        "student by EEKD": lambda: EEKDTrainer(
            model(32, 1), EEKDConfig(str(folder / "student"), weighting="attention", **common),
            train_dataset=train, teacher_checkpoints=folder / "teacher",
        ),
    }  # fmt: skip
    found = {}
    for name, make in trainers.items():
        trainer = make()
        trainer.train()
        found[name] = math.exp(trainer.evaluate(val)["eval_loss"])
        print(f"{name}: perplexity {found[name]:.1f}")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
