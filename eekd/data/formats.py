"""The archives small image sets come in: bytes in, uint8 images and int64 labels out, nothing trusted."""

import gzip
import io
import math
import pickle
import tarfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

CIFAR_SHAPE = (3, 32, 32)
CIFAR_BYTES = math.prod(CIFAR_SHAPE)


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where it is gzip (told by its first two bytes, not by its name)."""
    data = Path(path).read_bytes()
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from None


def read_members(path: Path, names: set[str]) -> dict[str, bytes]:
    """Those of the named files that a folder or a tar archive holds; the archive is never unpacked to disk.

    Raises ValueError for a damaged archive, and for one with links, devices or names that lead out of it.
    """
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    found, strange = {}, []
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
                if name.is_absolute() or ".." in name.parts or not plain:
                    strange.append(member.name)
                elif member.isfile() and name.name in names:
                    found[name.name] = tar.extractfile(member).read()
    except Exception as error:  # a damaged header can make tarfile raise anything
        raise ValueError(f"{path} is damaged or no tar archive ({type(error).__name__})") from None
    if strange:
        raise ValueError(f"{path} is refused: {strange[0]!r} is no plain file or folder in it")
    return found


def parse_idx(data: bytes, source: str) -> Tensor:
    """An idx file of unsigned bytes: 00 00 08 ndim, ndim big-endian uint32 sizes, then the bytes.

    Returns uint8 of the shape in the header; raises ValueError naming `source` where anything else is found.
    Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
    """
    start = 4 + 4 * (data[3] if len(data) > 3 else 0)
    if data[:3] != b"\0\0\x08" or not 8 <= start <= min(20, len(data)):
        raise ValueError(f"{source} is no idx file of bytes: it starts with {data[:4].hex()}, not 000008")
    shape = np.frombuffer(data[4:start], ">u4").tolist()
    if not math.prod(shape) or math.prod(shape) != len(data) - start:
        raise ValueError(f"{source} holds {len(data) - start} bytes of data, but its header says {shape}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


def read_idx_pair(images: Path, labels: Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, S, S) uint8 and labels (N,) int64 from the two idx files of MNIST and its heirs."""
    x, y = (parse_idx(read_bytes(path), str(path)) for path in (images, labels))
    if x.ndim != 3 or x.shape[1] != x.shape[2]:
        raise ValueError(f"{images} has shape {list(x.shape)}, wanted [images, side, side]")
    if y.shape != x.shape[:1]:
        raise ValueError(f"{labels} has shape {list(y.shape)}, wanted one label for each of {len(x)} images")
    return x.unsqueeze(1), check_labels(y.tolist(), num_classes, str(labels))


def parse_cifar_binary(data: bytes, source: str, label_bytes: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 from records of `label_bytes` labels and 3072 pixels.

    The last label byte counts (CIFAR-100 writes the coarse label before the fine one).
    Source: Krizhevsky, "Learning multiple layers of features from tiny images", and the data's own page.
    """
    record = label_bytes + CIFAR_BYTES
    if not data or len(data) % record:
        raise ValueError(f"{source} holds {len(data)} bytes, wanted a positive multiple of {record}")
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
        raise ValueError(f"{source} has labels from {low} to {high}, wanted 0 to {num_classes - 1}")
    return torch.tensor(labels)


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass


class _Array:
    """Stands in for a numpy array of bytes in C order, so that numpy's own constructors are never called."""

    shape, data = (), b""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        if dtype.code not in ("u1", "|u1") or fortran or len(data) != math.prod(shape):
            raise pickle.UnpicklingError("its array is not one of bytes in C order")
        self.shape, self.data = shape, data


class _Unpickler(pickle._Unpickler):
    """Builds plain values and `_Array`: a pickle finds nothing else to call.

    Python's own unpickler, not the C one, whose memo is an array that a forged index makes fill the memory.
    """

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): bytes,  # how Python 3 writes bytes in protocol 2
    }

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'[:80]!r}")
        return self.allowed[module, name]


def read_pickle(data: bytes, source: str) -> dict:
    """The dict in a pickle of plain values and arrays of bytes; ValueError, and nothing run, for all else."""
    try:
        value = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a forged pickle can make the reader raise anything
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise ValueError(f"{source} is no pickle of plain values and arrays of bytes: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds a {type(value).__name__}, wanted a dict")
    return value
