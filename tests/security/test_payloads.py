"""Nothing in a data file is run."""

import contextlib
import io
import json
import pickle
import re
import shlex
import shutil
import subprocess
import tarfile

import pytest
import torch
from hostile import ROOT, STATE, Payload, a_bank, a_run, bad_input, cifar, evil, refused, saved
from torch import nn

from eekd.bank import LogitBank
from eekd.data import load
from eekd.data.images import decode_image
from eekd.io.files import read_json, write_json_atomic
from eekd.io.tensors import load_weights, save_tensors
from eekd.report import __main__ as report_command
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.train.config import Config
from eekd.train.replay import replay
from eekd.train.run_folder import read_settings


def test_the_payload_would_be_seen(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "seen")))
    assert (tmp_path / "seen").is_dir()


def legacy_tar(marker):
    """What torch.save wrote before version 0.1.10."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("pickle", "storages", "tensors"):
            data = pickle.dumps(Payload(marker))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


@bad_input
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "write",
    [
        lambda marker: pickle.dumps(Payload(marker)),
        lambda marker: pickle.dumps({"state_dict": {"weight": Payload(marker)}}, protocol=2),
        lambda marker: saved(Payload(marker)),
        lambda marker: saved(STATE | {"x": Payload(marker)}),
        lambda marker: saved({"model": STATE, "epoch": Payload(marker)}, _use_new_zipfile_serialization=False),
        legacy_tar,
    ],
)
def test_weights_with_a_payload(tmp_path, marker, write, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(write(marker))
    refused(load_weights, path, said="weights")
    refused(lambda: SnapshotEnsemble.from_files([path], lambda: nn.Linear(3, 2)), said="weights")


@bad_input
@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "meta"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_cifar_with_a_payload(tmp_path, marker, file, protocol):
    root = cifar(tmp_path, **{file: pickle.dumps({"labels": Payload(marker)}, protocol=protocol)})
    refused(load, "cifar10", root, said=f"{file} is no pickle of plain values .*it asks for 'posix.mkdir'")


@bad_input
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "environment.json",
        "summary.json",
        "teacher/manifest.json",
        "teacher/snapshots.json",
        "students/ce/student.json",
        "students/ce/metrics.jsonl",
    ],
)
def test_a_run_whose_json_is_a_pickle(tmp_path, marker, name, capsys):
    run = a_run(tmp_path / "run")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_bytes(pickle.dumps(Payload(marker), protocol=0) + b"\n")
    assert report_command.main([str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.full
@bad_input
def test_a_folder_for_hugging_face_with_code_in_it(tmp_path, marker, monkeypatch):
    pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from PIL import Image

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, png = tmp_path / "evil", io.BytesIO()
    folder.mkdir()
    Image.new("L", (8, 8)).save(png, "PNG")
    # A type of one's own, which some versions of Arrow unpickled as soon as they saw it (CVE-2023-47248).
    kind = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    cells = arrow.array([{"bytes": png.getvalue(), "path": None}] * 40)
    fields = [arrow.field("image", cells.type), arrow.field("label", arrow.int64(), metadata=kind)]
    table = arrow.table([cells, arrow.array([0, 1] * 20)], schema=arrow.schema(fields))
    parquet.write_table(table, folder / "train.parquet")
    evil(folder, marker)
    for name in ("evil.py", "train.py"):  # a script named as the folder was run by datasets before version 4
        if not (folder / name).exists():
            shutil.copy(folder / "evil.py", folder / name)
    (folder / "state.pkl").write_bytes(pickle.dumps(Payload(marker)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    try:
        assert len(load(str(folder)).train) > 0
    except ValueError as error:
        assert "cannot be read as parquet" in str(error)


@bad_input
def test_an_image_that_is_a_program(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: ran.append(arguments))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch x) (w) file\nshowpage\n"
    with pytest.raises(ValueError, match="cat.png is damaged or no image"):
        decode_image(program, "cat.png", "RGB")
    assert not ran


def test_reports_and_banks_run_no_factory(tmp_path, marker, capsys):
    run = a_run(tmp_path / "run", evil(tmp_path, marker))
    assert report_command.main([str(run)]) == 0
    bank = LogitBank.open(a_bank(run / "bank", spec={"name": evil(tmp_path, marker)}))
    assert bank.rows(1, torch.tensor([0, 5]))[0].shape == (2, 2, 4)
    ensemble = SnapshotEnsemble.load(run / "teacher", lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    assert len(ensemble) == 2
    read_settings(run)


def test_a_factory_that_a_setting_names_is_code_by_intention(tmp_path):
    """And the payload of the test before works."""
    run = a_run(tmp_path / "run", evil(tmp_path, tmp_path / "ran"))
    SnapshotEnsemble.load(run / "teacher")
    assert (tmp_path / "ran").is_dir()


def test_replay_runs_the_factory_that_was_trained(tmp_path):
    """As SECURITY.md says, whose search finds it."""
    spec = {"name": evil(tmp_path, tmp_path / "ran"), "num_classes": 2, "in_channels": 1, "image_size": 2}
    path = tmp_path / "run" / "teacher" / "non-finite-1.json"
    sha256 = save_tensors(path.with_suffix(".safetensors"), {"images": torch.zeros(1, 1, 2, 2)})
    settings = {"channels_last": False, "precision": "fp32"}
    write_json_atomic(path, {"format": 1, "sha256": sha256, "classes": 2, "criterion": None, "spec": spec,
                             "settings": settings})  # fmt: skip
    assert search(path.parent.parent).returncode == 0
    with contextlib.suppress(ValueError):  # of weights that are not there
        replay(path)
    assert (tmp_path / "ran").is_dir()
    assert "eekd.train.replay.replay" in (ROOT / "SECURITY.md").read_text()


def search(folder):
    """The search that SECURITY.md advises."""
    command = re.search(r"```bash\n(grep .*) RUN\n```", (ROOT / "SECURITY.md").read_text())[1]
    return subprocess.run([*shlex.split(command), folder], capture_output=True, text=True)


@pytest.mark.parametrize(
    "hide",
    [
        lambda path: None,
        lambda path: path.write_text(path.read_text().replace(".py:", r"\u002epy:")),
        lambda path: path.write_text(path.read_text().replace(".py:", r".p\u0079:")),
        lambda path: path.rename(path.with_suffix(".txt")) and path.symlink_to(path.with_suffix(".txt")),
    ],
)
def test_the_search_for_factories_in_security_md(tmp_path, hide):
    bad = a_run(tmp_path / "bad", evil(tmp_path, tmp_path / "ran"))
    for name in ("config.json", "teacher/manifest.json"):
        hide(bad / name)
    good = a_run(tmp_path / "good")
    found = [search(run) for run in (bad, good)]
    assert {"config.json", "manifest.json"} == set(re.findall(r"^/.*/(\w+.json)", found[0].stdout, re.MULTILINE))
    assert not found[1].stdout and not found[0].stderr + found[1].stderr


@bad_input
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_json_is_utf_8(tmp_path, encoding):
    """Or that search would not see what is in it."""
    run = a_run(tmp_path / "run", "evil+.py:f")
    for name, read in (
        ("teacher/manifest.json", lambda: read_manifest(run / "teacher")),
        ("config.json", lambda: Config.load(run / "config.json")),
    ):
        text = json.dumps(read_json(run / name))  # without its seal
        (run / name).write_bytes(text.encode(encoding))
        refused(read, said=name)
