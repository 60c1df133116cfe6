"""A run over several seeds: its folder, statistics, sentence and page; and that the default is the demonstration."""

import json

import pytest
from scipy import stats

from eekd import report, train
from eekd.config import preset
from eekd.statistics import interval, paired
from eekd.trainers.seeds import sentence, verdict

TINY = "--data digits --train-limit 150 --teacher.model resnet8_w4 --teacher.epochs 2 --teacher.snapshots 2 "
TINY += "--student.epochs 1 --device cpu --precision fp32 --augment none --seeds 2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("seeds") / "run"
    assert train.main([*TINY.split(), "--out", str(out)]) == 0
    return out


def test_each_seed_is_a_run_and_the_summary_speaks_of_all(run):
    summary = json.loads((run / "summary.json").read_text())
    each = [json.loads((run / f"seed-{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert summary["seeds"] == [0, 1]
    for row, *same in zip(summary["rows"], *(known["rows"] for known in each), strict=True):
        accuracies = [one["test_accuracy"] for one in same]
        assert row["test"]["mean"] == pytest.approx(sum(accuracies) / 2)
    gains = [one["rows"][-1]["test_accuracy"] - one["rows"][-3]["test_accuracy"] for one in each]
    assert summary["rows"][-1]["over_ce"]["mean"] == pytest.approx(sum(gains) / 2)


def test_it_goes_on_to_the_same_accuracies(run, capsys):
    before = json.loads((run / "summary.json").read_text())["rows"]
    (run / "summary.json").unlink()
    assert train.main(["--resume", str(run)]) == 0
    assert json.loads((run / "summary.json").read_text())["rows"] == before
    assert f"Report: {run / 'report.html'}" in capsys.readouterr().out


def test_the_page_links_to_the_seeds(run):
    page = report.report(run).read_text()
    assert 'href="seed-1/report.html"' in page and (run / "seed-1" / "report.html").is_file()
    assert "EEKD (attention)" in page


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
    assert verdict(gain) == word
    said = sentence({"seeds": [0, 1, 2, 3, 4], "rows": [row]})
    assert said.startswith("Over 5 seeds, the student by EEKD has +1.23") and f"({word})" in said


def test_without_a_setting_it_is_the_demonstration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.parse([]).settings == train.parse(["--out", "x"]).settings == preset("glyphs")
    assert train.parse(["--device", "cpu"]).settings.data == "digits"
    assert train.parse(["--data", "fashion-mnist"]).settings.seeds == 1
