"""Networks of several outputs or heads, and code of the user's that raises: right, said in a line, or one sentence."""

import json
import re
from collections import namedtuple

import pytest
import torch
from torch import nn

from eekd import LastFeatures, SnapshotEnsemble, load_student, models
from eekd.models.outputs import TakeOutput
from eekd.train import __main__ as cli

Named = namedtuple("Named", "main aux")

FILE = """
import torch
from collections import namedtuple
from torch import nn

class Net(nn.Module):
    def __init__(self, output, c, i, s, width=6, training_only=False):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(i * s**2, width), nn.Linear(width, c), nn.Linear(width, c)
        self.output, self.training_only = output, training_only

    def forward(self, x):
        f = self.body(x.flatten(1)).relu()
        if self.training_only and not self.training:
            return self.head(f)
        return self.output(f, self.head(f), self.aux(f))

def plain(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))

def heads(num_classes, in_channels, image_size):
    return Net(lambda f, z, aux: (z, aux), num_classes, in_channels, image_size)

def inception(num_classes, in_channels, image_size):
    return Net(lambda f, z, aux: (z, aux), num_classes, in_channels, image_size, training_only=True)

def lazy(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def infinite(num_classes, in_channels, image_size):
    return Net(lambda f, z, aux: z / 0, num_classes, in_channels, image_size)

def sigmoid(num_classes, in_channels, image_size):
    return plain(num_classes, in_channels, image_size).append(nn.Sigmoid())

def scaled(num_classes, in_channels, image_size):
    return Net(lambda f, z, aux: (2 * z, 2 * aux), num_classes, in_channels, image_size)

def features(num_classes, in_channels, image_size):
    return Net(lambda f, z, aux: (f, z), num_classes, in_channels, image_size, width=num_classes)

def wide_features(num_classes, in_channels, image_size):
    return Net(lambda f, z, aux: {"features": f, "scores": z}, num_classes, in_channels, image_size)

def tuple_features(num_classes, in_channels, image_size):
    return Net(lambda f, z, aux: (f, z), num_classes, in_channels, image_size)

def index(num_classes, in_channels, image_size):
    return {}["size"]

def deep(num_classes, in_channels, image_size):
    from layers_of_nets import make
    return make(num_classes)

class Key(nn.Module):
    def forward(self, x):
        return {}["z"]

def key(num_classes, in_channels, image_size):
    net = Key()
    net.w = nn.Parameter(torch.ones(1))
    return net

def ends(num_classes, in_channels, image_size):
    raise SystemExit("bye")

def asserts(num_classes, in_channels, image_size):
    assert image_size == 32

def nothing(num_classes, in_channels, image_size):
    net = nn.Flatten()
    net.forward = lambda x: x.flatten(1)[:, :num_classes]
    return net

def frozen(num_classes, in_channels, image_size):
    return plain(num_classes, in_channels, image_size).requires_grad_(False)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command line on nets of FILE, for teacher and student."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FILE)
    (tmp_path / "layers_of_nets.py").write_text("from torch import nn\n\ndef make(n):\n    return nn.Linear(-1, n)\n")
    small = "--train-limit 100 --device cpu --precision fp32 --out run --teacher.epochs 2 --teacher.snapshots 2"

    def run(teacher, *more, student="plain"):
        nets = f"--student.epochs 1 --teacher.model nets.py:{teacher} --student.model nets.py:{student}"
        return cli.main([*small.split(), *nets.split(), *more])

    return run


def printed(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("output", "which"),
    [((0, 1), "1"), ((0, 1), "-1"), ([0, 1], "1"), (Named(0, 1), "aux"), (Named(0, 1), "1"), ({"a": 0, "b": 1}, "b")],
)
def test_an_output_can_be_chosen(output, which):
    two = torch.zeros(2, 3), torch.ones(2, 3)
    values = [two[k] for k in (output.values() if isinstance(output, dict) else output)]
    made = (
        dict(zip(output, values, strict=True))
        if isinstance(output, dict)
        else type(output)(*values)
        if isinstance(output, Named)
        else type(output)(values)
    )
    assert TakeOutput(which)(nn.Identity(), (), made) is two[1]
    assert TakeOutput(which)(nn.Identity(), (), two[0]) is two[0]  # alone, as many networks give it in eval mode
    with pytest.raises(ValueError, match="^output must be one of .*, which the model returns, got 'x'$"):
        TakeOutput("x")(nn.Identity(), (), made)


@pytest.mark.bad_input
@pytest.mark.parametrize("which", ["", 1, None, ["a"]])
def test_an_output_is_named_by_text(which):
    with pytest.raises(ValueError, match="^output must be a number or a name, as text, got "):
        TakeOutput(which)


def test_what_is_taken_of_several_outputs_is_said(command, capsys):
    told = "Of the teacher's 2 outputs of 10 values (0, 1), 0 is taken for the logits; teacher.output takes another."
    for name in ("heads", "scaled", "inception"):
        assert command(name, "--students", "last", "--dry-run") == 0
        assert printed(capsys).count(told) == 1
    assert command("heads", "--students", "last", "--dry-run", "--teacher.output", "1") == 0
    assert "taken" not in printed(capsys)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("teacher", "more", "told"),
    [
        (
            "features",
            ["--students", "last"],
            "teacher.model .*:features must say which of its outputs 0, 1 of 10 values are the logits, for 0 would be "
            "taken and 1 comes from a layer of 10 outputs: give --teacher.output",
        ),
        (
            "heads",
            ["--students", "attention"],
            "teacher.model .*:heads: the last nn.Linear, 'aux', must give the logits, got those of 'head'; name the "
            "classifier by --teacher.layer",
        ),
        (
            "inception",
            ["--students", "attention"],
            "teacher.model .*: 'aux' must run once in .*, got none; name another by --teacher.layer .'head' gives the",
        ),
        ("sigmoid", [], "teacher.model .*:sigmoid must give logits, got what the sigmoid '2' makes of them: leave it"),
        ("lazy", [], "lazy' must give its layers their sizes, got a lazy one, with the parameter 1.weight"),
        ("infinite", [], "teacher.model .*infinite must give finite logits, got NaN or infinity"),
        (
            "tuple_features",
            [],
            r"must give 10 logits an image, .* shape \(8, 6\) for 8 images; --teacher.output 1 would",
        ),
        ("wide_features", [], "got a dict of features, scores; --teacher.output scores would take one that fits"),
        ("tuple_features", ["--teacher.output", "5"], "teacher.model .*: output must be one of 0, 1, which the model "),
        ("nothing", [], "teacher.model .*:nothing must have parameters to train, got none"),
        ("frozen", [], "teacher.model .*:frozen must have parameters to train, got none"),
    ],
)
def test_what_is_not_clear_is_refused(command, teacher, more, told, capsys, tmp_path):
    assert command(teacher, *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(told, error), error
    assert not (tmp_path / "run").exists()


def test_the_chosen_output_is_trained_kept_and_used(command, tmp_path):
    more = ["--teacher.output", "1", "--teacher.layer", "head", "--student.output", "scores", "--student.layer", "head"]
    assert command("features", "--students", "attention", *more, student="wide_features") == 0
    spec = json.loads((tmp_path / "run/teacher/manifest.json").read_text())["spec"]
    assert spec["output"] == "1"
    logits, _ = SnapshotEnsemble.load(tmp_path / "run/teacher", layer="head")(torch.randn(3, 1, 8, 8))
    assert logits.shape == (2, 3, 10)
    student = load_student(tmp_path / "run/students/attention")
    assert student(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    student.save(tmp_path / "mine")
    factory = f"{tmp_path}/nets.py:wide_features"
    mine = load_student(tmp_path / "mine", lambda: models.build(factory, num_classes=10, in_channels=1, image_size=8))
    assert mine(torch.randn(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.bad_input
def test_features_of_another_head_are_refused_once_and_later():
    class Two(nn.Module):
        def __init__(self, aux_last):
            super().__init__()
            names = ("head", "aux") if aux_last else ("aux", "head")
            for name in names:
                setattr(self, name, nn.Linear(4, 3))

        def forward(self, x):
            return self.head(x).float(), self.aux(x)

    x, told = torch.randn(5, 4), "^the last nn.Linear, 'aux', must give the logits, got those of 'head'; name the"
    capture = LastFeatures(Two(aux_last=True))
    for _ in range(2):
        with pytest.raises(ValueError, match=told):
            capture(x)
    with pytest.raises(ValueError, match=told):
        SnapshotEnsemble([Two(aux_last=True)])(x)
    LastFeatures(Two(aux_last=True), "head")(x)
    net = Two(aux_last=False)
    capture = LastFeatures(net)
    torch.testing.assert_close(capture(x)[0], net.head(x))
    assert not any(module._forward_hooks for module in net.modules())


# The user's own code


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ("index", "nets.py:index' fails: .*/nets.py, line [0-9]+, in index: KeyError: 'size'$"),
        (
            "deep",
            "deep' fails: .*/nets.py, line [0-9]+, in deep; .*/layers_of_nets.py, line 4, in make: RuntimeError: .*-1",
        ),
        ("ends", "ends' fails: .*/nets.py, line [0-9]+, in ends: SystemExit: bye$"),
        ("asserts", "asserts' fails: .*/nets.py, line [0-9]+, in asserts: AssertionError$"),
        ("key", "teacher.model .*key fails on images of 1 x 8 x 8: .*nets.py, line [0-9]+, in forward: KeyError: 'z'$"),
    ],
)
def test_a_network_that_raises_is_one_sentence_with_file_and_line(command, teacher, told, capsys):
    assert command(teacher, "--students", "last", "--dry-run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(told, error.strip()), error


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1 / 0", "own.py cannot be run: .*/own.py, line 1, in <module>: ZeroDivisionError: division by zero$"),
        (
            "import argparse\nargparse.ArgumentParser().parse_args(['--x'])",
            "own.py, line 2, in <module>: SystemExit: 2$",
        ),
        ("def own(*given):\n    return open('nowhere')", "own.py, line 2, in own: FileNotFoundError"),
    ],
)
@pytest.mark.parametrize("setting", ["--data", "--students"])
def test_a_file_that_raises_is_one_sentence_with_file_and_line(command, setting, text, told, capsys, tmp_path):
    (tmp_path / "own.py").write_text(text + "\n")
    assert command("plain", setting, "own.py:own", "--dry-run") == 2
    error = capsys.readouterr().err
    assert re.search(told, error.strip().splitlines()[-1]), error


@pytest.mark.bad_input
def test_the_error_of_a_factory_is_kept_for_a_debugger(tmp_path):
    (tmp_path / "nets.py").write_text(FILE)
    with pytest.raises(ValueError, match="index' fails") as caught:
        models.build(f"{tmp_path}/nets.py:index", num_classes=2)
    assert isinstance(caught.value.__cause__, KeyError)
