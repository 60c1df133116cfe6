"""Rows go to Weights & Biases and MLflow, here by modules that stand for them, and no failure of theirs ends a run."""

import sys
import types

import pytest
from small_runs import rows, small

from eekd.io.files import read_json
from eekd.train import __main__ as cli
from eekd.train import train, train_teacher


class Service(types.ModuleType):
    """Keeps what it is told: runs by id, each with its settings, its rows by step, and how it ended."""

    def __init__(self, name):
        super().__init__(name)
        self.runs, self.broken = {}, False

    def check(self):
        if self.broken:
            raise ConnectionError("nobody answers\nat all")


class Wandb(Service):
    def init(self, *, id, config, resume, **known):
        assert resume == "allow"
        run = self.runs.setdefault(id, {"config": config, "known": known, "rows": {}, "ends": []})

        def log(row, step):
            self.check()
            run["rows"].setdefault(step, row)

        return types.SimpleNamespace(log=log, finish=lambda exit_code: run["ends"].append(exit_code))


class Mlflow(Service):
    def MlflowClient(self):
        self.check()
        return self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        self.experiment = name
        return "1"

    def create_run(self, experiment, run_name):
        assert experiment == "1"
        self.runs[run_name] = {"config": {}, "rows": {}, "ends": []}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_name))

    def log_param(self, run, key, value):
        self.runs[run]["config"][key] = value

    def log_metric(self, run, key, value, step):
        self.check()
        self.runs[run]["rows"].setdefault(step, {})[key] = value

    def set_terminated(self, run, status):
        self.runs[run]["ends"].append(status)


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    return sys.modules["wandb"]


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", Mlflow("mlflow"))
    return sys.modules["mlflow"]


def numbers(row):
    flat = {f"{k}_{i}": x for k, v in row.items() if isinstance(v, list) for i, x in enumerate(v, 1)}
    return {k: v for k, v in row.items() if not isinstance(v, list) and v is not None} | flat


def test_every_row_of_every_phase_is_logged(tiny, tmp_path, wandb, mlflow):
    config = small(tiny, students=("ce", "uniform"), wandb=True, mlflow=True)
    out = train(config, tmp_path / "run")
    for phase in ("teacher", "students/ce", "students/uniform"):
        known, wanted = read_json(out / phase / "trackers.json"), {r["epoch"]: numbers(r) for r in rows(out / phase)}
        one, two = wandb.runs[known["wandb"]], mlflow.runs[known["mlflow"]]
        assert one["rows"] == two["rows"] == wanted and len(wanted) == 3
        assert one["known"]["name"] == known["mlflow"] == f"run/{phase.split('/')[-1]}"
        assert one["known"]["group"] == "run" and one["known"]["project"] == mlflow.experiment == "eekd"
        assert one["config"]["teacher"]["epochs"] == two["config"]["teacher.epochs"] == 3
        assert (one["ends"], two["ends"]) == ([0], ["FINISHED"])
    assert len(wandb.runs) == len(mlflow.runs) == 3


def test_a_phase_that_is_gone_on_with_is_the_same_run_there(tiny, tmp_path, wandb, mlflow, monkeypatch):
    config = small(tiny, wandb=True, mlflow=True, save_every=1e-9)

    def stop(phase, done, total, known):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_teacher(config, tmp_path / "run/teacher", progress=stop)
    assert [run["ends"] for run in (*wandb.runs.values(), *mlflow.runs.values())] == [[1], ["FAILED"]]
    train_teacher(config, tmp_path / "run/teacher", resume=True)
    for service in (wandb, mlflow):
        (run,) = service.runs.values()
        assert sorted(run["rows"]) == [1, 2, 3]
    assert list(wandb.runs.values())[0]["ends"] == [1, 0]


@pytest.mark.parametrize("when", ["at first", "later"])
def test_a_service_that_fails_is_a_warning(tiny, tmp_path, wandb, mlflow, when):
    config = small(tiny, students=(), wandb=True, mlflow=True)
    mlflow.broken = when == "at first"

    def fail(phase, done, total, known):
        wandb.broken = mlflow.broken = True

    with pytest.warns(RuntimeWarning) as told:
        train_teacher(config, tmp_path / "teacher", progress=fail)
    said = sorted(str(warning.message) for warning in told)
    assert [text.split()[0] for text in said] == ["mlflow", "wandb"]
    assert all(text.endswith("has them all: ConnectionError: nobody answers") for text in said)
    assert len(rows(tmp_path / "teacher")) == 3


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said_before_the_run(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main([f"--{name}", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"error: {name} is not installed; pip install 'eekd[{name}]'\n"
    assert not (tmp_path / "run").exists()


def test_train_prints_a_line_for_every_epoch_unless_progress_is_given(tiny, tmp_path, capsys):
    config = small(tiny, students=("uniform",))
    train(config, tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]
    assert [line.partition(",")[0] for line in said] == [
        f"{phase}: epoch {epoch}/3" for phase in ("teacher", "uniform") for epoch in (1, 2, 3)
    ]
    accuracy = rows(tmp_path / "run" / "teacher")[-1]["val_accuracy"]
    assert said[2].endswith(f"validation accuracy {accuracy:.2%}")
    train(config, tmp_path / "quiet", progress=lambda *known: None)
    assert "epoch" not in capsys.readouterr().out
