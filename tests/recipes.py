"""Small runs with settings of a recipe."""

from eekd.train.config import Config, Student, Teacher


def config_of(nets, phase, **more) -> Config:
    common = dict(epochs=2, batch_size=60, milestones=()) | phase
    settings = dict(students=("ce", "attention"), train_limit=200, device="cpu", precision="fp32", channels_last=False)
    return Config(
        teacher=Teacher(model=f"{nets}:net", snapshots=2, **common),
        student=Student(model=f"{nets}:small", optimizer="adamw", lr=1e-3, **common),
        **settings | more,
    )
