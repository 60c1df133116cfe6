"""Settings of small runs on the CPU."""

from eekd.train.config import Config, Student, Teacher

ADAMW = dict(optimizer="adamw", lr=1e-3)


def small_run(teacher: dict, student: dict, phase: dict | None = None, **more) -> Config:
    """Settings of a run with those of teacher and student, and of `phase` for both; two epochs by default."""
    both = dict(epochs=2, batch_size=60) | (phase or {})
    students = dict(students=("ce", "last", "attention"))
    rest = dict(train_limit=200, device="cpu", precision="fp32", channels_last=False) | students | more
    return Config(teacher=Teacher(**both | dict(snapshots=2) | teacher), student=Student(**both | student), **rest)


def config_of(nets, phase, **more) -> Config:
    """A run of the networks `net` and `small` of a file."""
    models = dict(model=f"{nets}:net"), dict(model=f"{nets}:small", **ADAMW)
    return small_run(*models, dict(milestones=()) | phase, **dict(students=("ce", "attention")) | more)
