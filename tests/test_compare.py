"""The comparison: cells are made once, whatever happens, and the statistics and verdicts follow from them."""

import copy
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from eekd.compare import __main__ as cli
from eekd.compare import page
from eekd.compare.methods import METHODS, method
from eekd.compare.runner import alone
from eekd.compare.study import claims, slope, summarise
from eekd.compare.verdict import CONTRADICTED, HOLDS, MISSING, UNDECIDED, together, verdict
from eekd.io.files import printable, read_json, sha256_of, write_json_atomic
from eekd.snapshots import read_manifest
from eekd.snapshots.manifest import stage_ends
from eekd.statistics import interval, paired
from eekd.train.config import Config

bad_input = pytest.mark.bad_input
SMALL = (
    "--teacher.epochs 4 --teacher.snapshots 2 --teacher.model resnet8_w4 --student.epochs 2 --train-limit 150 "
    "--device cpu --views 2"
)
NAMES = "ce last half uniform attention attention-m3 sed cyclic-uniform uniform-online"


def command(out, *, names=NAMES, seeds=2, first=0, flags=SMALL):
    return [*f"{flags} --methods {names} --seeds {seeds} --first-seed {first} --out {out}".split()]


def compare(*args, **kwargs) -> int:
    try:
        return cli.main(command(*args, **kwargs))
    except SystemExit as stop:
        return stop.code
    finally:
        torch.use_deterministic_algorithms(False)


def started(*args, **kwargs) -> subprocess.Popen:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here, or cells would not be alike
    return subprocess.Popen(
        [sys.executable, "-m", "eekd.compare", *command(*args, **kwargs)],
        env=os.environ | threads,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A finished comparison over two seeds, which tests only read."""
    out = tmp_path_factory.mktemp("compare") / "out"
    assert compare(out) == 0
    return out


@pytest.fixture(scope="module")
def record(out):
    return read_json(out / "study.json")


def without_time(record: dict) -> dict:
    """What must be the same however often the work was interrupted."""
    record = copy.deepcopy(record)
    for row in (*record["cells"], *record["teachers"], *record["methods"]):
        for name in [name for name in row if "seconds" in name]:
            del row[name]
    return {name: value for name, value in record.items() if name not in ("command", "environment")}


# ---- what comes out ----


def test_every_method_is_there_for_every_seed(out, record):
    names = NAMES.split()
    assert sorted((cell["name"], cell["seed"]) for cell in record["cells"]) == sorted(
        (name, seed) for name in names for seed in (0, 1)
    )
    assert {row["name"] for row in record["methods"]} == set(names) and record["images"] == 150
    assert record["environment"]["torch"] and record["command"][:3] == ["python", "-m", "eekd.compare"]
    for cell in record["cells"]:
        student = out / f"seed-{cell['seed']}" / "students" / cell["name"]
        known = read_json(student / "student.json")
        assert (known["val"], known["test"]) == (cell["val"], cell["test"]) and cell["seconds"] > 0
        if cell["name"] != "ce":
            assert sum(cell["weights"]) == pytest.approx(1, abs=1e-5)
            taught = [entry["step"] for entry in known["teacher"]["snapshots"]]
            assert taught == ([4, 8] if cell["name"] == "sed" else cell["epochs"])
            assert (known["teacher"]["bank"] is None) == cell["name"].endswith("-online")
    text = (out / "study.md").read_text()
    assert text == page.page(record, "study-")
    for name in re.findall(r"\]\((study-\w+\.svg)\)", text):
        assert (out / name).read_bytes().lstrip().startswith(b"<?xml")
    assert len(list(out.glob("*.svg"))) == 4


def test_teachers_are_what_they_are_called(out):
    seed = out / "seed-0"
    sed = read_manifest(seed / "sed" / "teacher")["snapshots"]
    finished = [read_manifest(seed / name / "teacher")["snapshots"][-1] for name in ("ordinary", "sed-1")]
    assert [entry["sha256"] for entry in sed] == [entry["sha256"] for entry in finished]
    assert sed[0]["sha256"] != sed[1]["sha256"] and sed[1]["sha256"] == sha256_of(seed / "sed/teacher" / sed[1]["file"])
    assert read_manifest(seed / "ordinary" / "teacher")["schedule"] == [1, 2, 4]
    rates = {}
    for kind in ("ordinary", "cyclic"):
        rows = (seed / kind / "teacher" / "metrics.jsonl").read_text().splitlines()
        rates[kind] = [json.loads(row)["lr"] for row in rows]
    assert rates["cyclic"][0] == rates["cyclic"][2] > rates["cyclic"][1] and rates["ordinary"] != rates["cyclic"]
    assert read_json(seed / "sed-1" / "config.json")["seed"] == 1000
    assert {
        read_json(seed / kind / "bank" / "manifest.json")["images"]["seed"] for kind in ("ordinary", "cyclic", "sed")
    } == {0}


def test_snapshots_picked_from_a_union_teach_like_a_teacher_that_kept_no_others(out, tmp_path):
    assert compare(tmp_path, names="attention uniform", seeds=1) == 0
    assert read_manifest(tmp_path / "seed-0" / "ordinary" / "teacher")["schedule"] == [2, 4]
    for name in ("attention", "uniform"):
        one, other = (sha256_of(root / f"seed-0/students/{name}/student.safetensors") for root in (out, tmp_path))
        assert one == other


def test_labels_alone_are_learnt_from_the_images_in_the_bank(tmp_path):
    assert compare(tmp_path, names="ce ce-online", seeds=1, flags=SMALL.replace("--views 2", "--views 1")) == 0
    one, other = (sha256_of(tmp_path / f"seed-0/students/{name}/student.safetensors") for name in ("ce", "ce-online"))
    assert one != other  # whose second epoch shows another view


def test_a_method_is_a_row_of_one_table():
    config = Config()
    assert [name for name in METHODS if METHODS[name].teacher == "sed"] == ["sed"]
    assert METHODS["uniform"].epochs(config) == [4, 8, 12, 16, 20] and METHODS["half"].epochs(config) == [10]
    assert METHODS["last"].epochs(config) == [20] and METHODS["uniform-m3"].epochs(config) == [6, 13, 20]
    assert METHODS["sed"].epochs(config) == [20] * 5 and METHODS["ce"].epochs(config) == []
    assert method("entropy-online").online and not method("entropy").online
    assert stage_ends(7, 3) == [2, 4, 7]


# ---- made once ----


def test_what_is_finished_is_not_made_again(out, monkeypatch):
    files = {path: path.stat().st_mtime_ns for path in out.glob("seed-*/**/*.*") if path.is_file()}
    before = (out / "study.json").read_bytes()

    def refuse(*args, **kwargs):
        raise AssertionError("made again")

    for name in ("train_student", "train_teacher"):
        monkeypatch.setattr(f"eekd.compare.runner.{name}", refuse)
    monkeypatch.setattr("eekd.compare.runner.write_bank", refuse)
    assert compare(out) == 0
    assert {path: path.stat().st_mtime_ns for path in files if path.name != ".lock"} == {
        path: mtime for path, mtime in files.items() if path.name != ".lock"
    }
    assert (out / "study.json").read_bytes() == before


@pytest.mark.full
def test_interrupted_before_every_cell_and_teacher_it_comes_out_the_same(record, tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def once(source, target):
        if str(source).endswith(".partial") and source not in calls:
            calls.append(source)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("eekd.compare.runner.os.replace", once)
    codes = []
    while not codes or codes[-1]:
        codes.append(compare(tmp_path, seeds=1))
    assert codes == [130] * 13 + [0]  # nine students, four folders of teachers
    found = read_json(tmp_path / "study.json")
    kept = without_time(record)
    for name in ("cells", "teachers"):
        assert without_time(found)[name] == [row for row in kept[name] if row["seed"] == 0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr("eekd.compare.runner.train_teacher", lambda *_, **__: signal.raise_signal(number))
    assert compare(tmp_path, seeds=1) == 128 + number
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


@pytest.mark.full
def test_two_processes_and_a_kill_give_what_one_gave_undisturbed(record, tmp_path):
    other = started(tmp_path, seeds=1, first=1)
    try:
        killed = started(tmp_path, seeds=1)
        try:
            deadline = time.monotonic() + 600
            while not (tmp_path / "seed-0" / "ordinary" / "bank").exists():
                assert killed.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            assert compare(tmp_path, seeds=1) == 2  # while another is at work on seed 0
        finally:
            os.kill(killed.pid, signal.SIGKILL)
            killed.communicate()
        assert compare(tmp_path, seeds=1) == 0
        assert other.wait(600) == 0, other.stderr.read()
    finally:
        other.kill()
        other.communicate()
    assert compare(tmp_path) == 0
    assert without_time(read_json(tmp_path / "study.json")) == without_time(record)
    assert not list(tmp_path.rglob("*.partial"))


@bad_input
@pytest.mark.parametrize("changed, wanted", [
    (dict(flags=f"{SMALL} --student.lr 0.05"), "student.lr must be 0.1, with which "),
    (dict(flags=f"{SMALL} --student.milestones 0.5"), "student.milestones must be [0.3, 0.6, 0.9], with which "),
    (dict(flags=SMALL.replace("--views 2", "--views 3")), "views must be 2, with which "),
    (dict(names="uniform-m4"), "no method 'uniform-m4'; did you mean 'uniform-m"),
    (dict(names="attentoin"), "no method 'attentoin'; did you mean 'attention'?"),
    (dict(names="attention-m10"), "teacher.epochs must be at least 10 for method attention-m10, got 4"),
    (dict(names="linear_increase-m3"), "no method 'linear_increase-m3'"),
    (dict(seeds=0), "seeds must be at least 1, got 0"),
    (dict(first=-1), "first_seed must be at least 0, got -1"),
    (dict(flags=f"{SMALL} --seed 3"), "seed must be left to --first-seed, got 3"),
    (dict(flags=f"{SMALL} --students ce"), "students must be left to --methods, got ('ce',)"),
    (dict(flags=f"{SMALL} --student.fusion logit"), "student.fusion must be 'probability', since methods vary it"),
    (dict(flags=f"{SMALL} --teacher.schedule cyclic"), "teacher.schedule must be another than"),
    (dict(flags=f"{SMALL} --teacher.snapshots 3"), "teacher.epochs must be a multiple of teacher.snapshots (3)"),
    (dict(flags=f"{SMALL} --student.model resnet9"), "resnet"),
])  # fmt: skip
def test_bad_flags(out, capsys, changed, wanted):
    before = (out / "study.json").read_bytes()
    assert compare(out, **changed) == 2
    told = capsys.readouterr().err
    assert wanted in told and told.count("\n") == 1 and "Traceback" not in told
    assert (out / "study.json").read_bytes() == before


@bad_input
def test_a_snapshot_that_was_not_kept_and_a_method_that_changed(tmp_path, capsys, monkeypatch):
    assert compare(tmp_path, names="last", seeds=1) == 0
    assert compare(tmp_path, names="last attention-m3", seeds=1) == 2
    assert "has no snapshot of epochs [1], which this method needs" in capsys.readouterr().err
    monkeypatch.setitem(METHODS, "last", METHODS["half"])
    assert compare(tmp_path, names="last", seeds=1) == 2
    assert "snapshots must be 1, with which " in capsys.readouterr().err


@bad_input
def test_only_one_process_works_on_a_seed(out, capsys):
    with alone(out / "seed-1"):
        assert compare(out) == 2
    assert "another process is at work in" in capsys.readouterr().err


# ---- statistics and verdicts ----


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_intervals_are_those_of_the_paired_t_test(n):
    a, b = np.random.default_rng(n).normal(0.9, 0.01, (2, n))
    found = paired(dict(enumerate(a)), dict(enumerate(b)) | {99: 1.0})
    wanted = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["n"] == n and found["mean"] == pytest.approx((a - b).mean())
    assert (found["low"], found["high"]) == pytest.approx(tuple(wanted))


def test_without_two_seeds_there_is_no_interval():
    assert interval([0.3]) == {"n": 1, "mean": 0.3, "low": None, "high": None}
    assert interval([]) is None and paired({0: 1.0}, {1: 1.0}) is None


def test_the_slope_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    series = {m: {seed: rng.normal() for seed in (4, 5, 6)} for m in (1, 2, 3, 10)}
    x = np.log2(list(series))
    wanted = [np.polyfit(x, [found[seed] for found in series.values()], 1)[0] for seed in (4, 5, 6)]
    assert slope(series) == pytest.approx(interval(wanted))
    assert slope({1: {0: 0.5}}) is None


@pytest.mark.parametrize("low, high, above, wanted", [
    (0.1, 0.3, True, HOLDS), (0.1, 0.3, False, CONTRADICTED), (-0.3, -0.1, True, CONTRADICTED),
    (-0.3, -0.1, False, HOLDS), (-0.1, 0.3, True, UNDECIDED), (-0.1, 0.3, False, UNDECIDED),
    (0.0, 0.3, True, UNDECIDED), (None, None, True, UNDECIDED), (0.2, 0.2, True, UNDECIDED),
])  # fmt: skip
def test_the_rule_of_a_verdict(low, high, above, wanted):
    assert verdict({"n": 3, "mean": 0.1, "low": low, "high": high}, above) == wanted


def test_differences_that_are_equal_but_for_rounding_decide_nothing():
    for k in range(100, 143):
        found = paired({0: (k + 1) / 144, 1: 138 / 144}, {0: k / 144, 1: 137 / 144})
        assert verdict(found, True) == verdict(found, False) == UNDECIDED, k
    assert verdict(paired({0: 0.8, 1: 0.81}, {0: 0.7, 1: 0.709999}), True) == HOLDS


def test_a_claim_holds_where_all_its_parts_hold():
    assert verdict(None, True) == MISSING
    assert together([HOLDS, HOLDS]) == HOLDS and together([HOLDS, UNDECIDED]) == UNDECIDED
    assert together([HOLDS, CONTRADICTED, MISSING]) == CONTRADICTED and together([UNDECIDED, MISSING]) == MISSING


def known(record: dict, best: dict, ensembles: dict) -> dict:
    """`record` as if students and ensembles were as accurate as this, give or take a little for each seed."""
    record, seeds = copy.deepcopy(record), range(3)
    blank = record["cells"][0]

    def cell(name, seed, value):
        how = METHODS[name]
        m = {"weights": None} if name == "ce" else {"weights": [1.0] * len(how.epochs(Config()))}
        score = {"accuracy": value + seed * (0.001 + 5e-5 * [*METHODS].index(name)), "loss": 1.0}
        return blank | m | {"name": name, "seed": seed, "method": vars(how), "epochs": how.epochs(Config()),
                            "val": score, "test": score, "weight_entropy": 1.0}  # fmt: skip

    record["cells"] = [cell(name, seed, best.get(name, 0.8)) for name in METHODS for seed in seeds]
    record["teachers"] = [
        {"seed": seed, "kind": kind, "seconds": 1.0, "bank_seconds": 1.0, "bank_snapshots": 5,
         "test": {"members": [{"accuracy": value + 5e-4 * seed * len(kind)}]}}
        for kind, value in ensembles.items() for seed in seeds
    ]  # fmt: skip
    return record | summarise(record, Config(), {"teacher": 1000, "student": 100}) | {"seeds": [*seeds]}


PAPER = {"uniform": 0.84, "attention": 0.87, "linear_increase": 0.82, "linear_decrease": 0.83, "cyclic-uniform": 0.81,
         "cyclic-attention": 0.82, "sed": 0.81, "last": 0.81, "half": 0.815, "uniform-m2": 0.82, "uniform-m3": 0.83,
         "uniform-m10": 0.845, "attention-m2": 0.83, "attention-m3": 0.85, "attention-m10": 0.875}  # fmt: skip


def test_verdicts_where_the_paper_is_right_and_where_it_is_wrong(record):
    right = known(record, PAPER, {"ordinary": 0.9, "cyclic": 0.92, "sed": 0.93})
    assert [row["verdict"] for row in right["claims"]] == [HOLDS] * len(right["claims"])
    wrong = known(
        record, {name: 1.7 - value for name, value in PAPER.items()}, {"ordinary": 0.9, "cyclic": 0.88, "sed": 0.87}
    )
    assert [row["verdict"] for row in wrong["claims"]] == [CONTRADICTED] * (len(wrong["claims"]) - 1) + [HOLDS]
    for told, found in ((right, "**Holds.**"), (wrong, "**Contradicted.**")):
        text = page.page(told)
        assert text.count(found) >= len(told["claims"]) - 1 and "nan" not in text and "None" not in text
    assert "undecided |" not in page.page(right) and "not measured" not in page.page(right)


def test_the_cost_is_the_papers_arithmetic(record):
    told = known(record, PAPER, {"ordinary": 0.9, "cyclic": 0.92, "sed": 0.93})
    (row,) = [row for row in told["claims"] if row["principle"] == "cost"]
    assert row["ratio"] == pytest.approx((1 + 5 / 3) / (5 + 5 / 3)) == pytest.approx(0.4)
    costs = {row["name"]: row["cost"] for row in told["methods"]}
    n, epochs, views = told["images"], Config().teacher.epochs, told["views"]
    assert costs["attention"]["teacher_training"] == costs["uniform-m2"]["teacher_training"] == 3 * n * epochs
    assert costs["sed"]["teacher_training"] == 15 * n * epochs and costs["ce"]["teacher_training"] == 0
    assert [costs[name]["teaching"] for name in ("ce", "last", "attention", "uniform-m10")] == [
        n * epochs * m for m in (0, 1, 5, 10)
    ]
    assert costs["attention"]["teaching_bank"] == 5 * n * views
    assert costs["ce"]["gflops_online"] == pytest.approx(3 * n * epochs * 100 / 1e9)


def test_verdicts_of_one_seed_are_undecided(record):
    test = {name: {0: 0.8} for name in METHODS}
    rows = claims(test, {kind: {0: 0.9} for kind in ("ordinary", "cyclic", "sed")}, Config(), {})
    assert {row["verdict"] for row in rows[:-1]} == {UNDECIDED} and rows[-1]["verdict"] == MISSING


def test_the_page_of_an_empty_comparison_says_so():
    assert "No cell is finished yet" in page.page({"methods": []})


def test_a_copy_of_a_folder_is_no_seed_and_no_cell(out, record, tmp_path):
    copied = Path(shutil.copytree(out, tmp_path / "out"))
    shutil.copytree(copied / "seed-0", copied / "seed-0.bak")
    for name in ("uniform.bak", "uniform.partial"):
        shutil.copytree(copied / "seed-0/students/uniform", copied / "seed-0/students" / name)
    assert compare(copied) == 0
    assert without_time(read_json(copied / "study.json")) == without_time(record)


HOSTILE = "a|b<img src=x>`c`\n# d ![e](//f) \x1b*g*"


def test_the_page_holds_no_markup_of_a_file(out, record, tmp_path):
    copied = Path(shutil.copytree(out, tmp_path / "out"))
    path = copied / "seed-0/students/ce/cell.json"
    cell = read_json(path)
    write_json_atomic(path, cell | {"method": cell["method"] | {"title": HOSTILE}})
    assert compare(copied) == 0
    assert all(row["title"] == method(row["name"]).title for row in read_json(copied / "study.json")["methods"])
    told = copy.deepcopy(record)
    told["command"] = ["python", HOSTILE, "x y"]
    told["config"]["data"] = told["environment"]["cpu"] = told["environment"]["torch"] = HOSTILE
    told["config"]["teacher"]["model"] = told["config"]["student"]["model"] = HOSTILE
    told["commits"] = [HOSTILE]
    text = page.page(told)
    line = next(line for line in text.splitlines() if line.startswith("``python"))
    code, _, rest = line[2:].partition("`` on ")
    assert code == printable(shlex.join(told["command"])) and "`" not in rest
    assert len(text.splitlines()) == len(page.page(record).splitlines())
    assert not re.search(r"a\||<img|!\[|\*g\*", text.replace(code, "")) and "a&#124;b&#60;img" in text


def test_a_plot_replaces_a_link(out, record, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "study-methods.svg").symlink_to(mine)
    page.plots(record, tmp_path)
    assert mine.read_text() == "mine"
    for path in tmp_path.glob("*.svg"):
        assert path.read_bytes() == (out / path.name).read_bytes() and not path.is_symlink()
    assert len(list(tmp_path.iterdir())) == 5


def test_flops_are_counted(record):
    # resnet8_w4 at 8 x 8: the first layer alone is 2 * 9 * 4 * 64 operations
    assert record["flops"]["student"] == record["flops"]["teacher"] > 2 * 9 * 4 * 64
    assert all(math.isfinite(row["cost"]["gflops_online"]) for row in record["methods"])
    assert Path(record["command"][0]).name == "python"
