"""How long a comparison will take: a few steps of each kind are timed, and multiplied."""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from eekd.compare.methods import Method, folder_of, method
from eekd.compare.study import passes
from eekd.snapshots.features import LastFeatures
from eekd.snapshots.manifest import stage_ends
from eekd.train import Session, StudentTrainer
from eekd.train.config import Config
from eekd.train.teacher import TeacherTrainer
from eekd.train.teaching import Teacher, TeacherOutputs
from eekd.train.trainer import Trainer

STEPS, LONGEST = 30, 10.0  # of a kind at most so many are timed, for about so many seconds


class Noise(Teacher):
    """Speaks for M snapshots without running any."""

    def __init__(self, snapshots: int, classes: int, feature_dim: int, device: torch.device):
        self.sizes, self.device, self.val = (snapshots, classes, feature_dim), device, []
        self.feature_dim = feature_dim

    def __call__(self, batch):
        m, classes, width = self.sizes
        shape = m, len(batch.labels)
        return TeacherOutputs(*(torch.randn(*shape, width, device=self.device) for width in (classes, width)))


def plan(session: Session, out: Path, names: Sequence[str], seeds: Sequence[int], views: int) -> list[dict]:
    """The parts of a comparison: part, number of them to make, how many are finished, and seconds of all to make.

    Nothing is written. Students are taken to be taught by attention, from all snapshots, which costs most.
    """
    config, methods = session.config, {folder_of(name): method(name) for name in names}
    each = timed(session)
    kept = _kept(config, list(methods.values()))
    looked = len(session.data.val) + len(session.data.test)
    teacher = config.teacher.epochs * (each["teacher"] + len(session.data.val) * each["snapshot"])
    bank = views * len(session.data.train) * each["snapshot"]
    rows = []

    def add(part: str, seconds: float, paths: list[Path]) -> None:
        missing = [path for path in paths if not path.exists()]
        finished = len(paths) - len(missing)
        rows.append({"part": part, "number": len(missing), "finished": finished, "seconds": len(missing) * seconds})

    augmented = session.loader("train", config.student, train=True).varies
    banks = {how.teacher for how in methods.values() if how.banked(augmented)}
    folders, kinds = [out / f"seed-{seed}" for seed in seeds], {how.teacher for how in methods.values() if how.taught}
    kinds |= banks
    trained = {kind: [kind] for kind in ("ordinary", "cyclic") if kind in kinds}
    if kinds & {"sed", "soup"}:
        trained["ordinary"] = ["ordinary"]
    if "sed" in kinds:
        trained["sed"] = [f"sed-{number}" for number in range(1, config.teacher.snapshots)]
    for kind, runs in trained.items():
        asked = looked * (kept if kind == "ordinary" else config.teacher.snapshots) * each["snapshot"]
        paths = [folder / run / "teacher.json" for folder in folders for run in runs]
        add(f"teacher, {kind}", teacher + asked, paths)
    for kind in sorted(banks):
        count = {"ordinary": kept, "soup": 1}.get(kind, config.teacher.snapshots)
        add(f"bank, {kind}", count * bank, [folder / kind / "bank.json" for folder in folders])
    for name, how in methods.items():
        paths = [folder / "students" / name / "cell.json" for folder in folders]
        add(f"student, {name}", _student(session, how, each), paths)
    return rows


def timed(session: Session) -> dict[str, float]:
    """The seconds of an epoch of "teacher", "ce" and "taught", and of an image by a "snapshot"."""
    config, data = session.config, session.data
    trainer = TeacherTrainer(session)
    seconds = {"teacher": _epoch(trainer)}
    network, [batch] = trainer.network.eval(), list(islice(session.loader("val", config.teacher), 1))
    with torch.no_grad(), LastFeatures(network, config.teacher.layer) as capture:
        times = [_seconds(session, lambda: session.run(capture, batch.images)) for _ in range(5)]
        feature_dim = capture.dim
    seconds["snapshot"] = min(times) / len(batch.images)
    speaker = Noise(config.teacher.snapshots, len(data.classes), feature_dim, session.device)
    seconds["ce"], seconds["taught"] = (
        _epoch(StudentTrainer(session, *of)) for of in ((None, "ce"), (speaker, "attention"))
    )
    return seconds


def _student(session: Session, how: Method, each: dict[str, float]) -> float:
    """Seconds of a student: its epochs, its validation, and what its teacher says where that is not in a bank."""
    phase, images = how.student(session.config), len(session.data.train)
    epoch, m = each["taught" if how.taught else "ce"], len(how.epochs(session.config))
    looks = epoch / 3 * len(session.data.val) / images
    asked = len(session.data.val) * m
    if how.runs:
        varies = session.loader("train", phase, train=True).varies
        asked += images * passes(how, m, phase.epochs, varies)
    return phase.epochs * (epoch + looks) + asked * each["snapshot"]


def _epoch(trainer: Trainer) -> float:
    """Seconds of an epoch, from some of its steps."""
    trainer.trained.train()
    batches, times, start = trainer.batches_from(0), [], time.perf_counter()

    def step() -> None:
        trainer.train_step(list(islice(batches, trainer.config.accumulate)))

    for _ in range(min(STEPS, trainer.steps_per_epoch)):
        times.append(_seconds(trainer.session, step))
        if time.perf_counter() - start > LONGEST:
            break
    return median(times[1:] or times) * trainer.steps_per_epoch


def _seconds(session: Session, run) -> float:
    def now() -> float:
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    run()
    return now() - start


def _kept(config: Config, methods: list[Method]) -> int:
    """How many snapshots the ordinary teacher keeps."""
    ends = set(stage_ends(config.teacher.epochs, config.teacher.snapshots))
    return len(ends.union(*(how.epochs(config) for how in methods if how.teacher == "ordinary")))
