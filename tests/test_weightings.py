"""The registry of weightings: one entry is all that the loss, the command lines, tables and reports need."""

import html
import re

import pytest
import torch

from eekd import EEKDLoss, top_k_logits
from eekd.compare import __main__ as compare
from eekd.compare.methods import method
from eekd.method import weightings
from eekd.method.weightings import log_weights, register
from eekd.report import charts
from eekd.report import page as report_page
from eekd.report import run as report_run
from eekd.report import weights as report_weights
from eekd.train import __main__ as cli
from eekd.train.checked import title_of
from eekd.train.config import Config

SHARP = """
from parts import spread

def sharp(snapshot_logits, labels):
    return spread(snapshot_logits)

def narrow(snapshot_logits, labels):
    return snapshot_logits[0]

number = 3
"""
PARTS = """
import torch

def spread(snapshot_logits):
    return torch.stack([z.float().log_softmax(1).amax(1) for z in snapshot_logits], 1)
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(weightings, "_REGISTRY", dict(weightings._REGISTRY))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "mine.py").write_text(SHARP)
    return tmp_path / "mine.py"


def by_norm(snapshot_logits, labels):
    return torch.stack([z.norm(dim=1) for z in snapshot_logits], 1)


def batch(m=3, b=5, c=6):
    g = torch.Generator().manual_seed(0)
    return torch.randn(b, c, generator=g), torch.randn(m, b, c, generator=g), torch.arange(b) % c


def test_one_entry_is_known_everywhere(capsys):
    with pytest.raises(ValueError, match="students must be"):
        Config(students=("norm",))
    entry = register("norm", "by norm", by_norm, colours=("#123456", "#abcdef"))
    student, snapshots, labels = batch()
    _, measured = EEKDLoss("norm")(student, snapshots, labels)
    torch.testing.assert_close(measured["weights"], by_norm(snapshots, labels).softmax(1).mean(0))
    assert Config(students=("ce", "norm")).students == ("ce", "norm")
    assert title_of("norm") == entry.title == method("norm").title == "by norm"
    assert report_run.colour_of("norm") == "var(--norm)" and "--norm: light-dark(#123456, #abcdef);" in charts.style()
    for parse in (cli.parse, compare.parse):
        with pytest.raises(SystemExit):
            parse(["--help"])
        shown = re.sub(r"[\s│]+", "", capsys.readouterr().out)
        assert ",".join(("{ce", *weightings.names())) in shown and weightings.names()[-1] == "norm"
    assert compare.parse(["--methods", "norm"]).methods == ("norm",)


def test_a_report_draws_the_weights_of_those_that_differ_by_sample():
    rows = [{"epoch": epoch, "weights": [0.4, 0.6], "weight_entropy": 0.5} for epoch in (1, 2)]
    register("norm", "by norm", by_norm)
    register("fixed", "fixed", by_norm, per_sample=False)
    for name, title in (
        ("norm", "by norm"),
        ("fixed", None),
        ("uniform", None),
        ("entropy", "entropy (EBKD)"),
        ("attention_dkd", "EEKD with DKD's loss"),
    ):
        net = report_run.Network(name, "resnet8", 2, rows, None)
        drawn = "".join(report_weights.attention(report_run.Run(Config(), None, None, [], net, [net])))
        assert (f"<h3>{title}</h3>" in html.unescape(drawn)) == bool(title)


def test_a_file_of_ones_own_with_its_neighbour(file):
    student, snapshots, labels = batch()
    loss = EEKDLoss(f"{file}:sharp")
    assert loss.weighting == "sharp"
    _, measured = loss(student, snapshots, labels)
    want = torch.stack([z.log_softmax(1).amax(1) for z in snapshots], 1).softmax(1)
    torch.testing.assert_close(measured["weights"], want.mean(0))
    assert title_of(f"{file}:sharp") == "sharp"


def test_what_a_file_registers_itself_keeps_its_title(tmp_path):
    path = tmp_path / "titled.py"
    path.write_text(
        "from eekd.method.weightings import register\n"
        "def even(z, labels):\n    return None\n"
        "register('even', 'all alike', even, per_sample=False)\n"
    )
    assert weightings.get(f"{path}:even").title == "all alike"


def test_neighbours_of_one_name_are_kept_apart(file, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "parts.py").write_text("def spread(snapshot_logits):\n    return None\n")
    (other / "theirs.py").write_text(SHARP)
    _, snapshots, labels = batch()
    assert log_weights(f"{file}:sharp", snapshots, labels) is not None
    assert log_weights(f"{other / 'theirs.py'}:sharp", snapshots, labels) is None
    assert log_weights(f"{file}:sharp", snapshots, labels) is not None


def test_with_top_k_logits_what_was_left_out_is_one_class():
    _, snapshots, labels = batch()
    seen = []

    def watch(logits, labels):
        seen.append((logits, labels))

    register("watch", "watch", watch)
    kept = top_k_logits(snapshots, 2)
    log_weights("watch", kept, labels)
    [(logits, among)] = seen
    assert logits.shape == (3, 5, 3)
    torch.testing.assert_close(logits.logsumexp(2), snapshots.logsumexp(2))
    left_out = ~(kept.indices == labels[:, None]).any(1)
    assert torch.equal(among == 2, left_out) and left_out.any()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "given, error, message",
    [
        (("2nd", "x", by_norm), ValueError, "name must be an identifier, got '2nd'"),
        (("a/../b", "x", by_norm), ValueError, "name must be an identifier"),
        (("uniform", "x", by_norm), ValueError, "name must be one that eekd does not use itself, got 'uniform'"),
        (("ce", "x", by_norm), ValueError, "name must be one that eekd does not use itself"),
        (("norm", "", by_norm), TypeError, "title must be some text, got ''"),
        (("norm", "x", 3), TypeError, "log_weights must be a function, got int"),
    ],
)
def test_what_cannot_be_registered(given, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        register(*given)


@pytest.mark.bad_input
def test_colours_are_two():
    for colours in (("red", "blue"), ("#123456",), ("#123456", "#12345z"), ("#123456", "#fff;}")):
        with pytest.raises(ValueError, match="^colours must be two of the form #rrggbb"):
            register("norm", "x", by_norm, colours=colours)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, error, message",
    [
        ("atention", ValueError, r"weighting must be one of last, .* got 'atention'; did you mean 'attention'\?"),
        (None, ValueError, "weighting must be one of last, .* got None"),
        ("no/such.py:f", FileNotFoundError, "'no/such.py:f' names a file that does not exist: /"),
        ("{file}:absent", AttributeError, r".*mine.py must define 'absent', a function of \(snapshot_logits, labels\)"),
        ("{file}:number", TypeError, "log_weights must be a function, got int"),
    ],
)
def test_unknown_weightings_are_refused(file, name, error, message):
    with pytest.raises(error, match=f"^{message}"):
        EEKDLoss(name and name.format(file=file))


@pytest.mark.bad_input
def test_weights_of_another_shape_are_refused(file):
    student, snapshots, labels = batch()
    want = r"^weighting 'narrow' must return log weights \(B, M\) = \(5, 3\) or None, got \(5, 6\)$"
    with pytest.raises(ValueError, match=want):
        EEKDLoss(f"{file}:narrow")(student, snapshots, labels)


@pytest.mark.bad_input
def test_students_of_one_name_are_refused(file):
    assert Config(students=("ce", f"{file}:sharp")).students[1] == f"{file}:sharp"
    for students in ((f"{file}:sharp", "x.py:sharp"), ("uniform", "x.py:uniform")):
        with pytest.raises(ValueError, match="^students must be different from each other"):
            Config(students=students)
    for name in ("x.py:../../up", "x.py:", "x.pz:sharp"):  # a folder has the name
        with pytest.raises(ValueError, match="^students must be a list of: one of ce, last"):
            Config(students=(name,))


def test_the_command_line_trains_a_weighting_of_ones_own(file, tmp_path):
    out = tmp_path / "run"
    small = "--train-limit 150 --device cpu --teacher.epochs 2 --teacher.snapshots 2 --teacher.model mlp64"
    more = f"--student.epochs 1 --student.model mlp64 --out {out} --students {file}:sharp"
    assert cli.main([*small.split(), *more.split()]) == 0
    assert (out / "students" / "sharp" / "student.json").is_file()
    assert cli.main(["--resume", str(out)]) == 0
    weightings._REGISTRY.pop("sharp")
    assert "sharp" in report_page.report(out).read_text()  # which runs no file
    assert "sharp" not in weightings.names()


def test_a_loss_keeps_its_weighting_when_another_file_has_one_of_that_name(tmp_path):
    for name, taken in (("one", 0), ("two", 2)):
        (tmp_path / f"{name}.py").write_text(
            "import torch\n\n\ndef only(z, y):\n"
            f"    return torch.full((len(z[0]), 3), -1e9).index_fill_(1, torch.tensor([{taken}]), 0.0)\n"
        )
    losses = [EEKDLoss(f"{tmp_path / name}.py:only") for name in ("one", "two")]
    given = torch.randn(4, 5), torch.randn(3, 4, 5), torch.arange(4)
    assert [loss(*given)[1]["weights"].tolist() for loss in losses] == [[1, 0, 0], [0, 0, 1]]
