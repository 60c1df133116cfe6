"""Writes a logit bank, whose format eekd.bank describes."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import safetensors.torch
import torch
from rich import filesize, progress
from rich.console import Console
from torch import Tensor

from eekd import parallel
from eekd.bank.reader import DTYPES, MANIFEST, projection, row_bytes, shard_names
from eekd.data import Batch, Loader
from eekd.info import commit
from eekd.io.files import printable, read_checked, write_json_atomic
from eekd.io.lock import locked
from eekd.io.tensors import save_tensors
from eekd.method.topk import top_k_logits

SHARD_ROWS, SHARD_BYTES = 4096, 64 << 20  # a shard is whichever is less: what a kill can cost, and what memory holds


def write(
    out: Path,
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    loader: Loader,
    settings: dict,
    *,
    run: Path,
    views: int,
    batch: int,
    console: Console,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Writes the shards that are not there yet, then the manifest; of `world` processes each its share.

    forward(images) gives the snapshots' logits and features, `settings` are those of the manifest that decide a
    shard's bytes, `batch` images are asked about at once. BlockingIOError, one sentence, where another command writes
    into the folder.
    """
    console.quiet = rank > 0
    samples, rows = settings["samples"], settings["shard_rows"]
    ask = _asker(forward, loader.device, settings)

    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if rank == 0 else nullcontext():
        if world > 1:
            parallel.long_barrier()  # until the first has the lock
        parts = [(view, index) for view in range(views) for index in torch.arange(samples).split(rows)]
        shards = list(zip(shard_names(views, samples, rows), parts, strict=True))
        hashes = {name: _whole(out / name, settings) for name, _ in shards[rank::world]}
        todo = [(name, view, index) for name, (view, index) in shards[rank::world] if not hashes[name]]
        missing = sum(len(index) for *_, index in todo)
        if todo:
            first = next(loader.replay([(0, torch.arange(min(batch, samples)))]))
            ask(first)  # the first call also sets things up
            start = time.perf_counter()
            ask(first)
            seconds = missing * (time.perf_counter() - start) / len(first.index)
            row, total, free = row_bytes(settings), views * samples, shutil.disk_usage(out).free
            left = min(missing * world, total)
            if free < left * row:
                free, needed = filesize.decimal(free), filesize.decimal(left * row)
                raise OSError(f"the disk of {out} must have {needed} for the bank, got {free} left")
            console.print(
                f"{views} views x {samples:,} images x {settings['snapshots']} snapshots in {len(shards)} "
                f"shards, {filesize.decimal(total * row)}: {left:,} of {total:,} rows to write, in about "
                f"{seconds:.0f} s",
                highlight=False,
                soft_wrap=True,
            )
        batches = loader.replay([(view, part) for _, view, index in todo for part in index.split(batch)])
        with _bar(console) as bar:
            task = bar.add_task("rows", total=missing)
            for name, _, index in todo:
                parts = []
                for part in index.split(batch):
                    parts.append(ask(next(batches)))
                    bar.advance(task, len(part))
                tensors = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
                # One entry: safetensors writes several in any order, and a shard's bytes must not depend on it.
                metadata = {"bank": json.dumps({**settings, "file": name, "sha256": _digest(tensors)})}
                hashes[name] = save_tensors(out / name, tensors, metadata)
        if world > 1:
            parallel.long_barrier()  # until every shard is written
        if rank == 0:
            hashes = {name: hashes.get(name) or _whole(out / name, settings) for name, _ in shards}
            if lost := [name for name in hashes if not hashes[name]]:
                raise OSError(f"{out / lost[0]} is missing or damaged: start again to write it")
            place = {"run": os.path.relpath(run, out), "views": views}
            write_json_atomic(out / MANIFEST, {**settings, "commit": commit(), **place, "shards": hashes})
            console.print(f"{printable(out)} is whole", highlight=False, soft_wrap=True)


def _asker(forward: Callable, device: torch.device, settings: dict) -> Callable[[Batch], dict[str, Tensor]]:
    """A function from a batch to what is stored of it, on the CPU."""
    dtype, classes, k, matrix = DTYPES[settings["dtype"]], settings["classes"], settings["top_k"], None
    if settings["projection"]:
        matrix = projection(**settings["projection"], to=settings["features"]).to(device)

    def ask(batch: Batch) -> dict[str, Tensor]:
        logits, features = forward(batch.images)
        kept = top_k_logits(logits, k, batch.labels) if k else None
        outputs = {"logits": kept.logits if kept else logits}
        if settings["features"]:
            outputs["features"] = features if matrix is None else features.float() @ matrix
        stored = {}
        for name, x in outputs.items():
            stored[name] = x.to(dtype).transpose(0, 1).cpu()
            if (stored[name].isinf().sum() > x.isinf().sum()).item():
                raise ValueError(
                    f"{name} of the snapshots must fit into {dtype}, got some that overflow: use --dtype bfloat16"
                )
        if kept:
            ids = kept.indices.cpu()
            # The bits of a uint16 as int16: safetensors knows unsigned tensors since lately only.
            stored["indices"] = ids.int() if classes > 65536 else ids.to(torch.uint16).view(torch.int16)
            stored["atoms"] = kept.atoms.transpose(0, 1).cpu()
        return stored

    return ask


def _whole(path: Path, settings: dict) -> str | None:
    """SHA-256 of a shard's file; None where it is missing or damaged, ValueError where it has other settings."""
    try:
        data = read_checked(path)
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        recorded = json.loads(header["bank"])
        if (recorded["file"], recorded["sha256"]) != (path.name, _digest(tensors)):
            return None
    except Exception:  # damaged bytes make the readers raise whatever they stumble over
        return None
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{name} must be {recorded.get(name)!r}, with which {path} was made, got {value!r}: choose another "
                "--out"
            )
    return hashlib.sha256(data).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()


def _bar(console: Console) -> progress.Progress:
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
               progress.TimeElapsedColumn(), progress.TimeRemainingColumn())  # fmt: skip
    return progress.Progress(*columns, console=console, disable=not console.is_terminal)
