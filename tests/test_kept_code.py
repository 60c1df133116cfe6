"""Files of the user's own, and the neighbours that they import: kept in the run, hashed, and run in their place."""

import shutil
import subprocess
import sys

import pytest

from eekd import SnapshotEnsemble, kept_code, load_student, models
from eekd.export.evaluation import teacher_of
from eekd.io.files import read_json, sha256_of, write_json_atomic
from eekd.train import __main__ as cli

NEIGHBOURS = {
    "layers.py": "from torch import nn\n\ndef act(): return nn.ReLU()\n",
    "parts/__init__.py": "from . import flat\n",
    "parts/flat.py": "from torch import nn\n\ndef layer():\n    from .deep import kind\n    return kind()\n",
    "parts/deep.py": "from torch import nn\n\nkind = nn.Flatten\n",
    "beside.py": "raise RuntimeError('nobody imports this')\n",
}
MADE_OF_PARTS = """
import layers
import parts.flat
from torch import nn

def small(num_classes, in_channels, image_size):
    return nn.Sequential(parts.flat.layer(), nn.Linear(in_channels * image_size**2, 16), layers.act(),
                         nn.Linear(16, num_classes))
"""
METHOD_OF_PARTS = """
from layers import act
from eekd.train import StudentTrainer

class Counting(StudentTrainer):
    weighting = "ce"
"""
IMPORTED = ["layers.py", "parts/__init__.py", "parts/deep.py", "parts/flat.py"]


@pytest.fixture
def of_parts(tmp_path, monkeypatch):
    """A finished run of a network and a method whose files import neighbours, and the folder of these files."""
    mine = tmp_path / "mine"
    for place, text in (NEIGHBOURS | {"nets.py": MADE_OF_PARTS, "method.py": METHOD_OF_PARTS}).items():
        (mine / place).parent.mkdir(parents=True, exist_ok=True)
        (mine / place).write_text(text)
    monkeypatch.chdir(mine)
    small = (
        "--train-limit 150 --device cpu --precision fp32 --teacher.epochs 2 --teacher.snapshots 2 --student.epochs 1"
    )
    nets = "--teacher.model nets.py:small --student.model nets.py:small --students attention method.py:Counting"
    assert cli.main([*small.split(), *nets.split(), "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "run/summary.json").unlink()
    return tmp_path / "run", mine


def test_neighbours_are_kept_and_hashed(of_parts):
    run, mine = of_parts
    for phase, record in (("teacher", "snapshots.json"), ("students/Counting", "student.json")):
        known = read_json(run / phase / record)["setup"]["model"]
        assert known["neighbours"] == {place: sha256_of(mine / place) for place in IMPORTED}
        for place in IMPORTED:
            assert (run / phase / "model" / place).read_text() == NEIGHBOURS[place]
        assert not (run / phase / "model/beside.py").exists()
    assert [*read_json(run / "students/Counting/student.json")["setup"]["method"]["neighbours"]] == ["layers.py"]
    assert (run / "students/Counting/method/layers.py").is_file()


@pytest.mark.filterwarnings("default")
@pytest.mark.full
def test_copies_stand_in_for_files_that_are_gone(of_parts, tmp_path, capsys):
    run, mine = of_parts
    shutil.move(mine, tmp_path / "gone")
    told = f"{mine}/nets.py is missing: its copy {run}/"
    with pytest.warns(UserWarning, match=f"^{told}students/attention/model.py is run in its place$"):
        load_student(run / "students/attention")
    with pytest.warns(UserWarning, match=told):
        assert teacher_of(run / "students/attention") is not None
    with pytest.warns(UserWarning, match=told):
        assert len(SnapshotEnsemble.load(run / "teacher")) == 2
    code = "import sys; from eekd.train import __main__ as cli; sys.exit(cli.main(sys.argv[1:]))"
    for flags in (["--resume", run], ["student", "--teacher", run, "--students", "last", "--out", tmp_path / "new"]):
        ended = subprocess.run([sys.executable, "-c", code, *map(str, flags)], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert f"{told}teacher/model.py is run" in ended.stderr
    (run / "students/attention/model/parts/deep.py").unlink()
    with pytest.raises(FileNotFoundError, match="^.*/students/attention/model/parts/deep.py is missing or not a file$"):
        load_student(run / "students/attention")


@pytest.mark.bad_input
@pytest.mark.parametrize("file", ["layers.py", "parts/deep.py"])
def test_a_neighbour_that_changed_is_named(of_parts, file, tmp_path, capsys):
    run, mine = of_parts
    (mine / file).write_text(NEIGHBOURS[file] + "# another\n")
    assert cli.main(["--resume", str(run)]) == 2
    told = f"error: {mine}/{file} must be what it was when {run}/teacher/snapshots.json was written, got another"
    assert capsys.readouterr().err.startswith(f"{told} content: {run}/teacher/model/{file} is a copy of what it was")
    with pytest.raises(ValueError, match=f"^{mine}/{file} must be what it was when the network in .* got another"):
        load_student(run / "students/attention")
    (mine / file).unlink()
    assert cli.main(["--resume", str(run)]) == 2
    told = f"error: {mine}/{file}, which nets.py imports, is missing: {run}/teacher/model/{file} is a copy of it"
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.bad_input
def test_a_neighbour_that_was_not_there_is_named(of_parts, capsys):
    run, mine = of_parts
    (mine / "torch.py").write_text("")  # which a file imports by that name
    assert cli.main(["--resume", str(run)]) == 2
    assert f"{mine}/torch.py must be what it was when" in capsys.readouterr().err


def test_a_run_from_before_neighbours_were_hashed_goes_on(of_parts):
    run, _ = of_parts
    for path in (run / "teacher/snapshots.json", *run.glob("students/*/student.json")):
        record = read_json(path)
        del record["setup"]["settings"]["repeats"]  # a setting that is younger
        for what in ("model", "method"):
            record["setup"].get(what, {}).pop("neighbours", None)
        write_json_atomic(path, record)
    assert cli.main(["--resume", str(run)]) == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("import does_not_exist", ImportError, "nets.py cannot be run: No module named 'does_not_exist'$"),
        ("def net(:", ValueError, "nets.py cannot be run: invalid syntax in .*nets.py, line 1$"),
        ("from torch import nn\nnet = nn.Linear(2, 2)", TypeError, "must be a function that returns .*, got a Linear$"),
        ("net = 5", TypeError, "nets.py:net' must be callable with the keywords"),
        ("from torch import nn\nclass net(nn.Module): pass", ValueError, "fails: TypeError: .* argument 'num_classes'"),
        ("other = 5", AttributeError, "nets.py must define 'net', a function that returns an nn.Module$"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, text, error, told):
    (tmp_path / "nets.py").write_text(text)
    with pytest.raises(error, match=told):
        models.build(f"{tmp_path}/nets.py:net", num_classes=2)


@pytest.mark.bad_input
def test_a_record_names_no_file_outside_its_folder(tmp_path):
    (tmp_path / "phase").mkdir()
    known = {"file": str(tmp_path / "gone.py"), "sha256": "0" * 64, "neighbours": {"../secret.py": "0" * 64}}
    with pytest.raises(ValueError, match="must have a record of neighbours in the folder of model, got"):
        kept_code.stand_in(tmp_path / "phase", {"model": known})
