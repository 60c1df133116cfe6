"""A run of several processes learns what a run of one does."""

import shutil

import pytest
from processes import SMALL, TIMES, assert_close, launch

from eekd.io.files import read_json
from eekd.train.run_folder import read_metrics

NORM_FREE = """
from torch import nn

def build(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(),
                         nn.Linear(8 * (image_size - 2) ** 2, 16), nn.GELU(), nn.Linear(16, num_classes))
"""


@pytest.fixture(scope="module")
def norm_free(tmp_path_factory) -> list:
    """Flags of a small run whose networks see every sample by itself, and its outcome in one process."""
    folder = tmp_path_factory.mktemp("norm-free")
    (folder / "net.py").write_text(NORM_FREE)
    model = f"{folder / 'net.py'}:build"
    flags = [
        "-m",
        "eekd.train",
        *SMALL,
        "--teacher.model",
        model,
        "--student.model",
        model,
        "--teacher.lr",
        "0.02",
        "--student.lr",
        "0.02",
        "--students",
        "ce",
        "uniform",
        "attention",
    ]
    launch(1, *flags, "--out", folder / "one")
    return [*flags, "--out"], folder / "one"


@pytest.mark.parametrize("processes, flags", [
    pytest.param(1, ["--accumulate", 3], marks=pytest.mark.full),
    (2, ["--accumulate", 2, "--check-replicas", 1]),
    pytest.param(4, ["--snapshots-on", "ranks"], marks=pytest.mark.full),
    pytest.param(2, ["--parallel", "fsdp", "--accumulate", 2], marks=pytest.mark.full),
])  # fmt: skip
def test_the_same_batch_gives_the_same_networks(norm_free, tmp_path, processes, flags):
    """155 images in batches of 24, the last one of 11: however they are shared out, the steps are the same."""
    command, one = norm_free
    launch(processes, *command, tmp_path / "run", *flags)
    assert_close(one, tmp_path / "run", 2e-5)
    for phase in ("teacher", "students/attention"):
        ours, theirs = (read_metrics(run / phase, {}) for run in (one, tmp_path / "run"))
        for row, other in zip(ours, theirs, strict=True):
            assert row.keys() == other.keys()
            for name in row.keys() - TIMES:
                assert row[name] == pytest.approx(other[name], abs=1e-4), name


@pytest.mark.full
def test_processes_run_seed_after_seed(norm_free, tmp_path):
    """The first seed's networks are those of a run of its own, and what is lost of the second is done again."""
    command, one = norm_free
    run, summary = tmp_path / "run", tmp_path / "run" / "summary.json"
    launch(2, *command, run, "--seeds", 2)
    assert_close(one, run / "seed-0", 2e-5)
    before = read_json(summary)
    assert before["seeds"] == [0, 1] and len({row["test"]["std"] for row in before["rows"]}) > 1
    summary.unlink()
    shutil.rmtree(run / "seed-1" / "students")
    (run / "seed-1" / "summary.json").unlink()
    launch(2, "-m", "eekd.train", "--resume", run)
    again = read_json(summary)
    assert [row["test"] for row in again["rows"]] == [row["test"] for row in before["rows"]]


@pytest.mark.full
def test_synchronised_batch_norm_makes_processes_agree(tmp_path):
    command = ["-m", "eekd.train", *SMALL, "--students", "attention", "--sync-batchnorm", "--out"]
    launch(1, *command, tmp_path / "one")
    launch(2, *command, tmp_path / "two")
    assert_close(tmp_path / "one", tmp_path / "two", 2e-3)


@pytest.mark.full
def test_a_comparison_shares_its_seeds(tmp_path):
    flags = [
        "-m",
        "eekd.compare",
        "--train-limit",
        "155",
        "--teacher.epochs",
        "1",
        "--student.epochs",
        "1",
        "--teacher.snapshots",
        "1",
        "--teacher.model",
        "resnet8_w4",
        "--methods",
        "ce",
        "--seeds",
        "2",
        "--out",
    ]
    launch(2, *flags, tmp_path / "out")
    assert read_json(tmp_path / "out" / "study.json")["seeds"] == [0, 1]
