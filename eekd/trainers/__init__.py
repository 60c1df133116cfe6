"""Training as a library: the whole of a run, its teacher, or one of its students."""

import dataclasses
import json
import os
import time
from pathlib import Path

from eekd import models
from eekd.bank import LogitBank
from eekd.checkpoint import read_json, write_json_atomic
from eekd.config import Config
from eekd.features import LastFeatures
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.trainers.folder import FORMAT, new_folder, summary_writer, write_settings
from eekd.trainers.loop import Progress, Session, quiet
from eekd.trainers.student import check_bank, train_student
from eekd.trainers.teacher import train_teacher

__all__ = ["Session", "prepare", "train", "train_student", "train_teacher"]


def train(
    config: Config, out: str | Path | None = None, *, session: Session | None = None, progress: Progress = quiet
) -> Path:
    """Trains the teacher and then every student; returns the run folder, described in eekd.trainers.folder.

    With config.teacher_run or config.bank no teacher is trained, without config.students no student. What is
    wrong with the settings is raised by `prepare`, before anything is written; FileExistsError where `out` holds
    anything. `session` is what `prepare` returned for this config, to save doing it again.
    """
    start, session = time.perf_counter(), session or prepare(config)
    config = session.config
    run = new_folder(out, Path(config.data).name)
    write_settings(run, config, session.data, session.device)
    teacher = run / "teacher"
    if config.teacher_run:
        teacher = Path(config.teacher_run, "teacher")
    else:
        train_teacher(config, teacher, session=session, progress=progress)
    students = {weighting: run / "students" / weighting for weighting in config.students}
    for weighting, folder in students.items():
        train_student(config, teacher, weighting, folder, session=session, progress=progress)
    rows, seconds = table(teacher, list(students.values())), time.perf_counter() - start
    write_json_atomic(run / "summary.json", {"format": FORMAT, "seconds": seconds, "rows": rows})
    return run


def prepare(config: Config) -> Session:
    """Loads the data and finds what would stop the run later: an unknown name, a teacher that does not fit.

    The teacher's settings become those of config.teacher_run, where there is one; a bank knows its teacher_run.
    """
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"WORLD_SIZE is {processes}, and training runs in one process: start it without torchrun")
    if config.bank and not config.teacher_run:
        config = dataclasses.replace(config, teacher_run=str(LogitBank.open(config.bank).run))
    earlier = Path(config.teacher_run) if config.teacher_run else None
    if earlier:
        config = dataclasses.replace(config, teacher=Config.load(earlier / "config.json").teacher)
    if config.tensorboard:
        summary_writer()
    session = Session(config)
    for phase in (config.teacher, config.student):
        LastFeatures(models.build(**session.spec(phase)))
    if earlier:
        if session.bank:
            loader = session.loader("train", config.student, train=True)
            check_bank(session, loader, earlier / "teacher", config.students)
        check_data(session, earlier)
        SnapshotEnsemble.load(earlier / "teacher")
    return session


def check_data(session: Session, run: Path) -> None:
    """ValueError unless the session has the images that the teacher of `run` was trained on."""
    if read_json(run / "environment.json")["data"]["fingerprint"] != session.data.fingerprint:
        raise ValueError(f"teacher_run {run} was trained on other images than {session.config.data}")


def table(teacher: Path, students: list[Path]) -> list[dict]:
    """The rows of summary.json, from what the phases left in their folders."""
    manifest, known = read_manifest(teacher), read_json(teacher / "snapshots.json")
    epochs = [entry["step"] for entry in manifest["snapshots"]]
    *snapshots, ensemble = [
        {"val_accuracy": val["accuracy"], "test_accuracy": test["accuracy"]}
        for val, test in zip(known["val"]["members"], known["test"]["members"], strict=True)
    ]
    seconds = [row["seconds"] for row in _rows(teacher)]
    network = {"model": manifest["spec"]["name"], "parameters": parameters(manifest["spec"])}
    rows = [_row("teacher", "teacher", **network, epochs=epochs[-1], **snapshots[-1],
                 seconds_per_epoch=sum(seconds) / len(seconds))]  # fmt: skip
    for number, (epoch, scores) in enumerate(zip(epochs, snapshots, strict=True), 1):
        rows.append(_row("snapshot", f"snapshot {number}", **network, epochs=epoch, **scores))
    rows.append(_row("ensemble", "ensemble", model=network["model"], epochs=epochs[-1], **ensemble,
                     parameters=network["parameters"] * len(snapshots)))  # fmt: skip
    records = [read_json(folder / "student.json") for folder in students]
    alone = next((record["test"]["accuracy"] for record in records if record["weighting"] == "ce"), None)
    for folder, record in zip(students, records, strict=True):
        spec, accuracy = record["spec"], record["test"]["accuracy"]
        rows.append(_row(
            "student", record["weighting"], model=spec["name"], parameters=parameters(spec),
            epochs=len(_rows(folder)), val_accuracy=record["val"]["accuracy"], test_accuracy=accuracy,
            gain=None if alone is None else accuracy - alone, seconds_per_epoch=record["seconds_per_epoch"],
        ))  # fmt: skip
    return rows


def _row(kind: str, name: str, **known) -> dict:
    return {"kind": kind, "name": name, "gain": None, "seconds_per_epoch": None} | known


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def parameters(spec: dict) -> int:
    """How many numbers a network of this architecture learns."""
    return sum(p.numel() for p in models.build(**spec).parameters())
