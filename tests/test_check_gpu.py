"""check_gpu runs to its end on a CPU, whatever its parts do."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import check_gpu
import pytest
import torch
from check_gpu import Part

PARTS = ["tests", "bench", "forward", "memcheck", "racecheck", "initcheck", "train", "fashion", "suite", "tune"]


def check(results: Path, *names: str) -> int:
    return check_gpu.main(["--tiny", "--results", str(results), *(word for n in names for word in ("--part", n))])


def python(code: str, seconds: float = 60, missing: str = "") -> Part:
    return Part([sys.executable, "-c", code], seconds, missing)


def records(results: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in results.glob("*/*.json")}


@pytest.mark.full
def test_runs_to_its_end_and_reports(tmp_path, capsys):
    parts = [name for name in PARTS if name != "tune" or find_spec("eekd.kernels.tune")]
    assert check(tmp_path, *parts) == 0
    out = capsys.readouterr().out
    table = out[out.index("result\n") :]
    got = records(tmp_path)
    assert parts == [name for name in PARTS if name in got] and all(name in table for name in parts)
    assert all(record["command"] and record["environment"]["torch"] for record in got.values())
    assert not any(str(check_gpu.ROOT) in json.dumps(record["command"]) for record in got.values())
    assert got["forward"]["forwards"][0]["ways"]["eekd"]["error"] < 1e-4
    assert got["bench"]["op"] == "ensemble_kd" and got["bench"]["rows"]
    assert got["tests"]["status"] == got["train"]["status"] == got["suite"]["status"] == 0
    if not torch.cuda.is_available():
        assert got["memcheck"]["status"] == "not run: no CUDA device" and "not run: no CUDA device" in table


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_rest(tmp_path, capsys, monkeypatch):
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    slow = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    stages = [
        {"bad": python("print('why'); raise SystemExit(3)")},
        {"slow": python(slow, 1.5), "beside": python("import time; time.sleep(0.5)")},
        {"absent": python("", missing="nobody has it"), "good": python("print('fine')")},
    ]
    monkeypatch.setattr(check_gpu, "stages", lambda *_: stages)
    start = time.monotonic()
    assert check(tmp_path) == 1
    out = capsys.readouterr().out
    for line in ("FAILED: exit status 3", "stopped after 2 s", "not run: nobody has it"):
        assert line in out
    assert out.count("passed") == 2 and "why" in out and "begun" in out
    got = records(tmp_path)
    assert {name: r["status"] for name, r in got.items()} == {
        "bad": 3, "slow": "stopped after 2 s", "beside": 0, "absent": "not run: nobody has it", "good": 0,
    }  # fmt: skip
    assert got["good"]["output"] == ["fine"]
    time.sleep(max(0, start + 6 - time.monotonic()))
    assert not alive.exists()  # the grandchild was stopped too


def test_what_is_excused_is_no_failure(tmp_path, monkeypatch):
    stages = [{"absent": python("", missing="nobody has it"), "good": python("")}]
    monkeypatch.setattr(check_gpu, "stages", lambda *_: stages)
    assert check(tmp_path) == 0


def test_the_budget_is_kept(tmp_path, capsys, monkeypatch):
    stages = [{"slow": python("import time; time.sleep(60)")}, {"last": python("")}]
    monkeypatch.setattr(check_gpu, "stages", lambda *_: stages)
    monkeypatch.setattr(check_gpu, "BUDGET", 6)
    start = time.monotonic()
    assert check(tmp_path) == 1
    assert time.monotonic() - start < 12
    assert records(tmp_path)["slow"]["status"] == "stopped after 6 s"
    assert records(tmp_path)["last"]["status"] == "not run: no time was left"


def test_parts_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    parts = {name: part for stage in check_gpu.stages(True, False, tmp_path, tmp_path) for name, part in stage.items()}
    assert [*parts] == ["build", *PARTS]
    assert parts["racecheck"].command[:3] == [str(tmp_path / "compute-sanitizer"), "--tool", "racecheck"]
    assert parts["racecheck"].command[-1] == "--launch" and not parts["racecheck"].missing
    assert "--quick" not in parts["bench"].command and "--tiny" not in parts["tune"].command


@pytest.mark.full
@pytest.mark.skipif(not find_spec("eekd.kernels.tune"), reason="there is no tune")
def test_tune_knows_the_words_of_its_command(tmp_path):
    command = check_gpu.stages(True, False, tmp_path, tmp_path)[-1]["tune"].command
    known = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, check=True).stdout
    assert all(word in known for word in command if word.startswith("--"))


def test_the_kernels_that_the_sanitizers_watch_are_launched(capsys):
    check_gpu.launch_kernels("cpu")
    assert capsys.readouterr().out.splitlines()[0] == f"native: {len(check_gpu.SANITIZED) * 12} launches"


def test_tunes_table_is_copied(tmp_path, monkeypatch):
    (tmp_path / "kernels" / "launch").mkdir(parents=True)
    (tmp_path / "kernels" / "old.json").write_text("{}")
    os.utime(tmp_path / "kernels" / "old.json", (0, 0))
    monkeypatch.setattr(check_gpu, "ROOT", tmp_path)
    write = "import pathlib; pathlib.Path('kernels/launch/sm_90.json').write_text('[1]')"
    monkeypatch.setattr(check_gpu, "stages", lambda *_: [{"tune": python(write)}])
    assert check(tmp_path / "results") == 0
    assert sorted(path.name for path in tmp_path.glob("results/*/*")) == ["launch-sm_90.json", "tune.json"]


@pytest.mark.bad_input
def test_an_unknown_part(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check(tmp_path, "tea")
    assert "--part must be one of build, tests, bench" in capsys.readouterr().err


@pytest.mark.bad_input
def test_without_a_gpu_only_tiny(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        check_gpu.main([])
    assert "no CUDA device was found" in capsys.readouterr().err
