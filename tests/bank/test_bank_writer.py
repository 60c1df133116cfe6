"""Writing a bank, and going on with one."""

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from banks import CONFIG, bad_input, content, flip_a_bit, make

from eekd import LogitBank
from eekd.bank import __main__ as cli
from eekd.bank import writer
from eekd.io.files import read_json, sha256_of, write_json_atomic
from eekd.io.lock import locked

COMMAND = """import sys
from eekd.bank import __main__ as cli, writer
writer.SHARD_ROWS = 8
sys.exit(cli.main(sys.argv[1:]))"""


@pytest.mark.full
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(run, tmp_path):
    """19 shards a view, 8 views, of the top 3 logits; killed three times, once while it still starts."""
    chance = random.Random()
    command = [sys.executable, "-c", COMMAND, "--teacher", str(run), "--top-k", "3", "--out"]
    start = partial(subprocess.Popen, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert start([*command, str(tmp_path / "whole")]).wait() == 0
    out = tmp_path / "killed"
    for share in (0, 0.2, 0.6):
        process = start([*command, str(out)])
        while process.poll() is None and len(list(out.glob("view-*"))) < share * 152:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        assert not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("view-*")}
    assert 0.6 * 152 <= len(kept) < 152
    assert start([*command, str(out)]).wait() == 0
    assert content(out) == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == was for path, was in kept.items())


def test_what_is_missing_or_damaged_is_written_again(run, copy, capsys):
    folder = copy / "bank"
    before = content(folder)
    (folder / "view-0-shard-1.safetensors").unlink()
    flip_a_bit(folder / "view-1-shard-0.safetensors")
    os.truncate(folder / "view-2-shard-2.safetensors", 100)
    shutil.copy(folder / "view-0-shard-2.safetensors", folder / "view-1-shard-2.safetensors")
    renamed = (folder / "view-2-shard-0.safetensors").read_bytes().replace(b'"logits"', b'"mogits"')
    (folder / "view-2-shard-0.safetensors").write_bytes(renamed)
    kept = (folder / "view-0-shard-0.safetensors").stat().st_mtime_ns
    make(copy, "--views", 3)
    assert "9 shards" in (told := capsys.readouterr().out) and "236 of 450 rows to write" in told
    assert content(folder) == before and (folder / "view-0-shard-0.safetensors").stat().st_mtime_ns == kept
    make(copy, "--views", 3)
    assert "rows to write" not in capsys.readouterr().out and content(folder) == before


def test_more_views_are_added_to_a_bank(copy, bank):
    make(copy, "--views", 4)
    more = LogitBank.open(copy / "bank")
    assert more.views == 4 and bank.manifest["shards"].items() <= more.manifest["shards"].items()
    assert not torch.equal(more.rows(3, torch.arange(9))[0], more.rows(0, torch.arange(9))[0])


@pytest.mark.full
@pytest.mark.parametrize("kind", [(), ("--top-k", "3")], ids=["all classes", "top-k"])
def test_processes_share_the_shards(run, tmp_path, kind):
    """By torchrun, two of them; the bytes are those of one."""
    flags = ["-m", "eekd.bank", "--teacher", str(run), "--views", "3", *kind, "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = subprocess.run([*launch, *flags, str(tmp_path / "two")], env=environment, check=True, capture_output=True)
    subprocess.run([sys.executable, *flags, str(tmp_path / "one")], env=environment, check=True, capture_output=True)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert told.stdout.count(b"is whole") == 1 and len(LogitBank.open(tmp_path / "two").rows(2, torch.arange(150))) == 2


@bad_input
def test_a_shard_that_another_process_lost_is_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer.parallel, "long_barrier", lambda: None)
    for name in writer.parallel.TORCHRUN:
        monkeypatch.setenv(name, "2" if "SIZE" in name else "0")
    assert cli.main(["--teacher", str(run), "--views", "1", "--out", str(tmp_path / "bank")]) == 2
    assert "view-0-shard-1.safetensors is missing or damaged: start again" in capsys.readouterr().err
    assert not (tmp_path / "bank" / "manifest.json").exists()


def test_what_it_says_before_it_starts(run, tmp_path, capsys):
    make(run, "--views", 2, "--out", tmp_path / "bank")
    told = capsys.readouterr().out
    size = sum(path.stat().st_size for path in (tmp_path / "bank").glob("view-*"))
    first = r"2 views x 150 images x 3 snapshots in 6 shards, 46.8 kB: 300 of 300 rows to write, in about \d+ s\n"
    assert re.match(first, told)
    assert 46_800 <= size < 46_800 + 6 * 2000
    assert told.endswith("is whole\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(run, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(writer, "save_tensors", lambda *_: signal.raise_signal(number))
    assert cli.main(["--teacher", str(run), "--out", str(tmp_path / "bank")]) == 128 + number
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


@bad_input
@pytest.mark.parametrize(("flags", "wanted"), [
    ("", "--teacher"),
    ("--teacher nowhere", "nowhere is not the folder of a run"),
    ("--teacher RUN --views 0", "views must be at least 1, got 0"),
    ("--teacher RUN --views many", "--views"),
    ("--teacher RUN --view 3", "--views"),
    ("--teacher RUN --dtype float32", "--dtype"),
    ("--teacher RUN --top-k 11", "top-k must be at most 10, the number of classes, got 11"),
    ("--teacher RUN --top-k -1", "top-k must be at least 1, or 0 for all classes, got -1"),
    ("--teacher RUN --top-k few", "--top-k"),
    ("--teacher RUN --top-k 3", "shard-0.safetensors was made, got 3"),
    ("--teacher RUN --features some", "features must be none, all or a width of at least 1, got 'some'"),
    ("--teacher RUN --features 0", "features must be none, all or a width of at least 1, got '0'"),
    ("--teacher RUN --features -3", "features"),
    ("--teacher RUN --dtype bfloat16", "dtype must be 'float16', with which "),
    ("--teacher RUN --features none", "features must be 16, with which "),
    ("--teacher RUN --out RUN/config.json", "config.json"),
])  # fmt: skip
def test_bad_flags_of_the_writer(run, tmp_path, monkeypatch, capsys, flags, wanted):
    monkeypatch.chdir(tmp_path)
    before = content(run / "bank")
    try:
        code = cli.main(flags.replace("RUN", str(run)).split())
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    told = re.sub(r"[\s│╭╮╰╯─]+", " ", told.err + told.out)
    assert code == 2 and wanted in told and "Traceback" not in told
    assert content(run / "bank") == before and not list(tmp_path.iterdir())


@bad_input
def test_a_full_disk_is_said_before_it_starts(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    assert cli.main(["--teacher", str(run), "--out", str(tmp_path / "bank")]) == 2
    assert "must have 187.2 kB for the bank, got 1.0 kB left" in capsys.readouterr().err
    assert not content(tmp_path / "bank")


@bad_input
def test_two_writers_do_not_mix(run, tmp_path, capsys):
    with locked(tmp_path):
        assert cli.main(["--teacher", str(run), "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path} is in use by process ") and told.count("\n") == 1
    assert not content(tmp_path)


@bad_input
def test_other_data_than_the_teachers_is_refused_by_the_writer(copy, capsys):
    config = dataclasses.replace(CONFIG, split_seed=4)
    (copy / "config.json").write_text(config.to_json())
    assert cli.main(["--teacher", str(copy), "--out", str(copy / "other")]) == 2
    assert "config.json was changed or damaged" in capsys.readouterr().err
    path = copy / "environment.json"
    write_json_atomic(path, read_json(path) | {"config_sha256": sha256_of(copy / "config.json")})
    assert cli.main(["--teacher", str(copy), "--out", str(copy / "other")]) == 2
    assert "was trained on other images" in capsys.readouterr().err and not (copy / "other").exists()


@bad_input
def test_without_rich_and_tyro_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None; import eekd.bank.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "pip install 'eekd[train]'" in done.stderr
