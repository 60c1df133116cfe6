"""State on disk: written whole or not at all, checked by SHA-256 when read, never unpickled."""

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from eekd.io.files import first_line, read_checked, read_json, sha256_of, stranger, write_atomic
from eekd.io.state_dicts import bare_names, find_state, kind_of, load_state, some

__all__ = [
    "bare_names",
    "check_tensors",
    "load_state",
    "load_tensors",
    "load_weights",
    "save_tensors",
    "tensors_sha256",
    "weights_sha256",
]
INDEX = ".index.json"
# What is given for a checkpoint and is none.
_OTHERS = {
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x89hdf": "a file of HDF5, as Keras writes them",
    b"gguf": "a file of GGUF",
    b"{": "text: JSON",
}


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, sync: bool = True
) -> str:
    """Write named tensors as safetensors like `write_atomic`; return the file's SHA-256.

    Tensors of any dtype, device and strides; those that share memory are each written in full. Raises
    TypeError where an entry is not a dense tensor or a value of `metadata` not a string.
    """
    check_tensors(tensors, path)
    metadata = dict(metadata or {})
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(f"{path}: metadata {name!r} must be a str, got {kind_of(value)}")
    return write_atomic(path, _bytes(tensors, metadata), sync)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors as safetensors has them, without metadata."""
    return hashlib.sha256(_bytes(tensors)).hexdigest()


def _bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    copies = {
        name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(copies, metadata)


def check_tensors(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """TypeError where an entry is not what `save_tensors` can write: a dense tensor with data."""
    for name, tensor in tensors.items():
        lazy = isinstance(tensor, UninitializedBuffer | UninitializedParameter)
        if lazy or not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            got = "one that has no shape before the first batch" if lazy else kind_of(tensor)
            raise TypeError(f"{source}: {name!r} must be a dense tensor with data, got {got}")


def load_tensors(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; errors of `read_checked`, ValueError where damaged."""
    data = read_checked(path, sha256)
    if what := stranger(data, "file", _OTHERS):
        raise ValueError(f"{path} must be a safetensors file, got {what}")
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # damaged bytes make the reader raise whatever it stumbles over
        raise ValueError(f"{path} is not a whole safetensors file: {first_line(error)}") from error


def load_weights(path: str | Path, sha256: str | None = None, *, entry: str | None = None) -> dict[str, Tensor]:
    """The state_dict in a checkpoint, on the CPU.

    That is a .safetensors file, an index of several (`model.safetensors.index.json`), or by any other ending a file of
    `torch.save`. The latter is read with `weights_only=True`, so that nothing in it is run, and not where it unpacks to
    more than its size. `eekd.io.state_dicts.find_state` says where in it the state_dict may lie, and what `entry`
    chooses. `sha256` is that of `weights_sha256`. Errors of `load_tensors`.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        content = _shards(path, sha256)
    elif path.suffix == ".safetensors":
        content = load_tensors(path, sha256)
    else:
        content = _torch_file(path, sha256)
    if path.suffix == ".safetensors" and entry is None:
        return content
    return find_state(content, path, entry)


def weights_sha256(path: str | Path) -> str:
    """SHA-256 of a checkpoint's file; of an index, that of the lines "SHA-256 NAME" of it and its files."""
    path = Path(path)
    if not path.name.endswith(INDEX):
        return sha256_of(path)
    names = [path.name, *sorted(set(_weight_map(path).values()))]
    return hashlib.sha256("".join(f"{sha256_of(path.with_name(name))} {name}\n" for name in names).encode()).hexdigest()


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} must be an object with a weight_map, got {repr(content)}")
    for name in files.values():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", name, re.ASCII):
            raise ValueError(f"{index} must name .safetensors or .bin files in its folder, got {repr(name)}")
    return files


def _shards(index: Path, sha256: str | None) -> dict[str, Tensor]:
    if sha256 is not None and (digest := weights_sha256(index)) != sha256:
        raise ValueError(f"{index} or one of its files was changed or damaged: SHA-256 must be {sha256}, got {digest}")
    files, state = _weight_map(index), {}
    for file in sorted(set(files.values())):
        shard = load_weights(index.with_name(file))
        if lacking := [name for name, of in files.items() if of == file and name not in shard]:
            raise ValueError(f"{index.with_name(file)} must hold {some(lacking)}, as {index.name} says")
        state |= shard
    return state


def _torch_file(path: Path, sha256: str | None):
    data = read_checked(path, sha256)
    if int.from_bytes(data[:8], "little") < len(data) and data[8:9] == b"{":  # by whatever ending
        return load_tensors(path, sha256)
    what = stranger(data, "file", _OTHERS)
    if what or not data:
        raise ValueError(f"{path} must be a checkpoint, got {what or 'an empty file'}")
    try:
        if data.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.save packs nothing
                names = archive.namelist()
                if not any(name.endswith("data.pkl") for name in names):
                    raise ValueError(f"it is a zip archive of {some(names)}, which torch.save does not write")
                if any("/code/" in name for name in names):
                    raise ValueError(
                        "it is a TorchScript archive; give it as SnapshotEnsemble.from_files(..., load=torch.jit.load)"
                    )
                if (size := sum(member.file_size for member in archive.infolist())) > len(data):
                    raise ValueError(f"it unpacks {len(data)} bytes to {size}")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} cannot be read as tensors without unpickling: it is cut off or damaged") from error
    except Exception as error:
        # The reader begins with the advice to do without its protection.
        lines = [line for line in str(error).splitlines() if "Unpickler error: " in line or "GLOBAL" in line]
        reason = first_line(lines[0] if lines else error)
        if reason.startswith("Please file an issue"):  # torch's words for bytes that are no pickle
            reason = "it is no file of torch.save, or damaged"
        if kind := re.search(r"GLOBAL ([\w.]+)", reason):
            reason += "; where you trust the file, unpickle it yourself and save its state_dict alone"
            if not re.match("builtins|os|posix|nt|sys|subprocess|shutil|importlib", kind[1]):
                reason += f", or allow {kind[1]} by torch.serialization.add_safe_globals"
        raise ValueError(f"{path} cannot be read as tensors without unpickling: {reason}") from error
