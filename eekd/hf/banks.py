"""What the banks of eekd.hf share: shards, a manifest, and samples that are found by a hash of their inputs.

    BANK/
      rows-0.safetensors …   keys (S, 16) of the shard's S samples, offsets (S + 1) of their rows, and what the teachers
                             say of these rows, the rows first
      heads.safetensors      of a language model's bank, see eekd.hf.token_bank
      manifest.json          written last, so it marks a finished bank: `Manifest`

A row is a sample, or of models that say something of each token, a token. As a sample is known by its inputs, batches
may be drawn and padded in any way.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from eekd.hf.checkpoints import spaced, weights_file
from eekd.hf.teachers import Teachers
from eekd.io.files import read_json, sha256_of, write_json_atomic
from eekd.io.tensors import save_tensors, weights_sha256

MANIFEST, HEADS, FORMAT = "manifest.json", "heads.safetensors", 2
SHARD = 256 << 20  # bytes
LANGUAGE_MODEL, CLASSIFIER, TOKEN_CLASSIFIER = "language model", "classifier", "token classifier"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INPUTS = "input_ids", "token_type_ids", "pixel_values"  # by which a sample is known, those that there are; then others
MADE = "attention_mask", "position_ids"  # as padding and packing make them: a sample is not known by these
LABELS = "labels", "label", "label_ids"
LOOKED_AT = 64  # images of a dataset, which may take long to make


@dataclass
class Manifest:
    """What a bank says of itself: sizes, and the SHA-256 of tokenizer, teachers and files."""

    format: int
    kind: str  # of the models
    snapshots: int
    classes: int
    width: int  # of the hidden states or features; 0: none are stored
    dtype: str
    inputs: list[str]  # by which a sample is known
    tokenizer: str | None
    teachers: list[str]
    samples: int
    rows: int
    files: dict[str, str]
    labels: dict[str, str] | None = None  # the names of the classes
    top_k: int = 0  # of a language model; 0: hidden states are stored
    scale: float = 1.0
    softcap: float | None = None
    feature_layer: str | None = None  # of a classifier, whose input the features are; None: the last one


class Writer:
    """Writes a bank of what teachers say: each sample once, in shards, and the manifest.

    FileExistsError where the folder holds a bank; ValueError for other dtypes.
    """

    def __init__(self, folder: str | Path, dtype: str):
        self.folder, self.files, self.rows = Path(folder), {}, 0
        if (self.folder / MANIFEST).exists():
            raise FileExistsError(f"{folder} must hold no bank yet, got {MANIFEST}: choose another folder")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.dtype, self._seen = dtype, set()
        self._clear()

    def cast(self, name: str, x: Tensor) -> Tensor:
        """x in the bank's dtype, on the CPU; ValueError where it is out of its range."""
        stored = x.to(DTYPES[self.dtype]).cpu()
        if not stored.isfinite().all():
            raise ValueError(f"{name} must be finite in {self.dtype}, got some that are not: choose another dtype")
        return stored

    def add(self, keys: Sequence[bytes], lengths: Sequence[int], rows: Mapping[str, Tensor]) -> None:
        """The rows of a batch: `lengths` of them for each of its samples."""
        start = 0
        for key, length in zip(keys, lengths, strict=True):
            if key not in self._seen and length:
                self._seen.add(key)
                self._keys.append(key)
                self._lengths.append(length)
                self.rows += length
                for name, x in rows.items():
                    x = x[start : start + length]
                    self._said.setdefault(name, []).append(x)
                    self._bytes += x.nbytes
            start += length
        if self._bytes > SHARD:
            self._write()

    def end(self, heads: Mapping[str, Tensor] | None, teachers: Teachers, processing_class, **known) -> None:
        """Writes what is left, and the manifest; ValueError where there was nothing to write."""
        self._write()
        if not self.files:
            raise ValueError("dataset must hold at least one sample, got none")
        if heads:
            self.files[HEADS] = save_tensors(self.folder / HEADS, heads)
        manifest = Manifest(
            FORMAT, snapshots=len(teachers), dtype=self.dtype, tokenizer=tokenizer_sha256(processing_class),
            teachers=teachers.hashes, samples=len(self._seen), rows=self.rows, files=self.files, **known,
        )  # fmt: skip
        write_json_atomic(self.folder / MANIFEST, asdict(manifest))

    def _write(self) -> None:
        if self._keys:
            keys = torch.from_numpy(np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 16).copy())
            offsets = torch.tensor([0, *np.cumsum(self._lengths).tolist()])
            tensors = {name: torch.cat(parts) for name, parts in self._said.items()}
            name = f"rows-{len(self.files)}.safetensors"
            self.files[name] = save_tensors(self.folder / name, {"keys": keys, "offsets": offsets, **tensors})
        self._clear()

    def _clear(self) -> None:
        self._keys: list[bytes] = []
        self._lengths: list[int] = []
        self._said: dict[str, list[Tensor]] = {}
        self._bytes = 0


class Bank:
    """A finished bank, which a trainer asks in place of teachers: for M evenly spaced snapshots, or for the last.

    Attributes: `manifest`; `names` of the snapshots; `len(bank)` is M.

    Raises FileNotFoundError or ValueError if a file is missing, was changed, or has another format.
    """

    adapters = ()

    def __init__(self, folder: str | Path, last: bool = False, snapshots: int | None = None):
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        for name, sha256 in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: write the bank again")
            if (digest := sha256_of(path)) != sha256:
                raise ValueError(f"{path} was changed or damaged: its SHA-256 must be {sha256}, got {digest}")
        self._spaced = spaced(self.manifest.snapshots, snapshots)
        self.snapshots = self._spaced[-1 if last else 0 :]
        self.names = [f"snapshot {m + 1} of {folder}" for m in self.snapshots]
        self._shards = [safe_open(self.folder / name, "pt") for name in self.manifest.files if name != HEADS]
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, shard in enumerate(self._shards):
            keys, offsets = shard.get_tensor("keys").numpy(), shard.get_tensor("offsets").tolist()
            for row, key in enumerate(keys):
                self._places[key.tobytes()] = number, offsets[row], offsets[row + 1]
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.snapshots)

    def to(self, device) -> "Bank":
        """Where rows are put."""
        self.device = torch.device(device)
        return self

    def named_inputs(self) -> list[str]:
        """By what a sample is known."""
        return self.manifest.inputs

    def verify(self, *_) -> None:
        """Done when the bank was written."""

    def check(self, tokenizer=None, teachers: list[Path] | None = None, dataset=None) -> None:
        """ValueError, one sentence, where the bank is of another tokenizer, other teachers or other data."""
        own, manifest = tokenizer_sha256(tokenizer), self.manifest
        if None not in (own, manifest.tokenizer) and own != manifest.tokenizer:
            raise ValueError(f"{self.folder} must be of the trainer's tokenizer, got one of another")
        hashes = [sha256 for m, sha256 in enumerate(manifest.teachers) if m in self._spaced]
        if teachers is not None and [*map(weights_sha256, map(weights_file, teachers))] != hashes:
            raise ValueError(f"{self.folder} must be of these {len(teachers)} checkpoints, got one of others")
        if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            return
        rows = range(0, len(dataset), -(-len(dataset) // LOOKED_AT) if "pixel_values" in manifest.inputs else 1)
        for row in rows:
            sample = dataset[row]
            if not isinstance(sample, Mapping) or any(name not in sample for name in manifest.inputs):
                return  # the collator makes the inputs: batches are looked up as they come
            if sample_key(sample, manifest.inputs) not in self._places:
                raise ValueError(f"{self.folder} must hold every sample of train_dataset, got {row}, which it lacks")

    def rows(self, inputs: dict, names: Sequence[str], mask: Tensor) -> dict[str, Tensor]:
        """What is stored of a batch: (B, T, …), zeros where `mask` (B, T) has none."""
        slices = {name: [] for name in names}
        for row, key in enumerate(sample_keys(inputs, self.manifest.inputs)):
            if key not in self._places:
                raise ValueError(f"{self.folder} must hold every sample of a batch, got {row}, which it lacks")
            shard, start, end = self._places[key]
            for name in names:
                slices[name].append(self._shards[shard].get_slice(name)[start:end])
        wanted = {}
        for name, parts in slices.items():
            rows = torch.cat(parts).to(mask.device)
            wanted[name] = rows.new_zeros(*mask.shape, *rows.shape[1:])
            wanted[name][mask] = rows
        return wanted


def read_manifest(folder: str | Path) -> Manifest:
    """FileNotFoundError or ValueError where it is not that of a finished bank."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no bank, or one that was not finished")
    content = read_json(path)
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {version!r}")
    try:
        return Manifest(**content)
    except TypeError as error:
        raise ValueError(f"{path} must be that of a bank, got other entries") from error


def batches(teachers: Teachers, dataset, data_collator: Callable, size: int, device) -> Iterator[dict]:
    """A dataset in its order, on a device, without labels. As in a Trainer, the collator gets what models take."""
    taken = {*teachers.named_inputs()}

    def own(sample):
        named = isinstance(sample, Mapping) and not taken.isdisjoint(sample)
        return {k: x for k, x in sample.items() if k in taken or k in LABELS} if named else sample

    def collate(samples: list) -> dict:
        return data_collator([own(sample) for sample in samples])

    for batch in DataLoader(dataset, size, collate_fn=collate):
        yield {k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items() if "labels" not in k}


def known_by(teachers: Teachers, batch: Mapping) -> list[str]:
    """The names of all that teachers get of a batch, but `MADE`: by which its samples are known."""
    names = dict.fromkeys((*INPUTS, *teachers.named_inputs()))
    return [name for name in names if name not in MADE and isinstance(x := batch.get(name), Tensor) and x.ndim]


def sample_keys(inputs: Mapping, names: Sequence[str]) -> list[bytes]:
    """Of each sample of a batch the bytes that stand for it; ValueError where the batch has no such inputs for it."""
    if lacking := [name for name in names if not isinstance(inputs.get(name), Tensor)]:
        raise ValueError(f"a batch must have {', '.join(lacking)} for a bank, got {', '.join(inputs)}")
    columns = {name: inputs[name].cpu() for name in (*names, "attention_mask") if name in inputs}
    count = len(inputs[names[0]])
    for name in names:
        if len(columns[name]) != count:
            got = len(columns[name])
            raise ValueError(f"{name} must have a row for each of {count} samples of a batch, got {got}")
    return [sample_key({k: x[row] for k, x in columns.items()}, names) for row in range(count)]


def sample_key(sample: Mapping, names: Sequence[str]) -> bytes:
    """16 bytes that stand for a sample, whatever it is padded to."""
    mask, digest = sample.get("attention_mask"), hashlib.blake2b(digest_size=16)
    mask = None if mask is None else np.asarray(mask).astype(bool)
    for name in names:
        x = sample[name]
        x = np.asarray(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x)  # NumPy has no bfloat16
        x = x.astype("<i8" if x.dtype.kind in "iub" else "<f4")
        each = mask is not None and x.shape[: mask.ndim] == mask.shape and not name.startswith("pixel_")
        digest.update((x[mask] if each else x).tobytes())  # an image's channels may be as many as the tokens
    return digest.digest()


def tokens_of(inputs: Mapping) -> tuple[Tensor, Tensor]:
    """Ids (B, T), and which of them are no padding."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(f"a batch must have input_ids (B, T) for a token bank, got {', '.join(inputs)}")
    mask = inputs.get("attention_mask")
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def tokenizer_sha256(tokenizer) -> str | None:
    """SHA-256 of which token each id is; None without a tokenizer."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
