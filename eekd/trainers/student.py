"""A student: trained on labels alone, or taught by a teacher's snapshots under one of the weightings."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from eekd.checkpoint import save_tensors, write_json_atomic
from eekd.config import Config, Weighting
from eekd.features import LastFeatures
from eekd.losses import EEKDLoss
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.trainers.folder import FORMAT, commit
from eekd.trainers.loop import Means, Progress, Session, classify, evaluate, fit, quiet, scores


def train_student(config: Config, teacher: str | Path | None, weighting: Weighting, folder: str | Path, *,
                  session: Session | None = None, progress: Progress = quiet) -> dict:
    """Trains config.student by `weighting` from the snapshots in the folder `teacher` and leaves it in `folder`.

    "ce" trains on labels alone and needs no teacher; "last" is plain knowledge distillation and runs the last
    snapshot only. Returns the content of student.json, see eekd.trainers.folder. FloatingPointError where the
    loss is not finite; what `SnapshotEnsemble.load` raises for the teacher.
    """
    folder, session, phase = Path(folder), session or Session(config), config.student
    student = session.network(phase, 2 * config.seed + 1)  # not the teacher's first weights
    val = session.loader("val", phase)
    if weighting == "ce":
        trained, loss, taught_by = student, None, None
        objective = classify(session, session.compiled(student))

        def validate() -> dict:
            return {f"val_{name}": value for name, value in evaluate(session, student, val).items()}
    else:
        which = [-1] if weighting == "last" else None
        ensemble = SnapshotEnsemble.load(teacher, device=session.device, which=which)
        ensemble.to(memory_format=session.layout)
        capture = LastFeatures(session.compiled(student))
        settings = dict(temperature=phase.temperature, alpha=phase.alpha, fusion=phase.fusion)
        attend = dict(student_dim=capture.dim, snapshot_dim=ensemble.feature_dim, embed_dim=phase.embed_dim,
                      normalize=phase.normalize, scale=phase.scale, detach_query=phase.detach_query,
                      attention_objective=phase.attention_objective) if weighting == "attention" else {}  # fmt: skip
        loss = EEKDLoss(weighting, **settings, **attend).to(session.device)
        trained = nn.ModuleList([student, loss])
        objective = distil(session, capture, ensemble, loss)
        validate = judge(session, capture, ensemble, loss, EEKDLoss("uniform", **settings), val)
        manifest = read_manifest(teacher)
        entries = manifest["snapshots"] if which is None else manifest["snapshots"][-1:]
        taught_by = {
            "run": os.path.relpath(teacher, folder),
            "spec": manifest["spec"],
            "snapshots": [{key: entry[key] for key in ("file", "sha256", "step")} for entry in entries],
        }
    rows = fit(weighting, session, phase, trained, objective, validate, folder, progress)
    weights = dict(loss.state_dict()) if loss else {}
    known = {
        "format": FORMAT,
        "weighting": weighting,
        "spec": session.spec(phase),
        "file": "student.safetensors",
        "sha256": save_tensors(folder / "student.safetensors", student.state_dict()),
        "attention_sha256": save_tensors(folder / "attention.safetensors", weights) if weights else None,
        "loss": settings | attend if loss else {},
        "seed": config.seed,
        "commit": commit(),
        "val": {"loss": rows[-1]["val_loss"], "accuracy": rows[-1]["val_accuracy"]},
        "test": evaluate(session, student, session.loader("test", phase)),
        "seconds_per_epoch": sum(row["seconds"] for row in rows) / len(rows),
        "teacher": taught_by,
    }
    write_json_atomic(folder / "student.json", known)
    return known


def distil(session: Session, capture: LastFeatures, ensemble: SnapshotEnsemble, loss: EEKDLoss) -> Callable:
    """The objective with a teacher: both see the same augmented images."""

    def objective(batch, clock):
        with clock("teacher"):
            snapshot_logits, snapshot_features = session.run(ensemble, batch.images)
        with clock("forward"):
            logits, features = session.run(capture, batch.images)
        with clock("backward"):
            total, measured = loss(logits, snapshot_logits, batch.labels, features, snapshot_features)
        return total, measured | {"accuracy": scores(logits, batch.labels)["accuracy"]}

    return objective


def judge(session: Session, capture: LastFeatures, ensemble: SnapshotEnsemble, loss: EEKDLoss, uniform: EEKDLoss,
          val) -> Callable:
    """Validation of a student, and whether uniform weights would have made a better target.

    The validation images are never augmented, so the snapshots see them once, here.
    """
    known = [[t.clone() for t in session.run(ensemble, batch.images)] for batch in val]

    @torch.no_grad()
    def validate() -> dict:
        capture.model.eval()
        means = Means()
        for batch, (snapshot_logits, snapshot_features) in zip(val, known, strict=True):
            logits, features = session.run(capture, batch.images)
            _, weighted = loss(logits, snapshot_logits, batch.labels, features, snapshot_features)
            _, equal = uniform(logits, snapshot_logits, batch.labels)
            means.add(
                len(batch.labels),
                **{f"val_{name}": mean for name, mean in scores(logits, batch.labels).items()},
                val_target_nll=weighted["attention_loss"], val_target_nll_uniform=equal["attention_loss"],
                val_kd_loss=weighted["loss"], val_kd_loss_uniform=equal["loss"],
            )  # fmt: skip
        return means.all()

    return validate
