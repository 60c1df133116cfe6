"""SIGINT and SIGTERM while a command works."""

import os
import signal
import threading
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came, and what was going on is on disk; `args` hold the signal's number."""


class Signals:
    """SIGINT and SIGTERM as `Stopped`, raised at once, or while `held` after the step in progress: `with signals:`.

    A second signal is not held. Under torchrun it is ignored, to the end of the process: it is the same once more, from
    a terminal or Slurm to all processes, and from torchrun to its workers, which it kills 30 s later. Outside of
    `with`, and in other threads than the first, signals do what they did.
    """

    def __init__(self):
        self.received = 0  # the signal's number
        self._held, self._before, self._process = False, {}, 0

    def __enter__(self) -> "Signals":
        self.received, self._held, self._process = 0, False, os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *error) -> None:
        self.received = 0
        self._restore()

    @contextmanager
    def held(self, held: bool = True):
        """Whether a signal waits for `check`, or the end of the block, within this block."""
        before, self._held = self._held, held
        try:
            if not held:
                self.check()
            yield
        finally:
            self._held = before
        if not before:
            self.check()

    def check(self, number: int | None = None) -> None:
        """Raises Stopped where a signal came, here or, if `number` is given, in any process."""
        number = self.received if number is None else number
        if number:
            raise Stopped(number)

    def _take(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a worker of the loader, which inherited this: its parent decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self._restore()
        if "WORLD_SIZE" in os.environ:
            for other in (signal.SIGINT, signal.SIGTERM):
                signal.signal(other, signal.SIG_IGN)
        self.received = number
        if not self._held:
            raise Stopped(number)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


signals = Signals()
