"""What M teachers say of every token of a data set, computed once: students then train without running them.

    BANK/
      tokens-0.safetensors …   keys (S, 16) of the shard's S sequences, offsets (S + 1) of their tokens, and
                               hidden (tokens, M, H), the last hidden states; or of a top-k bank logits (tokens, M, K),
                               indices (tokens, K), atoms (tokens, M, 2, J), see eekd.method.topk
      heads.safetensors        weight.m (V, H) and bias.m (V) of the teachers, of one where all share it; none of top-k
      manifest.json            written last, so it marks a finished bank: `Manifest`

A sequence is known by a hash of its tokens, so that batches may be drawn and padded in any way.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from eekd.hf.checkpoints import weights_file
from eekd.hf.heads import LanguageHead
from eekd.hf.teachers import Teachers
from eekd.io.files import read_json, sha256_of, write_json_atomic
from eekd.io.tensors import load_tensors, save_tensors, weights_sha256
from eekd.method.topk import TopKLogits, top_k_logits

MANIFEST, HEADS, FORMAT = "manifest.json", "heads.safetensors", 1
SHARD = 256 << 20  # bytes
PROJECTED = 64 << 20  # logits at once, of all snapshots
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Manifest:
    """What a bank says of itself: sizes, and the SHA-256 of tokenizer, teachers and files."""

    format: int
    snapshots: int
    classes: int
    width: int  # of the hidden states
    top_k: int  # 0: hidden states are stored
    dtype: str
    scale: float
    softcap: float | None
    tokenizer: str | None
    teachers: list[str]
    sequences: int
    tokens: int
    files: dict[str, str]


@dataclass
class StoredHead:
    """A teacher's head, as `LanguageHead` has it."""

    name: str
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


@torch.no_grad()
def write_token_bank(
    folder: str | Path,
    teachers: Teachers,
    dataset,
    data_collator: Callable,
    *,
    processing_class=None,
    top_k: int = 0,
    dtype: str = "float16",
    batch_size: int = 8,
    device: str | torch.device = "cpu",
) -> "TokenBank":
    """Runs the teachers over the sequences of a dataset and stores their outputs for each token.

        bank = write_token_bank("bank", Teachers.load("teacher-run"), train_dataset, collator)

    Without `top_k` it stores the last hidden states, 2 H M bytes per token (4 H M in float32), and the heads. They are
    exact, up to `dtype`, at any temperature. With `top_k` K it stores the logits of the K likeliest tokens, the next
    token always among them, and a summary of the others (`eekd.top_k_logits`): (2 K + 48) M + 4 K bytes per token.
    `processing_class` is the tokenizer. If it is given, a trainer must have an equal one.

    Raises ValueError for other dtypes, a K that is not from 0 to V, batches without `input_ids`, values out of the
    range of `dtype`, and what `LanguageHead.verify` raises; FileExistsError if the folder holds a bank.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} must hold no bank yet, got {MANIFEST}: choose another folder")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    teachers.to(device)
    heads = teachers.language_heads()
    classes = min(len(head.weight) for head in heads)
    widths = {head.weight.shape[1] for head in heads}
    if not isinstance(top_k, int) or not 0 <= top_k <= classes:
        raise ValueError(f"top_k must be from 0 to {classes}, the number of tokens, got {top_k!r}")
    if len(widths) > 1:
        raise ValueError(f"teachers must have one width for a bank, got {sorted(widths)}")
    shard, files, seen, tokens = _Shard(), {}, set(), 0

    def close() -> None:
        if shard.keys:
            name = f"tokens-{len(files)}.safetensors"
            files[name] = save_tensors(folder / name, shard.tensors())
            shard.clear()

    for number, batch in enumerate(DataLoader(dataset, batch_size, collate_fn=data_collator)):
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if "labels" not in k}
        ids, mask = _tokens(batch)
        context = torch.no_grad
        if number == 0:
            rows = mask.flatten().nonzero()[:64, 0]
            teachers.verify(heads, batch, rows, next(iter(teachers)).dtype != torch.float32, context)
        states = teachers.hidden_states(heads, batch, lambda hidden, mask=mask: hidden[mask], context)
        following = ids.roll(-1, 1).masked_fill(~(mask & mask.roll(-1, 1)), -1)[mask]
        said = _said(states, heads, following, top_k, classes, DTYPES[dtype])
        lengths, start = mask.sum(1).tolist(), 0
        for row, length in enumerate(lengths):
            key = sequence_key(ids[row][mask[row]])
            if key not in seen and length:
                seen.add(key)
                tokens += length
                shard.add(key, {name: x[start : start + length] for name, x in said.items()})
            start += length
        if shard.bytes > SHARD:
            close()
    close()
    if not files:
        raise ValueError("dataset must hold at least one sequence, got none")
    if not top_k:
        own = heads[:1] if all(head.weight is heads[0].weight for head in heads) else heads
        stored = {f"weight.{m}": head.weight for m, head in enumerate(own)}
        stored |= {f"bias.{m}": head.bias for m, head in enumerate(own) if head.bias is not None}
        files[HEADS] = save_tensors(folder / HEADS, stored)
    manifest = Manifest(
        FORMAT, len(teachers), classes, widths.pop(), top_k, dtype, heads[0].scale, heads[0].softcap,
        tokenizer_sha256(processing_class), teachers.hashes, len(seen), tokens, files,
    )  # fmt: skip
    write_json_atomic(folder / MANIFEST, asdict(manifest))
    return TokenBank(folder)


class TokenBank:
    """A finished bank. `EEKDTrainer(..., token_bank="bank")` reads it instead of running teachers.

    Attributes: `manifest`; `names` of the snapshots; `len(bank)` is M.

    Raises FileNotFoundError or ValueError if a file is missing, was changed, or has another format.
    """

    adapters = ()

    def __init__(self, folder: str | Path, last: bool = False):
        self.folder = folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder / MANIFEST} is missing: no bank, or one that was not finished")
        try:
            self.manifest = Manifest(**read_json(folder / MANIFEST))
        except TypeError as error:
            raise ValueError(f"{folder / MANIFEST} must be that of a token bank, got other entries") from error
        if self.manifest.format != FORMAT:
            raise ValueError(f"{folder / MANIFEST} must have format {FORMAT}, got {self.manifest.format!r}")
        for name, sha256 in self.manifest.files.items():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: write the bank again")
            if (found := sha256_of(folder / name)) != sha256:
                raise ValueError(f"{folder / name} was changed or damaged: its SHA-256 must be {sha256}, got {found}")
        self.snapshots = list(range(self.manifest.snapshots))[-1 if last else 0 :]
        self.names = [f"snapshot {m + 1} of {folder}" for m in self.snapshots]
        self._shards = [safe_open(folder / name, "pt") for name in self.manifest.files if name != HEADS]
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, shard in enumerate(self._shards):
            keys, offsets = shard.get_tensor("keys").numpy(), shard.get_tensor("offsets").tolist()
            for row, key in enumerate(keys):
                self._places[key.tobytes()] = number, offsets[row], offsets[row + 1]
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.snapshots)

    @property
    def keeps_top_k(self) -> bool:
        """Whether logits at K tokens are stored, and no hidden states."""
        return self.manifest.top_k > 0

    def to(self, device) -> "TokenBank":
        """Where rows are put."""
        self.device = torch.device(device)
        return self

    def named_inputs(self) -> list[str]:
        """None: no model runs."""
        return []

    def check(self, tokenizer=None, teachers: list[Path] | None = None, dataset: Iterable | None = None) -> None:
        """ValueError, one sentence, where the bank is of another tokenizer, other teachers or other data."""
        own = tokenizer_sha256(tokenizer)
        if None not in (own, self.manifest.tokenizer) and own != self.manifest.tokenizer:
            raise ValueError(f"{self.folder} must be of the trainer's tokenizer, got one of another")
        if teachers is not None and [*map(weights_sha256, map(weights_file, teachers))] != self.manifest.teachers:
            raise ValueError(f"{self.folder} must be of these {len(teachers)} checkpoints, got one of others")
        if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            return
        for row in range(len(dataset)):
            sample = dataset[row]
            if not isinstance(sample, dict) or "input_ids" not in sample:
                return  # the collator makes the tokens: batches are looked up as they come
            if sequence_key(sample["input_ids"]) not in self._places:
                raise ValueError(f"{self.folder} must hold every sequence of train_dataset, got none of sample {row}")

    def language_heads(self) -> list[StoredHead]:
        """The teachers' heads; of a top-k bank one without weights for each."""
        said = self.manifest
        if self.keeps_top_k:
            empty = torch.empty(said.classes, 0, device=self.device)
            return [StoredHead(name, empty, None, said.scale, said.softcap) for name in self.names]
        stored = load_tensors(self.folder / HEADS, said.files[HEADS])
        stored = {name: x.to(self.device) for name, x in stored.items()}
        heads = []
        for m, name in zip(self.snapshots, self.names, strict=True):
            number = m if f"weight.{m}" in stored else 0
            weight, bias = stored[f"weight.{number}"], stored.get(f"bias.{number}")
            heads.append(StoredHead(name, weight, bias, said.scale, said.softcap))
        return heads

    def verify(self, *_) -> None:
        """Done when the bank was written."""

    def hidden_states(self, heads, inputs: dict, select, context) -> list[Tensor]:
        """As of `Teachers`."""
        rows = self._rows(inputs, ["hidden"], select)["hidden"]
        return [rows[:, m] for m in self.snapshots]

    def top_k(self, inputs: dict, select) -> TopKLogits:
        """What a top-k bank keeps of the rows that `select` takes."""
        rows = self._rows(inputs, ["logits", "indices", "atoms"], select)
        logits, atoms = (rows[name].transpose(0, 1)[self.snapshots] for name in ("logits", "atoms"))
        return TopKLogits(logits, rows["indices"].long(), atoms, self.manifest.classes)

    def _rows(self, inputs: dict, names: list[str], select) -> dict[str, Tensor]:
        ids, mask = _tokens(inputs)
        ids, lit = ids.cpu(), mask.cpu()
        found = {name: [] for name in names}
        for row in range(len(ids)):
            place = self._places.get(sequence_key(ids[row][lit[row]]))
            if place is None:
                raise ValueError(f"{self.folder} must hold every sequence of a batch, got none of sample {row}")
            shard, start, end = place
            for name in names:
                found[name].append(self._shards[shard].get_slice(name)[start:end])
        wanted = {}
        for name in names:
            rows = torch.cat(found[name]).to(mask.device)
            padded = rows.new_zeros(*mask.shape, *rows.shape[1:])
            padded[mask] = rows
            wanted[name] = select(padded.flatten(2)).unflatten(-1, rows.shape[1:])
        return wanted


class _Shard:
    """What is gathered of a shard."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.keys, self.lengths, self.bytes = [], [], 0
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, key: bytes, rows: dict[str, Tensor]) -> None:
        self.keys.append(key)
        self.lengths.append(len(next(iter(rows.values()))))
        for name, x in rows.items():
            self.rows.setdefault(name, []).append(x)
            self.bytes += x.nbytes

    def tensors(self) -> dict[str, Tensor]:
        keys = torch.from_numpy(np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, 16).copy())
        offsets = torch.tensor([0, *np.cumsum(self.lengths).tolist()])
        return {"keys": keys, "offsets": offsets, **{name: torch.cat(rows) for name, rows in self.rows.items()}}


def sequence_key(tokens) -> bytes:
    """16 bytes that stand for a sequence of tokens."""
    tokens = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    return hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=16).digest()


def tokenizer_sha256(tokenizer) -> str | None:
    """SHA-256 of which token each id is; None without a tokenizer."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _tokens(inputs: dict) -> tuple[Tensor, Tensor]:
    """Ids (B, T), and which of them are no padding."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(f"a batch must have input_ids (B, T) for a token bank, got {', '.join(inputs)}")
    mask = inputs.get("attention_mask")
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _said(
    states: list[Tensor], heads: list[LanguageHead], following: Tensor, top_k: int, classes: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is stored of N tokens, on the CPU."""
    if not top_k:
        hidden = torch.stack(states, 1).to(dtype).cpu()
        if not hidden.isfinite().all():
            raise ValueError(f"hidden states must be in the range of {dtype}, got larger ones: choose bfloat16")
        return {"hidden": hidden}
    parts, size = [], max(1, PROJECTED // (4 * classes * len(states)))
    for start in range(0, len(following), size):
        part = slice(start, start + size)
        z = torch.stack([head.project(u[part], classes) for head, u in zip(heads, states, strict=True)])
        kept = top_k_logits(z, top_k, following[part])
        logits = kept.logits.transpose(0, 1).to(dtype)
        if not logits.isfinite().all():
            raise ValueError(f"logits must be in the range of {dtype}, got larger ones: choose bfloat16")
        parts.append((logits, kept.indices.int(), kept.atoms.transpose(0, 1)))
    return {
        name: torch.cat(x).cpu()
        for name, x in zip(("logits", "indices", "atoms"), zip(*parts, strict=True), strict=True)
    }
