"""Reads a logit bank, whose format eekd.bank describes."""

import hashlib
import math
import os
import re
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from reprlib import repr  # a damaged manifest must not become a page of error

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eekd.data.loader import SHOWN
from eekd.io.files import printable, read_checked, read_json, sha256_of
from eekd.method.topk import TopKLogits

DENSE, TOP_K = 1, 2  # formats; older versions know the first one only
MANIFEST = "manifest.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK = 4 << 20  # bytes gathered at once, ahead of training: tiny batches then share one wake-up of the thread
EXAMPLES = 16


class LogitBank:
    """The stored logits and features of M snapshots: the results of an ensemble's forward, without running it.

        bank = LogitBank.open("runs/teacher/bank")
        logits, features = bank.rows(view, index)  # (M, B, C), (M, B, D)

    The logits of a top-k bank are TopKLogits, which EEKDLoss takes, too.

    Attributes: `views` V; `snapshots` M; `classes` C; `top_k` K, or None; `feature_dim` D, None if no features are
    stored; `run`, the folder of the teacher's run; `augment` and `seed` of the views; `manifest` and its `sha256`;
    `len(bank)` is the number of samples.
    """

    def __init__(self, path: Path, manifest: dict):
        self.path, self.manifest = path, manifest
        self.views, self.snapshots, self.classes = (manifest[name] for name in ("views", "snapshots", "classes"))
        self.feature_dim: int | None = manifest["features"] or None
        self.run = Path(os.path.normpath(path / manifest["run"]))
        self.augment, self.seed = manifest["images"]["augment"], manifest["images"]["seed"]
        self.sha256 = sha256_of(path / MANIFEST)
        self.top_k: int | None = manifest.get("top_k")
        self._shards: dict[str, dict[str, np.ndarray]] = {}
        self._stored = stored(manifest)

    @classmethod
    def open(cls, path: str | Path) -> "LogitBank":
        """The finished bank in the folder `path`; FileNotFoundError or ValueError names what is missing or wrong.

        This checks that every shard exists. The hash of a shard is checked when the shard is first read.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError(f"{path / MANIFEST} is missing: no bank, or one that eekd.bank has not finished")
        manifest = read_json(path / MANIFEST)
        _check(path / MANIFEST, manifest)
        for name in manifest["shards"]:
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path / name} is missing: write the bank again to replace it")
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest["samples"]

    def rows(self, view: int, index: Tensor) -> tuple[Tensor | TopKLogits, Tensor | None]:
        """Logits (M, B, C) and features (M, B, D), or None, of the samples `index` (B,) int64 in view `view`.

        They have the stored dtype, are on the device of `index`, and are transposed views of (B, M, …) memory.
        ValueError for a view or sample that is not in the bank, and for a damaged shard, which it names.
        """
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
            got = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index must be int64 of shape (B,), got {got}")
        return self._said(self._gather(view, index.cpu(), [*self._stored], pinned=False), index.device)

    def prefetch(
        self, view: int, indices: Sequence[Tensor], device: str | torch.device = "cpu", features: bool = True
    ) -> Generator[tuple[Tensor | TopKLogits, Tensor | None]]:
        """`rows(view, index)` on `device` for each of `indices`; a thread reads ahead, through pinned memory.

        `features=False` leaves the features unread.
        """
        kinds = [kind for kind in self._stored if features or kind != "features"]
        pinned = torch.device(device).type == "cuda"
        size = row_bytes(self.manifest | ({} if features else {"features": 0}))
        each = max(1, BLOCK // (size * max(map(len, indices), default=1)))

        def gather(batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
            memories = self._gather(view, torch.cat(tuple(batches)).cpu(), kinds, pinned)
            parts = zip(*(memory.split([*map(len, batches)]) for memory in memories.values()), strict=True)
            return [dict(zip(kinds, part, strict=True)) for part in parts]

        with ThreadPoolExecutor(1, "eekd.bank") as thread:
            blocks = (thread.submit(gather, indices[i : i + each]) for i in range(0, len(indices), each))
            ahead = deque(islice(blocks, 2))
            while ahead:
                batches = ahead.popleft().result()
                ahead.extend(islice(blocks, 1))
                for batch in batches:
                    yield self._said(batch, device)

    def project(self, features: Tensor) -> Tensor:
        """Features (…, D) of the snapshots as the bank stores them: unchanged, or u R in float32."""
        if not self.manifest["projection"]:
            return features
        width = self.manifest["projection"]["width"]
        if features.shape[-1] != width:
            raise ValueError(f"{self.path} must be of a teacher with {width} features, got {features.shape[-1]}")
        matrix = projection(width, self.manifest["features"], self.manifest["projection"]["seed"])
        return features.float() @ matrix.to(features.device)

    def check(self, data, loader, snapshots: Sequence[str] | None = None, **split) -> None:
        """Raises ValueError, which says what differs, unless the bank belongs to these images and snapshots.

        `data` is the eekd.data.ImageData, and `loader` the Loader whose batches are used with the rows. `snapshots` are
        the hashes of the snapshot files. `split` are the settings that `data` was loaded with, so that the error can
        name the one that differs.
        """
        recorded, now = self.manifest["images"], images_of(data, loader, **split)
        names = ["augment", *SHOWN, "seed", "augmented_sha256"]
        if recorded["fingerprint"] != now["fingerprint"]:
            names = [name for name in now if name not in names]
        for name in names:
            was, got = recorded.get(name), now.get(name)
            if was != got:
                raise ValueError(f"{name} must be {was!r}, with which {self.path} was made, got {got!r}")
        for m, (was, got) in enumerate(zip(self.manifest["teacher"]["sha256"], snapshots or (), strict=False), 1):
            if was != got:
                raise ValueError(f"snapshot {m} must have SHA-256 {was}, with which {self.path} was made, got {got}")
        if snapshots is not None and len(snapshots) != self.snapshots:
            raise ValueError(
                f"snapshots must be {self.snapshots}, with which {self.path} was made, got {len(snapshots)}"
            )

    def _said(self, memory: dict[str, Tensor], device) -> tuple[Tensor | TopKLogits, Tensor | None]:
        """What a reader gets: on `device`, the snapshots first."""
        x = {kind: t.to(device, non_blocking=True) for kind, t in memory.items()}
        by_snapshot = {kind: t.transpose(0, 1) for kind, t in x.items() if kind != "indices"}
        logits = by_snapshot["logits"]
        if self.top_k:
            logits = TopKLogits(logits, self._classes(x["indices"]), by_snapshot["atoms"], self.classes)
        return logits, by_snapshot.get("features")

    def _gather(self, view: int, index: Tensor, kinds: Sequence[str], pinned: bool) -> dict[str, Tensor]:
        """The (B, …) memory of samples on the CPU."""
        if view not in range(self.views):
            raise ValueError(f"view must be from 0 to {self.views - 1}, got {view}")
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise ValueError(f"index must be from 0 to {len(self) - 1}, got {index.min()} to {index.max()}")
        # By NumPy, in the thread that asks: torch would share such small work out to the cores that train.
        shard, row = np.divmod(index.numpy(), self.manifest["shard_rows"])
        contents = {number: self._shard(view, number) for number in np.unique(shard).tolist()}
        out = {}  # after the shards, which tell whether the manifest's sizes are true
        for kind in kinds:
            dtype, shape = self._stored[kind]
            out[kind] = torch.empty(len(index), *shape, dtype=dtype, pin_memory=pinned)
        for number, content in contents.items():
            where = np.flatnonzero(shard == number)
            for kind, memory in out.items():
                memory.view(torch.int16).numpy()[where] = content[kind].take(row[where], 0)
        return out

    def _shard(self, view: int, number: int) -> dict[str, np.ndarray]:
        """The memory-mapped content of a shard, as int16; that it is what the manifest says is checked once."""
        name = shard_name(view, number)
        if name not in self._shards:
            read_checked(self.path / name, self.manifest["shards"][name])
            try:
                with safe_open(self.path / name, "pt") as file:
                    content = {kind: file.get_tensor(kind) for kind in self._stored}
            except SafetensorError as error:
                raise ValueError(f"{self.path / name} cannot be read: {printable(error)}") from None
            rows = min(self.manifest["shard_rows"], len(self) - number * self.manifest["shard_rows"])
            for kind, (dtype, shape) in self._stored.items():
                if (got := (content[kind].dtype, *content[kind].shape)) != (dtype, rows, *shape):
                    raise ValueError(f"{self.path / name} must have {kind} {(dtype, rows, *shape)}, got {got}")
            if self.top_k and not ((ids := self._classes(content["indices"])).min() >= 0 and ids.max() < self.classes):
                raise ValueError(f"{self.path / name} must have indices below {self.classes}, got {ids.max()}")
            self._shards[name] = {kind: tensor.view(torch.int16).numpy() for kind, tensor in content.items()}
        return self._shards[name]

    @staticmethod
    def _classes(stored: Tensor) -> Tensor:
        """The stored indices as int64."""
        return stored.long() & 0xFFFF if stored.dtype == torch.int16 else stored.long()


def stored(settings: Mapping) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Of each kind of tensor in a shard the dtype and the shape of a sample, as the manifest's fields imply."""
    dtype, snapshots, k = DTYPES[settings["dtype"]], settings["snapshots"], settings.get("top_k")
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"logits": (dtype, (snapshots, k or settings["classes"]))}
    if k:
        kinds["indices"] = (torch.int16 if settings["classes"] <= 65536 else torch.int32, (k,))
        kinds["atoms"] = (torch.float32, (snapshots, 2, settings["atoms"]))
    if settings["features"]:
        kinds["features"] = (dtype, (snapshots, settings["features"]))
    return kinds


def row_bytes(settings: Mapping) -> int:
    """Bytes of a sample in a shard."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored(settings).values())


def shard_name(view: int, shard: int) -> str:
    """The name of a shard's file."""
    return f"view-{view}-shard-{shard}.safetensors"


def shard_names(views: int, samples: int, shard_rows: int) -> list[str]:
    """The names of all shards of a bank."""
    return [shard_name(view, shard) for view in range(views) for shard in range(-(-samples // shard_rows))]


def images_of(data, loader, **split) -> dict:
    """What a manifest says of the images that a Loader over `data` shows."""
    index = torch.linspace(0, len(loader.split) - 1, EXAMPLES).long()
    augmented = next(loader.replay([(0, index)])).images.cpu().contiguous()
    return {
        "data": data.name, "image_size": data.image_size, **split, "fingerprint": data.fingerprint,
        "augment": loader.augment, **loader.shown, "seed": loader.view_seed,
        "augmented_sha256": hashlib.sha256(augmented.numpy()).hexdigest(),
    }  # fmt: skip


def projection(width: int, to: int, seed: int) -> Tensor:
    """R (width, to): entries ±1/sqrt(to) from SHAKE-256 of the seed, so that products of features stay on average.

    Source: Achlioptas, "Database-friendly random projections" (2003).
    """
    data = hashlib.shake_256(f"eekd {seed}".encode()).digest(-(-width * to // 8))
    bits = torch.from_numpy(np.unpackbits(np.frombuffer(data, np.uint8))[: width * to].reshape(width, to))
    return (bits.float() * 2 - 1) / to**0.5


def _check(path: Path, manifest) -> None:
    """ValueError unless this is the content of a manifest."""
    if not isinstance(manifest, dict) or manifest.get("format") not in (DENSE, TOP_K):
        version = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"{path} must have format {DENSE} or {TOP_K}, got {repr(version)}")

    manifest = {"top_k": None, "atoms": None} | manifest

    def counts(*values, least=1):
        return all(type(value) is int and least <= value < 1 << 31 for value in values)

    def hashes(values):
        return all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in values)

    sizes: list[int] = [manifest.get(name) or 0 for name in ("views", "samples", "shard_rows")]
    right = {
        **{name: counts for name in ("views", "samples", "snapshots", "classes", "shard_rows")},
        "features": lambda value: counts(value, least=0),
        "top_k": lambda value: counts(value) and value <= manifest["classes"],
        "atoms": lambda value: counts(value, least=0) and value <= manifest["classes"] - manifest["top_k"],
        "run": lambda value: isinstance(value, str),
        "dtype": lambda value: value in list(DTYPES),
        "projection": lambda value: value is None or value.keys() == {"width", "seed"} and counts(value["width"])
        and counts(value["seed"], least=0),
        "teacher": lambda value: isinstance(value["sha256"], list)
        and len(value["sha256"]) == manifest["snapshots"] and hashes(value["sha256"]),
        "images": lambda value: {"fingerprint", "augment", "augmented_sha256"} <= value.keys()
        and counts(value["seed"], least=0),
        "shards": lambda value: counts(*sizes) and len(value) == sizes[0] * -(-sizes[1] // sizes[2])
        and list(value) == shard_names(*sizes) and hashes(value.values()),
    }  # fmt: skip
    if manifest["format"] == DENSE:
        right["top_k"] = right["atoms"] = lambda value: value is None
    for name, holds in right.items():
        try:
            good = holds(manifest[name])
        except (AttributeError, KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(f"{path} is damaged: its {name} cannot be {repr(manifest.get(name))}")


__all__ = ["LogitBank"]
