"""The teacher: one ordinary training run that keeps M snapshots, and what those snapshots know."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from eekd import parallel
from eekd.data import Loader
from eekd.io.files import read_checked, read_json, write_json_atomic
from eekd.snapshots import MANIFEST, SnapshotEnsemble, SnapshotRecorder, read_manifest
from eekd.train.checkpoints import check_setup, forget, setup_of
from eekd.train.config import Config
from eekd.train.run_folder import FORMAT, finite, metrics_of, read_metrics, read_record
from eekd.train.trainer import Progress, Session, classify, fit, quiet

BINS = 15
RECORD = "snapshots.json"


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

    `schedule` may name the epochs after which to keep a snapshot, in place of the ends of teacher.snapshots stages.
    Returns the content of snapshots.json, see eekd.train.run_folder. FileExistsError if the folder holds
    snapshots, FloatingPointError if the loss is not finite. `resume` goes on from what the folder holds, whatever
    that is: ValueError or FileNotFoundError names what is damaged, missing or of another teacher.
    """
    folder, session, phase = Path(folder), session or Session(config), config.teacher
    setup = setup_of("teacher", session, phase)
    setup["schedule"] = schedule if isinstance(schedule, str) else [*schedule]
    if resume and (folder / RECORD).exists():
        known = read_teacher(folder)
        check_setup(folder / RECORD, known, setup)
        forget(folder)
        return known
    model = session.network(phase, 2 * config.seed)
    spec, val = session.spec(phase), session.loader("val", phase)

    def begin(done: int) -> Callable[[dict], None]:
        if resume and not done and parallel.is_main_process():  # snapshots of an epoch that is done again
            for path in (folder / MANIFEST, *folder.glob("snapshot-*.safetensors")):
                path.unlink(missing_ok=True)
        recorder = SnapshotRecorder(
            folder, epochs=phase.epochs, snapshots=phase.snapshots, schedule=schedule, spec=spec, done=done
        )

        def record(row: dict) -> None:
            recorder.step(model, {name: row[name] for name in ("train_loss", "val_loss", "val_accuracy")})

        return record

    loader, replica = session.loader("train", phase, train=True), session.parallelize(model)
    objective, validate = classify(session, model, replica, val)
    fit(setup, session, phase, model, [replica], objective, validate, loader, folder, progress, begin, resume)
    parallel.barrier()  # until the last snapshot is written
    ensemble = SnapshotEnsemble.load(folder, device=session.device, snapshots_on=session.config.snapshots_on)
    ensemble.to(memory_format=session.layout)
    known = {split: diagnose(session, ensemble, session.loader(split, phase)) for split in ("val", "test")}
    if parallel.is_main_process():
        known = {"format": FORMAT, "setup": setup} | known | {"metrics": metrics_of(folder)}
        write_json_atomic(folder / RECORD, finite(known))
    forget(folder)
    return read_json(folder / RECORD)


def read_teacher(folder: Path) -> dict:
    """The content of snapshots.json of a finished teacher, all files checked; ValueError names the damaged one."""
    known = read_record(folder / RECORD, "setup", "val", "test", "metrics")
    for entry in read_manifest(folder)["snapshots"]:
        read_checked(folder / entry["file"], entry["sha256"])
    read_metrics(folder, known)
    return known


@torch.no_grad()
def diagnose(session: Session, ensemble: SnapshotEnsemble, loader: Loader) -> dict:
    """Accuracy, likelihood and calibration of each snapshot and of their mean, and how often two disagree.

    The expected calibration error is sum_bins count/N |accuracy - confidence| over 15 equal bins of the
    confidence (Guo et al., "On Calibration of Modern Neural Networks", 2017).
    """
    m, device = len(ensemble), session.device
    likelihood = torch.zeros(m + 1, dtype=torch.float64, device=device)
    bins = torch.zeros(3, m + 1, BINS, dtype=torch.float64, device=device)  # sums of confidence, hits, ones
    differ = torch.zeros(m, m, dtype=torch.int64, device=device)
    for images, labels, _ in loader:
        logits, _ = session.run(ensemble, images)
        each = logits.double().log_softmax(-1)
        both = torch.cat([each, each.logsumexp(0, keepdim=True) - math.log(m)])  # (M + 1, B, C)
        likelihood += both[:, torch.arange(len(labels), device=device), labels].sum(1)
        confidence, predicted = both.exp().max(-1)
        place = F.one_hot((confidence * BINS).long().clamp_(max=BINS - 1), BINS).double()
        values = torch.stack([confidence, (predicted == labels).double(), torch.ones_like(confidence)])
        bins += torch.einsum("kmb,mbn->kmn", values, place)
        differ += (predicted[:m, None] != predicted[None, :m]).sum(-1)
    likelihood, bins, differ = (parallel.all_reduce_sum(x) for x in (likelihood, bins, differ))
    count = bins[2].sum(1)
    accuracy, ece = bins[1].sum(1) / count, (bins[1] - bins[0]).abs().sum(1) / count
    names = [f"snapshot {i}" for i in range(1, m + 1)] + ["ensemble"]
    return {
        "members": [
            {"name": name, "accuracy": accuracy[i].item(), "nll": -likelihood[i].item() / count[i].item(),
             "ece": ece[i].item(), "reliability": _reliability(*bins[:, i].tolist())}
            for i, name in enumerate(names)
        ],
        "disagreement": (differ / count[0]).tolist(),
    }  # fmt: skip


def _reliability(confidence: list[float], hits: list[float], count: list[float]) -> dict[str, list]:
    return {
        "confidence": [c / n if n else None for c, n in zip(confidence, count, strict=True)],
        "accuracy": [h / n if n else None for h, n in zip(hits, count, strict=True)],
        "count": [int(n) for n in count],
    }
