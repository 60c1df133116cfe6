"""The report shows what the run recorded, and loads nothing."""

import json
import math
import re
import subprocess
import sys

import pytest
from pages import drawn, rows_of

from eekd.report.__main__ import main


def test_the_table_is_the_summary(run):
    words = drawn(run).words["results"]
    for row in json.loads((run / "summary.json").read_text())["rows"]:
        gain, seconds = row["gain"], row["seconds_per_epoch"]
        cells = [
            row["model"],
            f"{row['parameters']:,}",
            str(row["epochs"]),
            f"{100 * row['val_accuracy']:.2f}",
            f"{100 * row['test_accuracy']:.2f}",
        ]
        cells += [f"{100 * gain:+.2f}".replace("-", "−")] if gain is not None and row["name"] != "ce" else []
        cells += [f"{seconds:.2f}"] if seconds is not None else []
        assert " ".join(cells) in words
    error = 100 * math.sqrt(0.25 / json.loads((run / "environment.json").read_text())["data"]["test"])
    told = float(re.search(r"images, ([\d.]+) points", words)[1])
    assert 0 < told <= error + 0.01


def test_points_carry_the_recorded_values(run):
    rows = [
        row | {"weights": [0.3 + epoch / 100, 0.7 - epoch / 100]}
        for epoch, row in enumerate(rows_of(run, "attention"), 1)
    ]
    (run / "students/attention/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, row = drawn(run), rows[2]
    assert "snapshot 1, epoch 3: 0.33" in page.words["attention"]
    assert "uniform: 0.5" in page.words["attention"] and "uniform: 0.6931" in page.words["attention"]
    assert "snapshot 2, epoch 3: 0.67" in page.words["attention"]
    assert f"weights, epoch 3: {row['weight_entropy']:.4g}" in page.words["attention"]
    assert f"EEKD (attention), epoch 3: {100 * row['val_accuracy']:.4g}" in page.words["curves"]
    assert f"these weights, epoch 3: {row['val_target_nll']:.4g}" in page.words["uniform"]
    assert f"uniform weights, epoch 3: {row['val_kd_loss_uniform']:.4g}" in page.words["uniform"]
    known = json.loads((run / "teacher/snapshots.json").read_text())["test"]
    assert f"snapshot 1 and 2: {100 * known['disagreement'][0][1]:.2f} %" in page.words["disagreement"]
    for member in known["members"]:
        assert f"{member['name']}   ECE {100 * member['ece']:.1f} %" in page.words["snapshots"]
    last = 100 * known["members"][1]["accuracy"]
    assert f"test, epoch of the snapshot 4: {last:.4g}" in page.words["snapshots"]


def test_cost_adds_up(run):
    words, rows = drawn(run).words["cost"], rows_of(run, "uniform")
    assert f"uniform, snapshots' forward: {sum(row['seconds_teacher'] for row in rows) / 4:.3g}" in words
    assert f"{sum(row['seconds'] for row in rows) / 4:.3g}" in words


def test_settings_and_environment_are_there(run):
    words, here = drawn(run).words["settings"], json.loads((run / "environment.json").read_text())
    for told in (
        "students ce, last, uniform, confidence, attention",
        "val_fraction 0.1",
        "batch_size 60",
        "alpha 0.5",
        "detach_query true",
        "root none",
        f"torch {here['torch']}",
        f"commit {here['commit'] or 'none'}",
        here["data"]["fingerprint"],
        sys.orig_argv[0],
    ):
        assert told in words


@pytest.mark.parametrize(
    "own, even, verdict",
    [
        (
            0.4,
            0.6,
            "no: in the last epoch its −log p of the true label is 0.400, with uniform weights 0.600; "
            "it was lower in 4 of 4 epochs.",
        ),
        (
            0.6,
            0.4,
            "yes: in the last epoch its −log p of the true label is 0.600, with uniform weights 0.400; "
            "it was lower in 0 of 4 epochs.",
        ),
        (0.5, 0.5, "neither better nor worse"),
    ],
)
def test_the_verdict_on_uniform_weights(run, own, even, verdict):
    known = {"val_target_nll": own, "val_target_nll_uniform": even}
    lines = "".join(json.dumps(row | known) + "\n" for row in rows_of(run, "attention"))
    (run / "students/attention/metrics.jsonl").write_text(lines)
    words = drawn(run).words["uniform"].partition("EEKD (attention)")[2]
    assert f"For the target, {verdict}" in words
    other = json.loads((run / "students/uniform/student.json").read_text())["test"]["accuracy"]
    assert f"the one trained with uniform weights {100 * other:.2f} %" in words


def test_the_page_needs_nothing_else(run):
    page = drawn(run)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "a"}
    assert not [
        value for name, value in page.attributes if name in ("src", "href", "srcset", "data") or name.startswith("on")
    ]
    text = (run / "report.html").read_text()
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert len(text) < 200_000


def test_out_names_the_file(run, tmp_path, capsys):
    assert main([str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'page.html'}\n"
    assert (tmp_path / "new" / "page.html").is_file() and not (run / "report.html").exists()


def test_the_command_runs_without_optional_packages(run):
    """python -m eekd.report needs the core dependencies only."""
    absent = ["plotly", "matplotlib", "tyro", "rich", "sklearn", "tensorboard"]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); "
        "runpy.run_module('eekd.report', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{run / 'report.html'}\n", done.stderr
