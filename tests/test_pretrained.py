"""Networks that start from weights of others, and networks with a normalisation of their own."""

import copy
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from recipes import small_run
from torch import nn

from eekd import LastFeatures, SnapshotEnsemble, load_student, models
from eekd.bank import __main__ as bank
from eekd.data import load
from eekd.export.evaluation import batches, evaluate, teacher_of
from eekd.io.files import read_json, write_json_atomic
from eekd.io.tensors import load_tensors, save_tensors
from eekd.models.normalization import Renormalize
from eekd.train import Session, prepare, pretrained, resume, train
from eekd.train import __main__ as cli
from eekd.train.config import Config
from eekd.train.pretrained import Start

SIZES = {"num_classes": 10, "in_channels": 1, "image_size": 8}
GIVEN, OWN = {"mean": [0.3], "std": [0.4]}, {"mean": [0.5], "std": [0.25]}


def net(name="resnet8_w4", seed=0, **other) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(name, **SIZES | other)


def config(**other) -> Config:
    base = small_run({}, {}, dict(model="resnet8_w4", batch_size=50), train_limit=150, students=("ce", "attention"))
    for name, values in other.items():
        value = dataclasses.replace(getattr(base, name), **values) if isinstance(values, dict) else values
        base = dataclasses.replace(base, **{name: value})
    return base


@pytest.fixture
def weights(tmp_path):
    """A file of weights for 7 classes."""
    path = tmp_path / "weights.safetensors"
    save_tensors(path, net(seed=5, num_classes=7).state_dict())
    return str(path)


# Weights


def body(state: dict) -> dict:
    return {name: x for name, x in state.items() if not name.startswith("classifier.")}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_classifier_of_another_number_of_classes_is_made_anew(wrapped):
    source, network = net(seed=5, num_classes=7), net(seed=1)
    fresh = copy.deepcopy(network.classifier)
    state = {f"module.{name}" if wrapped else name: x for name, x in source.state_dict().items()}
    said = Start("FILE", "", state).load(network, 10)
    assert said == "starts from FILE, classifier made anew for 10 classes (there was one of 7)."
    torch.testing.assert_close(body(network.state_dict()), body(source.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(network.classifier.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_a_classifier_of_as_many_classes_is_kept():
    source, network = net(seed=5), net(seed=1)
    said = Start("FILE", "", source.state_dict()).load(network, 10)
    assert said == "starts from FILE, with its classifier for 10 classes."
    torch.testing.assert_close(network.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_weights_without_a_classifier_are_a_start():
    source, network = net(seed=5), net(seed=1)
    said = Start("FILE", "", body(source.state_dict())).load(network, 10)
    assert said == "starts from FILE, classifier made anew for 10 classes (there was none)."
    torch.testing.assert_close(body(network.state_dict()), body(source.state_dict()), rtol=0, atol=0)


class TwoHeads(nn.Module):
    """As a distilled DeiT: two classifiers, and a layer whose width is the number of classes by accident."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.head, self.head_dist = nn.Linear(4, 3), nn.Linear(3, classes), nn.Linear(3, classes)


def test_all_classifiers_are_made_anew_and_nothing_else():
    said = Start("FILE", "", TwoHeads(7).state_dict()).load(network := TwoHeads(3), 3)
    assert "head made anew" in said and "head_dist made anew" in said and "body" not in said
    state = TwoHeads(3).state_dict()
    del state["body.weight"], state["body.bias"]
    with pytest.raises(ValueError, match="^FILE does not fit this TwoHeads: missing: body.weight, body.bias$"):
        Start("FILE", "", state).load(network, 3)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("other", "told"),
    [
        (dict(in_channels=3), r"of another shape: trunk.0.0.weight \(4, 3, 3, 3\) for \(4, 1, 3, 3\)$"),
        (dict(name="mlp64"), "missing: .*; unexpected: "),
    ],
)
def test_weights_of_another_network_are_refused(other, told):
    with pytest.raises(ValueError, match="^FILE does not fit this Classifier: " + told):
        Start("FILE", "", net(seed=5, **other).state_dict()).load(net(), 10)


def test_random_numbers_are_those_of_a_network_without_weights(weights):
    drawn = []
    for phase in ({}, {"weights": weights}, {"weights": weights}):
        session = Session(config(student=phase))
        network = session.network(session.config.student, 3)
        drawn.append((torch.rand(3), network.classifier.weight))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    torch.testing.assert_close(drawn[1], drawn[2], rtol=0, atol=0)


def test_both_networks_start_from_weights_and_go_on_to_the_same_bits(weights, tmp_path, monkeypatch):
    asked = config(
        teacher={"weights": weights, "lr": 1e-6}, student={"weights": weights, "lr": 1e-6}, deterministic=True
    )
    whole = train(asked, tmp_path / "whole")
    for path in ("teacher/snapshot-1.safetensors", "students/ce/student.safetensors"):
        trained = {n: x for n, x in body(load_tensors(whole / path)).items() if "running" not in n and "num" not in n}
        start = body(net(seed=5, num_classes=7).state_dict())
        torch.testing.assert_close(trained, {name: start[name] for name in trained}, rtol=0, atol=1e-4)

    def stop(phase, done, total, known):
        if phase == "ce" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(asked, tmp_path / "run", progress=stop)
    moved = Path(weights).with_name("elsewhere.safetensors")
    shutil.copy(weights, moved)
    resume(tmp_path / "run")
    for path in sorted(whole.rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(whole)).read_bytes()
    torch.use_deterministic_algorithms(False)


@pytest.mark.bad_input
def test_other_weights_under_resume_are_noticed(weights, tmp_path):
    out = train(config(teacher={"weights": weights}, students=("ce",)), tmp_path / "run")
    (out / "summary.json").unlink()
    save_tensors(weights, net(seed=6, num_classes=7).state_dict())
    with pytest.raises(ValueError, match="settings.weights must be '[0-9a-f]{64}', .*snapshots.json was written"):
        resume(out)
    Path(weights).unlink()
    with pytest.raises(FileNotFoundError, match="weights.safetensors is missing"):
        resume(out)


def test_a_finished_teacher_needs_its_weights_no_more(weights, tmp_path):
    teacher = train(config(teacher={"weights": weights}, students=()), tmp_path / "teacher")
    Path(weights).unlink()
    out = ["--students", "last", "--student.epochs", "1", "--out", str(tmp_path / "run")]
    assert cli.main(["student", "--teacher", str(teacher), *out]) == 0


def test_the_dry_run_says_where_networks_start(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--train-limit", "150", "--device", "cpu", "--teacher.model", "resnet8_w4"]
    assert cli.main([*small, "--teacher.weights", "weights.safetensors", "--dry-run"]) == 0
    told = f"- The teacher starts from {weights}, classifier made anew for 10 classes (there was one of 7)."
    assert "".join(told.split()) in "".join(capsys.readouterr().out.split())  # however the lines are broken
    assert not (tmp_path / "runs").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--student.weights", "no.pt"], "no.pt is missing or not a file"),
        (["--student.weights", "timm"], "student.weights must be a file or a folder where model is no timm:NAME"),
        (["--student.weights", "many"], "student.weights must be one checkpoint, got 2 in "),
        (["--student.weights", "mlp.safetensors"], "mlp.safetensors does not fit this Classifier"),
        (["--teacher.mean", "124", "--teacher.std", "58"], "teacher.mean must be numbers from 0 to 1, as images"),
        (["--teacher.mean", "0.5"], "teacher.std must be 1 numbers, as many as mean, got None"),
        (["--teacher.mean", "timm", "--teacher.std", "timm"], "teacher.mean must be numbers or data where model is no"),
        (
            ["--teacher.mean", "0.5", "0.5", "0.5", "--teacher.std", "0.2", "0.2", "0.2"],
            "--channels 3, or teacher.mean",
        ),
        (["--teacher.mean", "tim", "--teacher.std", "tim"], "teacher.mean must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_start_that_cannot_be_is_one_sentence(flags, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tensors("mlp.safetensors", net("mlp64").state_dict())
    for number in (1, 2):
        save_tensors(f"many/epoch-{number}.safetensors", net().state_dict())
    try:
        assert cli.main(["--train-limit", "150", "--device", "cpu", *flags, "--out", "run"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
    except SystemExit:  # said in a frame
        error = " ".join(word for word in capsys.readouterr().err.split() if word not in "│╭╮╰╯")
    assert told in error
    assert not Path("run").exists()


def test_checkpoints_stand_beside_no_weights(weights):
    with pytest.raises(ValueError, match="^checkpoints must be left out beside teacher.weights"):
        config(checkpoints=(weights,), teacher={"weights": weights})


# timm's own weights


@pytest.fixture
def timm_model(tmp_path, monkeypatch):
    """A small model of timm's, whose pretrained weights, for 7 classes, lie in a file."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'eekd[timm]'")
    torch.manual_seed(5)
    source = timm.create_model("test_resnet", num_classes=7)
    save_tensors(tmp_path / "timm.safetensors", source.state_dict())
    cfg = timm.get_pretrained_cfg("test_resnet")
    cfg = dataclasses.replace(
        cfg, file=str(tmp_path / "timm.safetensors"), num_classes=7, hf_hub_id=None, interpolation="bicubic"
    )
    create = timm.create_model
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name, **_: cfg)
    monkeypatch.setattr(timm, "create_model", lambda *args, **named: create(*args, pretrained_cfg=cfg, **named))
    return source, cfg


def test_timms_own_weights_come_with_their_normalisation(timm_model, tmp_path, capsys):
    source, cfg = timm_model
    flags = ["--teacher.model", "timm:test_resnet", "--teacher.weights", "timm", "--students", "last"]
    short = ["--teacher.epochs", "1", "--teacher.snapshots", "1", "--student.epochs", "1", "--teacher.lr", "1e-6"]
    out = tmp_path / "run"
    data = tmp_path / "colours"
    _write_colours(data)
    assert (
        cli.main(["--data", str(data), "--device", "cpu", "--precision", "fp32", *flags, *short, "--out", str(out)])
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "The teacher starts from timm's weights of test_resnet, fc made anew for 2 classes (there was none)." in printed
    )
    mean, std = (", ".join(f"{x:.3g}" for x in numbers) for numbers in (cfg.mean, cfg.std))
    assert "Images are resized by bicubic, as the weights were trained (interpolation)." in printed
    assert json.loads((out / "config.json").read_text())["interpolation"] == "bicubic"
    assert f"The teacher sees images normalised by mean {mean} and std {std} (timm's of test_resnet)." in printed
    manifest = json.loads((out / "teacher/manifest.json").read_text())
    assert manifest["spec"]["normalization"]["own"] == {"mean": list(cfg.mean), "std": list(cfg.std)}
    trained = load_tensors(out / "teacher/snapshot-1.safetensors")
    torch.testing.assert_close(trained["conv1.0.weight"], source.state_dict()["conv1.0.weight"], rtol=0, atol=1e-3)


def _write_colours(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for c, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        for n in range(60):
            path = folder / c / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.new("RGB", (32, 32), tuple(x + n for x in colour)).save(path)


@pytest.mark.bad_input
def test_weights_of_timm_that_cannot_be_had_are_one_sentence(timm_model, monkeypatch):
    import timm

    session = Session(config(student={"model": "timm:test_resnet", "weights": "timm", "mean": "data", "std": "data"}))

    def unreachable(*args, **named):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        ValueError, match="^student.weights timm needs the weights of test_resnet .*: no route to host; "
    ):
        session.start(session.config.student)


@pytest.mark.parametrize(
    ("error", "offline"), [("ConnectError", True), ("ConnectTimeout", False), ("ReadTimeout", False), (None, False)]
)
def test_a_hub_that_nothing_connects_to_is_not_waited_for(error, offline, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    class Answer:
        asked = 0

        def head(self, url, timeout):
            Answer.asked += 1
            if error:
                raise type(error, (Exception,), {})("no")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Answer)
    monkeypatch.setattr(pretrained.time, "sleep", lambda seconds: None)
    was = hub.constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), pretrained._without_retries():
        assert hub.constants.HF_HUB_OFFLINE is (offline or was)
        raise KeyError
    assert hub.constants.HF_HUB_OFFLINE is was and Answer.asked == (3 if offline else 1)


# Interpolation


def test_images_are_resized_by_the_interpolation_that_was_asked_for(tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for c in "ab":
        for n in range(30):
            pixels = torch.randint(256, (20, 20), dtype=torch.uint8, generator=generator).numpy()
            (tmp_path / "data" / c).mkdir(parents=True, exist_ok=True)
            image.fromarray(pixels).save(tmp_path / "data" / c / f"{n}.png")
    found = {}
    for kind, number in (("bilinear", 2), ("bicubic", 3)):
        small = config(
            train_limit=None, data=str(tmp_path / "data"), image_size=8, interpolation=kind, students=("ce",)
        )
        run = train(small, tmp_path / kind)
        student, data = load_student(run / "students/ce"), prepare(small).data
        assert student.facts["preprocessing"]["interpolation"] == kind
        path = tmp_path / "data/a/0.png"
        resized = torch.tensor(list(image.open(path).resize((8, 8), number).getdata()), dtype=torch.uint8).view(
            1, 1, 8, 8
        )
        torch.testing.assert_close(student.preprocess(path), student.normalize(resized))
        again = load_student(student.save(tmp_path / f"{kind}-exported"))
        assert f"resize it by {kind} interpolation" in (tmp_path / f"{kind}-exported/README.md").read_text().replace(
            "\n", " "
        )
        torch.testing.assert_close(again.preprocess(path), student.preprocess(path))
        accuracy = evaluate(student, data, "test", seconds=0.01)["student"]["accuracy"]
        assert accuracy == pytest.approx(read_json(run / "students/ce/student.json")["test"]["accuracy"])
        found[kind] = data.fingerprint
    assert found["bilinear"] != found["bicubic"]


def test_weights_say_how_images_are_resized_unless_it_is_asked_for(timm_model, weights, tmp_path):
    timms = {"model": "timm:test_resnet", "weights": "timm", "mean": "data", "std": "data"}
    assert Session(config()).config.interpolation == "bilinear"
    assert Session(config(student=timms)).config.interpolation == "bicubic"
    assert Session(config(teacher=timms)).config.interpolation == "bicubic"
    assert Session(config(student=timms, students=())).config.interpolation == "bilinear"  # nobody is trained
    for name, content in (
        ("config.json", {"pretrained_cfg": {"interpolation": "bicubic"}}),
        ("preprocessor_config.json", {"image_mean": [0.5], "image_std": [0.5], "resample": 3}),
        ("student.json", {"preprocessing": {"interpolation": "bicubic"}}),
    ):
        (path := tmp_path / name).write_text(json.dumps(content))
        assert Session(config(student={"weights": weights})).config.interpolation == "bicubic", name
        path.write_text(json.dumps(content | {"do_resize": False}))  # of a processor: then nothing was resampled
        kind = "bilinear" if name == "preprocessor_config.json" else "bicubic"
        assert Session(config(student={"weights": weights})).config.interpolation == kind, name
        path.unlink()
    session = prepare(config(student=timms, interpolation="bilinear"))
    assert session.data.interpolation == "bilinear"
    assert "The student starts from weights for images resized by bicubic, got bilinear: --i" in str(session.notes)


@pytest.mark.bad_input
def test_networks_whose_weights_want_different_views_are_refused(timm_model, weights, tmp_path):
    timms = {"model": "timm:test_resnet", "weights": "timm", "mean": "data", "std": "data"}
    (tmp_path / "config.json").write_text(json.dumps({"preprocessing": {"interpolation": "bilinear"}}))
    asked = config(teacher=timms, student={"weights": weights})
    told = "want bicubic for teacher.model timm:test_resnet and bilinear for student.model resnet8_w4: --interpolation"
    with pytest.raises(ValueError, match=f"^interpolation must be given, for all networks see the same views.* {told}"):
        prepare(asked)
    assert prepare(dataclasses.replace(asked, interpolation="bicubic")).data.interpolation == "bicubic"


def test_a_students_images_are_those_of_its_teachers_run(timm_model, tmp_path):
    timms = {"model": "timm:test_resnet", "weights": "timm", "mean": "data", "std": "data"}
    run = train(config(interpolation="bilinear", students=()), tmp_path / "teacher")
    session = prepare(config(teacher_run=str(run), student=timms))
    assert session.config.interpolation == "bilinear"
    assert "The student starts from weights for images resized by bicubic, got bilinear" in str(session.notes)


def test_images_in_memory_are_resized_by_it_too():
    small, other = (load("digits", image_size=4, interpolation=kind).train.images for kind in ("bilinear", "bicubic"))
    assert small.shape == other.shape and not torch.equal(small, other)


# Normalisation


def test_the_hook_is_the_other_normalisation():
    pixels = torch.rand(4, 3, 5, 5)
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}

    def normalised(by):
        mean, std = (torch.tensor(by[key])[:, None, None] for key in ("mean", "std"))
        return (pixels - mean) / std

    [x] = Renormalize(given, own)(None, (normalised(given),))
    torch.testing.assert_close(x, normalised(own))


@pytest.mark.parametrize("name", ["resnet8_w4", "mlp64"])
def test_snapshots_are_normalised_however_they_run(name):
    torch.manual_seed(0)
    x = torch.randn(6, 1, 8, 8)
    spec = {"name": name, **SIZES, "normalization": {"given": GIVEN, "own": OWN}}
    plain, own = models.build(name, **SIZES), models.build(**spec)
    own.load_state_dict(plain.state_dict())
    plain.eval(), own.eval()
    [wanted] = Renormalize(GIVEN, OWN)(None, (x,))
    torch.testing.assert_close(own(x), plain(wanted))
    for again in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        torch.testing.assert_close(again(own)(x), plain(wanted))
    ensemble = SnapshotEnsemble([own, own])
    torch.testing.assert_close(ensemble(x)[0][1], plain(wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ensemble(x)[1][0], LastFeatures(plain)(wanted)[1], rtol=1e-4, atol=1e-4)
    assert ensemble._folded._graphs  # the fast way is still taken
    assert not torch.allclose(own(x), plain(x))


@pytest.fixture(scope="module")
def normalised(tmp_path_factory):
    """A run whose networks each have a normalisation of their own."""
    folder = tmp_path_factory.mktemp("normalised")
    asked = config(
        teacher={"mean": (0.5,), "std": (0.25,)}, student={"mean": (0.1,), "std": (0.6,)}, augment="crop", workers=0
    )
    return train(asked, folder / "run")


def test_teacher_and_student_see_the_same_view_in_their_own_way(normalised):
    session = prepare(Config.load(normalised / "config.json"))
    data = session.data
    given = {"mean": list(data.mean), "std": list(data.std)}
    teacher, student = (session.spec(phase) for phase in (session.config.teacher, session.config.student))
    assert teacher["normalization"] == {"given": given, "own": {"mean": [0.5], "std": [0.25]}}
    assert student["normalization"] == {"given": given, "own": {"mean": [0.1], "std": [0.6]}}
    assert read_json(normalised / "teacher/manifest.json")["spec"] == teacher
    assert any(note.startswith("The teacher sees images normalised by mean 0.5 and std 0.25") for note in session.notes)


def test_a_student_takes_its_own_normalisation_along(normalised, tmp_path):
    student = load_student(normalised / "students/attention")
    assert student.facts["preprocessing"]["mean"] == [0.1] and student.facts["preprocessing"]["std"] == [0.6]
    assert "normalization" not in student.facts["model"] and not student.network._forward_pre_hooks
    data = prepare(Config.load(normalised / "config.json")).data
    found = evaluate(student, data, "test", teacher=teacher_of(normalised / "students/attention"), seconds=0.01)
    record = read_json(normalised / "students/attention/student.json")
    assert found["student"]["accuracy"] == pytest.approx(record["test"]["accuracy"])
    teacher = read_json(normalised / "teacher/snapshots.json")["test"]["members"][1]
    assert found["teacher"]["accuracy"] == pytest.approx(teacher["accuracy"])
    assert found["teacher"]["nll"] == pytest.approx(teacher["nll"], rel=1e-4)
    x, _ = next(batches(student, data, "test", 4))
    again = load_student(student.save(tmp_path / "exported"))
    torch.testing.assert_close(again(x), student(x), rtol=0, atol=0)


def test_a_bank_is_of_the_normalised_teacher(normalised, tmp_path):
    path = str(tmp_path / "bank")
    assert bank.main(["--teacher", str(normalised), "--views", "2", "--out", path, "--features", "all"]) == 0
    torch.use_deterministic_algorithms(False)
    flags = ["--students", "attention", "--student.epochs", "1", "--out", str(tmp_path / "run")]
    assert cli.main(["student", "--bank", path, *flags]) == 0
    session = prepare(Config.load(tmp_path / "run/config.json"))
    [batch] = session.loader("train", session.config.student, train=True).replay([(1, torch.arange(5))])
    logits, _ = SnapshotEnsemble.load(normalised / "teacher")(batch.images)
    torch.testing.assert_close(session.bank.rows(1, torch.arange(5))[0].float(), logits, rtol=1e-2, atol=1e-2)


@pytest.mark.bad_input
def test_another_normalisation_under_resume_is_noticed(normalised, tmp_path):
    run = shutil.copytree(normalised, tmp_path / "run")
    (run / "summary.json").unlink()
    asked = Config.load(run / "config.json")
    asked = dataclasses.replace(asked, teacher=dataclasses.replace(asked.teacher, mean=(0.4,)))
    (run / "config.json").write_text(asked.to_json())
    (run / "environment.json").unlink()
    with pytest.raises(FileNotFoundError, match="environment.json"):
        resume(run)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"preprocessing": {"mean": [0.2], "std": [0.3], "zoom": 1}}),
        ("config.json", {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.2], "std": [0.3]}}),
        ("preprocessor_config.json", {"image_mean": [0.2], "image_std": [0.3]}),
        ("student.json", {"preprocessing": {"mean": [0.2], "std": [0.3]}, "spec": {"name": "x"}}),
        (
            "student.json",
            {
                "preprocessing": {"mean": [0], "std": [1]},
                "spec": {"normalization": {"own": {"mean": [0.2], "std": [0.3]}}},
            },
        ),
    ],
)
def test_weights_bring_the_normalisation_that_lies_beside_them(file, content, tmp_path):
    save_tensors(tmp_path / "model.safetensors", net(seed=5).state_dict())
    write_json_atomic(tmp_path / file, content)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        phase = dataclasses.replace(config().student, weights=str(weights))
        own, said = pretrained.normalization(phase, GIVEN)
        assert own == {"given": GIVEN, "own": {"mean": [0.2], "std": [0.3]}}
        assert said == f"sees images normalised by mean 0.2 and std 0.3 ({file})."
        phase = dataclasses.replace(phase, mean="data", std="data")
        assert pretrained.normalization(phase, GIVEN) == (None, None)


@pytest.mark.parametrize(
    ("content", "mean", "std"),
    [
        ({"do_normalize": False}, 0, 1),
        ({"do_rescale": False, "image_mean": [51.0], "image_std": [76.5]}, 0.2, 0.3),  # of images up to 255
        ({"do_rescale": False, "do_normalize": False}, 0, 1 / 255),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}, 0.5, 0.5),
        ({"rescale_factor": 1 / 127.5}, 0.1, 0.15),
    ],
)
def test_a_processor_may_leave_a_step_out(content, mean, std, tmp_path):
    content = {"image_mean": [0.2], "image_std": [0.3], "resample": 3} | content
    write_json_atomic(tmp_path / "preprocessor_config.json", content)
    found, _ = pretrained.stored_with(tmp_path)
    assert found == {"mean": [pytest.approx(mean)], "std": [pytest.approx(std)]}
    image = torch.rand(9, dtype=torch.float64)  # as the processor makes it, from an image up to 255
    seen = image * 255 * (content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1)
    seen = seen - 1 if content.get("rescale_offset") else seen
    if content.get("do_normalize", True):
        seen = (seen - content["image_mean"][0]) / content["image_std"][0]
    torch.testing.assert_close((image - found["mean"][0]) / found["std"][0], seen)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content", ["[", "[]", '{"preprocessing": {"mean": ["x"], "std": [1]}}', '{"preprocessing": 3}']
)
def test_what_lies_beside_weights_and_is_no_normalisation_is_passed_over(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert pretrained.stored_with(tmp_path) is None
