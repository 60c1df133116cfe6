"""Writes a logit bank: python -m eekd.bank --teacher RUN [--views 8] [--flag value ...], also under torchrun."""

import signal
import sys

from eekd import command

if __name__ == "__main__":
    command.start()

from eekd.bank import Flags
from eekd.train.signals import signals

try:
    import tyro
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"python -m eekd.bank needs {error.name}: pip install 'eekd[train]'") from None


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 130 or 143 when stopped by a signal, 2 for any mistake."""
    try:
        flags = parse(command.arguments(argv))
        import torch  # not before: a mistake, or a call for help, needs no torch

        from eekd import parallel
        from eekd.train.write_bank import write_bank
    except (ImportError, ValueError) as error:
        return command.refuse(error)
    with signals:
        try:
            write_bank(flags, Console(markup=False), *parallel.rank_and_world_size())
            return 0
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 128 + (signals.received or signal.SIGINT)
        except (AttributeError, ImportError, OSError, TypeError, ValueError, torch.OutOfMemoryError) as error:
            return command.refuse(error)


def parse(argv: list[str]) -> Flags:
    """The flags of a command line; ValueError or tyro's SystemExit says what is wrong."""
    flags = tyro.cli(Flags, prog="eekd bank", args=argv)
    if flags.views < 1:
        raise ValueError(f"views must be at least 1, got {flags.views}")
    if flags.features not in ("none", "all") and not (flags.features.isdecimal() and int(flags.features)):
        raise ValueError(f"features must be none, all or a width of at least 1, got {flags.features!r}")
    if flags.top_k < 0:
        raise ValueError(f"top-k must be at least 1, or 0 for all classes, got {flags.top_k}")
    return flags


if __name__ == "__main__":
    command.run(main)
