"""Somebody else's checkpoints as the snapshots of a run's teacher."""

import dataclasses
from pathlib import Path

from torch import nn

from eekd import models, parallel
from eekd.io.files import read_json, write_atomic, write_json_atomic
from eekd.io.state_dicts import bare_names, load_state
from eekd.io.tensors import load_weights, save_tensors
from eekd.snapshots import MANIFEST
from eekd.snapshots.files import checkpoint_files, checkpoint_sha256
from eekd.snapshots.manifest import FORMAT as MANIFEST_FORMAT
from eekd.train.checkpoints import KeepSources, check_identity, run_identity
from eekd.train.config import Config
from eekd.train.run_folder import FORMAT, METRICS, finite, metrics_of
from eekd.train.session import Session
from eekd.train.teacher import RECORD, diagnose, read_teacher


def with_checkpoints(config: Config) -> Config:
    """The settings with the absolute path of every checkpoint, in their order, as the teacher's M snapshots."""
    files = tuple(str(file.absolute()) for file in checkpoint_files(config.checkpoints))
    teacher = dataclasses.replace(config.teacher, schedule="step", epochs=len(files), snapshots=len(files))
    return dataclasses.replace(config, checkpoints=files, teacher=teacher)


def check_checkpoints(session: Session) -> nn.Module:
    """The last checkpoint; ValueError or FileNotFoundError, one sentence, unless each fits the model of the teacher."""
    network = models.build(**session.spec(session.config.teacher))
    for path in session.config.checkpoints:
        load_state(network, load_weights(path, entry=session.config.checkpoint_entry), path)
    return network


def import_teacher(session: Session, folder: Path) -> dict:
    """Leaves the checkpoints in `folder` as a finished teacher: snapshots, manifest.json and snapshots.json.

    The files are copied as safetensors with the model's own names, so that everything after is as with a teacher that
    was trained here; metrics.jsonl has no row. "sources" of snapshots.json says where each came from, with its SHA-256.
    Returns the content of snapshots.json, at once where it is there. Raises what `check_checkpoints` does.
    """
    config, phase = session.config, session.config.teacher
    identity = run_identity("teacher", session, phase) | {"schedule": "checkpoints"}
    if (folder / RECORD).exists():
        record = read_teacher(folder)
        check_identity(folder / RECORD, record, identity)
        return record
    sources = []
    if parallel.is_main_process():
        spec, entries = session.spec(phase), []
        network = models.build(**spec)
        for number, path in enumerate(map(Path, config.checkpoints), 1):
            sha256 = checkpoint_sha256(path)
            load_state(network, load_weights(path, sha256, entry=config.checkpoint_entry), path)
            file = f"snapshot-{number}.safetensors"
            own = save_tensors(folder / file, bare_names(network.state_dict()))
            entries.append({"file": file, "sha256": own, "step": number, "metrics": {}})
            sources.append({"path": str(path), "sha256": sha256})
        schedule = [entry["step"] for entry in entries]
        manifest = {"format": MANIFEST_FORMAT, "spec": spec, "schedule": schedule, "snapshots": entries}
        write_json_atomic(folder / MANIFEST, manifest)
        KeepSources(folder, phase.model).write()
        for name in METRICS:
            write_atomic(folder / name, b"")
    parallel.barrier()
    ensemble = session.load_snapshots(folder, features=False)
    known = {split: diagnose(session, ensemble, session.loader(split, phase)) for split in ("val", "test")}
    if parallel.is_main_process():
        record = {"format": FORMAT, "setup": identity} | known | {"metrics": metrics_of(folder), "sources": sources}
        write_json_atomic(folder / RECORD, finite(record))
    parallel.barrier()
    return read_json(folder / RECORD)
