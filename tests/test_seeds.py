"""A run over several seeds: its folder, statistics, sentence and page; and that the default is the demonstration."""

import contextlib
import json
from pathlib import Path

import pytest
from scipy import stats

from eekd.report import report, seeds_page
from eekd.statistics import interval, paired
from eekd.train import __main__ as train
from eekd.train.presets import preset
from eekd.train.run_folder import FORMAT
from eekd.train.seeds import sentence, summary_of, verdict

TINY = "--data digits --train-limit 150 --teacher.model resnet8_w4 --teacher.epochs 2 --teacher.snapshots 2 "
TINY += "--student.epochs 1 --device cpu --precision fp32 --augment none --seed 3 --seeds 2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder; what the command printed lies beside it."""
    out = tmp_path_factory.mktemp("seeds") / "run"
    with open(out.parent / "printed", "w") as printed, contextlib.redirect_stdout(printed):
        assert train.main([*TINY.split(), "--out", str(out)]) == 0
    return out


def test_each_seed_is_a_run_and_the_summary_speaks_of_all(run):
    summary = json.loads((run / "summary.json").read_text())
    each = [json.loads((run / f"seed-{seed}" / "summary.json").read_text()) for seed in (3, 4)]
    assert summary["seeds"] == [3, 4]
    for row, *same in zip(summary["rows"], *(known["rows"] for known in each), strict=True):
        assert row["test"]["mean"] == pytest.approx(sum(one["test_accuracy"] for one in same) / 2)
    gains = [one["rows"][-1]["test_accuracy"] - one["rows"][-3]["test_accuracy"] for one in each]
    assert summary["rows"][-1]["over_ce"]["mean"] == pytest.approx(sum(gains) / 2)
    for seed in (3, 4):
        config = json.loads((run / f"seed-{seed}" / "config.json").read_text())
        assert (config["seed"], config["seeds"]) == (seed, 1)
    printed = (run.parent / "printed").read_text()
    assert printed.count("teacher, seed 3: epoch 2/2") == printed.count("EEKD with DKD's loss, seed 4: epoch 1/1") == 1


def written(run: Path, *seeds: dict[str, tuple[float, float]]) -> dict:
    """The summary of seeds whose rows have these test accuracies and seconds per epoch, and 10 seconds in all."""
    for seed, accuracies in enumerate(seeds):
        rows = [{"kind": "teacher" if name == "teacher" else "student", "name": name, "model": "net", "parameters": 1,
                 "epochs": 2, "val_accuracy": 0.1, "test_accuracy": accuracy, "seconds_per_epoch": seconds}
                for name, (accuracy, seconds) in accuracies.items()]  # fmt: skip
        (run / f"seed-{seed}").mkdir()
        known = {"format": FORMAT, "seconds": 10.0, "rows": rows}
        (run / f"seed-{seed}" / "summary.json").write_text(json.dumps(known))
    return summary_of(run, range(len(seeds)))


@pytest.mark.parametrize("students, over_ce, over_last", [
    (("ce", "last", "attention"), {"last", "attention"}, {"attention"}),
    (("ce", "attention"), {"attention"}, set()),
    (("last", "attention"), set(), {"attention"}),
    (("attention",), set(), set()),
])  # fmt: skip
def test_gains_are_of_what_there_is(tmp_path, students, over_ce, over_last):
    first = {"teacher": (0.9, 4.0)} | {name: (0.5 + 0.1 * i, 1.0 + i) for i, name in enumerate(students)}
    summary = written(tmp_path, first, {name: (accuracy, seconds + 1) for name, (accuracy, seconds) in first.items()})
    rows = {row["name"]: row for row in summary["rows"]}
    assert {name for name, row in rows.items() if row["over_ce"]} == over_ce
    assert {name for name, row in rows.items() if row["over_last"]} == over_last
    assert summary["seconds"] == 20 and rows["teacher"]["seconds_per_epoch"] == 4.5
    assert bool(sentence(summary)) == bool(over_ce | over_last)
    assert seeds_page.students([*rows.values()], {0: {"rows": [{"name": n, "test_accuracy": 0.5} for n in rows]}})


def test_it_goes_on_to_the_same_accuracies(run, capsys):
    before = json.loads((run / "summary.json").read_text())["rows"]
    (run / "summary.json").unlink()
    assert train.main(["--resume", str(run)]) == 0
    assert json.loads((run / "summary.json").read_text())["rows"] == before
    assert f"Report: {run / 'report.html'}" in capsys.readouterr().out


@pytest.mark.bad_input
def test_the_folder_of_a_seed_with_other_settings_is_refused(run, capsys):
    one, other, aside = run / "seed-3", run / "seed-4", run / "aside"
    for code, told in ((2, True), (0, False)):  # exchanged, and back again
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        assert train.main(["--resume", str(run)]) == code
        assert (f"{one} holds a run with another seed" in capsys.readouterr().err) == told


def test_the_page_links_to_the_seeds(run):
    page = report(run).read_text()
    assert 'href="seed-4/report.html"' in page and (run / "seed-4" / "report.html").is_file()
    assert "EEKD with DKD" in page


def test_a_teacher_is_that_of_one_seed(run, capsys):
    assert train.main(["student", "--teacher", str(run)]) == 2
    assert "teacher_run must be the run of one seed, such as" in capsys.readouterr().err


def test_intervals_are_students():
    values = [0.1, 0.3, 0.2, 0.7]
    low, high = stats.t.interval(0.95, 3, stats.tmean(values), stats.sem(values))
    ends = {"low": pytest.approx(low), "high": pytest.approx(high)}
    assert interval(values) == {"n": 4, "mean": pytest.approx(0.325)} | ends
    assert paired({0: 0.5, 1: 0.7, 2: 0.1}, {0: 0.4, 1: 0.5})["n"] == 2


@pytest.mark.parametrize("low, high, word", [
    (0.01, 0.02, "ahead"), (-0.01, 0.02, "undecided"), (-0.02, -0.01, "behind"), (0.01, 0.01, "undecided"),
    (None, None, "undecided"),
])  # fmt: skip
def test_the_sentence_says_what_the_interval_says(low, high, word):
    gain = {"n": 5, "mean": 0.0123, "low": low, "high": high}
    row = {"name": "attention", "over_ce": gain, "over_last": None}
    other = {"name": "entropy", "over_ce": gain | {"mean": 0.5}, "over_last": None}
    assert verdict(gain) == word
    said = sentence({"seeds": [0, 1, 2, 3, 4], "rows": [row, other]})
    assert said.startswith("Over 5 seeds, the student by EEKD has +1.23") and f"({word})" in said


def test_without_a_setting_it_is_the_demonstration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.parse([]).settings == train.parse(["--out", "x"]).settings == preset("glyphs")
    assert train.parse(["--device", "cpu"]).settings.data == "digits"
    assert train.parse(["--data", "fashion-mnist"]).settings.seeds == 1
