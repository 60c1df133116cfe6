"""State on disk: written whole or not at all, checked by SHA-256 when read, never unpickled."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error

import safetensors.torch
import torch
from torch import Tensor, nn

from eekd.io.files import first_line, printable, read_checked, write_atomic

NESTS = "state_dict", "model_state_dict", "model", "module", "net"  # where others keep their state_dict


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, sync: bool = True
) -> str:
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
    copies = {
        name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, tensor in tensors.items()
    }
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
        raise ValueError(f"{path} must hold a state_dict of tensors, alone or under {', '.join(NESTS)}; got {found}")
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
        "of another shape": [
            f"{name} {tuple(got.shape)} for {tuple(want.shape)}" for name, got, want in both if got.shape != want.shape
        ],
        "of another kind": [
            f"{name} {got.dtype} for {want.dtype}"
            for name, got, want in both
            if got.is_floating_point() != want.is_floating_point()
        ],
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
