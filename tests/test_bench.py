"""The bench checks before it times and saves all it prints; info tells what a number depends on."""

import contextlib
import io
import json
import math
import re

import pytest
import torch

import eekd
from eekd import _C, info
from eekd.kernels import bench


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What `bench --quick` prints, and the record that it saves."""
    path = tmp_path_factory.mktemp("bench") / "made" / "quick.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        bench.main(["--quick", "--threads", "1", "--seed", "3", "--json", str(path)])
    return printed.getvalue(), json.loads(path.read_text())


def test_the_record_is_complete(quick):
    _, record = quick
    assert record["op"] == "ensemble_kd" and record["seed"] == 3 and record["threads"] == 1
    assert record["command"][:3] == ["python", "-m", "eekd.kernels.bench"] and "--quick" in record["command"]
    assert record["environment"].keys() == info.environment().keys()
    assert record["environment"]["threads"] == 1
    assert {row["fusion"] for row in record["rows"]} == {"probability", "logit"}
    for row in record["rows"]:
        contenders = row["times"].keys()
        assert {"eekd", "eager"} < contenders == row["error"].keys()
        assert any(name.startswith("compile") for name in contenders)
        assert all(0 <= error < 1e-4 for error in row["error"].values())
        for times in row["times"].values():
            assert 0 < times["p20"] <= times["us"] <= times["p80"]
        assert row["peak_bytes"].keys() == {"eekd", "eager"}
        assert row["dtype"] == "float32" and len(row["shape"]) == 3
        assert row["vs_eager"] == row["times"]["eager"]["us"] / row["times"]["eekd"]["us"]


def test_the_summary_is_of_the_rows(quick):
    _, record = quick
    ratios = [row["vs_compile"] for row in record["rows"]]
    assert record["summary"]["least_vs_compile"] == min(ratios)
    assert math.isclose(record["summary"]["geomean_vs_compile"], math.prod(ratios) ** (1 / len(ratios)))


def test_each_row_is_printed(quick):
    printed, record = quick
    for row in record["rows"]:
        shape = re.escape(str(tuple(row["shape"])))
        assert re.search(rf"{shape} +{row['fusion']} .*{row['vs_eager']:.1f}x", printed)
    assert f"least_vs_compile {record['summary']['least_vs_compile']:.2f}" in printed


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys, what):
    def wrong(student, snapshots, labels, scores, fusion):
        if what == "loss":
            return 1.001 * fused(student, snapshots, labels, scores, fusion)
        return fused(student, snapshots, labels, scores.detach() + 0 * scores, fusion)

    fused = bench.fused
    monkeypatch.setattr(bench, "fused", wrong)
    with pytest.raises(SystemExit, match=r"eekd is wrong at \(32, 5, 10\) probability: .*not timed"):
        bench.main(["--quick", "--threads", "1"])
    assert "x" not in capsys.readouterr().out.splitlines()[-1].replace("max", "")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--shape", "1,2"], "--shape must be B,M,C in positive numbers, got 1,2"),
        (["--shape", "1,2,3,4"], "--shape .*got 1,2,3,4"),
        (["--shape", "0,5,10"], "--shape .*got 0,5,10"),
        (["--shape", "8,-5,10"], "--shape .*got 8,-5,10"),
        (["--shape", "a,b,c"], "--shape .*got a,b,c"),
        (["--shape", "8,5,10", "--shape", "8"], "--shape .*got 8,5,10 8"),
        (["--dtype", "float8"], "--dtype"),
        (["--seconds", "soon"], "--seconds"),
        (["--threads", "many"], "--threads"),
        (["--quik"], "--quik"),
        (["ensemble_dk"], "ensemble_dk"),
    ],
)
def test_a_bad_argument(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(arguments)
    assert exit.value.code == 2 and re.search(says, capsys.readouterr().err.splitlines()[-1])


def test_info_prints_what_was_built_and_what_is_there(capsys):
    info.main()
    printed = capsys.readouterr().out
    for fact in (eekd.__version__, torch.__version__, _C.torch_version, _C.cpu_capability()):
        assert fact in printed
    names = [line.split()[0] for line in printed.splitlines()]
    assert names == ["eekd", "python", "torch", "triton", "cpu", "cuda", "gpus"]


def test_the_environment_is_json_and_names_the_commit():
    facts = info.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", facts["commit"])


def test_the_commit_of_another_checkout_is_not_ours(monkeypatch, tmp_path):
    package = tmp_path / "site-packages" / "eekd"
    package.mkdir(parents=True)
    monkeypatch.setattr(eekd, "__file__", str(package / "__init__.py"))
    assert info.commit() is None
