"""Training as a library: the whole of a run, its teacher, or one of its students."""

import dataclasses
import shlex
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

from eekd import models, parallel
from eekd.bank import LogitBank
from eekd.data.encoded import SMALL
from eekd.io.files import write_json_atomic
from eekd.io.lock import locked
from eekd.kept_code import check_code, stand_in
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.snapshots.features import LastFeatures
from eekd.train.checkpoints import setups_in
from eekd.train.config import Config, Phase, differences, located
from eekd.train.findings import findings
from eekd.train.import_checkpoints import check_checkpoints, import_teacher, with_checkpoints
from eekd.train.logs import asked_for
from eekd.train.optim import layer_scales
from eekd.train.preflight import preflight
from eekd.train.pretrained import resized_otherwise
from eekd.train.run_folder import FORMAT, changes, new_folder, read_metrics, read_record, read_settings, write_settings
from eekd.train.seeds import seeds_of, summary_of
from eekd.train.session import Progress, Session, checkpoint_gradients, lines
from eekd.train.student import method_of, read_student, train_student
from eekd.train.teacher import RECORD as TEACHER_RECORD
from eekd.train.teacher import read_teacher, train_teacher
from eekd.train.teaching import check_bank
from eekd.user_code import own_name


def train(
    config: Config, out: str | Path | None = None, *, session: Session | None = None, progress: Progress = lines
) -> Path:
    """Trains the teacher and then every student; returns the run folder, described in eekd.train.run_folder.

    With config.seeds above 1 it does this once per seed, each in its own run folder: see eekd.train.seeds. With
    config.teacher_run or config.bank no teacher is trained; with config.students () no student is. `prepare` raises an
    error for wrong settings before anything is written; FileExistsError if `out` is not empty. `session` may be what
    `prepare` returned for this config, so that it is not done again. `progress` is called after every step, and prints
    a line for each epoch unless you give another one.
    """
    parallel.check_process_group()
    session = session or prepare(config)
    run = Path(parallel.broadcast(lambda: str(new_folder(out, config.data_name))))
    with _resumable(run), _alone(run):
        if parallel.is_main_process():
            write_settings(run, session.config, session.data, session.device)
        return _train(run, session, progress)


def resume(run: str | Path, *, session: Session | None = None, progress: Progress = lines) -> Path:
    """Continues a run that was killed, was stopped or failed, to the same bits as without it; returns its folder.

    The settings are those in its config.json. Finished phases are kept, and their files are checked. `session` may be
    what `prepare` returned for these settings. ValueError or FileNotFoundError names a file that is damaged, missing or
    of another run; BlockingIOError if another process uses the run; else what `prepare` raises.
    """
    parallel.check_process_group()
    run, config = Path(run), read_settings(run)
    with _resumable(run), _alone(run):
        session = session or prepare(config, run)
        check_data(session, run)
        return _train(run, session, progress)


def _train(run: Path, session: Session, progress: Progress) -> Path:
    start, config, teacher = time.perf_counter(), session.config, run / "teacher"
    if (run / "summary.json").exists():
        read_record(run / "summary.json", "seconds", "rows")
    if config.seeds > 1:
        return _train_seeds(run, session, progress)
    if config.teacher_run:
        teacher = Path(config.teacher_run, "teacher")
    elif config.checkpoints:
        import_teacher(session, teacher)
    else:
        train_teacher(config, teacher, session=session, progress=progress, resume=True)
    students = {method: run / "students" / own_name(method) for method in config.students or ()}
    for method, folder in students.items():
        train_student(config, teacher, method, folder, session=session, progress=progress, resume=True)
    if parallel.is_main_process() and not (run / "summary.json").exists():
        rows, seconds = table(teacher, list(students.values())), time.perf_counter() - start
        summary = {"format": FORMAT, "seconds": seconds, "rows": rows}
        summary["findings"] = findings(rows, len(session.data.classes), len(session.data.val))
        write_json_atomic(run / "summary.json", summary)
    parallel.barrier()
    return run


def _train_seeds(run: Path, session: Session, progress: Progress) -> Path:
    seeds = seeds_of(session.config)
    for seed in seeds:
        config, folder = dataclasses.replace(session.config, seed=seed, seeds=1), run / f"seed-{seed}"

        def of_seed(phase: str, *state, seed=seed) -> None:
            progress(f"{phase}, seed {seed}", *state)

        if parallel.is_main_process():
            folder.mkdir(exist_ok=True)
            if not (folder / "config.json").exists():
                write_settings(folder, config, session.data, session.device)
        parallel.barrier()
        with _alone(folder):
            recorded = located(read_settings(folder))
            if changed := differences(dataclasses.asdict(recorded), dataclasses.asdict(config)):
                raise ValueError(f"{folder} holds a run with another {', '.join(changed)}")
            _train(folder, Session(config, session.data), of_seed)
    if parallel.is_main_process() and not (run / "summary.json").exists():
        summary, data = summary_of(run, seeds), session.data
        means = [row | {"val_accuracy": row["val"]["mean"]} for row in summary["rows"]]
        summary["findings"] = findings(means, len(data.classes), len(data.val))
        write_json_atomic(run / "summary.json", {"format": FORMAT} | summary)
    parallel.barrier()
    return run


@contextmanager
def _alone(run: Path):
    """The run's lock, which the first of several processes holds for all."""
    with locked(run) if parallel.is_main_process() else nullcontext():
        parallel.barrier()
        yield


@contextmanager
def _resumable(run: Path):
    """Appends the `--resume` command to errors that resuming can recover from."""
    try:
        yield
    except (KeyboardInterrupt, OSError, RuntimeError, ValueError) as error:
        if not isinstance(error, BlockingIOError) and (run / "config.json").exists():
            error.add_note(f"continue with: python -m eekd.train --resume {shlex.quote(str(run))}")
        raise


def prepare(config: Config, run: str | Path | None = None) -> Session:
    """Loads the data and finds errors that would stop the run later: an unknown name, a teacher that does not fit.

    If config.teacher_run is given, or known from a bank, the teacher's settings become those of that run. `run` is the
    folder of a run that is resumed, which may already hold copies of config.checkpoints.
    """
    config = located(config)
    for phase, setup in setups_in(Path(run)) if run else ():
        stand_in(phase, setup)
    imported = run and Path(run, "teacher", TEACHER_RECORD).exists()
    if config.checkpoints and not imported:
        config = with_checkpoints(config)
    if config.bank and not config.teacher_run:
        config = dataclasses.replace(config, teacher_run=str(LogitBank.open(config.bank).run))
    earlier = Path(config.teacher_run) if config.teacher_run else None
    if earlier:
        settings = read_settings(earlier)
        for phase, setup in setups_in(earlier):
            stand_in(phase, setup)
        if settings.seeds > 1:
            raise ValueError(
                f"teacher_run must be the run of one seed, such as {earlier / f'seed-{settings.seed}'}, "
                f"got {earlier}, which holds {settings.seeds}"
            )
        config = dataclasses.replace(config, teacher=settings.teacher)
        if config.interpolation == "auto":  # its images
            config = dataclasses.replace(config, interpolation=settings.interpolation)
    asked_for(config)
    session = Session(config)
    if (kind := session.config.interpolation) not in (config.interpolation, "bilinear"):
        session.notes.append(f"Images are resized by {kind}, as the weights were trained (interpolation).")
    methods, networks = [method_of(name) for name in session.config.students or ()], {}
    trained = {config.teacher: not (earlier or config.checkpoints), config.student: bool(methods)}
    for phase, is_trained in trained.items():
        session.micro_batch(phase)
        networks[phase] = network = models.build(**session.spec(phase))
        if is_trained and not any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(f"{phase._prefix}model {phase.model} must have parameters to train, got none")
        _, note = session.normalization(phase)
        started = is_trained and session.start(phase)
        resized = is_trained and resized_otherwise(phase, session.config.interpolation)
        for sentence in (started and started.load(network, len(session.data.classes)), note, resized):
            if sentence:
                session.notes.append(f"The {type(phase).__name__.lower()} {sentence}")
        layer_scales(phase, network)
        if phase.grad_checkpointing:
            checkpoint_gradients(network, phase)
        if any(method.needs_features for method in methods):
            LastFeatures(network, phase.layer).remove()
        if config.sync_batchnorm:
            parallel.convert_sync_batchnorm(network)
    if config.checkpoints and not imported:
        networks[config.teacher] = check_checkpoints(session)
    if earlier:
        if session.bank:
            loader = session.loader("train", config.student, train=True)
            needs_features = next((method.name for method in methods if method.needs_features), None)
            check_bank(session, loader, earlier / "teacher", needs_features)
        check_data(session, earlier)
        check_code(earlier / "teacher", read_teacher(earlier / "teacher"))
        networks[config.teacher] = SnapshotEnsemble.load(earlier / "teacher", features=False).models[-1]
    finished = bool(earlier or (config.checkpoints and not imported))
    session.notes += preflight(session, methods, networks[config.teacher], trained[config.teacher], finished)
    session.notes += _slow(session, [phase for phase, is_trained in trained.items() if is_trained])
    return session


def _slow(session: Session, phases: list[Phase]) -> list[str]:
    """What makes the training of these phases slower than it needs to be, a sentence each."""
    reasons, size = [], session.data.image_size
    small = dict.fromkeys(phase.model for phase in phases if phase.model in models.names())
    if size > SMALL and small:
        reasons.append(
            f"{' and '.join(small)} {'is' if len(small) == 1 else 'are'} made for images of 32 x 32; one of {size} x "
            f"{size} takes about {size**2 / 32**2:.0f} times as long: --image-size sets another size, and timm:NAME "
            "names networks for photographs."
        )
    if not session.config.workers and any(session.loader("train", x, train=True).encoded is not None for x in phases):
        reasons.append(
            "The training process decodes the files for every view; --workers N leaves this to N processes beside it."
        )
    return reasons


def check_data(session: Session, run: Path) -> None:
    """ValueError unless the session has the images that `run` was trained on."""
    images = read_record(run / "environment.json", "data")["data"]
    if not isinstance(images, dict) or images.get("fingerprint") != session.data.fingerprint:
        differ = changes(run, images if isinstance(images, dict) else {}, session.data)
        raise ValueError(
            f"{run} was trained on other images than {session.config.data} gives now ({differ}): put the data back as "
            "they were, where an image that cannot be read may stay with --bad-images skip; or train again, by "
            f"--config {run / 'config.json'}"
        )


def table(teacher: Path, students: list[Path]) -> list[dict]:
    """The rows of summary.json, from what the phases left in their folders."""
    manifest, measured = read_manifest(teacher), read_teacher(teacher)
    epochs = [entry["step"] for entry in manifest["snapshots"]]
    *snapshots, ensemble = [
        {"val_accuracy": val["accuracy"], "test_accuracy": test["accuracy"]}
        for val, test in zip(measured["val"]["members"], measured["test"]["members"], strict=True)
    ]
    seconds = [row["seconds"] for row in read_metrics(teacher, measured)]  # none of somebody else's teacher
    size = parameters(manifest["spec"])
    network = {"model": manifest["spec"]["name"], "parameters": size, "epochs": epochs[-1]}
    timed = {"seconds_per_epoch": sum(seconds) / len(seconds) if seconds else None}
    rows = [_row("teacher", "teacher", network, snapshots[-1], timed)]
    for number, (epoch, scores) in enumerate(zip(epochs, snapshots, strict=True), 1):
        rows.append(_row("snapshot", f"snapshot {number}", network, scores, {"epochs": epoch}))
    rows.append(_row("ensemble", "ensemble", network, ensemble, {"parameters": size * len(snapshots)}))
    records = [read_student(folder) for folder in students]
    alone = next((record["test"]["accuracy"] for record in records if record["weighting"] == "ce"), None)
    for folder, record in zip(students, records, strict=True):
        spec, accuracy = record["spec"], record["test"]["accuracy"]
        network = {"model": spec["name"], "parameters": parameters(spec), "epochs": len(read_metrics(folder, record))}
        scores = {"val_accuracy": record["val"]["accuracy"], "test_accuracy": accuracy}
        gain = {"gain": None if alone is None else accuracy - alone, "seconds_per_epoch": record["seconds_per_epoch"]}
        rows.append(_row("student", record["weighting"], network, scores, gain))
    return rows


def _row(kind: str, name: str, network: dict, scores: dict, more: dict) -> dict:
    return {"kind": kind, "name": name, "gain": None, "seconds_per_epoch": None, **network, **scores, **more}


def parameters(spec: dict) -> int:
    """How many numbers a network of this architecture learns."""
    return sum(p.numel() for p in models.build(**spec).parameters())
