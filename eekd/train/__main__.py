"""The command line of training: python -m eekd.train [teacher | student --teacher RUN] [--flag value ...]."""

import os
import signal
import sys
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

from eekd import command

if __name__ == "__main__":
    command.start()

from eekd.io.files import first_line, in_words, nearest, printable
from eekd.train.config import Config, differences, located, settled, switched
from eekd.train.presets import preset_or_file, recommended
from eekd.train.signals import Stopped, signals

try:
    import tyro
    from rich.console import Console

    from eekd.train import screen
    from eekd.train.flags import any_word
except ImportError as error:
    raise SystemExit(f"python -m eekd.train needs {error.name}: pip install 'eekd[train]'") from None

# torch, and what needs it, is imported after the command line is read: --help is quick then.
# Settings that a run may go on with others of.
CHANGEABLE = ("non_finite", "skip_budget", "verify_loss", "bad_images", "bad_image_budget", "data", "root", "classes")


@dataclass(frozen=True)
class Flags:
    """Trains a teacher, keeps its snapshots and distils students.

    A first word trains only a part. "teacher": the teacher. "student --teacher RUN": students of an earlier run's
    teacher. "student --bank PATH": the same, from a logit bank. "student --checkpoints FILE ...": students of a
    teacher that others trained; --teacher.model names its network.
    """

    # start from these settings (None: glyphs, the demonstration, if no setting is given; else digits)
    preset: str | None = None
    config: str | None = None  # start from the settings in a file: RUN/config.json runs RUN again
    resume: str | None = None  # continue this run, which was stopped or killed, with its settings
    out: str | None = None  # the new run folder (None: the first free one of runs/DATA-1, -2, ...)
    dry_run: bool = False  # print networks, steps, memory and disk, and stop
    check_data: bool = False  # read every image once, list what is wrong with the data, and stop
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class Start:
    """The flags that say which settings the others override."""

    preset: str | None = None
    config: str | None = None
    resume: str | None = None
    teacher_run: str | None = None
    bank: str | None = None


def main(argv: list[str] | None = None) -> int:
    """Runs a command line, in one process or under torchrun, and returns its exit code.

    0, 130 or 143 when stopped by a signal, 2 for any mistake, 1 where another process ended first.
    """
    shown = warnings.showwarning
    warnings.showwarning = _warn
    try:
        try:
            flags = parse(command.arguments(argv))
            import eekd.train.run  # noqa: F401  # before signals are held: it takes seconds
        except (ImportError, OSError, TypeError, ValueError) as error:
            return _error(error)
        with signals:
            return _joined(flags)
    except Stopped as stop:
        number = signal.Signals(stop.args[0])
        return _fail("; ".join([f"stopped by {number.name}", *_notes(stop)]), 128 + number)
    except KeyboardInterrupt as stop:
        return _fail("; ".join(["stopped", *_notes(stop)]), 130)
    finally:
        warnings.showwarning = shown


def _joined(flags: Flags) -> int:
    from eekd import parallel

    with ExitStack() as stack:
        try:
            stack.enter_context(parallel.process_group())
        except ValueError as error:
            return _fail(f"error: {error}", 2)
        except RuntimeError as error:  # the others did not come
            return _fail(f"error: {first_line(error)}", 1)
        if code := _main(flags):
            stack.pop_all()  # the others may not leave the group now
        return code


def _main(flags: Flags) -> int:
    import torch

    from eekd import parallel
    from eekd.train import prepare, resume, train
    from eekd.train.run_folder import read_record

    console = Console(quiet=not parallel.is_main_process(), markup=False)
    try:
        if flags.check_data:
            return screen.check_data(console, flags.settings)
        flags = _again(flags)
        session = prepare(flags.settings, flags.resume)
    except (AttributeError, ImportError, OSError, TypeError, ValueError) as error:  # a name, a file, a value
        return _error(error)
    except MemoryError:
        return _fail("error: there is not enough memory; a smaller image_size or train_limit may fit", 2)
    if flags.dry_run:
        screen.show(console, screen.plan(session))
        for note in (screen.takes(session), *session.data.decisions, *session.notes, *screen.kept(session.config)):
            console.print(f"- {printable(note)}", highlight=False)
        return 0
    for note in session.notes:
        console.print(printable(note), highlight=False)
    try:
        with screen.Display(console, session.config.seeds) as display:
            if flags.resume:
                run = resume(flags.resume, session=session, progress=display)
            else:
                run = train(session.config, flags.out, session=session, progress=display)
    except torch.OutOfMemoryError as error:
        return _error(error, "error: the device is out of memory, a smaller batch_size may fit: ")
    except (FloatingPointError, OSError, ValueError) as error:
        return _error(error)
    except RuntimeError as error:
        if signals.received and parallel.world_size() > 1:  # by all processes, of which another was faster
            raise Stopped(signals.received) from error
        if not parallel.is_peer_failure(error):
            raise
        return _fail(f"stopped, since another process ended or differs: {str(error).splitlines()[0]}", 1)
    summary = read_record(run / "summary.json", "seconds", "rows")
    if not parallel.is_main_process():
        return 0
    if "seeds" not in summary:
        screen.show(console, screen.results(summary["rows"]))
        for note in screen.kept(session.config):
            console.print(note, highlight=False, soft_wrap=True)
        _print_findings(summary)
        console.print(f"{summary['seconds']:.0f} s in all; everything is in {printable(run)}", highlight=False)
    else:
        from eekd.report import report
        from eekd.train.seeds import sentence

        screen.show(console, screen.over_seeds(summary))
        _print_findings(summary)
        print(f"{sentence(summary)} {summary['seconds']:.0f} s in all. Report: {printable(report(run))}".strip())
    _print_gain(run)
    return 0


def _print_gain(run: Path) -> None:
    """The last line of a run, which is whole whether or not its networks can be timed now."""
    from eekd.export.gain import gain

    try:
        if line := gain(run):
            print(line)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        warnings.warn(f"the student's speed was not measured: {in_words(error)}", stacklevel=2)


def _print_findings(summary: dict) -> None:
    for finding in summary.get("findings", ()):
        print(f"note: {printable(finding)}")


def parse(argv: list[str]) -> Flags:
    """The flags of a command line; ValueError or tyro's SystemExit says what is wrong and what is near it."""
    phase = argv[0] if argv and not argv[0].startswith("-") else None
    if phase not in (None, "teacher", "student"):
        near = nearest(phase, ("teacher", "student"))
        raise ValueError(f"the first word must be teacher, student or a flag, got {phase!r}{near}")
    flags = ["--teacher-run" + flag[9:] if flag.split("=")[0] == "--teacher" else flag for flag in argv]
    flags = switched(flags[1:] if phase else flags)
    start = tyro.cli(Start, args=flags, return_unknown_args=True, add_help=False)[0]
    # Without any setting it is the demonstration; a setting is meant for the general recipe.
    given = {flag.partition("=")[0] for flag in flags if flag.startswith("--")}
    settings = _start(start, "glyphs" if not phase and given <= {"--out", "--dry-run"} else "digits")
    if phase == "teacher":
        settings = replace(settings, students=(), teacher_run=None, checkpoints=(), bank=None)
    with any_word():
        parsed = tyro.cli(Flags, prog="eekd train", args=flags, default=Flags(settings=settings))
    chosen = parsed.settings
    if start.resume:
        other = next((name for name in ("preset", "config", "out") if getattr(parsed, name)), phase)
        changed = differences(asdict(_settings_of(start.resume)), asdict(chosen))
        changed = other or ", ".join(name for name in changed if name not in CHANGEABLE)
        if changed:
            raise ValueError(
                f"--resume {start.resume} continues the run with its own settings, and cannot be given with "
                f"another {changed}"
            )
    if phase == "student" and not (chosen.teacher_run or chosen.checkpoints):
        raise ValueError(
            "student needs --teacher RUN, the run folder whose teacher to use, --bank PATH or --checkpoints FILE ..."
        )
    if chosen.teacher_run and chosen.teacher != settings.teacher:
        raise ValueError(f"the teacher's settings are those of {chosen.teacher_run} and cannot be changed")
    return parsed


def _again(flags: Flags) -> Flags:
    """Under torchrun --max-restarts: the same flags, or those that go on with the run, where it has begun."""
    from eekd import parallel
    from eekd.train.run_folder import read_settings

    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) or flags.resume:
        return flags
    if not flags.out:
        raise ValueError("--out must be given under torchrun --max-restarts, which finds the run by it")
    # The first process decides for all, for it may have begun the run when another comes here.
    there = Path(flags.out, "config.json")
    if not parallel.broadcast(lambda: "begun" * there.exists()):
        return flags
    begun = read_settings(flags.out)
    settings = flags.settings
    if settings.checkpoints:  # whose paths the run keeps
        from eekd.train.import_checkpoints import with_checkpoints

        settings = with_checkpoints(settings)
    changed = differences(asdict(located(begun)), asdict(settled(located(settings), begun)))
    if flags.settings.bank and not flags.settings.teacher_run:  # which the run has from its bank
        changed.pop("teacher_run", None)
    if changed:
        raise ValueError(f"{flags.out} holds a run with another {', '.join(changed)}: choose another --out")
    return replace(flags, resume=flags.out, out=None)


def _settings_of(run: str) -> Config:
    from eekd.train.run_folder import read_settings

    return read_settings(run)


def _start(start: Start, default: str) -> Config:
    """The settings that flags override: a preset's, a file's, or those of the run that gives the teacher."""
    if start.resume:
        return _settings_of(start.resume)
    settings = preset_or_file(start.preset, start.config, default)
    folder = start.teacher_run
    if start.bank and not folder:
        from eekd.bank import LogitBank

        folder = str(LogitBank.open(start.bank).run)
    if not folder:
        return settings
    run = _settings_of(folder)
    if not start.preset and not start.config:
        students = None if run.students in ((), recommended(run.student)) else run.students
        settings = replace(run, students=students, bank=None)
    return replace(settings, teacher=run.teacher, teacher_run=folder, checkpoints=(), checkpoint_entry=None)


def _warn(message: Warning, category: type, filename: str, lineno: int, file=None, line=None) -> None:
    if not _rank():
        print(f"warning: {printable(message)}", file=sys.stderr)


def _rank() -> int:
    """The number of this process; 0 before it has joined the others."""
    module = sys.modules.get("eekd.parallel")
    return module.rank() if module else 0


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _error(error: Exception, what: str = "error: ") -> int:
    return _fail("; ".join([what + in_words(error), *_notes(error)]), 2)


def _fail(sentence: str, code: int) -> int:
    who = f"process {_rank()}: " if _rank() else ""
    print(who + printable(sentence), file=sys.stderr)
    return code


if __name__ == "__main__":
    command.run(main)
