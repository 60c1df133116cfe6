"""A student: trained on labels alone, or taught by a teacher's snapshots under one of the weightings."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eekd import parallel
from eekd.bank import LogitBank
from eekd.data import Batch, Loader
from eekd.info import commit
from eekd.io.files import read_checked, read_json, write_json_atomic
from eekd.io.tensors import save_tensors
from eekd.method import weightings
from eekd.method.losses import EEKDLoss
from eekd.snapshots import SnapshotEnsemble, read_entries, read_manifest
from eekd.snapshots.features import LastFeatures
from eekd.train.checkpoints import check_setup, forget, setup_of
from eekd.train.config import Config, Student
from eekd.train.nonfinite import Verifier
from eekd.train.run_folder import FORMAT, finite, metrics_of, read_metrics, read_record
from eekd.train.trainer import SPLIT, Means, Progress, Session, accuracy, classify, evaluate, fit, quiet

RECORD = "student.json"


def train_student(
    config: Config,
    teacher: str | Path | None,
    weighting: str,
    folder: str | Path,
    *,
    which: Sequence[int] | None = None,
    session: Session | None = None,
    progress: Progress = quiet,
    resume: bool = False,
) -> dict:
    """Trains config.student by `weighting` from the snapshots in the folder `teacher`; leaves it in `folder`.

    "ce" trains on labels alone and needs no teacher; "last" is plain knowledge distillation and runs the last
    snapshot only. `which` picks the snapshots by index. With config.bank they run on validation images only.
    Returns the content of student.json, see eekd.train.run_folder. FloatingPointError if the loss is not finite,
    FileExistsError if the folder holds a network, and what SnapshotEnsemble.load and LogitBank.check raise.
    `resume` goes on from what the folder holds, whatever that is: ValueError or FileNotFoundError names what is
    damaged or of another student.
    """
    folder, session, phase = Path(folder), session or Session(config), config.student
    weighting = weighting if weighting == "ce" else weightings.get(weighting).name  # of a path, whose file is run now
    which = [-1] if which is None and weighting == "last" else which
    entries, spec = (None, None) if weighting == "ce" else read_entries(teacher, which)
    setup = setup_of(weighting, session, phase, entries and [entry["sha256"] for entry in entries])
    if resume and (folder / RECORD).exists():
        known = read_student(folder)
        check_setup(folder / RECORD, known, setup)
        forget(folder)
        return known
    student = session.network(phase, 2 * config.seed + 1)  # not the teacher's first weights
    loader, val = session.loader("train", phase, train=True), session.loader("val", phase)
    bank, loss, taught_by = session.bank, None, None
    if bank:
        check_bank(session, loader, teacher, [weighting])
    replicas = [session.parallelize(student)]
    if weighting == "ce":
        trained, (objective, validate) = student, classify(session, student, *replicas, val)
    else:
        ensemble = SnapshotEnsemble.load(teacher, device=session.device, which=which, snapshots_on=config.snapshots_on)
        ensemble.to(memory_format=session.layout)
        capture = LastFeatures(session.compiled(*replicas))
        options = _options(phase, weighting, capture.dim, bank.feature_dim if bank else ensemble.feature_dim)
        loss = EEKDLoss(weighting, **options).to(session.device)
        trained = nn.ModuleList([student, loss])
        replicas.append(session.parallelize(loss, "ddp"))
        taught_by = {
            "run": os.path.relpath(teacher, folder),
            "spec": spec,
            "snapshots": [{key: entry[key] for key in ("file", "sha256", "step")} for entry in entries],
            "bank": {"path": os.path.relpath(bank.path, folder), "sha256": bank.sha256} if bank else None,
        }
        # Validation images never change, so the snapshots see them once.
        known = [[t.clone() for t in session.run(ensemble, batch.images)] for batch in val]
        if bank:
            known = [(logits, bank.project(features)) for logits, features in known]
            loader = Replay(loader, bank, which, features=weightings.get(weighting).needs_features)
            teach, ensemble = loader.teach, None  # frees the snapshots
        else:

            def run_snapshots(batch):
                return session.run(ensemble, batch.images)

            teach = remember(run_snapshots, loader) or run_snapshots

        verify = Verifier(weighting, loss, session, folder)
        objective, validate = distil(session, student, capture, teach, loss, replicas[1], verify, val, known)
    rows = fit(setup, session, phase, trained, replicas, objective, validate, loader, folder, progress, resume=resume)
    test = evaluate(session, student, session.loader("test", phase))
    learned = loss.state_dict() if loss else {}
    weights = parallel.gather_to_main_process(student.state_dict().items())
    known = parallel.is_main_process() and {
        "format": FORMAT,
        "setup": setup,
        "weighting": weighting,
        "spec": session.spec(phase),
        "classes": list(session.data.classes),
        "preprocessing": session.data.preprocessing,
        "sha256": save_tensors(folder / "student.safetensors", weights),
        "attention_sha256": save_tensors(folder / "attention.safetensors", learned) if learned else None,
        "loss": options if loss else None,
        "weights": rows[-1].get("weights"),
        "seed": config.seed,
        "commit": commit(),
        "metrics": metrics_of(folder),
        "val": {"loss": rows[-1]["val_loss"], "accuracy": rows[-1]["val_accuracy"]},
        "test": test,
        "seconds_per_epoch": sum(row["seconds"] for row in rows) / len(rows),
        "teacher": taught_by,
    }
    if known:
        write_json_atomic(folder / RECORD, finite(known))
    forget(folder)
    return read_json(folder / RECORD)


def read_student(folder: Path) -> dict:
    """The content of student.json of a finished student, all files checked; ValueError names the one at fault."""
    keys = "setup", "weighting", "spec", "sha256", "attention_sha256", "seconds_per_epoch", "val", "test", "metrics"
    known = read_record(folder / RECORD, *keys)
    read_checked(folder / "student.safetensors", known["sha256"])
    if known["attention_sha256"]:
        read_checked(folder / "attention.safetensors", known["attention_sha256"])
    read_metrics(folder, known)
    return known


def _options(phase: Student, weighting: str, student_dim: int, snapshot_dim: int) -> dict:
    """The arguments of EEKDLoss that matter to this weighting."""
    options = dict(temperature=phase.temperature, alpha=phase.alpha, fusion=phase.fusion)
    if weightings.get(weighting).needs_features:
        options |= dict(
            student_dim=student_dim,
            snapshot_dim=snapshot_dim,
            embed_dim=phase.embed_dim,
            normalize=phase.normalize,
            scale=phase.scale,
            detach_query=phase.detach_query,
            attention_objective=phase.attention_objective,
        )
    return options


def check_bank(session: Session, loader: Loader, teacher: str | Path | None, students: Iterable[str]):
    """ValueError, one sentence, unless the session's bank has its images and teacher, and what these students need."""
    config, bank = session.config, session.bank
    split = {name: getattr(config, name) for name in SPLIT}
    hashes = [entry["sha256"] for entry in read_manifest(teacher)["snapshots"]] if teacher else None
    bank.check(session.data, loader, hashes, **split)
    needs = next((name for name in students if name != "ce" and weightings.get(name).needs_features), None)
    if needs and not bank.feature_dim:
        raise ValueError(f"weighting {needs} needs features, and {bank.path} was written with --features none")


class Replay:
    """A training loader beside which a bank is read: `teach(batch)` gives its batch's rows, of `which` snapshots."""

    def __init__(self, loader: Loader, bank: LogitBank, which: Sequence[int] | None, features: bool):
        self.loader, self.bank, self.which, self.features = loader, bank, which, features

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def skip(self, batches: int) -> None:
        self.loader.skip(batches)

    def rows(self, batch: int) -> int:
        return self.loader.rows(batch)

    def __iter__(self) -> Iterator[Batch]:
        loader = self.loader
        rows = self.bank.prefetch(loader.view, loader.indices(), loader.device, self.features)
        with closing(rows) as self.said:
            yield from loader

    def teach(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        logits, features = next(self.said)
        if self.which is None:
            return logits, features
        return logits[[*self.which]], None if features is None else features[[*self.which]]


REMEMBERED = 2**30  # bytes of snapshots' outputs that a student may keep in memory


def remember(teach: Callable, loader: Loader) -> Callable | None:
    """`teach`, run once over the loader's images, whose outputs are then looked up; None where that can't be.

    It can where every epoch shows the same images: without augmentation, in one process. Each output is then computed
    in one fixed order before training, so that a resumed run has the same bits.
    """
    if loader.augment != "none" or loader.world_size > 1:
        return None
    count, kept = len(loader.split), None
    for index in torch.arange(count, device=loader.device).split(loader.batch_size):
        (batch,) = loader.replay([(0, index)])
        logits, features = teach(batch)
        if kept is None:
            row = sum(x[:, 0].numel() * x.element_size() for x in (logits, features))
            if count * row > REMEMBERED:
                return None
            kept = [x.new_empty(len(x), count, *x.shape[2:]) for x in (logits, features)]
        for all_rows, rows in zip(kept, (logits, features), strict=True):
            all_rows[:, index] = rows
    return lambda batch: tuple(x[:, batch.index] for x in kept)


def distil(
    session: Session,
    student: nn.Module,
    capture: LastFeatures,
    teach: Callable,
    loss: EEKDLoss,
    criterion: nn.Module,
    verify: Callable,
    val: Loader,
    known: list,
) -> tuple[Callable, Callable]:
    """Objective and validation with a teacher: teach(batch) gives the snapshots' logits and features.

    `capture` and `criterion` are the student and the loss as they train, parallel and compiled; verify(the
    loss, *what it was given) looks at the first of them.
    Validation, where they are `known` batch by batch, also asks whether uniform weights would have made a better
    target.
    """
    alone = copy.copy(capture)
    alone.model = student
    uniform = EEKDLoss("uniform", **{name: loss.options[name] for name in ("temperature", "alpha", "fusion")})

    def objective(batch, clock):
        with clock("teacher"):
            snapshot_logits, snapshot_features = teach(batch)
        with clock("forward"):
            logits, features = session.run(capture, batch.images)
        with clock("backward"):
            total, measured = criterion(logits, snapshot_logits, batch.labels, features, snapshot_features)
        verify(total, logits, snapshot_logits, batch.labels, features, snapshot_features)
        return total, measured | {"accuracy": accuracy(logits, batch.labels)}

    @torch.no_grad()
    def validate():
        student.eval()
        means = Means()
        for (images, labels, _), (snapshot_logits, snapshot_features) in zip(val, known, strict=True):
            logits, features = session.run(alone, images)
            _, weighted = loss(logits, snapshot_logits, labels, features, snapshot_features)
            _, equal = uniform(logits, snapshot_logits, labels)
            means.add(
                len(labels),
                val_loss=F.cross_entropy(logits.float(), labels),
                val_accuracy=accuracy(logits, labels),
                val_target_nll=weighted["attention_loss"],
                val_target_nll_uniform=equal["attention_loss"],
                val_kd_loss=weighted["loss"],
                val_kd_loss_uniform=equal["loss"],
            )
        return means.all()

    return objective, validate
