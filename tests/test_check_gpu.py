"""check_gpu runs to its end on a CPU, whatever its parts do."""

import importlib.util
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "tools" / "check_gpu.py"
spec = importlib.util.spec_from_file_location("check_gpu", SCRIPT)
check_gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_gpu)
Part = check_gpu.Part


def check(out: Path, *names: str, budget: float = 300) -> int:
    words = [word for n in names for word in ("--part", n)]
    return check_gpu.main(["--tiny", "--budget", str(budget), "--out", str(out), *words])


def python(code: str, seconds: float = 60, missing: str = "") -> Part:
    return Part([sys.executable, "-c", code], seconds, missing)


def records(out: Path) -> dict[str, dict]:
    return json.loads((out / "parts.json").read_text())


def staged(monkeypatch, *stages):
    monkeypatch.setattr(check_gpu, "stages", lambda *_: list(stages))


@pytest.mark.full
def test_runs_to_its_end_and_reports(tmp_path, capsys):
    names = ["ready", "warm", "bench-native", "tests-native", "memcheck-triton", "forward", "train", "tune"]
    assert check(tmp_path, *names, budget=1200) == 0
    out = capsys.readouterr().out
    table = out[out.index("result\n") :]
    got = records(tmp_path)
    assert names == [*got] and all(name in table for name in names)
    assert all(record["command"] and record["environment"]["torch"] for record in got.values())
    assert not any(str(check_gpu.ROOT) in json.dumps(record["command"]) for record in got.values())
    bench = json.loads((tmp_path / "bench-native.json").read_text())
    assert {*bench["rows"][0]["contenders"]} == {"native", "eager:einsum", "copy"}
    assert bench["rows"][0]["contenders"]["native"]["percent_of_floor"] > 0
    assert json.loads((tmp_path / "forward.json").read_text())["forwards"][0]["ways"]["eekd"]["error"] < 1e-4
    assert got["ready"]["status"] == got["tests-native"]["status"] == got["train"]["status"] == 0
    with tarfile.open(tmp_path / check_gpu.ARCHIVE) as archive:
        inside = set(archive.getnames())
    assert inside == {"output.txt"} | {path.name for path in tmp_path.glob("*.json")} and len(inside) < 8
    if not torch.cuda.is_available():
        assert got["memcheck-triton"]["status"] == "not run: no CUDA device"


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_rest(tmp_path, capsys, monkeypatch):
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(alive)!r}).touch()"
    slow = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    staged(
        monkeypatch,
        {"bad": python("print('why'); raise SystemExit(3)")},
        {"slow": python(slow, 1.5), "beside": python("import time; time.sleep(0.5)")},
        {"absent": python("", missing="nobody has it"), "good": python("print('fine')")},
    )
    start = time.monotonic()
    assert check(tmp_path) == 1
    out = capsys.readouterr().out
    for line in ("FAILED: exit status 3", "stopped after 2 s", "not run: nobody has it"):
        assert line in out
    assert out.count("passed") == 2 and "why" in out and "begun" in out
    got = records(tmp_path)
    assert {name: r["status"] for name, r in got.items()} == {
        "bad": 3,
        "slow": "stopped after 2 s",
        "beside": 0,
        "absent": "not run: nobody has it",
        "good": 0,
    }
    assert got["good"]["output"] == ["fine"]
    assert (tmp_path / "output.txt").read_text().endswith("== absent\n== good\nfine\n")
    time.sleep(max(0, start + 8 - time.monotonic()))
    assert not alive.exists()  # the grandchild was stopped too


@pytest.mark.full
def test_what_is_stopped_may_report_first_and_failures_are_printed_as_they_come(tmp_path, capsys, monkeypatch):
    code = "import time\nprint('FAILED tests/x.py')\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('summary')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    staged(monkeypatch, {"suite": python(code, 2), "deaf": python(deaf, 2)})
    monkeypatch.setattr(check_gpu, "GRACE", 2)
    assert check(tmp_path) == 1
    assert all(r["seconds"] < 6 for r in records(tmp_path).values())
    assert records(tmp_path)["suite"]["output"][-1] == "summary"
    assert "  suite: FAILED tests/x.py" in capsys.readouterr().out.splitlines()


def test_of_long_output_the_record_has_the_end_and_a_file_all(tmp_path, monkeypatch):
    staged(monkeypatch, {"long": python("print(*range(100), sep='\\n')")})
    assert check(tmp_path) == 0
    assert records(tmp_path)["long"]["output"] == [str(i) for i in range(60, 100)]
    assert (tmp_path / "output.txt").read_text().split() == ["==", "long", *map(str, range(100))]


@pytest.mark.full
def test_another_call_goes_on_with_what_has_not_passed(tmp_path, capsys, monkeypatch):
    staged(monkeypatch, {"good": python("")}, {"bad": python("raise SystemExit(1)")})
    assert check(tmp_path) == 1
    staged(monkeypatch, {"good": python("raise SystemExit(1)")}, {"bad": python("")})
    assert check(tmp_path) == 0
    assert [r["status"] for r in records(tmp_path).values()] == [0, 0]
    assert check(tmp_path, "good") == 1  # asked for by name


def test_nothing_runs_without_both_backends(tmp_path, capsys, monkeypatch):
    staged(monkeypatch, {"ready": python("raise SystemExit('CUDA was not built')")}, {"bench": python("")})
    assert check(tmp_path) == 1
    assert [*records(tmp_path)] == ["ready"] and "CUDA was not built" in capsys.readouterr().out


def test_the_kernels_are_this_trees_without_an_installation(tmp_path, monkeypatch):
    code = "import eekd.kernels, eekd, os; print(os.path.realpath(eekd.kernels.__file__)); print(eekd.__file__)"
    staged(monkeypatch, {"where": python(code)})
    assert check(tmp_path) == 0
    kernels, package = records(tmp_path)["where"]["output"]
    assert kernels == "kernels/__init__.py" and package.endswith("/tree/eekd/__init__.py")


@pytest.mark.full
def test_a_wheel_that_is_missing_is_installed_from_a_folder(tmp_path, monkeypatch):
    import zipfile

    with zipfile.ZipFile(tmp_path / "oddity-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("oddity.py", "found = 1\n")
        wheel.writestr("oddity-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: oddity\nVersion: 1.0\n")
        wheel.writestr("oddity-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("oddity-1.0.dist-info/RECORD", "")
    staged(monkeypatch, {"uses": python("import oddity; print(oddity.found)")})
    assert check_gpu.main(["--tiny", "--out", str(tmp_path / "out")]) == 1
    assert check_gpu.main(["--tiny", "--out", str(tmp_path / "out"), "--wheels", str(tmp_path)]) == 0
    assert "oddity is not installed" in check_gpu.absent("oddity") or "oddity" in sys.modules


def test_what_is_excused_is_no_failure(tmp_path, monkeypatch):
    staged(monkeypatch, {"absent": python("", missing="nobody has it"), "good": python("")})
    assert check(tmp_path) == 0


@pytest.mark.full
def test_the_budget_is_kept(tmp_path, capsys, monkeypatch):
    staged(monkeypatch, {"slow": python("import time; time.sleep(60)")}, {"last": python("")})
    assert check(tmp_path, budget=7) == 1
    assert records(tmp_path)["slow"]["seconds"] < 7 + check_gpu.GRACE
    assert records(tmp_path)["slow"]["status"].startswith("stopped after ")
    assert records(tmp_path)["last"]["status"] == "not run: no time was left"


def test_parts_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDAARCHS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    stages = check_gpu.stages(True, False, tmp_path, tmp_path)
    parts = {name: part for stage in stages for name, part in stage.items()}
    assert [*stages[0]] == ["build"] and parts["build"].environment == {"CUDAARCHS": "90"}
    first = [*parts][: [*parts].index("tests-rest") + 1]
    assert first == [
        "build",
        "ready",
        "warm",
        "bench-native",
        "bench-triton",
        "tests-native",
        "tests-triton",
        "tests-ops",
        "tests-rest",
    ]
    assert [*stages[5]] == ["tests-native", "tests-triton"]  # at once
    assert parts["racecheck-native"].command[:3] == [str(tmp_path / "compute-sanitizer"), "--tool", "racecheck"]
    assert parts["racecheck-native"].command[-2:] == ["--launch", "native"] and not parts["racecheck-native"].missing
    assert "--quick" not in parts["bench"].command and "--tiny" not in parts["tune"].command
    for name in ("tune", "bench"):  # their commands know these words
        command = parts[name].command
        known = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, check=True).stdout
        assert all(word in known for word in command if word.startswith("--"))


@pytest.mark.parametrize("shape", [(3, 3, 13), (8, 2, 1001)])
def test_the_kernels_that_the_sanitizers_watch_are_launched(capsys, shape):
    assert check_gpu.launch_kernels("cpu", "native", [shape]) == 24
    assert any(m > 8 for _, m, _ in check_gpu.SANITIZED) and any(b > 2048 for b, _, _ in check_gpu.SANITIZED)
    assert any(b % 8 == 0 and c % 8 for b, _, c in check_gpu.SANITIZED)


def test_the_sanitizers_tensors_end_at_whole_pieces():
    x = check_gpu.apart(torch.arange(7).bfloat16())
    assert x.tolist() == [*range(7)] and x.untyped_storage().nbytes() == 16


@pytest.mark.bad_input
def test_an_unknown_part(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check(tmp_path, "tea")
    assert "--part must be one of build, ready, warm" in capsys.readouterr().err


@pytest.mark.bad_input
def test_without_a_gpu_only_tiny(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        check_gpu.main([])
    assert "no CUDA device was found" in capsys.readouterr().err
