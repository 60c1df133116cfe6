"""Training as a library: the whole of a run, its teacher, or one of its students."""

from typing import TYPE_CHECKING

from eekd.lazy import attach

__all__ = ["Session", "prepare", "resume", "train", "train_student", "train_teacher"]

if TYPE_CHECKING:
    from eekd.train.run import prepare, resume, train
    from eekd.train.student import train_student
    from eekd.train.teacher import train_teacher
    from eekd.train.trainer import Session
else:  # a command line reads its settings without torch
    __getattr__, __dir__ = attach(
        __name__,
        {
            "Session": "trainer",
            "prepare": "run",
            "resume": "run",
            "train": "run",
            "train_student": "student",
            "train_teacher": "teacher",
        },
        modules=(
            "checkpoints",
            "config",
            "estimate",
            "nonfinite",
            "presets",
            "run",
            "run_folder",
            "runtime",
            "screen",
            "seeds",
            "signals",
            "student",
            "teacher",
            "trainer",
            "write_bank",
        ),
    )
