"""Files that are written whole or not at all, JSON that finds any byte that changed, and words for what went wrong.

Needs no torch: command lines are read by it.
"""

import difflib
import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

SEAL = "own_sha256"  # the last entry of a JSON object: SHA-256 of the file as it would be without this entry
# How disks that lack something answer, and not those that are full or break: on them the work goes on with a warning.
LACKING = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_FOLDER_SYNC = LACKING | {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}
_NO_REPLACE = LACKING | {errno.EEXIST, errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY}
LARGEST_JSON = 1 << 25  # bytes: Python needs twenty times as many to hold them, and a manifest of a TB has fewer


def write_atomic(path: str | Path, data: bytes, sync: bool = True) -> str:
    """Write `data` so that a crash at any moment leaves the old file or the new one; return its SHA-256.

    The bytes go to a hidden file beside `path`, reach the disk, and take the name in one step. Missing
    folders are made. An error removes the hidden file; after a power cut the next write replaces it, as it does a
    link of that name, which could lead anywhere.
    `sync=False` saves the wait for the disk: the kill of a process harms as little, a power cut may. Of a disk that
    cannot wait, or not replace a file in one step, a warning says what it does not promise.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if sync:
                _sync(file.fileno(), path.parent, LACKING)
        _replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename, error.filename2 = str(path), None  # a full disk does not say where
        raise
    if sync:
        _sync_folder(path.parent)  # without it the new name may not survive a power cut
    return hashlib.sha256(data).hexdigest()


def lacks(folder: Path, what: str, so: str, error: OSError) -> None:
    """Warns, once for each disk, that the one of `folder` lacks `what`, and `so` what is not promised."""
    with suppress(OSError):
        if (key := (what, os.stat(folder).st_dev)) in _warned:
            return
        _warned.add(key)
    warnings.warn(
        f"the disk of {folder} {what} ({os.strerror(error.errno or 0)}), so {so}", RuntimeWarning, stacklevel=3
    )


_warned: set[tuple[str, int]] = set()
_NO_SYNC = "cannot wait until files are written", "a power cut may cost files that were written before"


def _sync(descriptor: int, folder: Path, lacking: set[int]) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in lacking:
            raise
        lacks(folder, *_NO_SYNC, error)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        lacks(folder, *_NO_SYNC, error)
        return
    try:
        _sync(descriptor, folder, _NO_FOLDER_SYNC)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, path: Path) -> None:
    """Gives `temporary` the name `path`, in one step where the disk can."""
    try:
        os.replace(temporary, path)
        return
    except OSError as error:
        if error.errno not in _NO_REPLACE or not os.path.lexists(path) or path.is_dir():
            raise
        cause = error
    old = path.with_name(f".{path.name}.old")
    old.unlink(missing_ok=True)
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    old.unlink()
    lacks(
        path.parent,
        "cannot replace a file in one step",
        "a kill between two steps can leave a file under the name .NAME.old only",
        cause,
    )


def read_checked(path: str | Path, sha256: str | None = None) -> bytes:
    """The bytes of a file, with this SHA-256 where one is given.

    Raises FileNotFoundError where there is no such file, ValueError where the hash differs or memory is too small.
    """
    path = _file(path)
    try:
        data = path.read_bytes()
    except MemoryError:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than there is memory for") from None
    if sha256 is not None and (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{path} was changed or damaged: its SHA-256 must be {sha256}, got {digest}")
    return data


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal; FileNotFoundError where there is none."""
    with open(_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():  # nor a pipe or a device, which would be read for ever
        raise FileNotFoundError(f"{path} is missing or not a file")
    return path


def write_json_atomic(path: str | Path, value, sync: bool = True) -> str:
    """Write `value` as JSON like `write_atomic`; ValueError for NaN, infinities and what JSON lacks.

    An object is sealed: its last entry is "own_sha256", by which `read_json` finds any byte that changed.
    """
    try:
        data = _json(value)
        if isinstance(value, dict):
            data = _json({**value, SEAL: hashlib.sha256(data).hexdigest()})
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be written as JSON: {error}") from error
    if len(data) > LARGEST_JSON:
        raise ValueError(f"{path} cannot be written as JSON: it would have {len(data)} bytes, more than {LARGEST_JSON}")
    return write_atomic(path, data, sync)


def _json(value) -> bytes:
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def json_bytes(path: str | Path) -> bytes:
    """The bytes of a file of JSON; errors of `read_checked`, ValueError where there are more than `LARGEST_JSON`."""
    if (size := _file(path).stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path} must have at most {LARGEST_JSON} bytes, as JSON, got {size}")
    return read_checked(path)


def read_json(path: str | Path):
    """The value in a JSON file, without its seal.

    ValueError where it is not JSON, or not strictly (NaN, Infinity), or larger than `LARGEST_JSON`, and where a seal
    is not that of the file.
    """

    def refuse(constant: str):
        raise ValueError(f"{constant} is not a number")

    data = json_bytes(path)
    try:
        value = json.loads(data.decode(), parse_constant=refuse)  # of bytes it would read UTF-16, which grep does not
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict) or not value:
        return value
    last = list(value)[-1]
    if SEAL not in value and not difflib.get_close_matches(last, [SEAL], 1, 0.8):  # a flip can hit its name
        return value  # written by something else
    before, _, seal = data.rpartition(f'  "{SEAL}": "'.encode())
    bare = b"{}\n" if before == b"{\n" else before.removesuffix(b",\n") + b"\n}\n"
    if seal != hashlib.sha256(bare).hexdigest().encode() + b'"\n}\n':
        raise ValueError(f"{path} was changed or damaged: its {SEAL} is not that of what it holds")
    return {name: entry for name, entry in value.items() if name != SEAL}


def printable(text) -> str:
    """A sentence with escapes in place of what a terminal obeys, and an end: names from a file may hold anything."""
    text = str(text)
    text = text if len(text) <= 2000 else f"{text[:2000]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_words(error: Exception) -> str:
    """What an error says; of one of the system's what is wrong and where."""
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)


def first_line(error: Exception | str) -> str:
    """The first line of what a reader of damaged bytes says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """A hint at the entry of `names` closest to `name`: "; did you mean 'x'?", or "" where none is close."""
    lowered = {n.lower(): n for n in reversed([*names])}
    close = difflib.get_close_matches(str(name).lower(), lowered, 1, cutoff)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""


# What stands in a file of another kind than its name says, by how it starts, in small letters.
_STRANGERS = {
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` fetches the {}",
    b"<!doctype html": "a page of HTML",
    b"<html": "a page of HTML",
}


def stranger(data: bytes, wanted: str, others: Mapping[bytes, str]) -> str | None:
    """What `data` is in place of the file that is `wanted`, by how it starts; `others` has more than LFS and HTML."""
    head = data[:100].lstrip().lower()
    kind = next((what for start, what in (_STRANGERS | dict(others)).items() if head.startswith(start)), None)
    return kind and kind.format(wanted)
