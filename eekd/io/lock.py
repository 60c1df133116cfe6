"""A lock on a folder, held by one process at a time."""

import errno
import fcntl
import os
import platform
from contextlib import contextmanager, suppress
from pathlib import Path

from eekd.io.files import LACKING, lacks


@contextmanager
def locked(run: Path, wait: bool = False):
    """Keeps other processes from the run; BlockingIOError, one sentence, where one has it, unless it shall `wait`.

    The lock is the kernel's (flock), so it ends with the process however that ends. Of a disk without locks a warning
    says that there is none.
    """
    path = run / ".lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)  # a link may lead anywhere
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            raise BlockingIOError(f"{run} is in use by {holder}: wait for it or stop it first") from None
        except OSError as error:
            error.filename = str(path)
            if error.errno not in LACKING | {errno.ENOLCK}:
                raise
            lacks(
                run, "has no locks", "nothing keeps a second process out of what this one writes: start only one", error
            )
        _locks.add(file)
        with suppress(OSError):  # a disk may be full: the lock holds all the same
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        _locks.discard(file)
        os.close(file)


def _leave_locks() -> None:
    while _locks:
        os.close(_locks.pop())


_locks: set[int] = set()
os.register_at_fork(after_in_child=_leave_locks)  # else a worker of the loader that outlives a kill would hold it
