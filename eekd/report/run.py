"""What a run folder holds so far, whole or not: all that a page is drawn from."""

import json
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error
from typing import Any

from eekd.io.files import read_checked
from eekd.report.charts import Line
from eekd.train.checked import student_names, title_of
from eekd.train.config import Config
from eekd.user_code import own_name


@dataclass
class Network:
    """A network in training, and what its folder holds so far."""

    name: str  # "teacher" or a student's weighting
    model: str
    epochs: int  # asked for
    rows: list[dict]  # metrics.jsonl
    known: dict | None  # snapshots.json or student.json, written at the end

    @property
    def title(self) -> str:
        return title_of(self.name)

    def last(self, key: str) -> Any:
        return self.rows[-1].get(key) if self.rows else None

    def mean(self, key: str) -> float | None:
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return sum(values) / len(values) if values else None

    def line(self, key: str, scale: float = 1, *, since: float = 0, name=None, colour=None) -> Line:
        rows = [(row["epoch"], row.get(key)) for row in self.rows if row["epoch"] >= since]
        points = [(epoch, None if value is None else scale * value) for epoch, value in rows]
        return Line(name or self.title, colour or colour_of(self.name), points)


@dataclass
class Run:
    """What a run folder holds so far."""

    config: Config
    environment: dict | None
    summary: dict | None
    manifest: list[dict]  # an entry for each snapshot
    teacher: Network
    students: list[Network]


def read(folder: str | Path) -> Run:
    """Reads a run folder (eekd.train.run_folder), whole or not.

    FileNotFoundError where there is no run; ValueError that names a damaged file or one of another format.
    """
    from eekd.snapshots import read_manifest  # not before: a call for help needs no torch
    from eekd.train.run_folder import check_metrics, read_record, read_settings

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} must be a run folder, got one without config.json")
    config = read_settings(folder)

    def read_if_there(path):
        return read_record(path) if path.exists() else None

    def network(name, phase, own, record):
        content = read_if_there(own / record)
        check_metrics(own, content or {})
        return Network(name, phase.model, phase.epochs, _rows(own / "metrics.jsonl"), content)

    on_disk = sorted(path.parent.name for path in folder.glob("students/*/metrics.jsonl"))
    names = dict.fromkeys([*map(own_name, config.students or ()), *on_disk])
    students = [network(name, config.student, folder / "students" / name, "student.json") for name in names]
    # a student names its teacher as seen from its own folder, config.json as seen from where the run began
    teachers = []
    for student in students:
        noted = (student.known or {}).get("teacher")
        if isinstance(noted, dict) and isinstance(noted.get("run"), str):
            teachers.append(folder / "students" / student.name / noted["run"])
    teachers.append(Path(config.teacher_run or folder, "teacher"))
    own = next(filter(Path.is_dir, teachers), teachers[-1])
    manifest = read_manifest(own)["snapshots"] if (own / "manifest.json").exists() else []
    teacher = network("teacher", config.teacher, own, "snapshots.json")
    environment, summary = read_if_there(folder / "environment.json"), read_if_there(folder / "summary.json")
    return Run(config, environment, summary, manifest, teacher, students)


def _rows(path: Path) -> list[dict]:
    rows = []
    lines = read_checked(path).split(b"\n")[:-1] if path.exists() else []  # the rest may be half a row
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line, parse_constant=lambda constant: None))
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(rows[-1], dict) or type(rows[-1].get("epoch")) is not int:
            raise ValueError(f"{path}, line {number} must be an object with an epoch, got {repr(rows[-1])}")
    return rows


def colour_of(name: str) -> str:
    return f"var(--{name})" if name in ("teacher", *student_names()) else "var(--late)"
