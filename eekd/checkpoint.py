"""State on disk: written whole or not at all, checked by SHA-256 when read, never unpickled."""

import difflib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error

import safetensors.torch
import torch
from torch import Tensor, nn

SEAL = "own_sha256"  # the last entry of a JSON object: SHA-256 of the file as it would be without this entry
LARGEST_JSON = 1 << 25  # bytes: Python needs twenty times as many to hold them, and a manifest of a TB has fewer
NESTS = "state_dict", "model_state_dict", "model", "module", "net"  # where others keep their state_dict


def write_atomic(path: str | Path, data: bytes, sync: bool = True) -> str:
    """Write `data` so that a crash at any moment leaves the old file or the new one; return its SHA-256.

    The bytes go to a hidden file beside `path`, reach the disk, and take the name in one step. Missing
    folders are made. An error removes the hidden file; after a power cut the next write replaces it, as it does a
    link of that name, which could lead anywhere.
    `sync=False` saves the wait for the disk: the kill of a process harms as little, a power cut may.
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
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename, error.filename2 = str(path), None  # a full disk does not say where
        raise
    if not sync:
        return hashlib.sha256(data).hexdigest()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without it the new name may not survive a power cut
    finally:
        os.close(folder)
    return hashlib.sha256(data).hexdigest()


def read_checked(path: str | Path, sha256: str | None = None) -> bytes:
    """The bytes of a file, with this SHA-256 where one is given.

    Raises FileNotFoundError where there is no such file, ValueError where the hash differs or memory is too small.
    """
    path = _file(path)
    try:
        data = path.read_bytes()
    except MemoryError:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than there is memory for") from None
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{path} was changed or damaged: its SHA-256 must be {sha256}, got {found}")
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
        data = _sealed(value) if isinstance(value, dict) else _json(value)
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be written as JSON: {error}") from error
    if len(data) > LARGEST_JSON:
        raise ValueError(f"{path} cannot be written as JSON: it would have {len(data)} bytes, more than {LARGEST_JSON}")
    return write_atomic(path, data, sync)


def _json(value) -> bytes:
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def _sealed(value: dict) -> bytes:
    return _json({**value, SEAL: hashlib.sha256(_json(value)).hexdigest()})


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


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor],
                 metadata: Mapping[str, str] | None = None, sync: bool = True) -> str:
    """Write named tensors as safetensors like `write_atomic`; return the file's SHA-256.

    Tensors of any dtype, device and strides; those that share memory are each written in full. Raises
    TypeError where an entry is not a dense tensor or a value of `metadata` not a string.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(f"{path}: {name!r} must be a dense tensor with data, got {_kind(tensor)}")
    metadata = dict(metadata or {})
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(f"{path}: metadata {name!r} must be a str, got {_kind(value)}")
    copies = {name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
              for name, tensor in tensors.items()}
    return write_atomic(path, safetensors.torch.save(copies, metadata), sync)


def load_tensors(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; errors of `read_checked`, ValueError where damaged."""
    data = read_checked(path, sha256)
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # damaged bytes make the reader raise whatever it stumbles over
        raise ValueError(f"{path} is not a whole safetensors file: {first_line(error)}") from error


def load_weights(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The state_dict in a .safetensors file or, by any other ending, in a file of `torch.save`; on the CPU.

    The latter is read with `weights_only=True`, so that nothing in it is run, and not where it unpacks to more than
    its size; the state_dict may lie in it under "state_dict", "model_state_dict", "model", "module" or "net". Errors
    of `load_tensors`.
    """
    if Path(path).suffix == ".safetensors":
        return load_tensors(path, sha256)
    data = read_checked(path, sha256)
    try:
        if data.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.save packs nothing
                if (size := sum(member.file_size for member in archive.infolist())) > len(data):
                    raise ValueError(f"it unpacks {len(data)} bytes to {size}")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # The reader begins with the advice to do without its protection.
        lines = [line for line in str(error).splitlines() if "Unpickler error: " in line or "GLOBAL" in line]
        reason = first_line(lines[0] if lines else error)
        raise ValueError(f"{path} cannot be read as tensors without unpickling: {reason}") from error
    state = content
    for _ in NESTS:  # a file can nest without end
        if isinstance(state, dict) and not _all_tensors(state):
            state = next((state[key] for key in NESTS if isinstance(state.get(key), dict)), None)
    if not isinstance(state, dict) or not state or not _all_tensors(state):
        found = f"a dict of {_some(map(repr, content))}" if isinstance(content, dict) else _kind(content)
        raise ValueError(f"{path} must hold a state_dict of tensors, alone or under {', '.join(NESTS)}; "
                         f"got {found}")
    return state


def bare_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the bare model's names, without what torch.compile and DistributedDataParallel add."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `model`, both wrapped or not; ValueError, and nothing copied, where it does not fit.

    It fits if it has the model's names, and for each the model's shape and kind of number. `source` is where
    it came from, for the error.
    """
    state, own = bare_names(state), bare_names(model.state_dict())
    both = [(name, state[name], own[name]) for name in own if name in state]
    faults = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [f"{name} {tuple(got.shape)} for {tuple(want.shape)}"
                             for name, got, want in both if got.shape != want.shape],
        "of another kind": [f"{name} {got.dtype} for {want.dtype}" for name, got, want in both
                            if got.is_floating_point() != want.is_floating_point()],
    }
    if any(faults.values()):
        reasons = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {reasons}")
    model.load_state_dict({name: state[bare] for name, bare in zip(model.state_dict(), own, strict=True)})


def _all_tensors(state: dict) -> bool:
    return all(isinstance(value, Tensor) for value in state.values())


def _kind(value) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor on {value.device}"
    return f"a {type(value).__name__}"


def _some(names) -> str:
    names = list(names)
    shown = ", ".join(printable(name)[:100] for name in names[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
