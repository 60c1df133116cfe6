"""Today's recipe: mixed and smoothed labels train, resume, replay, and come from a bank, as plain ones do."""

import dataclasses
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from killed import EVERY_STEP, NETS, Killed, check_same, go_on, killer
from processes import SMALL, assert_close, launch
from recipes import config_of

from eekd.bank import LogitBank
from eekd.bank import __main__ as bank
from eekd.io.files import read_json
from eekd.method import losses
from eekd.ops.backend import backend_for
from eekd.snapshots import SnapshotEnsemble
from eekd.train import StudentTrainer, TeacherTrainer, prepare, train, train_student
from eekd.train import __main__ as cli
from eekd.train.metrics import accuracy
from eekd.train.replay import replay
from eekd.train.session import Session

bad_input = pytest.mark.bad_input
MIXED = dict(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
SHOWN = dict(auto_augment="trivial", erasing=0.25)
FLAGS = ["--mixup", "0.8", "--cutmix", "1", "--auto-augment", "trivial", "--erasing", "0.25"]


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module")
def run(nets, tmp_path_factory):
    """A session and its run, which tests only read."""
    pytest.importorskip("PIL")
    session = prepare(config_of(nets, MIXED | SHOWN, students=("ce", "last", "confidence", "attention")))
    return session, train(session.config, tmp_path_factory.mktemp("run") / "whole", session=session)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_accuracy_is_counted_at_the_larger_share():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    mixed = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.3, 0.6]])
    assert accuracy(logits, mixed) == accuracy(logits, torch.tensor([0, 2])) == 0.5


def test_teacher_and_students_learn_from_soft_labels(run):
    session, out = run
    trainer = TeacherTrainer(session)
    batch = next(trainer.batches_from(0))
    assert batch.labels.shape == (60, 10) and batch.labels.dtype == torch.float32
    torch.testing.assert_close(batch.labels.sum(1), torch.ones(60))
    loss, measured = trainer.compute_loss(batch)
    assert loss > 0 and measured["loss"] is loss
    smallest = -(0.9 + 0.01) * torch.tensor(0.91).log()  # of labels smoothed by 0.1, the entropy at least
    for name in ("teacher", "students/ce", "students/attention"):
        assert all(row["train_loss"] > smallest for row in rows(out / name))


@pytest.mark.parametrize("augment", ["auto", "none"])
def test_the_student_is_taught_what_the_teacher_says_of_the_mixed_image(run, augment):
    session, out = run
    session = Session(dataclasses.replace(session.config, augment=augment))
    trainer = StudentTrainer(session, out / "teacher", "last")
    batch = next(trainer.batches_from(trainer.steps_per_epoch))
    ensemble = SnapshotEnsemble.load(out / "teacher", which=[-1], features=False)
    torch.testing.assert_close(batch.teacher.logits, ensemble(batch.images)[0], rtol=1e-4, atol=1e-4)
    logits = trainer.model(batch.images)
    tau, alpha = 5.0, session.config.student.alpha
    kl = F.kl_div((logits / tau).log_softmax(1), (batch.teacher.logits[0] / tau).softmax(1), reduction="batchmean")
    loss, _ = trainer.criterion(logits, batch.teacher.logits, batch.labels)
    torch.testing.assert_close(loss, alpha * F.cross_entropy(logits, batch.labels) + (1 - alpha) * tau**2 * kl)


def test_a_mixed_run_goes_on_to_the_same_bits(run, tmp_path):
    session, undisturbed = run
    session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)
    progress = killer(*range(1, 1000, 2))
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=progress)
    assert go_on(tmp_path / "run", session, progress) > 5
    check_same(undisturbed, tmp_path / "run")


def test_repeated_views_go_on_to_the_same_bits_and_are_in_no_bank(nets, tmp_path, capsys):
    session = prepare(config_of(nets, dict(repeats=3, mixup=0.8), augment="crop", save_every=EVERY_STEP))
    whole = train(session.config, tmp_path / "whole", session=session)
    progress = killer(*range(1, 1000, 2))
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=progress)
    assert go_on(tmp_path / "run", session, progress) > 5
    check_same(whole, tmp_path / "run")
    assert rows(whole / "teacher")[-1]["step"] == 2 * len(session.loader("train", session.config.teacher, train=True))
    assert bank.main(["--teacher", str(whole), "--views", "2", "--mixup", "0.8"]) == 0
    torch.use_deterministic_algorithms(False)
    once = dataclasses.replace(session.config.student, repeats=1)
    config = dataclasses.replace(session.config, bank=str(whole / "bank"), teacher_run=str(whole), student=once)
    trainer, ensemble = (
        StudentTrainer(prepare(config), whole / "teacher", "uniform"),
        SnapshotEnsemble.load(whole / "teacher"),
    )
    for epoch in (0, 1):
        batch = next(iter(trainer.batches_from(epoch * trainer.steps_per_epoch)))
        torch.testing.assert_close(batch.teacher.logits.float(), ensemble(batch.images)[0], rtol=2e-3, atol=2e-3)
    student = ["student", "--bank", str(whole / "bank"), "--students", "last", "--student.mixup", "0.8", "--out"]
    assert cli.main([*student, str(tmp_path / "one"), "--student.repeats", "3", "--student.batch-size", "60"]) == 2
    assert "student.repeats must be 1 with a bank, got 3" in capsys.readouterr().err
    assert cli.main([*student, str(tmp_path / "two"), "--student.repeats", "1"]) == 0


def test_a_bank_of_mixed_views_is_exact(run, tmp_path, capsys):
    session, out = run
    assert bank.main(["--teacher", str(out), "--views", "2", "--out", str(tmp_path / "bank"), "--features", "all"]) == 0
    torch.use_deterministic_algorithms(False)
    stored = LogitBank.open(tmp_path / "bank")
    assert {name: stored.manifest["images"][name] for name in ("mixup", "cutmix", *SHOWN)} == {
        "mixup": 0.8, "cutmix": 1.0, **SHOWN,
    }  # fmt: skip
    config = dataclasses.replace(session.config, bank=str(tmp_path / "bank"), teacher_run=str(out), seed=5)
    other = prepare(config)
    trainer = StudentTrainer(other, out / "teacher", "attention")
    ensemble = SnapshotEnsemble.load(out / "teacher")
    for epoch in (0, 1, 3):
        for batch in trainer.batches_from(epoch * trainer.steps_per_epoch):
            logits, features = ensemble(batch.images)
            torch.testing.assert_close(batch.teacher.logits.float(), logits, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(batch.teacher.features.float(), features, rtol=2e-3, atol=2e-3)
    taught = train(dataclasses.replace(config, students=("attention",)), tmp_path / "taught", session=other)
    assert len(rows(taught / "students/attention")) == 2


def test_a_bank_of_other_views_than_the_runs(run, nets, tmp_path, capsys):
    """The writer is told what students will see, and students that would see something else are refused."""
    plain = train(config_of(nets, {}, students=()), tmp_path / "plain")
    assert bank.main(["--teacher", str(plain), "--views", "1", *FLAGS]) == 0
    torch.use_deterministic_algorithms(False)
    capsys.readouterr()
    student = ["student", "--bank", str(plain / "bank"), "--students", "last", "--out"]
    assert cli.main([*student, str(tmp_path / "one")]) == 2
    assert "auto_augment must be 'trivial', with which " in capsys.readouterr().err
    given = [x.replace("--", "--student.") for x in FLAGS]
    assert cli.main([*student, str(tmp_path / "two"), *given]) == 0
    assert cli.main([*student, str(tmp_path / "three"), *given, "--student.mixup", "0.5"]) == 2
    assert "mixup must be 0.8, with which " in capsys.readouterr().err
    assert bank.main(["--teacher", str(plain), "--out", str(tmp_path / "top"), "--top-k", "3", "--mixup", "1"]) == 2
    said = "top-k must be 0 where images are mixed, whose labels are two classes, got 3 with mixup 1.0 and cutmix 0.0"
    assert said in capsys.readouterr().err


def test_labels_smoothed_with_a_top_k_bank_are_refused(nets, tmp_path, capsys):
    plain = train(config_of(nets, {}, students=()), tmp_path / "plain")
    assert bank.main(["--teacher", str(plain), "--views", "1", "--top-k", "3"]) == 0
    torch.use_deterministic_algorithms(False)
    student = ["student", "--bank", str(plain / "bank"), "--students", "last", "--out", str(tmp_path / "one")]
    assert cli.main([*student, "--student.label-smoothing", "0.1"]) == 2
    assert "student.label_smoothing must be 0 with" in capsys.readouterr().err


@pytest.mark.parametrize("accumulate", [2, 3])
def test_parts_of_a_mixed_batch_are_the_batch(nets, tmp_path, accumulate):
    """But for batch norm, which sees the parts: so a teacher is asked, whose loss here has none."""
    losses = []
    for parts in (1, accumulate):
        session = Session(config_of(nets, MIXED, accumulate=parts, augment="none"))
        trainer = TeacherTrainer(session)
        trainer.network.eval()
        batches = [next(batches) for batches in [trainer.batches_from(1)] for _ in range(parts)]
        assert sum(len(batch.labels) for batch in batches) == 60
        index = torch.cat([batch.index for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])[index.argsort()]
        images = torch.cat([batch.images for batch in batches])[index.argsort()]
        losses.append((index.sort().values, labels, images))
    assert all(map(torch.equal, *losses))


def test_a_bad_step_of_mixed_images_can_be_replayed(nets, tmp_path):
    config = config_of(nets, MIXED, students=("attention",))
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, lr=1e30))
    with pytest.raises(FloatingPointError, match="teacher: "):
        train(config, tmp_path / "run")
    [path] = (tmp_path / "run").glob("**/non-finite-*.json")
    assert str(replay(path)) == read_json(path)["found"] or read_json(path)["found"] is None


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
def test_processes_share_a_mixed_and_averaged_run(tmp_path, parallel):
    phase = "--student.mixup 0.8 --student.cutmix 1 --student.label-smoothing 0.1 --student.ema 0.9 --teacher.ema 0.8"
    command = ["-m", "eekd.train", *SMALL, *phase.split(), "--sync-batchnorm", "--students", "attention", "--out"]
    launch(1, *command, tmp_path / "one")
    launch(2, *command, tmp_path / "two", "--parallel", parallel)
    assert_close(tmp_path / "one", tmp_path / "two", 1e-3)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.full)])
def test_mixed_labels_in_half_precision(nets, tmp_path, precision):
    config = config_of(nets, MIXED, precision=precision, students=("confidence", "attention"), train_limit=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it is emulated
        out = train(config, tmp_path / "run")
    assert all(0 < row["train_loss"] < 100 for name in config.students for row in rows(out / "students" / name))


def test_a_wrong_loss_of_mixed_labels_can_be_replayed(run, tmp_path, monkeypatch):
    session, out = run

    def wrong(*args, **options):
        result = reference(*args, **options)
        return result if backend_for(args[0].device) == "reference" else result._replace(loss=1.01 * result.loss)

    reference = losses.ensemble_kd
    monkeypatch.setattr(losses, "ensemble_kd", wrong)
    with pytest.raises(FloatingPointError, match="by its formula in fp64"):
        train_student(session.config, out / "teacher", "attention", tmp_path / "phase", session=session)
    path = tmp_path / "phase/loss-differs.json"
    assert replay(path) == read_json(path)["found"]
    monkeypatch.undo()
    assert replay(path) is None


@bad_input
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--student.mixup -1", "student.mixup must be from 0 to 100, got -1.0"),
        ("--teacher.cutmix 1000", "teacher.cutmix must be from 0 to 100, got 1000.0"),
        ("--student.label-smoothing 1", "student.label_smoothing must be from 0 to below 1, got 1.0"),
        ("--student.erasing 2", "student.erasing must be from 0 to 1, got 2.0"),
        ("--student.auto-augment trivia", "did you mean 'trivial'?"),
        ("--student.ema 1", "student.ema must be from 0 to below 1, got 1.0"),
        ("--student.layer-decay 0", "student.layer_decay must be above 0 and at most 1, got 0.0"),
        ("--student.layer-decay 0.9", "student.layer_decay must be 1 for resnet8_w4, which names no layers"),
        ("--student.grad-checkpointing", "student.grad_checkpointing must be false for resnet8_w4, which cannot"),
        ("--student.model-args depth", "student.model_args must be words of the form name=value"),
        ("--student.model-args a=1 a=2", "words of the form name=value with different names"),
        ("--student.model-args depht=1", "args must be arguments of 'resnet8_w4', got depht"),
    ],
)
def test_recipes_that_cannot_be_are_refused(capsys, flags, said):
    try:
        code = cli.main(flags.split())
    except SystemExit as exit:  # tyro's, which breaks lines
        code = exit.code
    assert code == 2 and said in " ".join(capsys.readouterr().err.split())
