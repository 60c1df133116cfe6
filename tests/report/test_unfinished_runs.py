"""The report of a run that is not whole says what is missing; text from files stays text."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pages import NAMES, ONLY_CONFIG, cut, drawn, rewrite, without

from eekd.report.page import report


def teacher_only(run):
    without("students")(run)
    rewrite(run / "config.json", lambda config: config | {"students": []})
    rewrite(run / "summary.json", lambda summary: summary | {"rows": summary["rows"][:4]})


def in_teacher(run):
    without("students", "summary.json", "teacher/snapshots.json")(run)
    rewrite(run / "teacher/manifest.json", lambda manifest: manifest["snapshots"].pop() and None)
    rows = (run / "teacher/metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "teacher/metrics.jsonl").write_text("".join(rows[:3]))


def untimed(run):
    for path in run.glob("**/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "change, sentences",
    [
        (without("summary.json"), {"": "The run has not ended: there is no summary.json yet."}),
        (
            cut,
            {
                "": "EEKD (attention): 2 of 4 epochs, and no final measurements yet.",
                "attention": "snapshot 1, epoch 2: ",
                "results": "EEKD (attention) resnet8_w4",
            },
        ),
        (
            teacher_only,
            {
                "": "No student: this run trains a teacher only.",
                "results": "No gain without the test accuracy of a CE student",
                "attention": "No student here has weights that depend on the sample.",
                "uniform": "No student here weighs several snapshots other than uniformly.",
            },
        ),
        (
            in_teacher,
            {
                "": "teacher: 3 of 4 epochs, and no final measurements yet.",
                "results": "snapshot 1 resnet8_w4",
                "snapshots": "There is no snapshots.json yet",
                "disagreement": "no pair of snapshots",
                "curves": "teacher, epoch 3: ",
            },
        ),
        (without("students/attention"), {"": "EEKD (attention): not found.", "attention": "confidence (CA-MKD)"}),
        (without("teacher"), {"": "teacher: not found.", "curves": "CE only, epoch 4"}),
        (without("environment.json"), {"settings": "There is no environment.json."}),
        (untimed, {"cost": "No epoch has been timed yet."}),
        (ONLY_CONFIG, {"": "CE only: not found.", "curves": "No epoch has been trained yet."}),
    ],
)
def test_what_is_missing_is_said(run, change, sentences):
    change(run)
    page = drawn(run)
    assert list(page.charts) == NAMES
    for section, sentence in sentences.items():
        assert sentence in " ".join(page.words[section].split())


def test_the_table_is_the_same_before_the_summary_is_written(run):
    """But for the parameters, which only the summary knows."""
    whole = re.sub(r"resnet8_w4 [\d,]+", "resnet8_w4", " ".join(drawn(run).words["results"].split()))
    without("summary.json")(run)
    assert whole == " ".join(drawn(run).words["results"].split())


def test_a_students_run_finds_its_teacher_elsewhere(run, tmp_path, monkeypatch):
    """From any working folder, by the student's own note; without one, by the path in the config."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    without("teacher")(other)
    rewrite(other / "config.json", lambda config: config | {"teacher_run": "run"})
    for path in other.glob("students/*/student.json"):
        rewrite(path, lambda known: known["teacher"] and known["teacher"].update(run="../../../run/teacher"))
    monkeypatch.chdir("/")
    assert "teacher, epoch 4" in drawn(other).words["curves"]
    for path in other.glob("students/*/student.json"):
        rewrite(path, lambda known: known | {"teacher": known["teacher"] and ["no note"]})
    assert "teacher, epoch 4" not in drawn(other).words["curves"]
    monkeypatch.chdir(tmp_path)
    assert "teacher, epoch 4" in drawn(other).words["curves"]


def test_not_a_number_is_a_gap(run):
    path = run / "students/ce/metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    rows[1] = re.sub(r'"val_accuracy": [\d.]+', '"val_accuracy": NaN', rows[1])
    path.write_text("".join(rows))
    text = report(run).read_text()
    assert "CE only, epoch 1: " in text and "nan" not in text.lower()


HOSTILE = "</style><script>alert('1')</script>&\"\ud800"


def test_text_from_files_stays_text(run):
    rewrite(run / "config.json", lambda config: config | {"data": HOSTILE.replace("/", ":")})
    rewrite(run / "environment.json", lambda here: here | {"device": HOSTILE, "command": [HOSTILE], HOSTILE: HOSTILE})
    rewrite(
        run / "summary.json",
        lambda summary: [row.update(name=HOSTILE, model=HOSTILE) for row in summary["rows"]] and None,
    )
    rewrite(
        run / "teacher/snapshots.json",
        lambda known: [member.update(name=HOSTILE) for member in known["test"]["members"]] and None,
    )
    (run / "students/ce").rename(run / "students" / "<b onload='x'>")
    page = drawn(run)
    shown = HOSTILE.replace("\ud800", "?")
    assert not page.tags & {"script", "b onload='x'"} and page.words["results"].count(shown) == 18
    assert shown in page.words["settings"] and shown in page.words["snapshots"]
    assert "<b onload='x'>, epoch 4" in page.words["curves"]
