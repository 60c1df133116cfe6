"""The teacher: one ordinary training run that keeps M snapshots, and what those snapshots know."""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from eekd import parallel
from eekd.data import Loader
from eekd.io.files import read_checked, read_json, write_json_atomic
from eekd.kept_code import check_copies
from eekd.snapshots import MANIFEST, SnapshotEnsemble, SnapshotRecorder, read_manifest
from eekd.train.callbacks import Callback
from eekd.train.checkpoints import KeepSources, check_identity, delete_checkpoints, run_identity
from eekd.train.config import Config
from eekd.train.metrics import Calibration
from eekd.train.run_folder import FORMAT, finite, metrics_of, read_metrics, read_record
from eekd.train.session import Progress, Session, quiet
from eekd.train.standard import standard_callbacks
from eekd.train.trainer import Trainer

RECORD = "snapshots.json"


class TeacherTrainer(Trainer):
    """Trains the teacher of a session, on labels."""

    def __init__(self, session: Session, **options):
        phase = session.config.teacher
        super().__init__(session, phase, session.network(phase, 2 * session.config.seed), "teacher", **options)


class Snapshots(Callback):
    """Saves the network at the end of each stage; `resume` forgets those of epochs that are done again."""

    def __init__(self, folder: Path, schedule: str | Sequence[int], spec: dict, resume: bool = False):
        self.folder, self.schedule, self.spec, self.resume = folder, schedule, spec, resume

    @contextmanager
    def running(self, trainer):
        if self.resume and not trainer.epoch and parallel.is_main_process():
            for path in (self.folder / MANIFEST, *self.folder.glob("snapshot-*.safetensors")):
                path.unlink(missing_ok=True)
        phase = trainer.config.teacher
        self.recorder = SnapshotRecorder(
            self.folder,
            epochs=phase.epochs,
            snapshots=phase.snapshots,
            schedule=self.schedule,
            spec=self.spec,
            done=trainer.epoch,
        )
        yield

    def on_epoch_end(self, trainer, row):
        kept = "train_loss", "val_loss", "val_accuracy"
        self.recorder.step(trainer.kept, {name: row[name] for name in kept if name in row})


def train_teacher(
    config: Config,
    folder: str | Path,
    *,
    schedule: str | Sequence[int] = "uniform",
    session: Session | None = None,
    progress: Progress = quiet,
    resume: bool = False,
) -> dict:
    """Trains config.teacher and leaves the snapshots, the metrics and snapshots.json in `folder`.

    `schedule` may list the epochs after which to save a snapshot, instead of the ends of teacher.snapshots stages.
    Returns the content of snapshots.json, see eekd.train.run_folder. FileExistsError if the folder holds
    snapshots, FloatingPointError if the loss is not finite. `resume` continues from what the folder holds, which may be
    nothing: ValueError or FileNotFoundError names a file that is damaged, missing or of another teacher.
    """
    folder, session, phase = Path(folder), session or Session(config), config.teacher
    identity = run_identity("teacher", session, phase)
    identity["schedule"] = schedule if isinstance(schedule, str) else [*schedule]
    if resume and (folder / RECORD).exists():
        record = read_teacher(folder)
        check_identity(folder / RECORD, record, identity)
        delete_checkpoints(folder)
        return record
    snapshots = Snapshots(folder, schedule, session.spec(phase), resume)
    kept = snapshots, KeepSources(folder, phase.model)
    callbacks = standard_callbacks(session, "teacher", folder, identity, resume, *kept)
    TeacherTrainer(session, callbacks=callbacks, progress=progress).fit()
    parallel.barrier()  # until the last snapshot is written
    ensemble = session.load_snapshots(folder, features=False)
    record = {split: diagnose(session, ensemble, session.loader(split, phase)) for split in ("val", "test")}
    if parallel.is_main_process():
        record = {"format": FORMAT, "setup": identity} | record | {"metrics": metrics_of(folder)}
        write_json_atomic(folder / RECORD, finite(record))
    delete_checkpoints(folder)
    return read_json(folder / RECORD)


def read_teacher(folder: Path) -> dict:
    """The content of snapshots.json of a finished teacher, all files checked; ValueError names the damaged one."""
    record = read_record(folder / RECORD, "setup", "val", "test", "metrics")
    for entry in read_manifest(folder)["snapshots"]:
        read_checked(folder / entry["file"], entry["sha256"])
    check_copies(folder, record["setup"])
    read_metrics(folder, record)
    return record


@torch.no_grad()
def diagnose(session: Session, ensemble: SnapshotEnsemble, loader: Loader) -> dict:
    """Accuracy, likelihood and calibration of each snapshot and of their mean, and how often two disagree."""
    m, device = len(ensemble), session.device
    calibration = Calibration(m + 1, device)
    differ = torch.zeros(m, m, dtype=torch.int64, device=device)
    for images, labels, _ in loader:
        logits, _ = session.run(ensemble, images)
        each = logits.double().log_softmax(-1)
        mean = each.logsumexp(0, keepdim=True) - math.log(m)
        predicted = calibration.add(torch.cat([each, mean]), labels)
        differ += (predicted[:m, None] != predicted[None, :m]).sum(-1)
    calibration.reduce()
    results = calibration.all()
    names = [f"snapshot {i}" for i in range(1, m + 1)] + ["ensemble"]
    images = sum(results[0]["reliability"]["count"])
    return {
        "members": [{"name": name} | member for name, member in zip(names, results, strict=True)],
        "disagreement": (parallel.all_reduce_sum(differ) / images).tolist(),
    }
