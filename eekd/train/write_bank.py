"""Asks the snapshots of a run about its training images and writes their bank."""

import dataclasses
from pathlib import Path

from rich.console import Console

import eekd
from eekd.bank import Flags, writer
from eekd.bank.reader import DENSE, TOP_K, images_of, row_bytes
from eekd.data import ImageData
from eekd.data.loader import SHOWN
from eekd.method.topk import ATOMS
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.train.run import check_data
from eekd.train.run_folder import read_settings
from eekd.train.session import SPLIT, Session

AHEAD = 4  # times the batch the teacher was trained with: without gradients that much fits


def write_bank(flags: Flags, console: Console, rank: int = 0, world: int = 1, data: ImageData | None = None) -> None:
    """Writes the bank that `flags` describe, or what is missing of it, as one of `world` processes.

    `data` are the run's images, where they are there already.
    """
    run, out = Path(flags.teacher), Path(flags.out or Path(flags.teacher, "bank"))
    # Deterministic: a shard that is made again has the same bytes.
    session = Session(dataclasses.replace(read_settings(run), bank=None, deterministic=True), data)
    check_data(session, run)
    config = session.config
    given = {name: getattr(flags, name) for name in SHOWN}
    shown = {name: x for name, x in given.items() if x is not None}
    phase = dataclasses.replace(config.student, repeats=1, **shown)  # as its students see views, one in each epoch
    loader = session.loader("train", phase, train=True)
    if flags.top_k and loader.mixes:
        raise ValueError(
            f"top-k must be 0 where images are mixed, whose labels are two classes, got {flags.top_k} with mixup "
            f"{phase.mixup} and cutmix {phase.cutmix}"
        )
    ensemble = session.load_snapshots(run / "teacher", features=flags.features != "none")
    settings = _settings(flags, session, ensemble, loader, read_manifest(run / "teacher")["spec"])
    writer.write(
        out,
        lambda images: session.run(ensemble, images),
        loader,
        settings,
        run=run,
        views=flags.views,
        batch=AHEAD * config.teacher.batch_size,
        console=console,
        rank=rank,
        world=world,
    )


def _settings(flags: Flags, session: Session, ensemble: SnapshotEnsemble, loader, spec: dict) -> dict:
    """What decides a shard's bytes, and so must not change between a kill and going on."""
    samples, snapshots, classes = len(loader.split), len(ensemble), len(session.data.classes)
    own = 0 if flags.features == "none" else ensemble.feature_dim
    width = own if flags.features in ("none", "all") else min(int(flags.features), own)
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
    return settings | {"shard_rows": max(1, min(writer.SHARD_ROWS, writer.SHARD_BYTES // row_bytes(settings)))}
