"""The command line: python -m eekd.train as a user types it."""

import dataclasses
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from eekd.io.files import sha256_of
from eekd.train import __main__ as cli
from eekd.train import screen
from eekd.train.config import Config, Teacher, settled
from eekd.train.presets import preset
from eekd.train.runtime import chosen

TEACHER = "--teacher.epochs 2 --teacher.snapshots 2 --teacher.model resnet8_w4"
SMALL = f"teacher {TEACHER} --student.epochs 1 --train-limit 150 --device cpu"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a small teacher, which tests only read."""
    out = tmp_path_factory.mktemp("run") / "teacher"
    assert cli.main([*SMALL.split(), "--out", str(out)]) == 0
    return out


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sentence(capsys) -> str:
    """What was printed, in one line without boxes."""
    printed = capsys.readouterr()
    return re.sub(r"[\s│╭╮╰╯─]+", " ", printed.err + printed.out).strip()


@pytest.mark.full
def test_the_default_command(tmp_path):
    """Everything, end to end, by the general recipe."""
    command = [sys.executable, "-m", "eekd.train", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits-1"
    assert "everything is in runs/digits-1" in done.stdout
    table = " ".join(done.stdout.split())
    for name in ("teacher", "snapshot 1", "ensemble", "CE only", "KD (last)", "EEKD with DKD's loss"):
        assert re.search(re.escape(name) + r" resnet8\S* [\d,]+ \d+ \d\d\.\d\d \d\d\.\d\d", table)
    assert "EEKD with DKD's loss: epoch 20/20" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    accuracy = {row["name"]: row["test_accuracy"] for row in summary["rows"]}
    assert accuracy["teacher"] > 0.93 and accuracy["attention_dkd"] > 0.85 and accuracy["snapshot 1"] < 0.99
    known = Config.load(run / "config.json")
    assert known == settled(dataclasses.replace(preset("digits"), device="cpu"), known)


def test_the_halves(run, here):
    assert json.loads((run / "summary.json").read_text())["rows"][-1]["kind"] == "ensemble"
    assert Config.load(run / "config.json").students == ()
    assert cli.main(["student", "--teacher", str(run), "--students", "uniform", "--out", "one"]) == 0
    assert cli.main(["student", f"--teacher={run}", "--out", "two", "--student.epochs", "2"]) == 0
    one, two = Config.load("one/config.json"), Config.load("two/config.json")
    assert (one.students, one.student.epochs, one.train_limit) == (("uniform",), 1, 150)
    assert (two.students, two.student.epochs) == (("ce", "last", "attention_dkd"), 2)
    assert one.teacher == two.teacher == Config.load(run / "config.json").teacher
    rows = json.loads((here / "two" / "summary.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "snapshot 1", "snapshot 2", "ensemble", *two.students]


def test_students_of_an_earlier_teacher_go_on(run, here):
    assert cli.main(["student", "--teacher", str(run), "--students", "uniform", "--out", "one"]) == 0
    assert cli.main(["--resume", "one"]) == 0


def test_a_run_runs_again_from_its_own_config(run, here, capsys):
    assert cli.main(["--config", str(run / "config.json"), "--out", "again[b]"]) == 0
    assert "everything is in again[b]" in sentence(capsys)  # brackets are no markup
    for snapshot in run.glob("teacher/*.safetensors"):
        assert sha256_of(snapshot) == sha256_of(here / "again[b]" / "teacher" / snapshot.name)


def test_flags_override_presets():
    typed = "--preset cifar100-crd:vgg13-vgg8 --teacher.epochs 10 --data cifar10 --train-limit None --seed 3"
    more = "--students ce entropy --student.milestones 0.5"
    base, made = preset("cifar100-crd:vgg13-vgg8"), cli.parse(f"{typed} {more}".split()).settings
    assert (made.teacher.epochs, made.teacher.lr, made.data) == (10, base.teacher.lr, "cifar10")
    assert (made.student.milestones, made.students, made.seed) == ((0.5,), ("ce", "entropy"), 3)
    assert made.student.temperature == 4


@pytest.mark.parametrize("underscores", [False, True])
def test_every_setting_is_a_flag(underscores, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out
    for name in ("data", "train-limit", "teacher.batch-size", "student.attention-objective", "teacher-run"):
        assert f"--{name} " in told
    flag = "--train_limit" if underscores else "--train-limit"
    assert cli.parse([flag, "5"]).settings.train_limit == 5


@pytest.mark.parametrize("mixed", ["--student.mixup 0.2", "--student.cutmix 1", "--student.label-smoothing 0.1"])
def test_images_without_one_class_are_taught_by_the_loss_that_takes_them(here, mixed):
    def students(*flags):
        return chosen(cli.parse([*flags]).settings, torch.device("cpu")).students

    assert students("--seed", "1") == ("ce", "last", "attention_dkd")
    assert students(*mixed.split()) == ("ce", "last", "attention")
    assert students("--students", "attention_dkd", *mixed.split()) == ("attention_dkd",)  # which is refused later
    for own in ("attention", "attention_dkd"), ("ce", "last", "attention_dkd"):  # a choice of the user's is kept
        (here / "own.json").write_text(Config(students=own).to_json())
        assert students("--config", "own.json", *mixed.split()) == own
    earlier = Config(teacher=Teacher(epochs=1, snapshots=1), students=("ce", "last", "attention_dkd"))
    (here / "earlier").mkdir()
    (here / "earlier/config.json").write_text(earlier.to_json())
    assert students("student", "--teacher", "earlier", *mixed.split()) == ("ce", "last", "attention")


def test_dry_run_writes_nothing(here, capsys):
    assert cli.main(["--dry-run", "--teacher.model", "resnet20"]) == 0
    told = sentence(capsys)
    assert "teacher resnet20 272,186 20" in told and "EEKD with DKD's loss resnet8_w4" in told and "MiB" in told
    took = r"[\d.]+ (s|min)"
    assert re.search(rf"It takes about {took} on this .*: teacher {took}, CE only {took}, KD", told)
    assert not list(here.iterdir())


def test_display_on_a_terminal():
    output = io.StringIO()
    with screen.Display(Console(file=output, force_terminal=True, width=100)) as display:
        known = {"epoch": 1, "epochs": 2, "train_loss": 0.5}
        display("last", 1, 4, known)
        display("last", 2, 4, known | {"val_accuracy": 0.75})
    assert "KD (last)" in output.getvalue() and "epoch 1/2  loss 0.500  val 75.00%" in output.getvalue()


def test_ctrl_c_is_one_line(here, monkeypatch, capsys):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("eekd.train.train", stop)
    assert cli.main([]) == 130
    assert sentence(capsys) == "stopped"


def test_out_of_memory_is_one_line(here, monkeypatch, capsys):
    import torch

    def burst(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("eekd.train.train", burst)
    assert cli.main([]) == 2
    assert "a smaller batch_size may fit" in sentence(capsys)


@pytest.mark.bad_input
@pytest.mark.parametrize(("typed", "wanted"), [
    ("--teacher.epoch 3", "perhaps you meant: --teacher.epochs"),
    ("--epochs 3", "--teacher.epochs"),
    ("--teacher.lr", "lr"),
    ("--teacher.lr fast", "--teacher.lr"),
    ("--teacher.lr 0", "teacher.lr must be above 0, got 0.0"),
    ("--teacher.lr nan", "teacher.lr must be a finite number, got nan"),
    ("--teacher.schedule cosin", "did you mean 'cosine'?"),
    ("--student.schedule cyclic", "must be one of step, cosine, one_cycle, got 'cyclic'"),
    ("--student.alpha 1.5", "student.alpha must be from 0 to 1, got 1.5"),
    ("--student.temperature -1", "student.temperature must be above 0"),
    ("--student.fusion probabilty", "did you mean 'probability'?"),
    ("--students ce atention", "did you mean 'attention'?"),
    ("--students ce ce", "students must be different from each other"),
    ("--precision fp8", "did you mean 'fp"),
    ("--compile yes", "unrecognized options: yes"),
    ("--val-fraction 1", "val_fraction must be between 0 and 1, got 1.0"),
    ("--train-limit 0.5", "train-limit"),
    ("--train-limit 0", "train_limit must be at least 1, got 0"),
    ("--teacher.snapshots 30", "teacher.snapshots must be from 1 to teacher.epochs (20), got 30"),
    ("--teacher.schedule cyclic --teacher.epochs 11", "a multiple of teacher.snapshots"),
    ("--preset digit", "did you mean 'digits'?"),
    ("--preset", "preset"),
    ("--config nowhere.json", "no config file at nowhere.json"),
    ("--config nowhere.json --preset digits", "--config must not be given with --preset, got nowhere.json and digits"),
    ("--data digit", "digit"),
    ("--teacher.model resnet21", "resnet2"),
    ("--student.model nowhere.py:net", "nowhere.py"),
    ("--device cuda:77", "on this machine, got 'cuda:77'"),
    ("teach", "the first word must be teacher, student or a flag, got 'teach'; did you mean 'teacher'?"),
    ("student", "student needs --teacher run"),
    ("student --teacher nowhere", "nowhere is not the folder of a run"),
    ("student --teacher RUN --teacher.epochs 3", "cannot be changed"),
    ("student --teacher RUN --split-seed 7", "was trained on other images"),
    ("--out RUN", "already holds something"),
    ("--teacher.lr 1e30 --out bad", "teacher: the loss became"),
])  # fmt: skip
def test_bad_flags(run, here, capsys, typed, wanted):
    try:
        code = cli.main([*typed.replace("RUN", str(run)).split()])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    told = sentence(capsys)
    assert wanted in told.lower().replace(str(run).lower(), "run") and "Traceback" not in told
    assert {path.name for path in here.iterdir()} <= {"bad"} and not list(here.rglob("s*.safetensors"))


@pytest.mark.bad_input
def test_without_rich_and_tyro_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None; import eekd.train.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "pip install 'eekd[train]'" in done.stderr


KNOWN = {"epochs": 200, "kind": "student", "gain": None}
ROWS = [
    KNOWN | {"name": "teacher", "model": "path/to/a/long/file.py:factory_of_networks", "parameters": 123_456_789,
             "val_accuracy": 0.98765, "test_accuracy": 0.97531, "seconds_per_epoch": 123.45},
    KNOWN | {"name": "confidence", "model": "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k", "parameters": 4_567,
             "val_accuracy": 1.0, "test_accuracy": 0.86421, "gain": -0.01234, "seconds_per_epoch": 1234.56},
]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_results_keep_numbers_whole_and_shorten_names(width):
    output = io.StringIO()
    screen.show(Console(file=output, width=width, markup=False), screen.results(ROWS))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert all(number in lines[3] for number in ("123,456,789", " 200 ", "98.77", "97.53", "123.45"))
    assert all(number in lines[4] for number in (" 4,567", "100.00", "86.42", "-1.23", "1234.56"))
    assert ("…" in lines[3]) == (width <= 80) and lines[3].split()[0] == ("teacher" if width >= 80 else "teach…")


@pytest.mark.parametrize("width", [60, 80])
def test_the_plan_keeps_numbers_whole(here, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    (here / "a_long_name_of_a_file.py").write_text(
        "from eekd.models import build\n\n\ndef factory_of_networks(**sizes):\n    return build('resnet8', **sizes)\n"
    )
    model = "a_long_name_of_a_file.py:factory_of_networks"
    assert cli.main(["--dry-run", "--teacher.model", model, "--device", "cpu", "--precision", "fp32"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(" tea"))
    assert re.search(r"…\s+77,754\s+20\s+420\s+[\d.]+ MiB\s+1\.5 MiB", row)


def test_groups_of_help_have_their_own_titles(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().out.replace("---", " "))
    assert "teacher options one ordinary training run, which keeps snapshots --teacher.model" in told
    assert "student options all start from the same weights and see the same images; only the loss differs" in told
