import json

import check_gpu
import pytest


def test_runs_to_its_end_on_a_cpu_and_reports(tmp_path, capsys):
    assert check_gpu.main(["--tiny", "--results", str(tmp_path), "--part", "tests", "--part", "train"]) == 0
    assert capsys.readouterr().out.count("passed") == 2
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/*.json"))]
    assert [(r["part"], r["status"]) for r in records] == [("tests", 0), ("train", 0)]


def test_a_failing_part_and_one_that_takes_too_long_are_reported_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    commands = {"bad": (["-c", "raise SystemExit(3)"], 60), "slow": (["-c", "import time; time.sleep(60)"], 1)}
    monkeypatch.setattr(check_gpu, "parts", lambda *_: commands | {"good": (["-c", "print('fine')"], 60)})
    assert check_gpu.main(["--tiny", "--results", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED: 3" in out and "FAILED: stopped after 1 s" in out and "passed" in out
    assert len(list(tmp_path.glob("*/*.json"))) == 3


@pytest.mark.bad_input
def test_an_unknown_part(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check_gpu.main(["--tiny", "--results", str(tmp_path), "--part", "tea"])
    assert "--part must be one of build, tests, train" in capsys.readouterr().err
