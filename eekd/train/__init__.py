"""Training as a library: the whole of a run, its teacher, or one of its students."""

from typing import TYPE_CHECKING

from eekd.lazy import attach

__all__ = [
    "Callback",
    "Session",
    "StudentTrainer",
    "TeacherTrainer",
    "Trainer",
    "prepare",
    "resume",
    "train",
    "train_student",
    "train_teacher",
]

if TYPE_CHECKING:
    from eekd.train.callbacks import Callback
    from eekd.train.run import prepare, resume, train
    from eekd.train.session import Session
    from eekd.train.student import StudentTrainer, train_student
    from eekd.train.teacher import TeacherTrainer, train_teacher
    from eekd.train.trainer import Trainer
else:  # a command line reads its settings without torch
    __getattr__, __dir__ = attach(
        __name__,
        {
            "callbacks": "Callback",
            "run": "prepare resume train",
            "session": "Session",
            "student": "StudentTrainer train_student",
            "teacher": "TeacherTrainer train_teacher",
            "trainer": "Trainer",
        },
    )
