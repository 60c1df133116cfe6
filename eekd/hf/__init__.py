"""Hugging Face: the checkpoint-* folders of a Trainer's run become the teachers of another model.

    trainer = EEKDTrainer(
        model=student, args=EEKDConfig("student-run", weighting="attention"), teacher_checkpoints="teacher-run",
        train_dataset=tokens, data_collator=collator,
    )
    trainer.train()

Needs the extra "hf": transformers and accelerate; peft where adapters are read.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from eekd.lazy import attach

__all__ = [
    "ClassifierBank",
    "EEKDArguments",
    "EEKDConfig",
    "EEKDMixin",
    "EEKDTrainer",
    "SnapshotCallback",
    "Teachers",
    "TokenBank",
    "write_classifier_bank",
    "write_token_bank",
]

for needed in ("transformers", "accelerate"):
    if find_spec(needed) is None:
        raise ImportError(f"eekd.hf needs {needed}: pip install 'eekd[hf]'")

if TYPE_CHECKING:
    from eekd.hf.callback import SnapshotCallback
    from eekd.hf.classifier_bank import ClassifierBank, write_classifier_bank
    from eekd.hf.config import EEKDArguments, EEKDConfig
    from eekd.hf.teachers import Teachers
    from eekd.hf.token_bank import TokenBank, write_token_bank
    from eekd.hf.trainer import EEKDMixin, EEKDTrainer
else:  # transformers takes seconds to import
    __getattr__, __dir__ = attach(
        __name__,
        {
            "callback": "SnapshotCallback",
            "classifier_bank": "ClassifierBank write_classifier_bank",
            "config": "EEKDArguments EEKDConfig",
            "teachers": "Teachers",
            "token_bank": "TokenBank write_token_bank",
            "trainer": "EEKDMixin EEKDTrainer",
        },
    )
