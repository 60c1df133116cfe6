"""Today's recipe: mixed and smoothed labels train, resume, replay, and come from a bank, as plain ones do."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from killed import EVERY_STEP, NETS, Killed, check_same, go_on, killer
from test_distributed import SMALL, assert_close, launch

import eekd
from eekd import models
from eekd.bank import LogitBank
from eekd.bank import __main__ as bank
from eekd.io.files import read_json
from eekd.io.tensors import load_tensors
from eekd.snapshots import SnapshotEnsemble
from eekd.train import StudentTrainer, TeacherTrainer, prepare, train
from eekd.train import __main__ as cli
from eekd.train.average import WeightAverage
from eekd.train.config import Config, Student, Teacher
from eekd.train.metrics import accuracy, evaluate
from eekd.train.optim import build_optimizer
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


def config_of(nets, phase=MIXED, **more) -> Config:
    common = dict(epochs=2, batch_size=60, milestones=()) | phase
    settings = dict(students=("ce", "attention"), train_limit=200, device="cpu", precision="fp32", channels_last=False)
    return Config(
        teacher=Teacher(model=f"{nets}:net", snapshots=2, **common),
        student=Student(model=f"{nets}:small", optimizer="adamw", lr=1e-3, **common),
        **settings | more,
    )


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
    batch = next(trainer.batches_from(0))
    ensemble = SnapshotEnsemble.load(out / "teacher", which=[-1], features=False)
    torch.testing.assert_close(batch.teacher.logits, ensemble(batch.images)[0], rtol=1e-4, atol=1e-4)
    logits = trainer.model(batch.images)
    tau, alpha = session.config.student.temperature, session.config.student.alpha
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
    assert "was made with auto_augment 'trivial', got None" in capsys.readouterr().err
    given = [x.replace("--", "--student.") for x in FLAGS]
    assert cli.main([*student, str(tmp_path / "two"), *given]) == 0
    assert cli.main([*student, str(tmp_path / "three"), *given, "--student.mixup", "0.5"]) == 2
    assert "was made with mixup 0.8, got 0.5" in capsys.readouterr().err
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


# ---- averages of the weights ----


def test_an_average_forgets_its_start_and_follows_the_weights():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2))
    average, trainer = WeightAverage(network, 0.9), SimpleNamespace(network=network, step=0, skipped=0)
    assert not any(p.requires_grad for p in average.network.parameters()) and not average.network.training
    want = network[0].weight.detach().clone()
    with average.running(trainer):
        for step in range(1, 200):
            trainer.step = step
            with torch.no_grad():
                network[0].weight.fill_(float(step))
            network[1].num_batches_tracked.fill_(step)
            average.on_step_end(trainer)
            decay = min(0.9, (1 + step) / (10 + step))
            want = decay * want + (1 - decay) * step
            torch.testing.assert_close(average.network[0].weight, want)
            assert average.network[1].num_batches_tracked == step
        trainer.step, trainer.skipped = 200, 1  # a step that was left out
        average.on_step_end(trainer)
        torch.testing.assert_close(average.network[0].weight, want)


@pytest.fixture(scope="module")
def averaged(nets, tmp_path_factory):
    session = prepare(config_of(nets, {"ema": 0.9}))
    return session, train(session.config, tmp_path_factory.mktemp("averaged") / "whole", session=session)


def test_what_is_validated_and_kept_is_the_average(averaged, nets, tmp_path):
    session, out = averaged
    plain = train(config_of(nets, {}), tmp_path / "plain")
    for name in ("teacher", "students/ce"):  # the average changes nothing in how a network trains
        assert [r["train_loss"] for r in rows(out / name)] == [r["train_loss"] for r in rows(plain / name)]
    for folder in ("teacher", "students/ce", "students/attention"):
        ours, theirs = (rows(run / folder)[-1]["val_loss"] for run in (out, plain))
        assert ours != theirs
    one, two = (load_tensors(run / "students/ce/student.safetensors") for run in (out, plain))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    network = session.build(session.spec(session.config.student))
    network.load_state_dict(one)
    found = evaluate(session, network, session.loader("val", session.config.student))
    assert found["loss"] == pytest.approx(rows(out / "students/ce")[-1]["val_loss"], rel=1e-6)
    record = read_json(out / "students/ce/student.json")
    assert record["ema"] == 0.9 and read_json(plain / "students/ce/student.json")["ema"] is None
    ensemble = SnapshotEnsemble.load(out / "teacher", features=False)
    assert ensemble.models[-1].state_dict().keys() == load_tensors(out / "teacher/snapshot-2.safetensors").keys()
    found = evaluate(session, ensemble.models[-1], session.loader("val", session.config.teacher))
    assert found["loss"] == pytest.approx(rows(out / "teacher")[-1]["val_loss"], rel=1e-6)


def test_an_average_goes_on_to_the_same_bits(averaged, tmp_path):
    session, undisturbed = averaged
    session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)
    progress = killer(*range(1, 1000))
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=progress)
    go_on(tmp_path / "run", session, progress)
    check_same(undisturbed, tmp_path / "run")


def test_what_is_kept_is_said(nets, capsys):
    flags = f"--dry-run --teacher.model {nets}:net --student.model {nets}:small --student.ema 0.99 --train-limit 200"
    assert cli.main(flags.split()) == 0
    said = "What is validated, kept and exported of students is the average of their weights (ema 0.99)."
    assert said in " ".join(capsys.readouterr().out.split())


# ---- what the model itself can do ----


def vit(**more):
    pytest.importorskip("timm")
    small = "img_size=28", "patch_size=14", "embed_dim=24", "depth=4", "num_heads=2"
    args = tuple(word for word in small if not word.startswith("img")) + more.pop("model_args", ())
    return Student(model="timm:vit_tiny_patch16_224", model_args=args, optimizer="adamw", lr=1e-3, **more)


def session_of(student: Student) -> Session:
    return Session(Config(data="digits", image_size=28, device="cpu", precision="fp32", student=student))


def test_layers_learn_the_slower_the_further_in_front():
    session = session_of(vit(layer_decay=0.5, weight_decay=0.05, epochs=1))
    network = session.network(session.config.student, 0)
    optimizer = build_optimizer(session.config.student, network)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = dict(network.named_parameters())
    assert len(found) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    order = "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "blocks.3.mlp.fc1.weight"
    scales = [found[id(named[name])]["lr_scale"] for name in order]
    assert scales == sorted(set(scales)) and found[id(named["head.weight"])].get("lr_scale", 1) == 1
    for name, decay in {"head.weight": 0.05, "head.bias": 0, "pos_embed": 0, "cls_token": 0, "norm.weight": 0}.items():
        assert found[id(named[name])]["weight_decay"] == decay, name
    from timm.optim import param_groups_layer_decay

    theirs = param_groups_layer_decay(network, 0.05, network.no_weight_decay(), layer_decay=0.5)
    for group in theirs:
        for parameter in group["params"]:
            ours = found[id(parameter)]
            assert (ours.get("lr_scale", 1), ours["weight_decay"]) == (group["lr_scale"], group["weight_decay"])


def test_a_layers_rate_is_used(tmp_path):
    session = session_of(vit(layer_decay=0.5, epochs=1))
    trainer = StudentTrainer(session, None, "ce")
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.train_step([next(trainer.batches_from(0))])
    moved = {name: (p - before[name]).abs().max().item() for name, p in trainer.network.named_parameters()}
    scales = {id(p): group.get("lr_scale", 1) for group in trainer.optimizer.param_groups for p in group["params"]}
    scale = scales[id(trainer.network.patch_embed.proj.weight)]
    assert moved["patch_embed.proj.weight"] == pytest.approx(scale * moved["head.weight"], rel=0.05) and scale < 0.1


def test_checkpointed_gradients_are_the_gradients(tmp_path):
    grads = []
    for on in (False, True):
        session = session_of(vit(grad_checkpointing=on, epochs=1, model_args=("drop_path_rate=0.5",)))
        trainer = StudentTrainer(session, None, "ce")
        assert getattr(trainer.network, "grad_checkpointing", False) == on
        loss, _ = trainer.compute_loss(next(trainer.batches_from(0)))
        loss.backward()
        grads.append([p.grad for p in trainer.network.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_a_models_own_arguments_are_kept_with_it(tmp_path):
    student = vit(model_args=("drop_path_rate=0.3", "class_token=false", "global_pool=avg"), epochs=1)
    config = Config(data="digits", image_size=28, device="cpu", precision="fp32", train_limit=100, students=("ce",),
                    teacher=Teacher(epochs=1, snapshots=1), student=student)  # fmt: skip
    out = train(config, tmp_path / "run")
    spec = read_json(out / "students/ce/student.json")["spec"]
    assert spec["args"] == {"patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 2, "drop_path_rate": 0.3,
                            "class_token": False, "global_pool": "avg"}  # fmt: skip
    assert models.build(**spec).cls_token is None
    loaded = eekd.load_student(out)
    assert loaded.network.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert loaded(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    loaded.save(tmp_path / "exported")
    again = eekd.load_student(tmp_path / "exported")
    assert torch.equal(again(torch.ones(1, 1, 28, 28)), loaded(torch.ones(1, 1, 28, 28)))


@bad_input
@pytest.mark.parametrize("args, said", [
    ({"drop_path": 1}, "args must be arguments of timm's 'vit_tiny_patch16_224'"),
    ({"pretrained": True}, "args must be those of the model 'vit_tiny_patch16_224' itself, got pretrained"),
    ({"checkpoint_path": "x.pt"}, "got checkpoint_path"),
    ({"pretrained_strict": False}, "got pretrained_strict"),
    ({"num_classes": 3}, "args must leave num_classes to the data"),
    ({"drop_rate": {"a": 1}}, "args must be numbers, truths, texts or lists"),
    ([1], "args must be numbers, truths, texts or lists"),
])  # fmt: skip
def test_arguments_that_the_model_lacks_or_that_load_something(args, said):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=re.escape(said)):
        models.build("timm:vit_tiny_patch16_224", num_classes=2, image_size=224, args=args)


@bad_input
def test_arguments_of_eekds_own_models_and_of_factories(nets):
    with pytest.raises(ValueError, match="args must be arguments of 'resnet20', got width_of_all"):
        models.build("resnet20", num_classes=2, args={"width_of_all": 3})
    assert models.build(f"{nets}:net", num_classes=2, in_channels=1, args={"width": 7})[0].out_channels == 7
    with pytest.raises(TypeError, match="with the keywords num_classes, in_channels, image_size, deep"):
        models.build(f"{nets}:net", num_classes=2, in_channels=1, args={"deep": 7})


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
