"""The command line of the comparison: python -m eekd.compare [--methods NAME ...] [--seeds N] [--flag value ...]."""

import dataclasses
import functools
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from eekd import command

if __name__ == "__main__":
    command.start()

from eekd.compare import screen
from eekd.compare.methods import METHODS, NEWEST, PAPER, base_of, folder_of, method, spelled
from eekd.compare.tuning import trials
from eekd.compare.variants import parts
from eekd.io.files import read_json
from eekd.method import weightings
from eekd.train.config import Config, Student, settled, switched
from eekd.train.presets import preset_or_file
from eekd.train.signals import signals
from eekd.user_code import is_file_name

try:
    import tyro
    from rich.console import Console

    from eekd.train.flags import any_word
except ImportError as error:
    raise SystemExit(f"python -m eekd.compare needs {error.name}: pip install 'eekd[train]'") from None

if TYPE_CHECKING:
    from eekd.train import Session

DECIDED = ("seed", "students", "teacher_run", "checkpoints", "bank")  # settings that a comparison decides by itself
NUMBERS = ("temperature", "alpha", "beta", "lr")  # settings of the student that fit any network
VARIED = ("fusion", "attention_objective")  # and those of the student


@dataclass(frozen=True)
class Flags:
    """Compares ways to teach the same student, over several seeds.

    Run it again after a kill, or to add methods or seeds: finished parts are kept. Processes with different seeds may
    work on the same --out at the same time. The processes of torchrun share the seeds.
    """

    # names of eekd.compare.METHODS or path/to/file.py:NAME, NAME-online without a bank, NAME@alpha=0.9,lr=0.05 with
    # other settings of the student (None: the methods of the paper)
    methods: tuple[str, ...] = ()
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...; --seeds says how many (3)
    tune: bool = False  # train variants of each method and choose by validation images: tuning.json
    dry_run: bool = False  # time a few steps, say how long all will take, and stop
    views: int | None = None  # augmented views in a bank (None: 8, or 1 without augmentation)
    out: str | None = None  # the folder of the comparison (None: runs/compare-DATA)
    preset: str | None = None  # start from these settings (None: digits)
    config: str | None = None  # start from the settings in a file
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class Start:
    """The flags that say which settings the others override."""

    preset: str | None = None
    config: str | None = None


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 130 or 143 when stopped by a signal, 2 for any mistake."""
    argv = command.arguments(argv)
    try:
        flags = parse(argv)
        import torch  # not before: a mistake, or a call for help, needs no torch

        from eekd.compare import runner  # noqa: F401
    except (ImportError, OSError, TypeError, ValueError) as error:
        return command.refuse(error)
    with signals:
        try:
            run(flags, ["python", "-m", "eekd.compare", *argv])
            return 0
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 128 + (signals.received or signal.SIGINT)
        except torch.OutOfMemoryError as error:
            return command.refuse(error, "error: the device is out of memory, a smaller batch_size may fit: ")
        except (AttributeError, FloatingPointError, ImportError, OSError, TypeError, ValueError) as error:
            return command.refuse(error)


def parse(argv: list[str]) -> Flags:
    """The flags of a command line; ValueError or tyro's SystemExit says what is wrong and what is near it."""
    argv = switched(argv)
    start = tyro.cli(Start, args=argv, return_unknown_args=True, add_help=False)[0]
    settings = preset_or_file(start.preset, start.config, "digits")
    defaults = {name: getattr(Config(), name) for name in DECIDED}
    settings = dataclasses.replace(settings, seeds=3, **defaults)
    with any_word():
        flags = tyro.cli(Flags, prog="eekd compare", args=argv, default=Flags(settings=settings))
    chosen = flags.settings
    for name in DECIDED:
        if getattr(chosen, name) != defaults[name]:
            by = {"seed": "--first-seed", "students": "--methods"}.get(name, "the comparison")
            raise ValueError(f"{name} must be left to {by}, got {getattr(chosen, name)!r}")
    for name in VARIED:
        if getattr(chosen.student, name) != (kept := getattr(Config().student, name)):
            raise ValueError(
                f"student.{name} must be {kept!r}, since methods vary it, got {getattr(chosen.student, name)!r}"
            )
    if chosen.student.repeats > 1:
        raise ValueError(f"student.repeats must be 1 with a bank, got {chosen.student.repeats}")
    if flags.views is not None and flags.views < 1:
        raise ValueError(f"views must be at least 1, got {flags.views}")
    if flags.first_seed < 0:
        raise ValueError(f"first_seed must be at least 0, got {flags.first_seed}")
    names = tuple(dict.fromkeys(map(spelled, flags.methods or PAPER)))
    if len({*map(folder_of, names)}) < len(names):
        raise ValueError(f"methods must have different names, got {', '.join(names)}")
    for name in names:
        how, teacher = method(name), chosen.teacher
        folder = base_of(folder_of(name))
        known = METHODS.get(folder)
        if known and known.weighting != folder and (is_file_name(how.weighting) or folder in weightings.names()):
            raise ValueError(f"a method's name must be one that eekd does not use itself, got {folder!r}")
        if how.unread:
            raise ValueError(f"{how.unread[0]} must be left out of a method that does not read it, got {name!r}")
        try:
            how.student(chosen)
        except ValueError as error:
            raise ValueError(f"{error} in method {name!r}") from None
        if type(how.snapshots) is int and how.snapshots > teacher.epochs:
            raise ValueError(f"teacher.epochs must be at least {how.snapshots} for method {name}, got {teacher.epochs}")
        if (how.newest or how.teacher == "soup") and teacher.snapshots < NEWEST:
            raise ValueError(f"teacher.snapshots must be at least {NEWEST} for method {name}, got {teacher.snapshots}")
        if how.teacher == "cyclic":
            dataclasses.replace(teacher, schedule="cyclic")  # a ValueError where its cycles are not equal
        elif teacher.schedule == "cyclic":
            raise ValueError("teacher.schedule must be another than that of the cyclic- methods, got 'cyclic'")
    _check_shared(chosen, names)
    return dataclasses.replace(flags, methods=names)


def _check_shared(settings: Config, names: Sequence[str]) -> None:
    """ValueError where a setting of all students is not one for some of the methods."""
    with_beta = {}
    for name in names:
        how, given = method(name), parts(name)[1]
        if how.rival and "beta" in how.rival.settings and "beta" not in given:
            with_beta.setdefault(how.weighting, name)
        for setting, value in METHODS.get(base_of(name), how).settings.items():
            if setting not in given and (got := getattr(settings.student, setting)) != getattr(Student(), setting):
                raise ValueError(
                    f"student.{setting} must be left out beside {name}, which has {value!r}, got {got!r}: "
                    f"give NAME@{setting}="
                )
    if settings.student.beta is not None and len(with_beta) > 1:
        raise ValueError(
            f"student.beta must be left out, for each of {', '.join(with_beta.values())} has its own, "
            f"got {settings.student.beta!r}: give NAME@beta="
        )


def run(flags: Flags, typed: list[str]) -> Path:
    """Makes the cells that are missing and writes study.json, or tuning.json; returns its path.

    With flags.dry_run nothing is made; the path is that of the folder.
    """
    from eekd import parallel
    from eekd.compare import study, tuning
    from eekd.compare.runner import Seed, keep_settings, kept_settings
    from eekd.train import prepare
    from eekd.train.student import method_of

    rank, processes = parallel.rank_and_world_size()
    out = Path(flags.out or f"runs/{'tune' if flags.tune else 'compare'}-{flags.settings.data_name}")
    wanted = dataclasses.replace(flags.settings, seeds=1)
    if (out / "settings.json").exists():
        wanted = settled(wanted, kept_settings(out))
    for name in flags.methods:
        method_of(method(name).weighting)  # which a mistake in a user's file ends here
    console, session = Console(quiet=rank > 0, markup=False), prepare(wanted)
    if flags.tune:  # test images are not looked at
        session.data = dataclasses.replace(session.data, test=session.data.val)
    settings, seeds = session.config, range(flags.first_seed, flags.first_seed + flags.settings.seeds)
    names = [trial for name in flags.methods for trial in trials(name)] if flags.tune else flags.methods
    _try(session, names)
    augmented = session.loader("train", settings.student, train=True).varies
    views = flags.views or (8 if augmented else 1)
    if flags.dry_run:
        _show_plan(console, session, out, names, seeds, views)
        return out
    keep_settings(out, settings, views, session.data.fingerprint)
    with console.status("") as status:

        def progress(phase, done, total, metrics):
            status.update(f"{phase}: epoch {metrics['epoch']} of {metrics['epochs']}, loss {metrics['train_loss']:.3f}")

        for seed in seeds[rank::processes]:
            config = dataclasses.replace(settings, seed=seed)
            say = functools.partial(screen.say, console)
            Seed(out, config, names, views, augmented, session.data, say, progress).run()
    parallel.long_barrier()
    path = out / ("tuning.json" if flags.tune else "study.json")
    if rank == 0 and flags.tune:
        record = tuning.gather(out, typed, flags.methods, list(seeds))
        screen.say(console, "chosen: --methods " + " ".join(record["chosen"].values()))
    elif rank == 0:
        screen.ending(console, read_json(study.gather(out, typed, augmented)))
    screen.say(console, f"everything is in {out}")
    return path


def _try(session: "Session", names: Sequence[str]) -> None:
    """Runs a few images through what `prepare` does not know: other settings, rivals and methods of one's own."""
    from eekd import models
    from eekd.train import Session
    from eekd.train.preflight import preflight
    from eekd.train.student import method_of

    teacher, tried = models.build(**session.spec(session.config.teacher)), []
    for name in names:
        how = method(name)
        what = how.weighting, {setting: x for setting, x in how.settings.items() if setting not in NUMBERS}
        if (what[1] or how.rival or is_file_name(how.weighting)) and what not in tried:
            tried.append(what)
            config = dataclasses.replace(session.config, student=how.student(session.config))
            try:
                preflight(Session(config, session.data), [method_of(how.weighting)], teacher, False)
            except ValueError as error:
                raise ValueError(f"method {name}: {error}") from None


def _show_plan(console: Console, session: "Session", out: Path, names: Sequence[str], seeds: range, views: int):
    from eekd.compare.plan import plan

    rows = plan(session, out, names, seeds, views)
    total, students = screen.duration(sum(row["seconds"] for row in rows)), len(names) * len(seeds)
    finished = sum(row["finished"] for row in rows if row["part"].startswith("student"))
    sentence = (
        f"It would take about {total} in one process: {len(seeds)} seeds x {len(names)} methods = {students} students"
    )
    screen.planned(
        console, rows, sentence + f", of which {finished} are finished." * bool(finished) + "." * (not finished)
    )


if __name__ == "__main__":
    command.run(main)
