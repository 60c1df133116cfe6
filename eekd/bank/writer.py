"""Writes a logit bank, whose format eekd.bank describes."""

import dataclasses
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

import eekd
from eekd import distributed
from eekd.bank import Flags
from eekd.bank.reader import DENSE, DTYPES, MANIFEST, TOP_K, images_of, projection, row_bytes, shard_names
from eekd.checkpoint import save_tensors
from eekd.data import Batch
from eekd.files import printable, read_checked, write_json_atomic
from eekd.info import commit
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.topk import ATOMS, top_k_logits
from eekd.trainers import Session, check_data
from eekd.trainers.folder import locked, read_settings
from eekd.trainers.loop import SPLIT

SHARD_ROWS, SHARD_BYTES = 4096, 64 << 20  # a shard is whichever is less: what a kill can cost, and what memory holds
AHEAD = 4  # times the batch the teacher was trained with: without gradients that much fits


def write(flags: Flags, console: Console, rank: int = 0, world: int = 1) -> None:
    """Writes the shards that are not there yet, then the manifest; of `world` processes each its share.

    BlockingIOError, one sentence, where another command writes into the folder.
    """
    console.quiet = rank > 0
    run, out = Path(flags.teacher), Path(flags.out or Path(flags.teacher, "bank"))
    # Deterministic: a shard that is made again has the same bytes.
    config = dataclasses.replace(read_settings(run), bank=None, deterministic=True)
    session = Session(config)
    check_data(session, run)
    ensemble = SnapshotEnsemble.load(run / "teacher", device=session.device, snapshots_on=config.snapshots_on)
    ensemble.to(memory_format=session.layout)
    loader = session.loader("train", config.teacher, train=True)
    settings = _settings(flags, session, ensemble, loader, read_manifest(run / "teacher")["spec"])
    samples, rows, batch = settings["samples"], settings["shard_rows"], AHEAD * config.teacher.batch_size
    ask = _asker(session, ensemble, settings)

    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if rank == 0 else nullcontext():
        if world > 1:
            distributed.wait_for_started()  # until the first has the lock
        views = [(view, index) for view in range(flags.views) for index in torch.arange(samples).split(rows)]
        shards = list(zip(shard_names(flags.views, samples, rows), views, strict=True))
        hashes = {name: _whole(out / name, settings) for name, _ in shards[rank::world]}
        todo = [(name, view, index) for name, (view, index) in shards[rank::world] if not hashes[name]]
        missing = sum(len(index) for *_, index in todo)
        if todo:
            first = next(loader.replay([(0, torch.arange(min(batch, samples)))]))
            ask(first)  # the first call also sets things up
            start = time.perf_counter()
            ask(first)
            seconds = missing * (time.perf_counter() - start) / len(first.index)
            row, total, free = row_bytes(settings), flags.views * samples, shutil.disk_usage(out).free
            left = min(missing * world, total)
            if free < left * row:
                free, needed = filesize.decimal(free), filesize.decimal(left * row)
                raise OSError(f"the disk of {out} has {free} left, and the bank needs {needed} more")
            console.print(
                f"{flags.views} views x {samples:,} images x {settings['snapshots']} snapshots in {len(shards)} "
                f"shards, {filesize.decimal(total * row)}: {left:,} of {total:,} rows to write, in about "
                f"{seconds:.0f} s",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
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
                known = {"bank": json.dumps({**settings, "file": name, "sha256": _digest(tensors)})}
                hashes[name] = save_tensors(out / name, tensors, known)
        if world > 1:
            distributed.wait_for_started()  # until every shard is written
        if rank == 0:
            known = {name: hashes.get(name) or _whole(out / name, settings) for name, _ in shards}
            if lost := [name for name in known if not known[name]]:
                raise OSError(f"{out / lost[0]} is missing or damaged: start again to write it")
            place = {"run": os.path.relpath(run, out), "views": flags.views}
            write_json_atomic(out / MANIFEST, {**settings, "commit": commit(), **place, "shards": known})
            console.print(f"{printable(out)} is whole", highlight=False, soft_wrap=True)


def _settings(flags: Flags, session: Session, ensemble: SnapshotEnsemble, loader, spec: dict) -> dict:
    """What decides a shard's bytes, and so must not change between a kill and going on."""
    samples, snapshots, classes = len(loader.split), len(ensemble), len(session.data.classes)
    own = ensemble.feature_dim
    width = 0 if flags.features == "none" else own if flags.features == "all" else min(int(flags.features), own)
    split = {name: getattr(session.config, name) for name in SPLIT}
    if flags.top_k > classes:
        raise ValueError(f"top-k must be at most {classes}, the number of classes, got {flags.top_k}")
    top_k = {"top_k": flags.top_k, "atoms": min(ATOMS, classes - flags.top_k)} if flags.top_k else {"top_k": None}
    settings = {
        **top_k, "format": TOP_K if flags.top_k else DENSE,
        "eekd": eekd.__version__, "precision": session.config.precision,
        "samples": samples, "snapshots": snapshots, "classes": classes, "features": width, "dtype": flags.dtype,
        "projection": {"width": own, "seed": 0} if 0 < width < own else None,
        "teacher": {"spec": spec, "sha256": list(ensemble.hashes)},
        "images": images_of(session.data, loader, **split),
    }  # fmt: skip
    return settings | {"shard_rows": max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes(settings)))}


def _asker(session: Session, ensemble: SnapshotEnsemble, settings: dict) -> Callable[[Batch], dict[str, Tensor]]:
    """A function from a batch to what is stored of it, on the CPU."""
    dtype, classes, k, matrix = DTYPES[settings["dtype"]], settings["classes"], settings["top_k"], None
    if settings["projection"]:
        matrix = projection(**settings["projection"], to=settings["features"]).to(session.device)

    def ask(batch: Batch) -> dict[str, Tensor]:
        logits, features = session.run(ensemble, batch.images)
        kept = top_k_logits(logits, k, batch.labels) if k else None
        found = {"logits": kept.logits if kept else logits}
        if settings["features"]:
            found["features"] = features if matrix is None else features.float() @ matrix
        stored = {}
        for name, x in found.items():
            stored[name] = x.to(dtype).transpose(0, 1).cpu()
            if (stored[name].isinf().sum() > x.isinf().sum()).item():
                raise ValueError(f"{name} of the snapshots are too large for {dtype}: use --dtype bfloat16")
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
        made = json.loads(header["bank"])
        if (made["file"], made["sha256"]) != (path.name, _digest(tensors)):
            return None
    except Exception:  # damaged bytes make the readers raise whatever they stumble over
        return None
    for name, value in settings.items():
        if made.get(name) != value:
            raise ValueError(f"{path} belongs to a bank with {name} {made.get(name)!r}, not {value!r}: choose "
                             "another --out")  # fmt: skip
    return hashlib.sha256(data).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


def _bar(console: Console) -> progress.Progress:
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
               progress.TimeElapsedColumn(), progress.TimeRemainingColumn())  # fmt: skip
    return progress.Progress(*columns, console=console, disable=not console.is_terminal)

