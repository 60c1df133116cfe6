"""Somebody else's checkpoints as the snapshots of a run's teacher."""

import dataclasses
import sys
import warnings
from pathlib import Path

from torch import nn

from eekd import models, parallel
from eekd.io.files import read_json, write_atomic, write_json_atomic
from eekd.io.state_dicts import bare_names, load_state
from eekd.io.tensors import load_weights, save_tensors, tensors_sha256
from eekd.snapshots import MANIFEST
from eekd.snapshots.files import checkpoint_files, checkpoint_sha256
from eekd.snapshots.manifest import FORMAT as MANIFEST_FORMAT
from eekd.train.checkpoints import KeepSources, check_identity, run_identity
from eekd.train.config import Config
from eekd.train.pretrained import stored_with
from eekd.train.run_folder import FORMAT, METRICS, finite, metrics_of
from eekd.train.session import Session
from eekd.train.teacher import RECORD, diagnose, read_teacher

CONFIG = "config.json"  # what a Hugging Face run says of its model


def with_checkpoints(config: Config) -> Config:
    """The settings with the absolute path of every checkpoint, in their order, as the teacher's M snapshots."""
    files = tuple(str(file.absolute()) for file in checkpoint_files(config.checkpoints))
    teacher = dataclasses.replace(config.teacher, schedule="step", epochs=len(files), snapshots=len(files))
    if teacher.mean is None and (stored := stored_with(Path(files[-1]))):
        own, _ = stored
        teacher = dataclasses.replace(teacher, mean=tuple(own["mean"]), std=tuple(own["std"]))
    return dataclasses.replace(config, checkpoints=files, teacher=teacher)


def check_checkpoints(session: Session) -> nn.Module:
    """The last checkpoint; ValueError or FileNotFoundError, one sentence, unless each fits the model of the teacher.

    And unless it has the classes of the data in their order, where it names them.
    """
    network = models.build(**session.spec(session.config.teacher))
    paths: dict[str, Path] = {}
    for path in map(Path, session.config.checkpoints):
        _check_classes(path, list(session.data.classes))
        _read(network, path, session.config.checkpoint_entry)
        if (twin := paths.setdefault(tensors_sha256(network.state_dict()), path)) != path:
            warnings.warn(f"{twin} and {path} hold the same weights, so that two snapshots are one", stacklevel=2)
    return network


def _read(network: nn.Module, path: Path, entry: str | None, sha256: str | None = None) -> None:
    """Copies a checkpoint into the network. One of transformers is read by it, for files may have older names."""
    own = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    if isinstance(network, own) and entry is None and (path.parent / CONFIG).is_file():
        from eekd.hf.teachers import read_model

        state = read_model(type(network), path.parent).state_dict()
    else:
        state = load_weights(path, sha256, entry=entry)
    load_state(network, state, path)


def _check_classes(path: Path, classes: list) -> None:
    """ValueError where a Hugging Face run has the data's classes in another order."""
    config = read_json(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else {}
    labels = config.get("id2label")
    names = [str(labels.get(str(i))) for i in range(len(labels))] if isinstance(labels, dict) else []
    wanted = [str(name) for name in classes]
    if names != wanted and sorted(names) == sorted(wanted):
        got, want = next((a, b) for a, b in zip(names, wanted, strict=True) if a != b)
        raise ValueError(f"{path.parent} must have the data's classes in their order, got {got!r} for {want!r}")


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
            _read(network, path, config.checkpoint_entry, sha256)
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
    measured = {split: diagnose(session, ensemble, session.loader(split, phase)) for split in ("val", "test")}
    if parallel.is_main_process():
        record = {"format": FORMAT, "setup": identity} | measured | {"metrics": metrics_of(folder), "sources": sources}
        write_json_atomic(folder / RECORD, finite(record))
    parallel.barrier()
    return read_json(folder / RECORD)
