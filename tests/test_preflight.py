"""Before training: one batch through every network and loss. After it: what in the table was not wanted."""

import copy
import json
import re
import threading

import pytest
import torch
from PIL import Image

from eekd import load_student, models
from eekd.export.evaluation import teacher_of
from eekd.io.files import read_json, write_json_atomic
from eekd.io.tensors import load_tensors, save_tensors
from eekd.report import report
from eekd.train import __main__ as cli
from eekd.train import prepare, train
from eekd.train.config import Config, Student, Teacher
from eekd.train.findings import findings
from eekd.train.preflight import preflight
from eekd.train.student import method_of

NETS = """
import torch
from torch import nn

def small(num_classes, in_channels, image_size):
    pixels = in_channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 12), nn.ReLU(), nn.Linear(12, num_classes))

def five(num_classes, in_channels, image_size):
    return small(5, in_channels, image_size)

def wide(num_classes, in_channels, image_size):
    return small(num_classes, in_channels, image_size + 1)

class Training(nn.Module):
    def __init__(self, net, fault):
        super().__init__()
        self.net, self.fault = net, fault
    def forward(self, x):
        return self.fault(self.net(x)) if self.training else self.net(x)

def auxiliary(num_classes, in_channels, image_size):
    return Training(small(num_classes, in_channels, image_size), lambda z: {"main": z, "auxiliary": z})

def frozen(num_classes, in_channels, image_size):
    return Training(small(num_classes, in_channels, image_size), lambda z: z.detach())

def softmax(num_classes, in_channels, image_size):
    return small(num_classes, in_channels, image_size).append(nn.Softmax(1))

def headless(num_classes, in_channels, image_size):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(in_channels * image_size**2, num_classes))
        def forward(self, x):
            return x.flatten(1) @ self.w
    return Net()
"""
METHOD = """
from eekd.train import StudentTrainer

class Broken(StudentTrainer):
    weighting = "uniform"
    def compute_loss(self, batch):
        raise ValueError("this loss must be finished, got a stub")

class Counting(StudentTrainer):
    weighting = "ce"
    seen = []
    def compute_loss(self, batch):
        self.seen.append(len(batch.images))
        return super().compute_loss(batch)
"""
SMALL = [
    "--train-limit",
    "150",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--teacher.epochs",
    "2",
    "--student.epochs",
    "1",
    "--teacher.snapshots",
    "2",
]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command line on nets of NETS, for teacher and student."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "method.py").write_text(METHOD)

    def run(teacher, student, *more):
        models = ["--teacher.model", f"nets.py:{teacher}", "--student.model", f"nets.py:{student}"]
        return cli.main([*SMALL, *models, "--out", str(tmp_path / "run"), *more])

    return run


@pytest.mark.bad_input
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("teacher", "student", "more", "told"),
    [
        ("five", "small", [], r"teacher.model .*nets.py:five must give 10 logits an image, .* \(8, 5\) for 8 images"),
        ("small", "five", [], r"student.model .*nets.py:five must give 10 logits an image, .* \(8, 5\) for 8 images"),
        ("wide", "small", [], "teacher.model .*nets.py:wide fails on images of 1 x 8 x 8: .*mat1 and mat2"),
        (
            "softmax",
            "small",
            [],
            "teacher.model .*softmax must give logits, got probabilities, which sum to 1 for each",
        ),
        ("small", "softmax", ["--students", "last"], "student.model .*softmax must give logits, got probabilities"),
        (
            "small",
            "frozen",
            ["--students", "attention"],
            "the model's logits must have a gradient in training, got none",
        ),
        ("small", "auxiliary", [], "the model must return logits, .* got a dict of main, auxiliary"),
        ("small", "frozen", ["--students", "ce"], "student.model .*frozen fails on .*: element 0 of tensors does not"),
        ("small", "headless", ["--students", "attention"], "model must have an nn.Linear or a 1×1 convolution"),
        ("small", "small", ["--students", "attention", "--student.layer", "4"], "layer must be in the model, got '4'"),
        ("small", "small", ["--students", "method.py:Broken"], "this loss must be finished, got a stub"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_trained(
    command, dry, teacher, student, more, told, capsys, tmp_path
):
    assert command(teacher, student, *more, *dry) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(told, error)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_was_decided_and_why(command, capsys):
    assert command("small", "small", "--teacher.mean", "0.001", "--teacher.std", "0.01", "--dry-run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "- 20% of the images are the test split, since there is no other." in printed
    assert "- 10% of the training images are held out to validate on (val_fraction)." in printed
    assert "- The teacher sees images normalised by mean 0.001 and std 0.01 (teacher.mean and teacher.std)." in printed
    assert (
        re.search("- The teacher sees images with mean 29.* and standard deviation 3", printed)
        and "look at teacher.mean and teacher.std" in printed
    )
    assert "The student sees images with mean" not in printed


def test_a_finished_teacher_that_guesses_is_named_before_students_are_trained(command, tmp_path, capsys):
    flags = ["--teacher.epochs", "8", "--teacher.lr", "0.02", "--students", "last"]
    assert command("small", "small", *flags) == 0
    snapshot = str(tmp_path / "run/teacher/snapshot-2.safetensors")
    state = load_tensors(snapshot)
    state["3.weight"], state["3.bias"] = state["3.weight"].roll(1, 0), state["3.bias"].roll(1, 0)
    save_tensors(tmp_path / "rolled.safetensors", state)  # as of classes in another order
    for file, guesses in ((snapshot, False), (str(tmp_path / "rolled.safetensors"), True)):
        capsys.readouterr()
        start = ["student", *SMALL[:6], "--teacher.model", "nets.py:small", "--student.model", "nets.py:small"]
        assert cli.main([*start, "--checkpoints", file, "--students", "last", "--dry-run"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert ("The finished teacher is no better than chance" in printed) == guesses


def test_a_batch_is_a_few_images_and_leaves_no_trace(tmp_path):
    (tmp_path / "method.py").write_text(METHOD)
    config = Config(
        train_limit=150,
        device="cpu",
        precision="fp32",
        teacher=Teacher(model="resnet8_w4", epochs=2, snapshots=2),
        student=Student(model="resnet8_w4", epochs=1),
        students=("ce", "attention", "last", f"{tmp_path}/method.py:Counting"),
    )
    session = prepare(config)
    methods = [method_of(name) for name in config.students]
    seen, network = methods[-1].trainer.seen, models.build(**session.spec(config.teacher))
    before, state, threads = torch.get_rng_state(), copy.deepcopy(network.state_dict()), threading.active_count()
    assert session.notes == preflight(session, methods, network, True) == []
    assert seen == [8]
    assert torch.equal(before, torch.get_rng_state()) and threading.active_count() == threads
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("students", [("ce",), ("last", "attention"), ("entropy", "confidence")])
def test_good_settings_pass(students, tmp_path):
    config = Config(train_limit=150, device="cpu", precision="fp32", students=students, accumulate=2, augment="crop")
    assert prepare(config).notes == []


# After training


def rows(teacher=0.9, snapshots=(0.7, 0.9), ensemble=0.9, **students):
    said = [("teacher", "teacher", teacher)]
    said += [("snapshot", f"snapshot {m}", p) for m, p in enumerate(snapshots, 1)]
    said += [("ensemble", "ensemble", ensemble)] + [("student", name, p) for name, p in students.items()]
    return [{"kind": kind, "name": name, "val_accuracy": p} for kind, name, p in said]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (rows(ce=0.8, attention=0.85), []),
        (rows(snapshots=(0.1, 0.9)), ["Snapshot 1 is no better than chance: 10.0% of .* right. Try fewer"]),
        (
            rows(0.1, (0.12, 0.1), 0.1),
            ["Snapshot 1 is no better than chance", "Snapshot 2 is no better .* finished teacher: look at --teacher.m"],
        ),
        (rows(ensemble=0.5), ["The ensemble of snapshots is 40.00 points below the last of them: early snapshots are"]),
        (rows(ensemble=0.89), []),
        (
            rows(ce=0.8, last=0.6, uniform=0.799),
            ["ce.: last by 20.00 points, uniform by 0.10 points .which may be chance"],
        ),
        (rows(last=0.6), []),
        (rows(ce=0.1, last=0.9), ["CE only is no better than chance: .* lower --student.lr"]),
    ],
)
def test_what_was_not_wanted_is_said(given, told):
    found = findings(given, 10, 500)
    assert len(found) == len(told)
    assert all(re.search(wanted, sentence) for wanted, sentence in zip(told, found, strict=True)), found


def test_findings_stand_in_the_summary_on_the_terminal_and_in_the_report(tmp_path, capsys):
    flags = [
        "--teacher.model",
        "resnet8_w4",
        "--student.model",
        "resnet8_w4",
        "--teacher.lr",
        "1e-7",
        "--students",
        "ce",
        "last",
    ]
    assert cli.main([*SMALL, *flags, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert any("Snapshot 2 is no better than chance" in finding for finding in summary["findings"])
    printed, page = capsys.readouterr().out, report(tmp_path / "run").read_text()
    for finding in summary["findings"]:
        assert f"note: {finding}\n" in printed
        assert finding.split(":")[0] in page


def test_findings_over_seeds(tmp_path):
    config = Config(
        train_limit=150,
        device="cpu",
        precision="fp32",
        seeds=2,
        students=("ce",),
        teacher=Teacher(model="resnet8_w4", lr=1e-7, epochs=2, snapshots=2),
        student=Student(model="resnet8_w4", epochs=1),
    )
    run = train(config, tmp_path / "run")
    found = json.loads((run / "summary.json").read_text())["findings"]
    assert any("finished teacher" in finding for finding in found)
    assert "finished teacher" in report(run).read_text()


# Files of one's own


@pytest.fixture
def elsewhere(command, tmp_path, monkeypatch):
    """A run by relative paths, from whose folder one has gone away."""
    students = ["--students", "attention", "method.py:Counting"]
    weights = ["--student.weights", "start.safetensors"]
    (tmp_path / "start.safetensors").write_bytes(b"")
    network = _from_file(tmp_path / "nets.py", "small")
    save_tensors(tmp_path / "start.safetensors", network.state_dict())
    assert command("small", "small", *students, *weights) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    return tmp_path / "run"


def _from_file(path, name):
    return models.build(f"{path}:{name}", num_classes=10, in_channels=1, image_size=8)


def test_a_run_by_relative_paths_is_used_from_any_folder(elsewhere, tmp_path):
    config = json.loads((elsewhere / "config.json").read_text())
    assert config["teacher"]["model"] == f"{tmp_path}/nets.py:small"
    assert config["student"]["weights"] == f"{tmp_path}/start.safetensors"
    assert config["students"] == ["attention", f"{tmp_path}/method.py:Counting"]
    for folder in ("teacher", "students/attention", "students/Counting"):
        assert (elsewhere / folder / "model.py").read_text() == NETS
    (elsewhere / "summary.json").unlink()
    assert cli.main(["--resume", str(elsewhere)]) == 0
    assert cli.main(["student", "--teacher", str(elsewhere), "--students", "last", "--out", "mine"]) == 0
    assert load_student(elsewhere / "students/attention").network is not None
    assert teacher_of(elsewhere / "students/attention") is not None


@pytest.mark.bad_input
def test_another_content_of_a_networks_file_is_noticed(elsewhere, tmp_path, capsys):
    (tmp_path / "nets.py").write_text(NETS.replace("nn.ReLU()", "nn.Tanh()"))  # which fits the same weights
    (elsewhere / "summary.json").unlink()
    assert cli.main(["--resume", str(elsewhere)]) == 2
    told = f"{tmp_path}/nets.py must be what it was when "
    assert f"error: {told}{elsewhere}/teacher/snapshots.json was written" in capsys.readouterr().err
    assert cli.main(["student", "--teacher", str(elsewhere), "--students", "last", "--out", "mine"]) == 2
    assert told in capsys.readouterr().err
    for use in (load_student, teacher_of):
        with pytest.raises(
            ValueError, match=f"^{told}the network in .* was trained, .*model.py is a copy of what it was$"
        ):
            use(elsewhere / "students/attention")


def test_a_run_from_before_files_were_hashed_goes_on(elsewhere, tmp_path):
    for path in (elsewhere / "teacher/snapshots.json", *elsewhere.glob("students/*/student.json")):
        record = read_json(path)
        record.pop("own_sha256", None)
        record["setup"].pop("model")
        record["setup"]["settings"]["model"] = "nets.py:small"
        write_json_atomic(path, record)
    (elsewhere / "summary.json").unlink()
    assert cli.main(["--resume", str(elsewhere)]) == 0


def test_what_makes_a_training_slow_is_said_before_it(tmp_path, capsys):
    for number in range(40):
        (tmp_path / "data" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80, 70), 50).save(tmp_path / "data" / str(number % 2) / f"{number}.png")
    flags = ["--data", str(tmp_path / "data"), "--teacher.model", "mlp64", "--student.model", "mlp64", "--dry-run"]

    def told(*more):
        assert cli.main([*flags, *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    said = told("--image-size", "96")
    assert "mlp64 is made for images of 32 x 32; one of 96 x 96 takes about 9 times as long" in said
    assert "--workers N leaves this to N processes" in said
    said = told("--image-size", "96", "--workers", "1", "--augment", "none")
    assert "--workers N" not in said
    assert "mlp64 is made" not in told("--image-size", "64")
