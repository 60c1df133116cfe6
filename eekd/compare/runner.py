"""One seed of the comparison: its teachers, their banks, and a cell for each method, each made once."""

import dataclasses
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console

from eekd.bank import Flags, LogitBank
from eekd.compare.methods import FORMAT, NEWEST, Method, folder_of, method
from eekd.compare.soup import soup
from eekd.data import ImageData
from eekd.io.files import write_json_atomic
from eekd.io.lock import locked
from eekd.snapshots import MANIFEST as SNAPSHOTS
from eekd.snapshots import read_manifest
from eekd.snapshots.manifest import stage_ends
from eekd.train import Session, train_student, train_teacher
from eekd.train.config import Config, differences, located
from eekd.train.run_folder import finite, read_record, write_settings
from eekd.train.session import Progress, quiet
from eekd.train.student import check_source, method_of
from eekd.train.teacher import diagnose
from eekd.train.write_bank import write_bank
from eekd.user_code import is_file_name

SOUP = Method("", "uniform", newest=NEWEST)  # whose weights are averaged
APART = 1000  # between the seeds of independently trained teachers: more than there are seeds in a study


@contextmanager
def alone(folder: Path, wait: bool = False) -> Iterator[None]:
    """Only one process at a time is in here for a folder; OSError for a second one that shall not wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as lock:
        try:
            lock.enter_context(locked(folder, wait))
        except BlockingIOError:
            raise OSError(f"another process is at work in {folder}: wait for it, or take other seeds") from None
        yield


def keep_settings(out: Path, config: Config, views: int, fingerprint: str) -> None:
    """Writes settings.json; ValueError, one sentence, where `out` was made with others."""
    settings = _but_seed(config)
    now = {"format": FORMAT, "config": settings, "views": views, "fingerprint": fingerprint}
    with alone(out, wait=True):
        if not (out / "settings.json").exists():
            write_json_atomic(out / "settings.json", now)
        kept = {"config": _but_seed(kept_settings(out))}  # with the defaults of settings that are newer than it
        changed = differences(read_record(out / "settings.json") | kept, now)
    for name, (was, got) in changed.items():
        if name == "fingerprint":
            raise ValueError(f"{out} must be of the same images, all with --tune or all without: choose another --out")
        raise ValueError(
            f"{name.removeprefix('config.')} must be {was!r}, with which {out} was made, got {got!r}: "
            "choose another --out"
        )


def _but_seed(config: Config) -> dict:
    settings = json.loads(located(config).to_json())
    return {name: value for name, value in settings.items() if name not in ("seed", "seeds")}


def kept_settings(out: Path) -> Config:
    """The settings, seed apart, that `out` was made with."""
    return Config.from_json(json.dumps(read_record(out / "settings.json", "config")["config"]))


@dataclasses.dataclass
class Seed:
    """What the cells of one seed share. `say` is told what is done, `progress` how far a network is."""

    out: Path
    config: Config  # with this seed
    names: Sequence[str]
    views: int
    augmented: bool
    data: ImageData
    say: Callable[[str], object] = print
    progress: Progress = quiet

    def __post_init__(self):
        self.folder = self.out / f"seed-{self.config.seed}"
        self.methods = {folder_of(name): method(name) for name in self.names}

    def run(self) -> None:
        """Makes the cells that are not there yet; OSError while another process works on this seed."""
        with alone(self.folder):
            for number, (name, how) in enumerate(self.methods.items(), 1):
                folder = self.folder / "students" / name
                cell = cell_made(folder, how)
                if cell and is_file_name(how.weighting):
                    check_source(folder, method_of(how.weighting))
                if cell is None:
                    record = self.cell(folder, name, how)
                    done = f"validation {record['val']['accuracy']:.2%}"
                    if self.data.test is not self.data.val:  # a tuning does not look at test images
                        done += f", test {record['test']['accuracy']:.2%}"
                    self.say(f"seed {self.config.seed}, {name}: {done} ({number} of {len(self.methods)})")

    def cell(self, folder: Path, name: str, how: Method) -> dict:
        """Trains the student of a method."""
        config = dataclasses.replace(self.config, student=how.student(self.config))
        run, which = None, None
        banked = how.banked(self.augmented)
        if how.taught or banked:
            run = self.teacher(how.teacher)
            which = picked(run, how, config)
        if run and banked:
            config = dataclasses.replace(config, bank=str(self.bank(run)))
        start, session = time.perf_counter(), Session(config, self.data)

        def progress(phase, *state):
            self.progress(f"seed {config.seed}, {name}", *state)

        with _whole(folder) as partial:
            teacher = run / "teacher" if how.taught else None
            record = train_student(
                config, teacher, how.weighting, partial, which=which, session=session, progress=progress
            )
            write_json_atomic(partial / "cell.json", {
                "format": FORMAT, "method": dataclasses.asdict(how), "epochs": how.epochs(config),
                "seconds": time.perf_counter() - start, "threads": torch.get_num_threads(),
            })  # fmt: skip
        return record

    def teacher(self, kind: str) -> Path:
        """The run folder of a teacher, trained if it is not there."""
        run, config = self.folder / kind, self.config
        if (run / "teacher.json").exists():
            return run
        m, total = config.teacher.snapshots, config.teacher.epochs
        if kind == "sed":
            others = [self.single(number) for number in range(1, m)]
            with _whole(run) as partial:
                merge([self.teacher("ordinary"), *others], partial / "teacher")
                self.describe(partial, config, [total] * m, None, 0.0)
        elif kind == "soup":
            ordinary, start = self.teacher("ordinary"), time.perf_counter()
            with _whole(run) as partial:
                soup(Session(config, self.data), ordinary / "teacher", picked(ordinary, SOUP, config), partial)
                self.describe(partial, config, [total], None, time.perf_counter() - start)
        elif kind == "cyclic":
            config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, schedule="cyclic"))
            self.train(run, config, stage_ends(total, m))
        else:
            asked = [how.epochs(config) for how in self.methods.values() if how.teacher == "ordinary"]
            self.train(run, config, sorted({*stage_ends(total, m), *(e for epochs in asked for e in epochs)}))
        return run

    def single(self, number: int) -> Path:
        """One more teacher, of which only the end is kept."""
        run, seed = self.folder / f"sed-{number}", self.config.seed + APART * number
        if not (run / "teacher.json").exists():
            once = dataclasses.replace(self.config.teacher, snapshots=1)
            self.train(run, dataclasses.replace(self.config, seed=seed, teacher=once), [once.epochs])
        return run

    def train(self, run: Path, config: Config, schedule: list[int]) -> None:
        start, session = time.perf_counter(), Session(config, self.data)

        def progress(phase, *state):
            self.progress(f"seed {self.config.seed}, teacher {run.name}", *state)

        epochs = stage_ends(schedule[-1], config.teacher.snapshots)
        with _whole(run) as partial:
            train_teacher(config, partial / "teacher", schedule=schedule, session=session, progress=progress)
            seconds = time.perf_counter() - start
            self.describe(partial, config, epochs, [schedule.index(epoch) for epoch in epochs], seconds)
        self.say(f"seed {self.config.seed}, teacher {run.name}: {seconds:.0f} s")

    def describe(self, run: Path, config: Config, epochs: list[int], which: list[int] | None, seconds: float) -> None:
        """Makes `run` a finished run folder, and says what the ensemble of the snapshots `which` knows."""
        config = dataclasses.replace(config, students=(), bank=None)
        session = Session(config, self.data)
        write_settings(run, config, self.data, session.device)
        ensemble = session.load_snapshots(run / "teacher", which, features=False)
        measured = {}
        for split in ("val", "test"):
            diagnosis = diagnose(session, ensemble, session.loader(split, config.teacher))
            names = "name", "accuracy", "nll", "ece"
            measured[split] = {
                "members": [{name: member[name] for name in names} for member in diagnosis["members"]],
                "disagreement": diagnosis["disagreement"],
            }
        write_json_atomic(run / "teacher.json", finite({
            "format": FORMAT, "seconds": seconds, "threads": torch.get_num_threads(), "epochs": epochs, **measured,
        }))  # fmt: skip

    def bank(self, run: Path) -> Path:
        """The logit bank of a run, written if it is not whole."""
        path = run / "bank"
        if not (path / "manifest.json").exists():
            start = time.perf_counter()
            flags = Flags(teacher=str(run), views=self.views)
            write_bank(flags, Console(file=io.StringIO()), data=self.data)
            seconds = time.perf_counter() - start
            write_json_atomic(run / "bank.json", {"format": FORMAT, "seconds": seconds})
            self.say(f"seed {self.config.seed}, bank of {run.name}: {seconds:.0f} s")
        LogitBank.open(path)
        return path


def cell_made(folder: Path, how: Method) -> dict | None:
    """The cell.json of a finished cell, with the method as it is now; None where there is none.

    ValueError where the method was another.
    """
    if not (folder / "cell.json").exists():
        return None
    cell = read_record(folder / "cell.json", "method", "epochs", "seconds", "threads")
    made_by = dataclasses.asdict(Method("", "")) | cell["method"]  # with the defaults of what is newer than it
    now = json.loads(json.dumps(dataclasses.asdict(how)))
    for name, (was, got) in differences({"": made_by}, {"": now}).items():
        if name != ".title":
            raise ValueError(
                f"{name.strip('.')} must be {was!r}, with which {folder} was made, got {got!r}: choose another --out"
            )
    return cell | {"method": dataclasses.asdict(how)}


def picked(run: Path, how: Method, config: Config) -> list[int] | None:
    """The indices of the snapshots in `run` that a method wants, None for all of them."""
    if how.weighting == "ce":
        return None
    steps, wanted = [entry["step"] for entry in read_manifest(run / "teacher")["snapshots"]], how.epochs(config)
    if how.teacher in ("sed", "soup") or steps == wanted:
        return None
    if missing := [epoch for epoch in wanted if epoch not in steps]:
        raise ValueError(
            f"{run} has no snapshot of epochs {missing}, which this method needs: it was trained "
            "before the method was added; choose another --out"
        )
    return [steps.index(epoch) for epoch in wanted]


def merge(runs: list[Path], folder: Path) -> None:
    """The last snapshots of several runs as one ensemble; a step counts the epochs of all of them so far."""
    folder.mkdir(parents=True)
    entries, step = [], 0
    manifests = [read_manifest(run / "teacher") for run in runs]
    for number, (run, manifest) in enumerate(zip(runs, manifests, strict=True), 1):
        last = manifest["snapshots"][-1]
        step += last["step"]
        file = f"snapshot-{number}.safetensors"
        shutil.copyfile(run / "teacher" / last["file"], folder / file)
        entries.append({**last, "file": file, "step": step})
    schedule, first = [entry["step"] for entry in entries], manifests[0]
    write_json_atomic(folder / SNAPSHOTS, {"format": first["format"], "spec": first["spec"], "schedule": schedule,
                                           "snapshots": entries})  # fmt: skip


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    os.replace(partial, folder)
