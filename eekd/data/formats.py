"""The archives small image sets come in: bytes in, uint8 images and int64 labels out, nothing trusted.

No name in an archive becomes a path, nothing in a pickle is run, and what a file can cost is bounded by its size and
by `LARGEST`, whatever its headers say.
"""

import gzip
import io
import math
import os
import pickle
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

CIFAR_SHAPE = (3, 32, 32)
CIFAR_BYTES = math.prod(CIFAR_SHAPE)
LARGEST = 1 << 30  # bytes of a file, and of all that an archive unpacks to: CIFAR is a fifth of it
STEPS = 2_000_000  # of a pickle; the batch of CIFAR-100 takes 450,000
BLOCK = 512  # bytes: what tar archives are made of


@contextmanager
def unpacked(path: str | Path) -> Iterator[io.BufferedIOBase]:
    """A file open to be read, unpacked where it is gzip (told by its first two bytes, not by its name).

    Raises what `open` does, and ValueError where it is no regular file (a pipe would be waited for) or too large.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
        raise ValueError(f"{path} must be a file of at most {LARGEST} bytes")
    with open(path, "rb") as file:
        if file.peek(2)[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as inside:
                yield inside
        else:
            yield file


def read_bytes(path: str | Path) -> bytes:
    """The content of a file, unpacked where it is gzip; raises what `unpacked` does, ValueError where damaged."""
    try:
        with unpacked(path) as file:
            data = _read(file, LARGEST + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from None
    if len(data) > LARGEST:
        raise ValueError(f"{path} unpacks to more than {LARGEST} bytes")
    return data


def _read(file: io.BufferedIOBase, count: int) -> bytes:
    """The next `count` bytes or what there is of them, in memory for no more than that."""
    data = io.BytesIO()
    while count and (part := file.read(min(count, 1 << 20))):
        data.write(part)
        count -= len(part)
    return data.getvalue()


def read_members(path: Path, names: set[str]) -> dict[str, bytes]:
    """Those of the named files that a folder or a tar archive, packed by gzip or not, holds, by their last name.

    Raises what `unpacked` does, and ValueError for a damaged archive, and for one with links, devices or names that
    lead out of it.
    """
    if path.is_dir():
        return {name: read_bytes(path / name) for name in names if (path / name).is_file()}
    members, total = {}, 0
    try:
        with unpacked(path) as file:
            while (header := _read(file, BLOCK)).strip(b"\0") or not header and not total:
                name, kind, size = _member(header)
                padded = -(-size // BLOCK) * BLOCK
                total += BLOCK + padded
                if total > LARGEST:
                    raise ValueError(f"{path} unpacks to more than {LARGEST} bytes")
                if kind in b"xgLK":  # more about the next member, and no part of what is read of it
                    kind, name = b"5", ""
                place = PurePosixPath(name)
                if kind not in (b"0", b"\0", b"5") or place.is_absolute() or ".." in place.parts:
                    raise ValueError(f"{path} is refused: {name!r} is no plain file or folder in it")
                if kind == b"5" or place.name not in names:
                    file.seek(padded, os.SEEK_CUR)
                elif len(data := _read(file, padded)) < size:
                    raise EOFError(f"{name!r} is cut off")
                else:
                    members[place.name] = data[:size]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no tar archive: {error}") from None
    return members


def _member(header: bytes) -> tuple[str, bytes, int]:
    """Name, kind and size that a block of a tar archive announces; EOFError where it is none.

    Source: POSIX.1-2017, pax, "ustar Interchange Format".
    """
    size, checksum = (re.fullmatch(rb"[ \0]*([0-7]+)[ \0]*", header[a:b]) for a, b in ((124, 136), (148, 156)))
    summed = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if len(header) < BLOCK or not size or not checksum or int(checksum[1], 8) != summed:
        raise EOFError("a header of it is none")
    parts = [header[:100], header[345:500]] if header[257:263] == b"ustar\0" else [header[:100]]
    names = [part.partition(b"\0")[0].decode(errors="backslashreplace") for part in parts]
    return "/".join(filter(None, reversed(names))), header[156:157], int(size[1], 8)


def parse_idx(data: bytes, source: str) -> Tensor:
    """An idx file of unsigned bytes: 00 00 08 ndim, ndim big-endian uint32 sizes, then the bytes.

    Returns uint8 of the shape in the header; raises ValueError naming `source` where anything else is found.
    Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
    """
    start = 4 + 4 * (data[3] if len(data) > 3 else 0)
    if data[:3] != b"\0\0\x08" or not 8 <= start <= min(20, len(data)):
        raise ValueError(f"{source} must be an idx file of bytes, which starts with 000008, got {data[:4].hex()}")
    shape = np.frombuffer(data[4:start], ">u4").tolist()
    if not math.prod(shape) or math.prod(shape) != len(data) - start:
        raise ValueError(f"{source} must hold bytes of shape {shape}, as its header says, got {len(data) - start}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


def read_idx_pair(images: Path, labels: Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, S, S) uint8 and labels (N,) int64 from the two idx files of MNIST and its heirs."""
    x, y = (parse_idx(read_bytes(path), str(path)) for path in (images, labels))
    if x.ndim != 3 or x.shape[1] != x.shape[2]:
        raise ValueError(f"{images} must have shape [images, side, side], got {list(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"{labels} must have one label for each of {len(x)} images, got shape {list(y.shape)}")
    return x.unsqueeze(1), check_labels(y.tolist(), num_classes, str(labels))


def parse_cifar_binary(data: bytes, source: str, label_bytes: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 from records of `label_bytes` labels and 3072 pixels.

    The last label byte counts (CIFAR-100 writes the coarse label before the fine one).
    Source: Krizhevsky, "Learning multiple layers of features from tiny images", and the data's own page.
    """
    record = label_bytes + CIFAR_BYTES
    if not data or len(data) % record:
        raise ValueError(f"{source} must hold a positive multiple of {record} bytes, got {len(data)}")
    records = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(-1, record).copy())
    labels = check_labels(records[:, label_bytes - 1].tolist(), num_classes, source)
    return records[:, label_bytes:].reshape(-1, *CIFAR_SHAPE), labels


def parse_cifar_python(data: bytes, source: str, label_key: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """The same from a pickled dict of `data`, (N, 3072) bytes, and a list of labels; see `read_pickle`."""
    batch = read_pickle(data, source)
    pixels, labels = batch.get("data"), batch.get(label_key)
    if not isinstance(pixels, _Array) or pixels.shape[1:] != (CIFAR_BYTES,) or not pixels.shape[0]:
        raise ValueError(f"{source} has no array 'data' of bytes of shape (images, {CIFAR_BYTES})")
    if not isinstance(labels, list) or len(labels) != pixels.shape[0] or {type(y) for y in labels} != {int}:
        raise ValueError(f"{source} has no list {label_key!r} of an integer for each of its images")
    images = torch.from_numpy(np.frombuffer(pixels.data, np.uint8).reshape(-1, *CIFAR_SHAPE).copy())
    return images, check_labels(labels, num_classes, source)


def check_labels(labels: list[int], num_classes: int, source: str) -> Tensor:
    """`labels` as int64, or ValueError where one lies outside [0, num_classes)."""
    low, high = min(labels), max(labels)
    if low < 0 or high >= num_classes:
        low, high = (min(max(y, -(10**40)), 10**40) for y in (low, high))  # Python writes out no number without end
        raise ValueError(f"{source} must have labels from 0 to {num_classes - 1}, got {low} to {high}")
    return torch.tensor(labels)


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass


class _Array:
    """Stands in for a numpy array of bytes in C order, so that numpy's own constructors are never called."""

    shape: tuple[int, ...] = ()
    data = b""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        sizes = isinstance(shape, tuple) and len(shape) < 4 and all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
        if not sizes or dtype.code not in ("u1", "|u1") or fortran or len(data) != math.prod(shape):
            raise pickle.UnpicklingError("its array is not one of bytes in C order")
        self.shape, self.data = shape, data


class _Latin1(bytes):
    """Stands in for _codecs.encode, by which Python 3 writes bytes in protocol 2; a number would be a size."""

    def __new__(cls, text, *_):
        return bytes(text, "latin1")


class _Dict(dict):
    """A dict without keys that are containers: the hash of nested tuples can take for ever, or all of the stack."""

    def __setitem__(self, key, value):
        if not isinstance(key, str | bytes | int):
            raise pickle.UnpicklingError(f"a {type(key).__name__} is a key in it")
        super().__setitem__(key, value)


class _Steps(io.BytesIO):
    """Bytes that are read in at most `STEPS` pieces."""

    left = STEPS

    def read(self, size=-1):
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it takes more than {STEPS} steps")
        return super().read(size)


class _Unpickler(pickle._Unpickler):
    """Builds plain values and `_Array`: a pickle finds nothing else to call, and costs as much as it is long.

    Python's own unpickler, not the C one, whose memo is an array that a forged index makes fill the memory.
    """

    known = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _Latin1,
    }
    codes = re.findall(
        r"\w+",
        """
        PROTO FRAME STOP MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT
        BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
        SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE
        TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
    """,
    )

    # What Python's has while it loads.
    stack: list
    read: Callable
    append: Callable
    pop_mark: Callable

    def __init__(self, data: bytes):
        super().__init__(_Steps(data), encoding="latin1")

    def find_class(self, module, name):
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'[:80]!r}")
        return self.known[module, name]

    def load_frame(self):
        self.read(8)  # a hint at what may be read ahead

    def load_dict(self):
        if self.pop_mark():
            raise pickle.UnpicklingError("a dict in it is not built entry by entry")
        self.append(_Dict())

    def load_empty_dictionary(self):
        self.append(_Dict())

    def load_build(self):
        state = self.stack.pop()
        self.stack[-1].__setstate__(state)  # only a stand-in has it: pickle would set attributes, of classes too

    dispatch = {  # pyright: ignore[reportAssignmentType]
        getattr(pickle, code)[0]: pickle._Unpickler.dispatch[getattr(pickle, code)[0]] for code in codes
    } | {
        pickle.FRAME[0]: load_frame, pickle.DICT[0]: load_dict, pickle.EMPTY_DICT[0]: load_empty_dictionary,
        pickle.BUILD[0]: load_build,
    }  # fmt: skip


def read_pickle(data: bytes, source: str) -> dict:
    """The dict in a pickle of plain values and arrays of bytes; ValueError, and nothing run, for all else."""
    try:
        value = _Unpickler(data).load()
    except Exception as error:  # a forged pickle can make the reader raise anything
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise ValueError(f"{source} is no pickle of plain values and arrays of bytes: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} must hold a dict, got a {type(value).__name__}")
    return value
