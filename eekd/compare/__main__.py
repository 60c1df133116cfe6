"""The command line of the comparison: python -m eekd.compare [--methods NAME ...] [--seeds N] [--flag value ...]."""

import dataclasses
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from eekd import command

if __name__ == "__main__":
    command.start()

from eekd.compare.methods import METHODS, folder_of, method
from eekd.io.files import in_words, printable
from eekd.train.config import Config, settled, switched
from eekd.train.presets import preset
from eekd.train.signals import signals

try:
    import tyro
    from rich.console import Console

    from eekd.train.flags import any_word
except ImportError as error:
    raise SystemExit(f"python -m eekd.compare needs {error.name}: pip install 'eekd[train]'") from None

DECIDED = ("seed", "students", "teacher_run", "checkpoints", "bank")  # settings that a comparison decides by itself
VARIED = ("fusion", "attention_objective")  # and those of the student


@dataclass(frozen=True)
class Flags:
    """Compares ways to teach the same student, over several seeds.

    Run it again after a kill, or to add methods or seeds: finished parts are kept. Processes with different seeds may
    work on the same --out at the same time. The processes of torchrun share the seeds.
    """

    methods: tuple[
        str, ...
    ] = ()  # names of eekd.compare.METHODS or path/to/file.py:NAME, NAME-online without a bank (None: all)
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...; --seeds says how many (3)
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
        return _error(error)
    with signals:
        try:
            run(flags, ["python", "-m", "eekd.compare", *argv])
            return 0
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 128 + (signals.received or signal.SIGINT)
        except torch.OutOfMemoryError as error:
            return _error(error, "error: the device is out of memory, a smaller batch_size may fit: ")
        except (AttributeError, FloatingPointError, ImportError, OSError, TypeError, ValueError) as error:
            return _error(error)


def _error(error: Exception, what: str = "error: ") -> int:
    print(what + printable(in_words(error)), file=sys.stderr)
    return 2


def parse(argv: list[str]) -> Flags:
    """The flags of a command line; ValueError or tyro's SystemExit says what is wrong and what is near it."""
    argv = switched(argv)
    start = tyro.cli(Start, args=argv, return_unknown_args=True, add_help=False)[0]
    if start.preset and start.config:
        raise ValueError("give --preset or --config, not both")
    settings = Config.load(start.config) if start.config else preset(start.preset or "digits")
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
    if flags.views is not None and flags.views < 1:
        raise ValueError(f"views must be at least 1, got {flags.views}")
    if flags.first_seed < 0:
        raise ValueError(f"first_seed must be at least 0, got {flags.first_seed}")
    names = tuple(dict.fromkeys(flags.methods or METHODS))
    if len({*map(folder_of, names)}) < len(names):
        raise ValueError(f"methods must have different names, got {', '.join(names)}")
    for name in names:
        how, teacher = method(name), chosen.teacher
        if type(how.snapshots) is int and how.snapshots > teacher.epochs:
            raise ValueError(f"teacher.epochs must be at least {how.snapshots} for method {name}, got {teacher.epochs}")
        if how.teacher == "cyclic":
            dataclasses.replace(teacher, schedule="cyclic")  # a ValueError where its cycles are not equal
        elif teacher.schedule == "cyclic":
            raise ValueError("teacher.schedule must be another than that of the cyclic- methods, got 'cyclic'")
    return dataclasses.replace(flags, methods=names)


def run(flags: Flags, typed: list[str]) -> Path:
    """Makes the cells that are missing and writes study.json; returns its path."""
    from eekd import parallel
    from eekd.compare.runner import Seed, keep_settings, kept_settings
    from eekd.compare.study import gather
    from eekd.train import prepare
    from eekd.train.student import method_of

    rank, processes = parallel.rank_and_world_size()
    out = Path(flags.out or f"runs/compare-{flags.settings.data_name}")
    wanted = dataclasses.replace(flags.settings, seeds=1)
    if (out / "settings.json").exists():
        wanted = settled(wanted, kept_settings(out))
    for name in flags.methods:
        method_of(method(name).weighting)  # which a mistake in a user's file ends here
    console, session = Console(quiet=rank > 0, markup=False), prepare(wanted)
    settings = session.config
    augmented = session.loader("train", settings.student, train=True).varies
    views = flags.views or (8 if augmented else 1)
    keep_settings(out, settings, views, session.data.fingerprint)
    with console.status("") as status:

        def progress(phase, done, total, known):
            status.update(f"{phase}: epoch {known['epoch']} of {known['epochs']}, loss {known['train_loss']:.3f}")

        def say(line):
            console.print(printable(line), highlight=False, soft_wrap=True)

        for seed in range(flags.first_seed, flags.first_seed + flags.settings.seeds)[rank::processes]:
            config = dataclasses.replace(settings, seed=seed)
            Seed(out, config, flags.methods, views, augmented, session.data, say, progress).run()
    parallel.long_barrier()
    path = gather(out, typed, augmented) if rank == 0 else out / "study.json"
    console.print(f"everything is in {printable(path.parent)}", highlight=False, soft_wrap=True)
    return path


if __name__ == "__main__":
    command.run(main)
