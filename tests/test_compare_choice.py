"""Variants of methods, more teachers, tuning, the plan, and which method a comparison advises to take."""

import dataclasses
import io
import json
import math
from itertools import count
from statistics import mean, stdev

import pytest
import torch
from rich.console import Console
from scipy import stats

from eekd.compare import __main__ as cli
from eekd.compare import page, plan, screen
from eekd.compare.methods import METHODS, PAPER, READ, folder_of, method, spelled
from eekd.compare.plots import points, standing
from eekd.compare.screen import duration
from eekd.compare.study import cost, summarise
from eekd.compare.tuning import axes, trials
from eekd.compare.variants import SHARED
from eekd.compare.verdict import advice, reference, seeds_needed
from eekd.data.loader import SHOWN
from eekd.io.files import read_json
from eekd.io.tensors import load_tensors
from eekd.method import weightings
from eekd.method.rivals import RIVALS
from eekd.snapshots import read_manifest
from eekd.statistics import percent
from eekd.train import Session
from eekd.train.config import Config, Student
from eekd.train.student import method_of

bad_input = pytest.mark.bad_input
SMALL = (
    "--teacher.epochs 4 --teacher.snapshots 4 --teacher.model resnet8_w4 --student.epochs 2 --student.model resnet8_s2 "
    "--train-limit 120 --device cpu --precision fp32 --augment none"
)
NAMES = (
    "ce last last@temperature=2 last@alpha=0.9,temperature=2.0 uniform@epochs=1 uniform-online@lr=0.05 last-3 soup ema "
    "curriculum attention-tau1 dkd dist attention-dkd attention-dist fitnet at crd at@beta=10"
)


def compare(out, names=NAMES, *more, flags=SMALL, seeds=1) -> int:
    try:
        return cli.main([*flags.split(), "--methods", *names.split(), "--seeds", str(seeds), "--out", str(out), *more])
    except SystemExit as stop:
        return stop.code
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A finished comparison of all that is not the paper's, which tests only read."""
    out = tmp_path_factory.mktemp("choice") / "out"
    assert compare(out) == 0
    return out


# ---- variants ----


def test_a_variant_is_named_by_its_settings():
    assert folder_of("last@alpha=0.90,temperature=2.0") == folder_of("last@temperature=2,alpha=0.9")
    assert folder_of("last@alpha=0.9,temperature=2") == "last@temperature=2,alpha=0.9"
    assert folder_of("attention-online@scale=none,normalize=false") == "attention-online@normalize=false,scale=none"
    assert folder_of("dir@x=1/own.py:Hint@milestones=[0.5,0.8],lr=0.01") == "Hint@lr=0.01,milestones=[0.5,0.8]"
    how = method("attention-kl-online@temperature=2,milestones=[0.5,0.8]")
    assert (
        how.online
        and how.objective == "kl"
        and how.title == ("EEKD, objective kl, milestones [0.5,0.8], τ = 2, online")
    )
    student = how.student(Config())
    assert (student.temperature, student.milestones, student.attention_objective) == (2.0, (0.5, 0.8), "kl")
    assert method("dkd@beta=2").settings == {"beta": 2.0}
    assert (*SHOWN, "repeats") == SHARED
    assert [*map(spelled, ("attention_dkd@beta=2", "linear_increase", "soup"))] == [
        "attention-dkd@beta=2",
        "linear_increase",
        "soup",
    ]


def test_the_temperature_and_weight_of_a_rival_are_those_it_is_trained_by():
    for student in (Student(), Student(temperature=3.0), Student(beta=7.0), Student(temperature=3.0, beta=7.0)):
        config = Config(student=student)
        for name in ("dkd", "dist", "attention-dkd", "crd", "last", "ce", "dkd@beta=2", "dkd@temperature=2"):
            how = method(name)
            trained = method_of(how.weighting).trainer.settings(
                dataclasses.replace(config, student=how.student(config))
            )
            said = {"temperature": student.temperature or 5.0} | how.settings | how.own(config)
            assert said["temperature"] == trained.temperature and said.get("beta", trained.beta) == trained.beta, name
            assert ("beta" in said) == (how.rival is not None)
    assert method("dkd@beta=2").own(Config()) == {"temperature": 4.0} and method("last").own(Config()) == {}


def test_a_variant_trains_by_its_settings_from_the_same_teacher(out):
    record = read_json(out / "study.json")
    names = [row["name"] for row in record["methods"]]
    assert names == [
        "ce", "last", "last@temperature=2", "last@temperature=2,alpha=0.9", "uniform-online@lr=0.05",
        "uniform@epochs=1", "last-3", "soup", "ema", "curriculum", "attention-tau1", "dkd", "dist",
        "attention-dkd", "attention-dist", "fitnet", "at", "at@beta=10", "crd",
    ]  # fmt: skip
    students = out / "seed-0/students"
    known = {name: read_json(students / name / "student.json") for name in names}
    settings = {name: known[name]["setup"]["settings"] for name in names}
    assert [settings[name]["temperature"] for name in names[1:4]] == [5, 2, 2]
    assert [settings[name]["alpha"] for name in names[1:4]] == [0.5, 0.5, 0.9]
    assert settings["uniform-online@lr=0.05"]["lr"] == 0.05 and known["uniform@epochs=1"]["loss"]["temperature"] == 5
    assert (
        settings["ema"]["ema"] == 0.99 and settings["at@beta=10"]["beta"] == 10 and settings["dkd"]["temperature"] == 4
    )
    assert len({known[name]["sha256"] for name in names}) == len(names)
    assert {path.name for path in (out / "seed-0").iterdir() if path.is_dir()} == {"ordinary", "soup", "students"}
    assert known["last"]["setup"]["snapshots"] == known["last@temperature=2"]["setup"]["snapshots"]
    assert [entry["step"] for entry in known["last-3"]["teacher"]["snapshots"]] == [2, 3, 4]
    banked = {name for name in names if known[name]["teacher"] and known[name]["teacher"]["bank"]}
    assert set(names) - banked == {"ce", "uniform-online@lr=0.05", "fitnet", "at", "at@beta=10"}
    costs = {row["name"]: row["cost"] for row in record["methods"]}
    assert costs["uniform@epochs=1"]["student_training"] == costs["ce"]["student_training"] / 2
    assert costs["curriculum"]["teaching"] == 120 * 2 and costs["last"]["teaching"] == 120
    assert costs["fitnet"]["teaching_bank"] is None and costs["crd"]["teaching_bank"] == 120
    titles = {row["name"]: row["title"] for row in record["methods"]}
    for name, rival in RIVALS.items():
        row = name.replace("_", "-")
        used = {setting: settings[row][setting] for setting in rival.settings}  # as trained
        assert method(row).own(Config.from_json(json.dumps(record["config"]))) == used, name
    assert titles["dkd"] == "DKD, τ = 4, β = 8" and titles["at@beta=10"] == "AT, β = 10"
    text = (out / "study.md").read_text()
    assert (
        "| DKD, τ = 4, β = 8 | `dkd` |" in text
        and "| KD (last), τ = 2, α = 0.9 | `last@temperature=2,alpha=0.9` |" in text
        and "nan" not in text
    )


def test_variants_are_found_again(out, monkeypatch):
    monkeypatch.setattr("eekd.compare.runner.train_student", None)
    monkeypatch.setattr("eekd.compare.runner.train_teacher", None)
    before = read_json(out / "study.json")
    assert compare(out, "last@alpha=0.9,temperature=2 at@beta=1e1") == 0
    assert read_json(out / "study.json")["methods"] == before["methods"]


@pytest.mark.parametrize("name, augmented, once", [
    ("last", 20, 1), ("attention-online", 100, 5), ("fitnet", 20, 1), ("curriculum", 20, 5),
    ("curriculum@epochs=3", 3, 3),
])  # fmt: skip
def test_snapshots_run_once_where_images_are_not_augmented(name, augmented, once):
    how, config, flops = method(name), Config(), {"teacher": 100, "student": 10}
    for varies, passes in ((True, augmented), (False, once)):
        found = cost(how, len(how.epochs(config)), config, 7, 1, flops, varies)
        assert found["teaching"] == 7 * passes


def test_augmented_images_are_those_of_the_bank(tmp_path):
    flags = SMALL.replace("--augment none", "--augment crop --views 1")
    assert compare(tmp_path, "ce at", flags=flags) == 0
    known = read_json(tmp_path / "seed-0/students/at/student.json")
    assert known["teacher"]["bank"] and known["setup"]["bank"]


@bad_input
@pytest.mark.parametrize("names, told", [
    ("last@temprature=2", "'temprature' in 'last@temprature=2' is no setting of the student; did you mean 'temp"),
    ("last@temperature=hot", "temperature must be a finite number or nothing, got hot in 'last@temperature=hot'"),
    ("last@temperature=-1", "student.temperature must be above 0, got -1.0 in method 'last@temperature=-1'"),
    ("last@mixup=0.2", "mixup must be left to --student.mixup, for all see the same images, got 'last@mixup=0.2'"),
    ("last@repeats=2", "repeats must be left to --student.repeats, for all see the same images, got 'last@repeats=2'"),
    ("last --student.repeats 2", "student.repeats must be 1 with a bank, got 2"),
    ("ce fitnet@temperature=2", "temperature must be left out of a method that does not read it, got 'fitnet@temp"),
    ("last@temperature", "settings of a method must be last@SETTING=VALUE, without /, got 'last@temperature'"),
    ("last@weights=a/b", "settings of a method must be last@SETTING=VALUE, without /, got 'last@weights=a/b'"),
    ("last@alpha=0.1,alpha=0.2", "alpha must be set once, got 'last@alpha=0.1,alpha=0.2'"),
    ("lost@alpha=0.1", "no method 'lost'; did you mean 'last'?"),
    ("last@alpha=0.5 last@alpha=0.50", "methods must have different names, got last@alpha=0.5, last@alpha=0.50"),
    ("ce fitnet@model=mlp64", "method fitnet@model=mlp64: student.model must have feature maps"),
    ("last@model=resnet9", "method last@model=resnet9: name must be"),
])  # fmt: skip
def test_a_variant_that_cannot_be_is_refused_first(tmp_path, capsys, names, told):
    assert compare(tmp_path / "out", names) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {told}") and said.count("\n") == 1 and not (tmp_path / "out").exists()


@bad_input
@pytest.mark.parametrize("name", [
    "ce@temperature=2", "last@beta=3", "dkd@alpha=0.9", "dkd@fusion=logit", "last@fusion=logit", "soup@scale=1.0",
    "uniform@attention_objective=kl", "attention-dkd@detach_query=false", "attention-tau1@attention_objective=kl",
    "curriculum-online@embed_dim=32", "attention@beta=1", "uniform@normalize=false",
])  # fmt: skip
def test_a_variant_that_changes_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"must be left out of a method that does not read it, got '{name}'"):
        cli.parse(["--methods", "ce", name])


@bad_input
@pytest.mark.parametrize("flags, told", [
    ("ce dkd fitnet --student.beta 1", "student.beta must be left out, for each of dkd, fitnet has its own, got 1.0"),
    ("dkd@beta=2 at dist-online --student.beta 1", "for each of at, dist-online has its own, got 1.0: give NAME@beta="),
    ("ema@lr=0.01 --student.ema 0.9", "student.ema must be left out beside ema@lr=0.01, which has 0.99, got 0.9: give"),
])  # fmt: skip
def test_a_setting_of_all_that_some_would_not_take_is_refused(flags, told):
    with pytest.raises(ValueError, match=told):
        cli.parse(["--methods", *flags.split()])


def test_a_setting_of_all_that_all_take_is_none():
    for flags in ("ce dkd dkd@temperature=2 fitnet@beta=10 --student.beta 1", "last ema@ema=0.5 --student.ema 0.9"):
        cli.parse(["--methods", *flags.split()])


def test_what_changes_a_student_is_no_mistake():
    names = "last@ema=0.9", "ema@lr=0.01", "uniform@fusion=logit", "own.py:mine@beta=2", "sed@alpha=0"
    assert cli.parse(["--methods", *names]).methods == names
    cli.parse(["--methods", *(trial for name in METHODS for trial in trials(name))])
    assert READ.keys() >= RIVALS.keys()
    for name, rival in RIVALS.items():
        assert set(READ[name]) >= rival.settings.keys() and ("beta" in READ[name]) == ("beta" in rival.settings)


@bad_input
@pytest.mark.parametrize("name", ["own.py:ema", "dir/own.py:half-online", "own.py:soup@lr=0.01"])
def test_a_method_of_ones_own_has_a_name_of_its_own(name):
    with pytest.raises(
        ValueError, match="a method's name must be one that eekd does not use itself, got '(ema|half|soup)'"
    ):
        cli.parse(["--methods", "ce", name])


@bad_input
def test_a_registered_weighting_is_not_taken_for_another_method(monkeypatch):
    monkeypatch.setitem(weightings._REGISTRY, "soup", weightings.Weighting("soup", "mine", ("", ""), print))
    with pytest.raises(ValueError, match="a method's name must be one that eekd does not use itself, got 'soup'"):
        cli.parse(["--methods", "ce", "soup"])


@bad_input
def test_three_snapshots_are_needed_for_the_last_three(tmp_path, capsys):
    for name in ("last-3", "soup"):
        assert compare(tmp_path / "out", name, "--teacher.snapshots", "2") == 2
        told = f"error: teacher.snapshots must be at least 3 for method {name}, got 2\n"
        assert capsys.readouterr().err == told and not (tmp_path / "out").exists()


# ---- more teachers ----


def test_a_soup_is_the_mean_of_the_weights_with_statistics_of_its_own(out):
    folder, ordinary = out / "seed-0/soup/teacher", out / "seed-0/ordinary/teacher"
    mixed, states = load_tensors(folder / "snapshot-1.safetensors"), []
    for entry in read_manifest(ordinary)["snapshots"][-3:]:
        states.append(load_tensors(ordinary / entry["file"]))
    statistics = [name for name in mixed if "running_" in name or "num_batches" in name]
    for name in mixed.keys() - set(statistics):
        torch.testing.assert_close(mixed[name], torch.stack([state[name] for state in states]).mean(0))
    assert statistics and not any(torch.equal(mixed[name], states[-1][name]) for name in statistics)

    session = Session(Config.from_json((out / "seed-0/soup/config.json").read_text()))
    network = session.network(session.config.teacher, 0)
    network.load_state_dict(mixed)
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in session.loader("train", session.config.teacher, train=True):
            network.train()(batch.images)
    wanted = mean(x.mean((0, 2, 3))[0].item() for x in seen)
    assert mixed[f"{name}.running_mean"][0].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    known = read_json(out / "seed-0/soup/teacher.json")
    assert known["epochs"] == [4] and len(known["val"]["members"]) == 2 and known["seconds"] > 0
    assert read_json(out / "study.json")["ensembles"][-1]["kind"] == "soup"


# ---- tuning ----


def test_every_method_has_as_many_trials():
    for name in METHODS:
        assert len(trials(name)) == len({*map(folder_of, trials(name))}) == (1 if name == "ce" else 6), name
    assert trials("ce") == ["ce"] and "last@temperature=2,alpha=0.1" in trials("last")
    assert axes(method("dkd")) == {"temperature": (1.0, 2.0, 4.0), "beta": (2.0, 8.0)}
    assert axes(method("at"))["beta"] == (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
    assert trials("uniform@temperature=3,lr=0.05") == [
        "uniform@lr=0.05,temperature=3,alpha=0.1", "uniform@lr=0.05,temperature=3,alpha=0.5"
    ]  # fmt: skip


@pytest.mark.full
def test_tuning_chooses_by_validation_images_and_never_looks_at_test_images(tmp_path, capsys):
    more = "--tune", "--first-seed", "100"
    assert compare(tmp_path, "ce dist last@temperature=2", *more, seeds=2) == 0
    record = read_json(tmp_path / "tuning.json")
    assert record["seeds"] == [100, 101] and len(record["trials"]) == 1 + 6 + 2
    for trial in record["trials"]:
        values = []
        for seed in (100, 101):
            known = read_json(tmp_path / f"seed-{seed}/students/{trial['name']}/student.json")
            assert known["test"]["accuracy"] == known["val"]["accuracy"] == trial["val"][str(seed)]
            values.append(known["val"]["accuracy"])
        assert trial["mean"] == pytest.approx(mean(values))
    for name, chosen in record["chosen"].items():
        of = [trial for trial in record["trials"] if trial["of"] == name]
        assert next(t["mean"] for t in of if t["name"] == chosen) == max(t["mean"] for t in of)
    printed = capsys.readouterr().out
    assert "chosen: --methods " + " ".join(record["chosen"].values()) + "\n" in printed and ", test " not in printed
    assert not (tmp_path / "study.json").exists()
    assert compare(tmp_path, "ce", "--first-seed", "100") == 2
    assert "of the same images, all with --tune or all without" in capsys.readouterr().err


# ---- the plan ----


def test_a_dry_run_says_how_long_and_writes_nothing(out, tmp_path, capsys):
    assert compare(tmp_path / "new", NAMES, "--dry-run", seeds=3) == 0
    told = capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    assert "3 seeds x 19 methods = 57 students" in told and "finished." not in told and "It would take about" in told
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert compare(out, NAMES, "--dry-run", seeds=2) == 0
    assert "2 seeds x 19 methods = 38 students, of which 19 are finished." in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_the_plan_multiplies_what_was_timed(tmp_path, monkeypatch):
    each = {"teacher": 3.0, "ce": 1.0, "taught": 2.0, "snapshot": 0.001}
    monkeypatch.setattr(plan, "timed", lambda session: each)
    config = Config(
        train_limit=120,
        augment="none",
        student=Student(epochs=10),
        teacher=dataclasses.replace(Config().teacher, epochs=20),
    )
    session = Session(config)
    val, test = len(session.data.val), len(session.data.test)
    names = "ce", "last", "attention-m3", "uniform-online", "fitnet", "sed", "last@epochs=5"
    rows = {row["part"]: row for row in plan.plan(session, tmp_path, names, range(2), 4)}
    assert {part: row["number"] for part, row in rows.items()} == {
        "teacher, ordinary": 2, "teacher, sed": 8, "bank, ordinary": 2, "bank, sed": 2,
        **{f"student, {name}": 2 for name in names},
    }  # fmt: skip
    kept = len({4, 8, 12, 16, 20} | {6, 13, 20})
    wanted = {
        "teacher, ordinary": 20 * (3 + val * 0.001) + (val + test) * kept * 0.001,
        "bank, ordinary": kept * 4 * 120 * 0.001,
        "student, ce": 10 * (1 + val / 120 / 3),
        "student, last": 10 * (2 + 2 * val / 120 / 3) + val * 0.001,
        "student, last@epochs=5": 5 * (2 + 2 * val / 120 / 3) + val * 0.001,
        "student, fitnet": 10 * (2 + 2 * val / 120 / 3) + (val + 120) * 0.001,
        "student, uniform-online": 10 * (2 + 2 * val / 120 / 3) + (val + 120) * 5 * 0.001,
    }
    for part, seconds in wanted.items():
        assert rows[part]["seconds"] == pytest.approx(2 * seconds), part
    assert [duration(x) for x in (0.52, 45, 600, 7800, 200_000)] == [
        "0.52 s",
        "45 s",
        "10 min",
        "2 h 10 min",
        "2 d 8 h",
    ]


# ---- which to take ----


def scores(**means) -> dict:
    """Accuracies of 6 seeds around each mean, with differences of their own."""
    noise = [0.003, -0.002, 0.001, 0.0, -0.003, 0.001]
    return {
        name: {seed: value + noise[(seed + shift) % 6] for seed in range(6)}
        for shift, (name, value) in zip(count(), means.items(), strict=False)
    }


def test_the_best_of_those_above_both_references_is_advised():
    found = advice(scores(ce=0.80, last=0.82, uniform=0.85, attention=0.84))
    assert (found["take"], found["best"], found["against"]) == ("uniform", "uniform", None)
    assert found["text"].startswith("For your data take uniform: 85.00% of the validation images, ")
    assert "over last and" in found["text"] and "(6 seeds)" in found["text"] and "Undecided" not in found["text"]


def test_what_is_not_decided_is_said_with_the_seeds_it_takes():
    val = scores(ce=0.80, last=0.82, uniform=0.8205)
    found = advice(val)
    assert (found["take"], found["best"], found["against"]) == ("last", "uniform", "last")
    assert found["text"].startswith("For your data take last: ")
    assert "Undecided between uniform and last: +0.05 [" in found["text"]
    differences = [val["uniform"][seed] - val["last"][seed] for seed in range(6)]
    n, middle, spread = found["seeds"], mean(differences), stdev(differences)

    def half(n):
        return stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n)

    assert half(n) < middle <= half(n - 1) and f"about {n} seeds would decide" in found["text"]
    nothing = advice(scores(ce=0.80, last=0.8001))
    assert (nothing["take"], nothing["best"], nothing["against"]) == (None, "last", "ce")
    assert nothing["text"].startswith("Undecided between last and ce: ")
    alone = advice(scores(ce=0.83, last=0.80, uniform=0.79))
    assert alone["take"] == alone["best"] == "ce"  # no teacher helps here


def test_the_best_variant_stands_for_a_reference_that_is_not_compared():
    val = scores(ce=0.80) | {
        f"last@temperature={t}": x for t, x in zip((1, 2), scores(a=0.82, b=0.83).values(), strict=True)
    }
    assert reference(val, "ce") == "ce" and reference(val, "last") == "last@temperature=2"
    assert reference(val | scores(last=0.7), "last") == "last" and reference({}, "last") is None
    lucky = val | {"last@temperature=9": {5: 0.99}}  # one seed
    rows = [{"name": name, "n": len(of), "val": {"mean": mean(of.values())}} for name, of in lucky.items()]
    assert reference(lucky, "last") == standing({"methods": rows})["last"]["name"] == "last@temperature=2"
    found = advice(val | {"uniform": {seed: 0.85 + seed / 1e4 for seed in range(6)}})
    assert found["take"] == "uniform" and "over last@temperature=2 and" in found["text"]
    assert advice(val)["take"] == "last@temperature=2"


def test_the_best_variant_stands_for_its_method_in_claims_and_plots(out):
    record = read_json(out / "study.json")
    names = {"ema": "half@lr=0.05", "crd": "half@lr=0.2", "last": "last", "ce": "ce"}
    record["cells"] = [cell | {"name": names[cell["name"]]} for cell in record["cells"] if cell["name"] in names]
    val = {cell["name"]: cell["val"]["accuracy"] for cell in record["cells"]}
    best = max(("half@lr=0.05", "half@lr=0.2"), key=val.get)
    test = {cell["name"]: cell["test"]["accuracy"] for cell in record["cells"]}
    found = summarise(record, Config.from_json(json.dumps(record["config"])), record["flops"])
    [part] = next(row for row in found["claims"] if "half-way" in row["claim"])["parts"]
    assert part["difference"]["mean"] == pytest.approx(test[best] - test["last"])
    assert standing(found)["half"]["name"] == best and standing(found)["last"]["name"] == "last"


def test_methods_without_references_are_compared_with_each_other():
    found = advice(scores(uniform=0.80, attention=0.85))
    assert found["take"] == "attention" and "over uniform" in found["text"]


def test_little_that_is_known_is_not_advice():
    assert advice({})["text"] == advice({"ce": {0: 0.5}})["text"] == ""
    assert advice({"ce": {0: 0.5}, "last": {1: 0.6}})["text"] == ""
    one = advice({"ce": {0: 0.5}, "last": {0: 0.6}})
    assert one["take"] is None and one["text"] == (
        "Undecided between last and ce: +10.00 points on validation images (1 seed); "
        "more seeds would tell it from chance."
    )
    assert (
        seeds_needed([0.1])
        is seeds_needed([0.0, 0.0])
        is seeds_needed([121 / 144 - 120 / 144, 138 / 144 - 137 / 144])
        is seeds_needed([1e-9, 1.0, -1.0])
        is None
    )
    equal = advice({"ce": {0: 120 / 144, 1: 137 / 144}, "last": {0: 121 / 144, 1: 138 / 144}})
    assert equal["take"] is None and equal["text"].endswith("(2 seeds); more seeds would tell it from chance.")


@pytest.mark.parametrize("stray", [{9: 0.9}, {0: 0.9}, {0: 0.9, 1: 0.9, 9: 0.9}])
def test_a_method_that_lacks_seeds_is_left_out_of_the_advice(stray):
    val = scores(ce=0.80, last=0.82, uniform=0.85)
    whole, found = advice(val), advice(val | {"dkd": stray})
    assert found["text"] == whole["text"] + " Left out, since they lack seeds that the others have: dkd."
    assert found | {"text": ""} == whole | {"text": ""}
    assert advice({"ce": val["ce"] | {9: 0.9}, "last": val["last"] | {8: 0.1}, "uniform": val["uniform"]}) == whole


def test_the_advice_is_on_the_page_and_the_screen(out, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    record = read_json(out / "study.json")
    text = record["advice"]["text"]
    assert text.startswith("Undecided between ") and f"**{page.plain(text)}**" in page.page(record)
    assert compare(out) == 0
    told = capsys.readouterr().out
    assert text in told and "over last" in told
    assert json.loads((out / "study.json").read_text())["advice"] == record["advice"]


def test_a_method_of_fewer_seeds_says_how_many_it_has():
    rows = [{"name": name, "title": name, "n": n, "settings": {}, "epochs": [], "val": score, "test": score,
             "val_over_ce": None, "val_over_last": None}
            for name, n in (("ce", 3), ("dkd@beta=2", 1)) for score in ({"mean": 0.5, "std": None},)]  # fmt: skip
    record, shown = {"methods": rows, "seeds": [0, 1, 2], "advice": {"text": ""}}, io.StringIO()
    lines = page._methods(record)
    assert lines[2].startswith("| ce | ") and lines[3].startswith("| dkd@beta=2 (1 seed) | ")
    screen.ending(Console(file=shown, width=80, markup=False), record)
    assert "dkd (1 seed)" in shown.getvalue() and "ce (" not in shown.getvalue()


def test_a_narrow_screen_cuts_no_number(out):
    record, shown = read_json(out / "study.json"), io.StringIO()
    record["methods"][-1]["name"] = f"{'long' * 9}@temperature=2"
    screen.ending(Console(file=shown, width=80, markup=False), record)
    lines = shown.getvalue().splitlines()
    for row in record["methods"]:
        for text in (percent(row["val"]), points(row["val_over_ce"]), points(row["val_over_last"])):
            assert any(text in line for line in lines), text
    assert any(line.startswith(" longlong") for line in lines) and max(map(len, lines[:-1])) <= 80


def test_without_names_the_methods_are_the_papers():
    assert cli.parse([]).methods == PAPER and not {*PAPER} & {"soup", "dkd"}
    assert {name.replace("_", "-") for name in RIVALS} <= METHODS.keys()
