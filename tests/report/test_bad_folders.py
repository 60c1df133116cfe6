"""Bad folders and flags end in one sentence."""

import shutil

import pytest
from pages import rewrite, without

from eekd.report.__main__ import main


def write(name, text):
    return lambda run: (run / name).write_text(text)


def edit(name, **changes):
    return lambda run: rewrite(run / name, lambda value: value | changes)


def add(name, text):
    return lambda run: (run / name).open("a").write(text)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda run: shutil.rmtree(run), "run must be a run folder, got one without config.json"),
        (without("config.json"), "run must be a run folder, got one without config.json"),
        (lambda run: (shutil.rmtree(run), run.write_text("")), "run must be a run folder"),
        (write("config.json", "{"), "config.json: the config is not JSON"),
        (write("config.json", "[]"), "config.json: the config must be an object"),
        (edit("config.json", sede=1), "config.json: sede is not a setting; did you mean 'seed'?"),
        (write("environment.json", "{}"), "environment.json must be an object with format 1"),
        (write("environment.json", '{"format": 1}'), "does not have the format of eekd.train.run_folder: KeyError"),
        (write("summary.json", "[1]"), "summary.json must be an object with format 1"),
        (edit("summary.json", format=2), "summary.json must be an object with format 1"),
        (edit("summary.json", rows=[{}]), "does not have the format of eekd.train.run_folder: KeyError"),
        (edit("summary.json", rows=None), "does not have the format of eekd.train.run_folder: TypeError"),
        (write("summary.json", '{"format": 1, "seconds": NaN}'), "summary.json is not JSON: NaN is not a number"),
        (write("teacher/manifest.json", '{"format": 1}'), "manifest.json is no manifest of snapshots"),
        (write("teacher/snapshots.json", "half"), "snapshots.json is not JSON"),
        (edit("teacher/snapshots.json", test=[]), "does not have the format of eekd.train.run_folder: TypeError"),
        (edit("teacher/snapshots.json", test={"members": []}), "does not have the format of eekd.train.run_folder"),
        (write("students/ce/student.json", "\x80"), "student.json is not JSON"),
        (edit("students/last/student.json", format="1"), "student.json must be an object with format 1"),
        (edit("students/last/student.json", test=None), "does not have the format of eekd.train.run_folder: TypeError"),
        (add("students/ce/metrics.jsonl", "not a row\n"), "metrics.jsonl, line 5 is not JSON"),
        (add("students/ce/metrics.jsonl", "[5]\n"), "metrics.jsonl, line 5 must be an object with an epoch"),
        (add("teacher/metrics.jsonl", '{"epoch": "5"}\n'), "line 5 must be an object with an epoch"),
        (add("teacher/metrics.jsonl", '{"epoch": 5, "val_loss": "<b>"}\n'), "does not have the format of eekd.train"),
        (lambda run: (run / "report.html").mkdir(), "report.html"),
    ],
)
def test_a_bad_folder_ends_in_one_sentence(run, change, message, capsys):
    change(run)
    assert main([str(run)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert not list(run.glob("**/*.tmp")) and not (run / "report.html").is_file()


@pytest.mark.bad_input
@pytest.mark.parametrize("argv", [[], ["a", "b"], ["a", "--to", "b"]])
def test_bad_flags_end_in_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: eekd report" in capsys.readouterr().err
