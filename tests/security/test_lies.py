"""Files that lie about what they hold, lead out of their folder, or speak to the terminal."""

import dataclasses
import io
import json
from types import SimpleNamespace

import pytest
import torch
from hostile import a_bank, a_run, bad_input, refused
from rich.console import Console
from torch import nn

from eekd.bank import LogitBank
from eekd.compare import __main__ as compare
from eekd.compare import runner
from eekd.data import load
from eekd.io.files import printable, read_json, write_atomic, write_json_atomic
from eekd.io.lock import locked
from eekd.report import __main__ as report_command
from eekd.report import page
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.train import __main__ as train_command
from eekd.train import screen
from eekd.train.config import Config, Student, Teacher
from eekd.train.run_folder import check_metrics


def a_table(folder, path):
    """Parquet of 40 images that lie in one file."""
    datasets = pytest.importorskip("datasets")
    table = {"image": [{"bytes": None, "path": path}] * 40, "label": [0, 1] * 20}
    folder.mkdir()
    datasets.Dataset.from_dict(table).to_parquet(str(folder / "t.parquet"))
    return folder


def an_image():
    from PIL import Image

    data = io.BytesIO()
    Image.new("L", (8, 8), 7).save(data, "PNG")
    return data.getvalue()


@pytest.mark.full
@bad_input
@pytest.mark.parametrize("path", ["../secret.png", "/secret.png", "x/../../secret.png"])
def test_a_table_reads_no_file_outside_its_folder(tmp_path, monkeypatch, path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(an_image())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = str(secret) if path.startswith("/") else path
    evil, good = a_table(tmp_path / "evil", path), a_table(tmp_path / "good", "mine.png")
    (evil / "x").mkdir()
    monkeypatch.chdir(evil)
    for source in (evil, evil / "t.parquet"):
        refused(lambda source=source: load(str(source)), said=f"must be bytes or a path in {evil}, got '{path}'")
    (good / "mine.png").write_bytes(an_image())
    assert len(load(str(good / "t.parquet")).train) > 0


@pytest.mark.full
@bad_input
def test_a_table_of_the_hub_reads_files_of_the_cache_only(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    evil = a_table(tmp_path / "evil", str(tmp_path / "evil" / "mine.png"))
    (evil / "mine.png").write_bytes(an_image())
    table = datasets.Dataset.from_parquet(str(evil / "t.parquet"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=table.select(range(20))))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "elsewhere"))
    refused(lambda: load("some/thing"), said=f"must be bytes or a path in {tmp_path}/elsewhere, got '.*mine.png'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(evil))
    assert len(load("some/thing").train) > 0


@bad_input
@pytest.mark.parametrize(
    "file",
    [
        "../snapshot-1.safetensors",
        "/etc/passwd.safetensors",
        "a/b.safetensors",
        "..safetensors",
        ".safetensors",
        "x.pt",
        "x.safetensors\n",
        "x\0.safetensors",
        "~.safetensors",
        3,
        None,
    ],
)
def test_a_manifest_that_leads_out_of_its_folder(tmp_path, file):
    run = a_run(tmp_path / "run")
    manifest = read_json(run / "teacher/manifest.json")
    manifest["snapshots"][0]["file"] = file
    write_json_atomic(run / "teacher/manifest.json", manifest)
    refused(read_manifest, run / "teacher", said="must be the name of a .safetensors file in its folder")


@bad_input
@pytest.mark.parametrize("metrics", [{"../../secret": "0" * 64}, {"/etc/passwd": ""}, [], "metrics.jsonl", {"": ""}])
def test_a_record_that_leads_out_of_its_folder(tmp_path, metrics):
    run = a_run(tmp_path / "run")
    write_json_atomic(run / "students/ce/student.json", {"format": 1, "metrics": metrics})
    refused(page.report, run, said="must have a record with metrics of metrics.jsonl and metrics.csv")
    refused(check_metrics, run / "students/ce", {"metrics": metrics})


@bad_input
@pytest.mark.parametrize("spec", [
    {}, {"x": 1}, {"name": "resnet8"}, {"name": ["resnet8"], "num_classes": 2},
    {"name": "resnet8", "num_classes": 1 << 50, "in_channels": 3, "image_size": 32},
    {"name": "resnet8", "num_classes": 10**30, "in_channels": 3, "image_size": 32},
])  # fmt: skip
def test_a_spec_that_cannot_be_built(tmp_path, spec):
    run = a_run(tmp_path / "run")
    write_json_atomic(run / "teacher/manifest.json", read_json(run / "teacher/manifest.json") | {"spec": spec})
    refused(SnapshotEnsemble.load, run / "teacher", said="manifest.json has a spec that cannot be built")


@bad_input
@pytest.mark.parametrize(("how", "said"), [
    ({"classes": 1 << 30}, "must have logits"), ({"classes": 1 << 60}, "its classes cannot be"),
    ({"classes": 5}, "must have logits"), ({"shape": (4, 1, 4)}, "must have logits"),
    ({"shape": (1,)}, "must have logits"), ({"dtype": "bfloat16"}, "must have logits"),
    ({"features": 128}, "cannot be read"), ({"snapshots": 1 << 30}, "teacher cannot"),
    ({"indices": 4}, "indices below 4, got 4"), ({"indices": -1}, "indices below 4, got 65535"),
    ({"views": 1 << 30}, "its shards cannot be"), ({"shard_rows": 1 << 62}, "its shard_rows cannot be"),
    ({"images": {"fingerprint": "", "augment": "", "seed": 1 << 70, "augmented_sha256": ""}}, "its images cannot be"),
])  # fmt: skip
def test_a_bank_whose_manifest_lies(tmp_path, how, said):
    a_bank(tmp_path / "bank", **how)
    refused(lambda: LogitBank.open(tmp_path / "bank").rows(0, torch.tensor([0, 3, 5])), said=said)


@bad_input
def test_a_projection_of_another_width(tmp_path):
    a_bank(tmp_path / "bank", projection={"width": (1 << 31) - 1, "seed": 0}, features=4)
    refused(lambda: LogitBank.open(tmp_path / "bank").project(torch.zeros(2, 8)), said="2147483647 features, got 8")


@bad_input
def test_settings_of_a_teacher_are_checked_by_train_too(tmp_path):
    run = a_run(tmp_path / "run")
    write_json_atomic(run / "environment.json", {"format": 1, "config_sha256": "0" * 64})
    a_bank(run / "bank")
    for flags in (["--teacher", str(run)], ["--bank", str(run / "bank")]):
        with pytest.raises(ValueError, match="config.json was changed or damaged since the run began"):
            train_command.parse(["student", *flags])


def test_what_is_written_follows_no_link_out(tmp_path, capsys):
    """A folder may hold links under the names that are written to."""
    secret, run = tmp_path / "secret", a_run(tmp_path / "run")
    secret.write_text("mine")
    (run / ".report.html.tmp").symlink_to(secret)
    (run / "report.html").symlink_to(secret)
    (run / ".lock").symlink_to(secret)
    assert report_command.main([str(run)]) == 0
    with pytest.raises(OSError, match=".lock"), locked(run):
        pass
    assert secret.read_text() == "mine" and not (run / "report.html").is_symlink()


@bad_input
@pytest.mark.parametrize(
    "flags",
    [
        lambda run: (report_command.main, [str(run)]),
        lambda run: (train_command.main, ["--resume", str(run)]),
        lambda run: (train_command.main, ["--config", str(run / "config.json")]),
    ],
)
def test_what_a_file_says_does_not_speak_to_the_terminal(tmp_path, capsys, flags):
    run = a_run(tmp_path / "run")
    write_atomic(run / "config.json", json.dumps({"a\x1b]0;title\x07\u202e\x9b2J\nerror: none": 1}).encode())
    command, arguments = flags(run)
    assert command(arguments) == 2
    out, error = capsys.readouterr()
    assert not out and error.endswith("\n") and error[:-1].isprintable() and r"a\x1b]0;title\x07\u202e\x9b2J\n" in error


HOSTILE = "a\x1b]0;title\x07\u202e\x9b2J\nb"


def printed(what):
    console = Console(file=io.StringIO(), width=999)
    console.print(what)
    return console.file.getvalue()


def test_tables_do_not_speak_to_the_terminal(monkeypatch):
    scores = {"val_accuracy": 0.5, "test_accuracy": 0.5, "gain": None, "seconds_per_epoch": None}
    rows = [{"kind": "student", "name": HOSTILE, "model": HOSTILE, "parameters": 1, "epochs": HOSTILE, **scores}]
    found = printed(screen.results(rows))
    assert found.count(printable(HOSTILE)) == 3 and all(line.isprintable() for line in found.splitlines())
    row = {"name": "ce", "model": HOSTILE, "parameters": 1, "epochs": 1, "steps": 1, "memory": 1, "disk": 1}
    monkeypatch.setattr("eekd.train.estimate.plan", lambda session: [row])
    data = dataclasses.replace(load("digits"), name=HOSTILE)
    found = printed(screen.plan(SimpleNamespace(data=data, asked=Config(), config=Config())))
    assert found.count(printable(HOSTILE)) == 2 and all(line.isprintable() for line in found.splitlines())


def test_lines_do_not_speak_to_the_terminal(tmp_path, monkeypatch, capsys):
    class Seed:
        def __init__(self, out, config, names, views, augmented, data, say, progress):
            self.run = lambda: say(HOSTILE)

    monkeypatch.setattr(runner, "keep_settings", lambda *known: None)
    monkeypatch.setattr(runner, "Seed", Seed)
    record = {"methods": [], "advice": {"text": ""}}
    (tmp_path / "study.json").write_text(json.dumps(record))
    monkeypatch.setattr("eekd.compare.study.gather", lambda *known: tmp_path / "study.json")
    compare.run(compare.Flags(methods=("ce",), settings=Config(data="digits", seeds=1), out=HOSTILE), [])
    found = capsys.readouterr().out
    assert found.count(printable(HOSTILE)) == 2 and all(line.isprintable() for line in found.splitlines())


@bad_input
def test_names_of_tensors_are_printable_and_short():
    from eekd.io.tensors import load_state

    with pytest.raises(ValueError, match="does not fit this Linear") as caught:
        load_state(nn.Linear(3, 2), {"\x1b[2J" + "x" * 10**6: torch.ones(1)}, "file")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_report_is_nothing_but_text_and_drawings(tmp_path):
    hostile = "</title><script src=x onerror=alert(1)>\"'&\u202e"
    run = a_run(tmp_path / "run")
    config = Config(data=hostile, teacher=Teacher(model=hostile, epochs=2, snapshots=2), student=Student(model=hostile))
    write_atomic(run / "config.json", config.to_json().encode())
    (run / "students/ce").rename(run / "students" / "<img onload='x'>")
    facts = {"format": 1, "command": [hostile], "data": {"test": 9}, hostile: {hostile: [hostile]}}
    write_json_atomic(run / "environment.json", facts)
    text = page.report(run).read_text()
    assert "<script" not in text and "<img" not in text and text.count("</title>") == text.count("<title>")
    assert "default-src 'none'" in text and "&lt;script" in text
