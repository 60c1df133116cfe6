"""What all commands share: how they start, --version, and one line for a mistake, or at Ctrl-C, also during imports."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import eekd
from eekd.io.files import in_words, printable

# What a mistake of the user's raises.
MISTAKES = AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError


def arguments(argv: list[str] | None) -> list[str]:
    """The words of a command line, by default this process's; --version among them is answered here."""
    argv = sys.argv[1:] if argv is None else argv
    if "--version" in argv:
        print(f"eekd {eekd.__version__}")
        raise SystemExit(0)
    return argv


def answer(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    work: Callable[[argparse.Namespace], int],
    mistakes: tuple[type[Exception], ...] = MISTAKES,
) -> int:
    """Calls `work` with the flags of a command line and returns its exit code; 2 and a line for any of `mistakes`."""
    given = parser.parse_args(arguments(argv))
    try:
        return work(given)
    except mistakes as error:
        return refuse(error)


def refuse(error: Exception, what: str = "error: ") -> int:
    """Prints what an error says, in one line, and returns the exit code of a mistake."""
    print(what + printable(in_words(error)), file=sys.stderr)
    return 2


def start() -> None:
    """What a command does before it imports torch: `stop_at_once`, and threads that soon sleep while they wait.

    A thread that has done its part of an operation spins until the others have theirs: libgomp's own 3 ms take the
    core from whom it waits for, where another program runs beside it. 3,000 turns cost nothing where none does; both
    measured by results/epochs.py, on few cores. The environment's own OMP_WAIT_POLICY or GOMP_SPINCOUNT holds.
    """
    stop_at_once()
    if "OMP_WAIT_POLICY" not in os.environ and len(os.sched_getaffinity(0)) <= 4:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def stop_at_once() -> None:
    """From now on SIGINT and SIGTERM end the process with one line: for the seconds in which a command is imported.

    Nothing is unwound: in the midst of an import an exception can become another one, or none.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame) -> NoReturn:
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with the exit code that `main` returns; a signal that comes after it is ignored."""
    stop_at_once()
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if parallel := sys.modules.get("eekd.parallel"):
        parallel.exit_process(code or 0)  # which knows how one of several processes ends
    sys.exit(code)
