"""The scripts of results/ compute what their tables say."""

import argparse
import dataclasses
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch
from tables import study as study_tables
from torch.testing import assert_close

from eekd import ensemble_kd
from eekd.compare.runner import keep_settings
from eekd.data import load
from eekd.train.config import Config, Student, Teacher

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("results_attention", RESULTS / "attention.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return 4 * torch.randn(5, 64, 10), torch.randint(10, (64,)), torch.randn(64, 5)


def test_the_attention_learns_by_the_loss_of_the_op(study, rows):
    logits, labels, scores = rows
    ours, ops = (scores.clone().requires_grad_() for _ in range(2))
    study.attention_loss(ours, logits, labels, study.Cell("attention")).backward()
    result = ensemble_kd(torch.zeros(64, 10), logits, labels, scores=ops)
    result.attention_loss.backward()
    assert_close(ours.grad, ops.grad)
    nll = study.quality(scores.log_softmax(1), logits, labels, 5.0)["nll"]
    assert nll == pytest.approx(result.attention_loss.item(), abs=1e-6)


def test_no_weights_are_better_than_the_best_fixed_and_the_oracle_s(study, rows):
    logits, labels, _ = rows

    def nll(log_w):
        return study.quality(log_w.expand(64, 5), logits, labels, 2.0)["nll"]

    w = study.best_fixed(logits, labels, 2.0)
    assert w.sum() == pytest.approx(1, abs=1e-6)
    others = torch.distributions.Dirichlet(torch.ones(5)).sample((200,))
    best = min(nll(other.log()) for other in [*others, *torch.eye(5), torch.full((5,), 0.2)])
    assert nll(w.log()) < best + 1e-6
    assert nll(study.scores_of(study.Cell("oracle", temperature=2.0), logits, labels)) < nll(w.log())


@pytest.mark.parametrize("name", ["ce", "attention", "warm-up 5", "kl, literal", "held-out, temperature 1"])
def test_the_student_of_the_study_is_a_short_trainer(study, tmp_path, monkeypatch, name):
    assert len([line for line in inspect.getsource(study.CellTrainer).splitlines() if line]) <= 30
    teacher = dataclasses.replace(study.CONFIG.teacher, epochs=5, batch_size=50)
    phase = dataclasses.replace(study.CONFIG.student, epochs=2, batch_size=50)
    small = dict(data="digits", train_limit=150, precision="fp32", teacher=teacher, student=phase, device="cpu")
    monkeypatch.setattr(study, "CONFIG", dataclasses.replace(study.CONFIG, **small))
    monkeypatch.setattr(study, "HELD", 200)
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(study, "_IMAGES", {})
    study.half_size.cache_clear()
    known = study.parts(study.teacher(0))
    found = study.student(1, study.CELLS[name], known)
    study.half_size.cache_clear()
    assert 0.1 < found["val"]["accuracy"] <= 1 and ("target" in found["val"]) == (name != "ce")
    assert len(found["curve"]) == (0 if name == "ce" else 2)
    if name != "ce":
        weights = found["curve"][-1]["weights"]
        assert sum(weights) == pytest.approx(1, abs=1e-5) and found["curve"][0]["grad_attention"] > 0


def test_characters_are_drawn_into_a_folder_that_data_reads(tmp_path):
    np = pytest.importorskip("numpy")
    spec = importlib.util.spec_from_file_location("results_glyphs", RESULTS / "glyphs.py")
    glyphs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(glyphs)
    faces = {part: [np.random.default_rng(i).integers(16, size=(3, 8, 8), dtype=np.uint8) for i in (1, 2, 3)]
             for part in glyphs.PARTS}  # fmt: skip
    digest = glyphs.write_folder(str(tmp_path / "drawn"), faces, "A/.")
    data = load(str(tmp_path / "drawn"))
    assert list(data.classes) == ["U+002E", "U+002F", "U+0041"]
    assert {part: len(getattr(data, part)) for part in ("train", "val", "test")} == {"train": 9, "val": 9, "test": 9}
    faces["val"][0][0, 0, 0] ^= 1
    assert glyphs.checksum(faces) != digest


def test_no_design_is_in_two_parts():
    about = json.loads((RESULTS / "glyphs94.json").read_text())
    assert len(about["characters"]) >= 94 and sum(len(package["faces"]) for package in about["packages"]) >= 300
    parts = {}
    for package in about["packages"]:
        for face in package["faces"]:
            assert parts.setdefault(face, package["part"]) == package["part"], face


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("results_study", RESULTS / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("what, given, first, number", [
    ("tune", (None, None), 100, 2), ("run", (None, None), 0, 10), ("tune", (0, 3), 0, 3), ("run", (5, None), 5, 10),
    ("time", (None, None), 0, 2),
])  # fmt: skip
def test_the_study_tunes_on_other_seeds_than_it_compares(runs, what, given, first, number):
    args = runs.with_seeds(argparse.Namespace(what=what, first_seed=given[0], seeds=given[1]))
    assert (args.first_seed, args.seeds) == (first, number)


def test_trials_of_other_seeds_or_settings_are_not_put_together(runs, tmp_path):
    def tuning(of, **changed):
        config = json.loads(Config(teacher=Teacher(epochs=changed.pop("epochs", 20))).to_json())
        record = {"seeds": [100, 101], "config": config, "commits": [of], "chosen": {of: f"{of}@alpha=0.1"}}
        return record | {"trials": [{"of": of, "name": f"{of}@alpha=0.1"}]} | changed

    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(tuning("last")))
    uniform = tuning("uniform")
    uniform["config"]["students"] = ["ce"]  # which the comparison decides by itself
    assert runs.with_others(uniform, path)["chosen"].keys() == {"last", "uniform"}
    with pytest.raises(ValueError, match=r"seeds must be \[100, 101\], with which .* was made, got \[0, 1\]"):
        runs.with_others(tuning("uniform", seeds=[0, 1]), path)
    with pytest.raises(ValueError, match="config.teacher.epochs must be 20, with which .* was made, got 10"):
        runs.with_others(tuning("uniform", epochs=10), path)


def test_teachers_of_other_settings_are_not_shared(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WORK", tmp_path)
    made = tmp_path / "glyphs-mlp/seed-0/ordinary/teacher.json"
    made.parent.mkdir(parents=True)
    made.write_text("{}")
    config = Config(data="digits", precision="fp32", channels_last=True)
    keep_settings(tmp_path / "glyphs-mlp", config, 1, "")
    other = dataclasses.replace(config, seeds=10, student=Student(epochs=3), channels_last="auto")
    with pytest.raises(ValueError, match="teacher.lr must be 0.1, with which .*glyphs-mlp was made, got 0.2"):
        runs.share("glyphs-resnet", "run", dataclasses.replace(other, teacher=Teacher(lr=0.2)))
    assert not (tmp_path / "glyphs-resnet").exists()
    runs.share("glyphs-resnet", "run", other)
    assert (tmp_path / "glyphs-resnet/seed-0/ordinary/teacher.json").exists()
    runs.share("glyphs-mlp", "time", other)
    assert (tmp_path / "glyphs-mlp-time/seed-0/ordinary/teacher.json").exists()


def test_a_method_has_one_name_in_a_record_of_the_study(monkeypatch):
    cells = [{"name": name, "seed": 0, "test": {"accuracy": 0.5}} for name in ("last@alpha=0.1", "last-online")]
    monkeypatch.setattr(study_tables, "records", lambda: {"glyphs-mlp": {"cells": cells}})
    with pytest.raises(ValueError, match="one name for each method, got last@alpha=0.1 and last-online"):
        study_tables.scores()


def test_times_are_relative_to_last_of_the_same_seed(tmp_path, monkeypatch):
    seconds = {("last", 0): 10, ("last", 1): 20, ("attention@temperature=2", 0): 11, ("attention@temperature=2", 1): 24}
    cells = [{"name": name, "seed": seed, "seconds": spent} for (name, seed), spent in seconds.items()]
    monkeypatch.setattr(study_tables, "FOLDER", tmp_path)
    monkeypatch.setattr(study_tables, "records", study_tables.records.__wrapped__)
    (tmp_path / "glyphs-mlp-time.json").write_text(json.dumps({"cells": cells}))
    assert study_tables.times().splitlines()[2:] == ["| `attention` | 1.15 (1.10, 1.20) |"]


def test_the_mean_of_the_settings_is_taken_seed_by_seed():
    known = {
        "a": {"half": {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.8}, "last": dict.fromkeys(range(4), 0.5)},
        "b": {"half": {3: 0.6, 0: 0.5, 2: 0.9}, "last": dict.fromkeys(range(4), 0.5)},
    }
    assert study_tables.in_all(known, "half", "last") == pytest.approx({0: 0.0, 2: 0.3, 3: 0.2})
    assert study_tables.in_all(known | {"c": {}}, "half", "last") == {}


def test_the_study_says_of_a_claim_what_its_differences_say(tmp_path, monkeypatch):
    over = {"last": 0.0, "attention": 0.02, "half": -0.03, "uniform@temperature=2": 0.0}
    cells = [{"name": name, "seed": seed, "test": {"accuracy": 0.8 + gain + 0.001 * (seed % 2) * (name != "last")}}
             for name, gain in over.items() for seed in range(4)]  # fmt: skip
    monkeypatch.setattr(study_tables, "FOLDER", tmp_path)
    monkeypatch.setattr(study_tables, "records", study_tables.records.__wrapped__)
    record = {"cells": cells, "seeds": [0, 1, 2, 3]}
    (tmp_path / "glyphs-mlp.json").write_text(json.dumps(record))
    said = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in study_tables.claims().splitlines()[2:]}
    assert said["Attention teaches better than the last snapshot alone"].startswith("**holds**: +2.05 [")
    assert said["The half-way snapshot teaches better than the last"].startswith("**contradicted**: −2.95 [")
    assert said["EEKD is better than CRD"] == "not measured"
    rows = study_tables.methods().splitlines()
    assert any("`uniform` | +0.05 [−0.04, +0.14]" in row for row in rows)
    assert any("**+2.05 [" in row for row in rows) and any("80.00 ± 0.00 %" in row for row in rows)
    for cell in cells:
        cell["test"]["accuracy"] += 0.02 * (cell["name"] == "half") * (cell["seed"] % 2)
    (tmp_path / "fashion-mlp.json").write_text(json.dumps(record))
    rows = study_tables.methods().splitlines()
    assert rows[0].endswith(" | mean of the settings |")
    half = next(row for row in rows if "`half`" in row)
    assert [cell.split()[0] for cell in half.split(" | ")[2:]] == ["−1.95", "−2.95", "−2.45"]
    assert any("| `last` | 80.00 ± 0.00 % | 80.00 ± 0.00 % |  |" in row for row in rows)
    record["cells"] = [cell for cell in cells if cell["name"] != "half" or cell["seed"] < 3]
    (tmp_path / "fashion-mlp.json").write_text(json.dumps(record))
    half = next(row for row in study_tables.methods().splitlines() if "`half`" in row)
    assert [" (3 seeds)" in cell for cell in half.split(" | ")[2:]] == [True, False, True]
    [claim] = [row for row in study_tables.claims().splitlines() if "half-way" in row]
    assert claim.count(" (3 seeds)") == 2 and " seeds)" not in study_tables.sentence()
