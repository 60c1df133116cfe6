"""A student: trained on labels alone, or taught by a teacher's snapshots, by a weighting or a method of one's own."""

import copy
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eekd import parallel
from eekd.info import commit
from eekd.io.files import read_checked, read_json, write_json_atomic
from eekd.io.tensors import save_tensors
from eekd.kept_code import check_copies, described
from eekd.method import weightings
from eekd.method.losses import EEKDLoss
from eekd.method.rivals import RIVALS, TEMPERATURE
from eekd.snapshots import read_entries
from eekd.snapshots.features import LastFeatures
from eekd.train.checked import StudentName, choices
from eekd.train.checkpoints import KeepSources, check_identity, delete_checkpoints, run_identity
from eekd.train.config import Config, Student
from eekd.train.metrics import RunningMeans, accuracy, evaluate
from eekd.train.run_folder import FORMAT, finite, metrics_of, read_metrics, read_record
from eekd.train.session import Progress, Session, quiet
from eekd.train.standard import standard_callbacks
from eekd.train.teaching import TaughtBatch, Teacher, check_bank, load_teacher
from eekd.train.trainer import Trainer
from eekd.user_code import is_file_name, load, own_name

RECORD, ATTENTION, CRITERION = "student.json", "attention.safetensors", "criterion.safetensors"


class StudentTrainer(Trainer):
    """Trains the student of a session, on labels or taught by the snapshots of a teacher.

    Your own method is a subclass. It may override

        compute_loss(batch)     the loss for `batch.images`, `batch.labels` and `batch.teacher`, which holds the
                                snapshots' logits (M, B, C) and features (M, B, D); it may depend on `epoch`, `step`
                                and `total_steps`
        build_criterion()       a module, called as `self.criterion(...)`, whose parameters are trained with the
                                student's; by default EEKDLoss with `weighting`; its sizes: `student_dim`, `teacher_dim`
        make_teacher(folder, which)   the Teacher that speaks; by default for the picked snapshots together
        weighting               a weighting's name; "ce" for a method without a teacher, "last" for the last snapshot
        needs_features          whether it reads `batch.teacher.features`; by default as the weighting does
        validates_target        whether validation measures an EEKDLoss, too; for that the snapshots run on the
                                validation images, even with a bank

    `self.forward_features(images)` returns the student's logits and last features in training.

    `teacher` is the folder of a teacher's snapshots or a Teacher; `which` picks snapshots by index.
    """

    phase: Student
    weighting: str = "attention"
    needs_features: bool | None = None
    validates_target = True
    rival: str | None = None  # its entry in eekd.method.rivals
    reads_maps = False  # whether the last snapshot itself must be there, for its feature maps

    def __init__(
        self,
        session: Session,
        teacher: str | Path | Teacher | None,
        weighting: str | None = None,
        *,
        which: Sequence[int] | None = None,
        name: str | None = None,
        **options,
    ):
        self.weighting = weighting or self.weighting
        self.teacher: Any = teacher
        self._which = snapshots_of(self.weighting, which)
        if self.needs_features is None:
            self.needs_features = needs_features(self.weighting)
        phase, seed = self.settings(session.config), 2 * session.config.seed + 1  # not the teacher's first weights
        name = name or (self.weighting if type(self) is StudentTrainer else type(self).__name__)
        super().__init__(session, phase, session.network(phase, seed), name, **options)

    @classmethod
    def settings(cls, config: Config) -> Student:
        """The student's settings, with the method's own temperature and β where none are given."""
        usual = {"temperature": TEMPERATURE} | (RIVALS[cls.rival].settings if cls.rival else {})
        missing = {name: value for name, value in usual.items() if getattr(config.student, name) is None}
        return dataclasses.replace(config.student, **missing)

    def setup(self) -> None:
        session, teacher = self.session, self.teacher
        folder = teacher if isinstance(teacher, str | Path) else None
        if session.bank:
            check_bank(session, self.loader, folder, self.name if self.needs_features else None)
        if self.weighting == "ce":
            self.teacher = None
        elif folder:
            self.teacher = self.make_teacher(folder, self._which)
        if self.teacher:
            self._capture = LastFeatures(self.model, self.phase.layer, features=bool(self.needs_features))
            if self.average:
                self._capture_alone = LastFeatures(self.kept, self.phase.layer, features=bool(self.needs_features))
            else:
                self._capture_alone = copy.copy(self._capture)  # to validate by, neither parallel nor compiled
                self._capture_alone.model = self.network
            if self.needs_features:
                self.student_dim, self.teacher_dim = self._capture.dim, self.teacher.feature_dim

    def make_teacher(self, folder: str | Path, which: Sequence[int] | None) -> Teacher:
        """The snapshots in `folder`, or those of the indices `which`, as the batches need them."""
        loaders, features = (self.loader, self.val_loader), bool(self.needs_features)
        return load_teacher(self.session, folder, which, *loaders, features=features, validates=self.validates_target)

    def build_criterion(self) -> nn.Module | None:
        return EEKDLoss(self.weighting, **self.loss_options()) if self.teacher else None

    def loss_options(self) -> dict:
        """The arguments of EEKDLoss that matter to the weighting."""
        options = {name: getattr(self.phase, name) for name in ("temperature", "alpha", "fusion")}
        if needs_features(self.weighting):
            names = "embed_dim", "normalize", "scale", "detach_query", "attention_objective"
            options |= {"student_dim": self.student_dim, "snapshot_dim": self.teacher_dim}
            options |= {name: getattr(self.phase, name) for name in names}
        return options

    def batches_from(self, step: int) -> Iterator[TaughtBatch]:
        batches = super().batches_from(step)
        return self.teacher.batches(self.loader, self.timer) if self.teacher else batches

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The student's logits (B, C) and last features (B, D) in training."""
        with self.timer("forward"):
            return self.session.run(self._capture, images)

    def infer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and last features of the network that is saved, neither parallel nor compiled."""
        return self.session.run(self._capture_alone, images)

    def compute_loss(self, batch: TaughtBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.teacher is None:
            return super().compute_loss(batch)
        logits, features = self.forward_features(batch.images)
        taught = batch.teacher
        loss, measured = self.criterion(logits, taught.logits, batch.labels, features, taught.features)
        return loss, measured | {"accuracy": accuracy(logits, batch.labels)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The val_ entries; with an EEKDLoss also whether uniform weights would give a better target."""
        loss = self.own_criterion
        if not (self.validates_target and isinstance(loss, EEKDLoss)):
            return super().validate()
        self.kept.eval()
        uniform = EEKDLoss("uniform", **{name: loss.options[name] for name in ("temperature", "alpha", "fusion")})
        means = RunningMeans()
        for (images, labels, _), taught in zip(self.val_loader, self.teacher.val, strict=True):
            logits, features = self.infer(images)
            _, weighted = loss(logits, taught.logits, labels, features, taught.features)
            _, equal = uniform(logits, taught.logits, labels)
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


@dataclass(frozen=True)
class Method:
    """How a student is taught: `trainer` with `weighting`, of one's own if it comes from a `file`."""

    name: str
    trainer: type[StudentTrainer]
    weighting: str
    file: Path | None = None

    @property
    def needs_features(self) -> bool:
        own = self.trainer.needs_features
        return needs_features(self.weighting) if own is None else own

    @property
    def reads_maps(self) -> bool:
        return self.trainer.reads_maps

    @property
    def source(self) -> dict:
        """What a record says of the file."""
        return described(self.file)


def method_of(method: "str | Callable | type[StudentTrainer]") -> Method:
    """The method that is "ce", a weighting's or a rival's name, path/to/file.py:NAME, a function or a StudentTrainer.

    A function is a weighting's; the rivals are those of eekd.method.rivals.

    The code of a file is run. ValueError for an unknown name, or one that belongs to eekd; TypeError for a NAME of
    another kind; else what eekd.user_code.load raises.
    """
    if method == "ce":
        return Method("ce", StudentTrainer, "ce")
    if isinstance(method, str) and method in RIVALS:
        from eekd.train.rivals import TRAINERS  # which stands on this module

        return Method(method, TRAINERS[method], TRAINERS[method].weighting)
    if isinstance(method, str) and not is_file_name(method):
        name = weightings.get(method).name
        return Method(name, StudentTrainer, name)
    wanted = "a weighting's function or a subclass of eekd.train.StudentTrainer"
    if isinstance(method, str):
        name, file, own = own_name(method), Path(method.rpartition(":")[0]), load(method, wanted)
    else:
        name, own = getattr(method, "__name__", "method"), method
        file = Path(inspect.getsourcefile(own) or "") if inspect.isroutine(own) or inspect.isclass(own) else None
        file = file if file and file.is_file() else None  # a notebook has none
    if isinstance(own, type) and issubclass(own, StudentTrainer):
        if name in choices(StudentName):
            raise ValueError(f"a method's name must be one that eekd does not use itself, got {name!r}")
        return Method(name, own, own.weighting, file)
    if not callable(own) or isinstance(own, type):
        raise TypeError(f"{name} must be {wanted}, got {own if isinstance(own, type) else type(own).__name__}")
    registered = next((entry for entry in weightings.registered() if entry.log_weights is own), None)
    entry = registered or weightings.register(name, name, cast(Callable, own))
    return Method(entry.name, StudentTrainer, entry.name, file)


def check_source(folder: Path, method: Method) -> None:
    """ValueError where the student in `folder` was trained by another content of the method's file."""
    record = read_record(folder / RECORD, "setup")
    check_identity(folder / RECORD, record, record["setup"] | {"method": method.source})


def train_student(
    config: Config,
    teacher: str | Path | None,
    method: "str | Callable | type[StudentTrainer]",
    folder: str | Path,
    *,
    which: Sequence[int] | None = None,
    session: Session | None = None,
    progress: Progress = quiet,
    resume: bool = False,
) -> dict:
    """Trains config.student by `method` from the snapshots in the folder `teacher`; leaves it in `folder`.

    "ce" trains on labels alone and needs no teacher; "last" is plain knowledge distillation and runs the last
    snapshot only; `method_of` says what else a method may be. `which` picks the snapshots by index. With config.bank
    they run on validation images at most. Returns the content of student.json, see eekd.train.run_folder.

    FloatingPointError if the loss is not finite, FileExistsError if the folder holds a network, and what
    SnapshotEnsemble.load and LogitBank.check raise. `resume` goes on from what the folder holds, whatever that is:
    ValueError or FileNotFoundError names what is damaged or of another student.
    """
    folder, session, how = Path(folder), session or Session(config), method_of(method)
    phase = how.trainer.settings(config)
    name, entries, spec = how.name, None, None
    if how.weighting != "ce":
        if teacher is None:
            raise ValueError(f"teacher must be a folder of snapshots, which {name} learns from, got None")
        entries, spec = read_entries(teacher, snapshots_of(how.weighting, which))
    identity = run_identity(name, session, phase, [entry["sha256"] for entry in entries] if entries else None)
    if how.file or how.trainer is not StudentTrainer:
        identity["method"] = how.source
    if resume and (folder / RECORD).exists():
        record = read_student(folder)
        check_identity(folder / RECORD, record, identity)
        delete_checkpoints(folder)
        return record
    callbacks = standard_callbacks(session, name, folder, identity, resume)
    callbacks.append(KeepSources(folder, phase.model, how.file))
    trainer = how.trainer(
        session, teacher, how.weighting, which=which, name=name, callbacks=callbacks, progress=progress
    )
    rows = trainer.fit()
    test = evaluate(session, trainer.kept, session.loader("test", phase))
    weights = parallel.gather_to_main_process(trainer.kept.state_dict().items())
    if parallel.is_main_process():
        bank, criterion = session.bank, trainer.own_criterion
        learned, eekd = criterion.state_dict() if criterion else {}, isinstance(criterion, EEKDLoss)
        record = {
            "format": FORMAT,
            "setup": identity,
            "weighting": name,
            "spec": session.spec(phase),
            "classes": list(session.data.classes),
            "preprocessing": session.data.preprocessing,
            "sha256": save_tensors(folder / "student.safetensors", weights),
            "attention_sha256": save_tensors(folder / ATTENTION, learned) if learned and eekd else None,
            "loss": trainer.loss_options() if eekd else None,
            "weights": rows[-1].get("weights"),
            "ema": phase.ema or None,
            "seed": config.seed,
            "commit": commit(),
            "metrics": metrics_of(folder),
            "val": {"loss": rows[-1]["val_loss"], "accuracy": rows[-1]["val_accuracy"]},
            "test": test,
            "seconds_per_epoch": sum(row["seconds"] for row in rows) / len(rows),
            "teacher": teacher and entries and {
                "run": os.path.relpath(teacher, folder),
                "spec": spec,
                "snapshots": [{key: entry[key] for key in ("file", "sha256", "step")} for entry in entries],
                "bank": bank and {"path": os.path.relpath(bank.path, folder), "sha256": bank.sha256},
            } or None,
        }  # fmt: skip
        if learned and not eekd:
            record["criterion_sha256"] = save_tensors(folder / CRITERION, learned)
        write_json_atomic(folder / RECORD, finite(record))
    delete_checkpoints(folder)
    return read_json(folder / RECORD)


def snapshots_of(weighting: str, which: Sequence[int] | None) -> Sequence[int] | None:
    """The indices of the snapshots that a weighting runs, None for all."""
    return [-1] if which is None and weighting == "last" else which


def read_student(folder: Path) -> dict:
    """The content of student.json of a finished student, all files checked; ValueError names the one at fault."""
    keys = "setup", "weighting", "spec", "sha256", "attention_sha256", "seconds_per_epoch", "val", "test", "metrics"
    record = read_record(folder / RECORD, *keys)
    read_checked(folder / "student.safetensors", record["sha256"])
    if record["attention_sha256"]:
        read_checked(folder / ATTENTION, record["attention_sha256"])
    if record.get("criterion_sha256"):
        read_checked(folder / CRITERION, record["criterion_sha256"])
    check_copies(folder, record["setup"])
    read_metrics(folder, record)
    return record


def needs_features(weighting: str) -> bool:
    """Whether a weighting reads the features of student and snapshots."""
    return weighting != "ce" and weightings.get(weighting).needs_features
