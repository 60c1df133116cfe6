"""Methods of one's own, those of examples/: they train, resume, run under torchrun, read banks and are compared."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from killed import EVERY_STEP, Killed, killer, untimed
from processes import ENVIRONMENT, TORCHRUN
from recipes import small_run

from eekd.bank.__main__ import main as bank
from eekd.compare import __main__ as compare
from eekd.io.files import read_json, sha256_of
from eekd.io.tensors import load_tensors
from eekd.method import weightings
from eekd.report.page import report
from eekd.train import Callback, Session, StudentTrainer, Trainer, prepare, resume, teaching, train, train_student
from eekd.train import __main__ as cli
from eekd.train.metrics import MetricsLogger, PhaseTimer
from eekd.train.replay import replay
from eekd.train.student import method_of, read_student

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
OWN = {name: f"{EXAMPLES / file}:{name}" for name, file in
       {"surest": "own_weighting.py", "Hint": "own_loss.py", "Curriculum": "curriculum.py"}.items()}  # fmt: skip
PHASE = dict(model="mlp64", epochs=3, batch_size=50)
CONFIG = small_run(dict(snapshots=3), {}, PHASE, train_limit=150, students=("ce", *OWN.values()))
SMALL = [  # CONFIG but for the students
    *("--train-limit", "150", "--device", "cpu", "--precision", "fp32", "--channels-last=false"),
    *("--teacher.model", "mlp64", "--teacher.epochs", "3", "--teacher.snapshots", "3", "--teacher.batch-size", "50"),
    *("--student.model", "mlp64", "--student.epochs", "3", "--student.batch-size", "50"),
]
EPOCH = 3  # steps


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(weightings, "_REGISTRY", dict(weightings._REGISTRY))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with all examples, which tests only read."""
    return train(CONFIG, tmp_path_factory.mktemp("own") / "run")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sentence(error) -> str:
    told = str(error.value)
    assert "\n" not in told
    return told


# ---- the examples ----


def test_examples_are_at_most_30_lines():
    for name, where in OWN.items():
        text = Path(where.rpartition(":")[0]).read_text()
        code = text.split('"""\n', 1)[1].strip().splitlines()
        assert len([line for line in code if line]) <= 30, name


def test_a_student_is_named_after_its_method_and_keeps_the_file(run):
    assert {path.name for path in (run / "students").iterdir()} == {"ce", *OWN}
    for name, where in OWN.items():
        file, folder = Path(where.rpartition(":")[0]), run / "students" / name
        record = read_student(folder)
        assert record["weighting"] == name and record["setup"]["phase"] == name
        assert record["setup"]["method"] == {"file": str(file), "sha256": sha256_of(file), "neighbours": {}}
        assert (folder / "method.py").read_bytes() == file.read_bytes()
        assert record["teacher"]["snapshots"] and len(record["teacher"]["snapshots"]) == 3
    assert "method" not in read_student(run / "students/ce")["setup"]
    assert [row["name"] for row in read_json(run / "summary.json")["rows"]][-4:] == ["ce", *OWN]
    page = report(run).read_text()
    assert all(name in page for name in OWN)


def test_a_loss_of_ones_own_trains_what_it_brings(run):
    folder = run / "students/Hint"
    assert all(math.isfinite(row["train_hint"]) for row in rows(folder))
    assert rows(folder)[-1]["train_hint"] < rows(folder)[0]["train_hint"]
    learned = load_tensors(folder / "criterion.safetensors", read_student(folder)["criterion_sha256"])
    fresh = method_of(OWN["Hint"]).trainer(Session(CONFIG), run / "teacher").own_criterion.state_dict()
    assert learned.keys() == fresh.keys() == {"map.weight", "map.bias"}
    assert not torch.equal(learned["map.weight"], fresh["map.weight"])
    data = bytearray((folder / "criterion.safetensors").read_bytes())
    data[-1] ^= 1
    copy = shutil.copytree(folder, folder.parent.parent / "damaged")
    (copy / "criterion.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="criterion.safetensors was changed or damaged"):
        read_student(copy)
    shutil.rmtree(copy)


def test_a_schedule_over_snapshots(run):
    weights = [row["weights"] for row in rows(run / "students/Curriculum")]
    assert weights == [pytest.approx([1 / m] * m) for m in (1, 2, 3)]
    lines = (run / "students/Curriculum/metrics.csv").read_text().splitlines()
    table = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [row["weights_3"] for row in table] == ["", "", str(weights[2][2])]
    assert [float(row["val_loss"]) for row in table] == [row["val_loss"] for row in rows(run / "students/Curriculum")]


def test_a_weighting_of_ones_own_weighs(run):
    session = Session(CONFIG)
    trainer = StudentTrainer(session, run / "teacher", "uniform")
    surest = method_of(OWN["surest"]).weighting
    batch = next(trainer.batches_from(0))
    scores = weightings.get(surest).log_weights(batch.teacher.logits, batch.labels)
    first = 2 * batch.teacher.logits[0].log_softmax(1).amax(1)
    assert torch.allclose(scores[:, 0], first)
    weights = rows(run / "students/surest")[-1]["weights"]
    assert weights == sorted(weights) and weights[0] < weights[2]  # later snapshots are surer


def test_killed_after_every_step_it_goes_on_to_the_same_bits(run, tmp_path):
    session = prepare(dataclasses.replace(CONFIG, save_every=EVERY_STEP))
    progress, out = killer(*range(1, 100)), tmp_path / "run"
    for _ in range(100):
        try:
            go = (resume, (out,)) if (out / "config.json").exists() else (train, (session.config, out))
            go[0](*go[1], session=session, progress=progress)
            break
        except Killed:
            pass
    for name in OWN:
        one, two = run / "students" / name, out / "students" / name
        assert sha256_of(one / "student.safetensors") == sha256_of(two / "student.safetensors")
        assert untimed(one) == untimed(two)
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


def test_from_a_bank(run, tmp_path):
    where = tmp_path / "bank"
    assert not bank(["--teacher", str(run), "--out", str(where), "--views", "3", "--features", "all"])
    config = dataclasses.replace(CONFIG, bank=str(where))
    out = train(config, tmp_path / "run")
    for name in OWN:
        one, two = rows(run / "students" / name), rows(out / "students" / name)
        assert [row["train_loss"] for row in two] == pytest.approx([row["train_loss"] for row in one], rel=1e-3)
        assert read_student(out / "students" / name)["teacher"]["bank"]
    plain = tmp_path / "plain"
    assert not bank(["--teacher", str(run), "--out", str(plain), "--views", "1", "--features", "none"])
    with pytest.raises(ValueError, match="must hold features for student Hint, got --features none$"):
        prepare(dataclasses.replace(config, bank=str(plain)))
    prepare(dataclasses.replace(config, bank=str(plain), students=(OWN["surest"], OWN["Curriculum"])))


def test_under_torchrun(run, tmp_path):
    """Two processes have the same weights after every step, those of one process up to rounding."""
    command = [*TORCHRUN, "--nproc-per-node", "2", "-m", "eekd.train", "student", "--teacher", run, "--out", "two"]
    more = ["--check-replicas", "1", "--students", *OWN.values()]
    done = subprocess.run([*map(str, command), *more], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in OWN:
        one, two = rows(run / "students" / name), rows(tmp_path / "two/students" / name)
        if name != "Hint":
            assert two[0]["train_loss"] == pytest.approx(one[0]["train_loss"], rel=0.05)
        assert two[-1]["step"] == one[-1]["step"]


def test_a_loop_of_ones_own_under_torchrun():
    command = [*TORCHRUN, "--nproc-per-node", "2", EXAMPLES / "ddp_loop.py", 2]
    done = subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(re.fullmatch(r"validation accuracy ([\d.]+)%\n", done.stdout)[1]) > 50


def test_in_python(run, tmp_path):
    def flat(snapshot_logits, labels):
        return None

    class Doubled(StudentTrainer):
        weighting = "last"

        def compute_loss(self, batch):
            loss, measured = super().compute_loss(batch)
            return 2 * loss, measured

    for own in (flat, Doubled):
        record = train_student(CONFIG, run / "teacher", own, tmp_path / own.__name__)
        assert record["weighting"] == own.__name__
        assert record["setup"]["method"]["sha256"] == sha256_of(__file__)
    assert len(read_student(tmp_path / "Doubled")["teacher"]["snapshots"]) == 1
    uniform = train_student(CONFIG, run / "teacher", "uniform", tmp_path / "uniform")
    assert read_student(tmp_path / "flat")["sha256"] == uniform["sha256"]


# ---- compared ----


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison with methods in files of its own, and these files."""
    folder = tmp_path_factory.mktemp("compared")
    for where in OWN.values():
        shutil.copy(where.rpartition(":")[0], folder)
    assert compare.main(command(folder)) == 0
    return folder


def command(folder: Path, *more: str) -> list[str]:
    names = [f"{folder}/own_loss.py:Hint", f"{folder}/own_weighting.py:surest", *more]
    names = ["ce", *names, f"{folder}/own_weighting.py:surest-online"]
    return [*SMALL, "--seeds", "1", "--out", str(folder / "out"), "--methods", *names]


def test_own_methods_are_compared(compared):
    study = read_json(compared / "out/study.json")
    assert [row["name"] for row in study["methods"]] == ["ce", "Hint", "surest", "surest-online"]
    assert all(row["over_ce"]["n"] == 1 for row in study["methods"][1:])
    assert "| surest, online | `surest-online` |" in (compared / "out/study.md").read_text()
    cells = compared / "out/seed-0/students"
    assert (cells / "Hint/method.py").read_text() == (compared / "own_loss.py").read_text()
    shutil.copytree(cells / "Hint", cells / "Hint (copy)")
    times = {path: path.stat().st_mtime_ns for path in cells.glob("*/student.json")}
    assert compare.main(command(compared, f"{compared}/curriculum.py:Curriculum")) == 0
    assert [row["name"] for row in read_json(compared / "out/study.json")["methods"]] == [
        "ce", "Curriculum", "Hint", "surest", "surest-online"
    ]  # fmt: skip
    assert times.items() <= {path: path.stat().st_mtime_ns for path in cells.glob("*/student.json")}.items()


@pytest.mark.bad_input
def test_a_changed_method_is_not_compared_with_what_it_was(compared, capsys):
    file = compared / "own_loss.py"
    before = file.read_text()
    file.write_text(before.replace("0.1 * hint", "0.2 * hint"))
    assert compare.main(command(compared)) == 2
    file.write_text(before)
    told = capsys.readouterr().err
    assert told.startswith(f"error: {file} must be what it was when ") and told.count("\n") == 1
    assert compare.main([*command(compared), f"{compared}/other.py:Hint"]) == 2
    assert "methods must have different names" in capsys.readouterr().err


# ---- what is wrong ----


@pytest.mark.bad_input
@pytest.mark.parametrize("done", ["in progress", "finished"])
def test_a_changed_file_refuses_to_resume(tmp_path, capsys, done):
    file = shutil.copy(EXAMPLES / "curriculum.py", tmp_path)
    session = prepare(dataclasses.replace(CONFIG, students=(f"{file}:Curriculum", "ce"), save_every=EVERY_STEP))
    stop = 3 * EPOCH + 2 if done == "in progress" else 6 * EPOCH + 2
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=killer(stop))
    Path(file).write_text(Path(file).read_text().replace("youngest", "least old"))
    assert cli.main(["--resume", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {file} must be what it was when {tmp_path}/run/students/Curriculum/")
    assert f"got another content: {tmp_path}/run/students/Curriculum/method.py is a copy of what it was" in told
    assert told.count("\n") == 1
    shutil.copy(tmp_path / "run/students/Curriculum/method.py", file)
    assert cli.main(["--resume", str(tmp_path / "run")]) == 0


BAD = """
from torch import nn
from eekd.train import StudentTrainer

number = 3

class Net(nn.Module):
    pass

class uniform(StudentTrainer):
    pass

class Left(StudentTrainer):
    def setup(self):
        super().setup()
        self.map = nn.Linear(3, 3)
"""


@pytest.mark.bad_input
@pytest.mark.parametrize(("name", "told"), [
    ("number", "number must be a weighting's function or a subclass of eekd.train.StudentTrainer, got int"),
    ("Net", "Net must be a weighting's function or a subclass of eekd.train.StudentTrainer, got <class '.*Net'>"),
    ("uniform", "a method's name must be one that eekd does not use itself, got 'uniform'"),
    ("absent", ".*bad.py must define 'absent', a weighting's function or a subclass of .*"),
])  # fmt: skip
def test_mistakes_end_before_a_run_begins(tmp_path, monkeypatch, capsys, name, told):
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*SMALL, "--students", f"bad.py:{name}", "--out", "run"]) == 2
    assert re.fullmatch(f"error: {told}\n", capsys.readouterr().err)
    assert compare.main([*SMALL, "--methods", f"bad.py:{name}", "--out", "run"]) == 2
    assert re.fullmatch(f"error: {told}\n", capsys.readouterr().err) and not (tmp_path / "run").exists()


@pytest.mark.bad_input
def test_a_module_that_would_not_be_trained_is_refused(run, tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    with pytest.raises(ValueError, match="^Left.map must be part of what build_criterion returns, for it is not "):
        train_student(CONFIG, run / "teacher", f"{tmp_path / 'bad.py'}:Left", tmp_path / "student")


@pytest.mark.bad_input
def test_a_measurement_keeps_its_shape(run, tmp_path):
    class Changing(StudentTrainer):
        def compute_loss(self, batch):
            loss, measured = super().compute_loss(batch)
            return loss, measured | {"weights": torch.ones(1 + self.step)}

    with pytest.raises(ValueError, match=r"^measurement weights must have shape \(1,\) all epoch, got \(2,\)$"):
        train_student(CONFIG, run / "teacher", Changing, tmp_path / "student")


class Wild(StudentTrainer):
    """Its loss is not finite at the second step."""

    def compute_loss(self, batch):
        loss, measured = super().compute_loss(batch)
        return loss * (math.nan if batch.index[0] == self.wild else 1), measured


@pytest.mark.bad_input
def test_the_guard_keeps_a_loss_of_ones_own_from_the_weights(run, tmp_path, monkeypatch):
    loader = Session(CONFIG).loader("train", CONFIG.student, train=True)
    monkeypatch.setattr(Wild, "wild", loader.indices()[1][0].item(), raising=False)
    with pytest.raises(FloatingPointError, match=r"^Wild: the loss became nan in .* step 2, .* is the loss, nan in 1"):
        train_student(CONFIG, run / "teacher", Wild, tmp_path / "student")
    with pytest.raises(ValueError, match="must be of one of eekd's methods, got 'Wild', which has a loss of its own"):
        replay(tmp_path / "student/non-finite-2.json")


@pytest.mark.bad_input
def test_the_kernel_beneath_a_loss_of_ones_own_is_checked(run, tmp_path, monkeypatch):
    monkeypatch.setattr("eekd.train.loss_check.differs", lambda *given: "loss is wrong")
    with pytest.raises(FloatingPointError, match="^Hint: loss is wrong, by backend"):
        train_student(CONFIG, run / "teacher", OWN["Hint"], tmp_path / "student")


# ---- a trainer and its callbacks ----


def test_a_trainer_without_callbacks_writes_nothing_and_has_the_same_bits(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = Session(CONFIG)
    network = session.network(CONFIG.teacher, 0)
    trained = Trainer(session, CONFIG.teacher, network, "plain").fit()
    assert not list(tmp_path.iterdir())
    weights = load_tensors(run / "teacher/snapshot-3.safetensors")
    assert all(torch.equal(weights[name], x) for name, x in network.state_dict().items())
    assert [row["val_loss"] for row in trained] == [row["val_loss"] for row in rows(run / "teacher")]


def test_callbacks_are_called_in_the_order_of_a_phase(run):
    events = []

    class Watch(Callback):
        pass

    for name, method in vars(Callback).items():
        if name in ("running", "fetching", "validating") or name.startswith("on_"):

            def watched(self, trainer, *args, name=name, then=method):
                events.append(name)
                return then(self, trainer, *args)

            setattr(Watch, name, watched)
    session = Session(dataclasses.replace(CONFIG, teacher=dataclasses.replace(CONFIG.teacher, epochs=3)))
    trainer = Trainer(session, CONFIG.teacher, session.network(CONFIG.teacher, 0), "t", callbacks=[Watch()])
    trainer.fit()
    step = ["fetching", "on_step_begin", "on_loss", "on_update", "on_step_end"]
    epoch = [*step * EPOCH, "on_pause", "validating", "on_epoch_end", "on_pause"]
    assert events == ["running", *epoch * 3]


def test_a_state_goes_on_in_another_trainer(run):
    session = Session(CONFIG)

    class Stop(Callback):
        def on_step_end(self, trainer):
            trainer.pause = trainer.step == 4

        def on_pause(self, trainer):
            if trainer.step == 4:
                self.state = trainer.state_dict()
                raise KeyboardInterrupt

    def trainer(*callbacks):
        return Trainer(session, CONFIG.teacher, session.network(CONFIG.teacher, 0), "t", callbacks=callbacks)

    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        trainer(stop).fit()
    other = trainer()
    other.load_state_dict(stop.state)
    assert (other.epoch, other.step) == (1, 4)
    assert [row["val_loss"] for row in other.fit()] == [row["val_loss"] for row in rows(run / "teacher")]


def test_every_source_of_a_teachers_outputs_gives_the_same_batches(tmp_path, monkeypatch):
    """Run, remembered, and read from a bank, whose dtype rounds."""
    still = dataclasses.replace(CONFIG, augment="none", students=())
    teacher = train(still, tmp_path / "run") / "teacher"
    assert not bank(["--teacher", str(teacher.parent), "--out", str(tmp_path / "bank"), "--features", "all"])
    from_bank = dataclasses.replace(still, bank=str(tmp_path / "bank"), students=("attention",))
    sources = {}
    for config, limit in ((still, 0), (still, 2**30), (from_bank, 0)):
        monkeypatch.setattr(teaching, "REMEMBERED", limit)
        trainer = StudentTrainer(Session(config), teacher)
        batches = []
        for batch in trainer.batches_from(1):
            outputs = batch.teacher
            batches.append((batch.index, outputs.logits.float().clone(), outputs.features.float().clone()))
            assert len(outputs.of([2]).logits) == len(outputs.of(slice(1)).features) == 1
        assert trainer.timer.seconds("teacher") > 0
        sources[type(trainer.teacher)] = batches
    assert [*sources] == [teaching.RunningTeacher, teaching.RememberedTeacher, teaching.BankTeacher]
    for batches in zip(*sources.values(), strict=True):
        for running, remembered, stored in zip(*batches, strict=True):
            torch.testing.assert_close(remembered, running)
            torch.testing.assert_close(stored, running, rtol=2e-3, atol=2e-3)


def test_parts_of_a_step_do_not_share_the_memory_of_what_a_teacher_says(run):
    session = Session(dataclasses.replace(CONFIG, accumulate=2, augment="crop"))
    trainer = StudentTrainer(session, run / "teacher", "uniform")
    first, second = (batch for batch, _ in zip(trainer.batches_from(0), range(2), strict=False))
    kept = first.teacher.logits.clone()
    assert not torch.equal(first.teacher.logits, second.teacher.logits)
    next(trainer.batches_from(0))
    assert torch.equal(first.teacher.logits, kept)


def test_time_counts_once_in_the_innermost_stretch():
    timer = PhaseTimer(torch.device("cpu"))
    now = iter(range(100))
    timer._now = lambda: next(now)
    with timer("a"), timer("b"), timer("a"):
        pass
    assert (timer.seconds("a"), timer.seconds("b")) == (3, 2)
    with pytest.raises(KeyError), timer("c"):
        raise KeyError
    assert timer.seconds("c") == 1 and not timer._open


def test_columns_that_come_later_rewrite_the_table(tmp_path):
    log = MetricsLogger(tmp_path / "phase")
    log.open()
    log.write({"epoch": 1, "weights": [1.0]})
    log.write({"epoch": 2, "weights": [0.5, 0.5]})
    log.write({"epoch": 3})
    lines = (tmp_path / "phase/metrics.csv").read_text().split()
    assert lines == ["epoch,weights_1,weights_2", "1,1.0,", "2,0.5,0.5", "3,,"]
    assert [row["epoch"] for row in rows(tmp_path / "phase")] == [1, 2, 3]
