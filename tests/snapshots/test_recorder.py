"""Snapshots are recorded in anybody's loop, and a run goes on after a crash."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import SPEC, Net, edited, filled, folder, last_lost, lost, record, updated
from torch import nn

from eekd.io import tensors as tensor_files
from eekd.io.files import read_json
from eekd.models import build
from eekd.snapshots import SnapshotEnsemble, SnapshotRecorder, read_manifest
from eekd.snapshots import recorder as recorder_module
from eekd.snapshots.recorder import _schedule


@pytest.mark.parametrize(
    "options, steps",
    [
        ({"epochs": 200}, [40, 80, 120, 160, 200]),
        ({"total_steps": 7, "snapshots": 3}, [2, 4, 7]),
        ({"total_steps": 5}, [1, 2, 3, 4, 5]),
        ({"total_steps": 4, "snapshots": 1}, [4]),
        ({"schedule": [1, 5, 6]}, [1, 5, 6]),
        ({"epochs": 6, "schedule": (2, 6)}, [2, 6]),
        ({"schedule": range(2, 9, 2)}, [2, 4, 6, 8]),
    ],
)
def test_each_stage_ends_with_one_snapshot_and_the_last_with_the_run(tmp_path, options, steps):
    recorder, model = SnapshotRecorder(tmp_path, **options), nn.Linear(1, 1)
    entries = []
    for step in range(1, steps[-1] + 1):
        assert not recorder.complete
        nn.init.constant_(model.weight, step)
        entries += [entry] if (entry := recorder.step(model)) else []
    assert recorder.complete and [entry["step"] for entry in entries] == steps
    assert read_manifest(tmp_path)["snapshots"] == entries == recorder.manifest["snapshots"]
    for entry in entries:
        assert tensor_files.load_tensors(tmp_path / entry["file"], entry["sha256"])["weight"] == entry["step"]
    names = [f"snapshot-{m}.safetensors" for m in range(1, len(steps) + 1)]
    assert sorted(folder(tmp_path)) == ["manifest.json", *names]


@given(st.integers(1, 64), st.integers(0, 10_000))
def test_uniform_stages_are_equal_to_one_step(snapshots, more):
    total = snapshots + more
    steps = _schedule("uniform", "epochs", total, snapshots)
    lengths = {later - earlier for earlier, later in zip([0, *steps], steps, strict=False)}
    assert len(steps) == snapshots and steps[-1] == total
    assert lengths <= {total // snapshots, -(-total // snapshots)} and min(lengths) > 0


def test_manifest_says_everything(tmp_path):
    recorder = SnapshotRecorder(tmp_path, epochs=2, snapshots=1, spec=SPEC)
    empty = {"format": 1, "spec": SPEC, "schedule": [2], "snapshots": []}
    assert read_json(tmp_path / "manifest.json") == empty
    assert recorder.step(build(**SPEC), {"loss": 0.0}) is None
    metrics = {"accuracy": torch.tensor(0.5), "epoch": 2, "loss": math.nan, "norm": math.inf}
    entry = recorder.step(build(**SPEC), metrics)
    assert entry["metrics"] == {"accuracy": 0.5, "epoch": 2, "loss": None, "norm": None}
    assert read_json(tmp_path / "manifest.json") == {**empty, "snapshots": [entry]}


@pytest.mark.parametrize(
    "wrap", [lambda model: model, torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))]
)
def test_wrappers_tied_weights_and_odd_buffers_are_recorded(tmp_path, device, wrap):
    net = Net().to(device)
    net.norm.num_batches_tracked += 7
    record(tmp_path, [wrap(net)], spec=None)
    state = tensor_files.load_tensors(tmp_path / "snapshot-1.safetensors")
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], tensor.cpu()) for name, tensor in net.state_dict().items())
    copy = SnapshotEnsemble.load(tmp_path, Net).models[0]
    assert copy.tied.weight is copy.convolution.weight and copy.norm.num_batches_tracked == 7


def test_distributed_models_are_recorded_by_the_first_process_only(tmp_path, monkeypatch):
    distributed = torch.distributed
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(Net())
        record(tmp_path / "first", [net], spec=None)
        monkeypatch.setattr(distributed, "get_rank", lambda: 1)
        second = SnapshotRecorder(tmp_path / "second", 1, snapshots=1)
        assert second.step(net) is None and second.complete
    finally:
        distributed.destroy_process_group()
    assert len(SnapshotEnsemble.load(tmp_path / "first", Net)) == 1
    assert not (tmp_path / "second").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "total_steps or epochs must be the number"),
        ({"total_steps": 10, "epochs": 10}, ValueError, "total_steps must be None where epochs is given"),
        ({"total_steps": 4}, ValueError, "snapshots must be from 1 to 4, got 5"),
        ({"epochs": 4, "snapshots": 0}, ValueError, "snapshots must be from 1 to 4, got 0"),
        ({"epochs": 4, "snapshots": 2.0}, TypeError, "snapshots must be an int, got 2.0"),
        ({"epochs": 4, "snapshots": True}, TypeError, "snapshots must be an int, got True"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"total_steps": -3}, ValueError, "total_steps must be at least 1, got -3"),
        ({"total_steps": 10.0}, TypeError, "total_steps must be an int, got 10.0"),
        ({"epochs": "10"}, TypeError, "epochs must be an int, got '10'"),
        ({"epochs": 10, "schedule": "cosine"}, ValueError, "schedule must be \"uniform\" or .*, got 'cosine'"),
        ({"epochs": 10, "schedule": []}, ValueError, r"schedule must be .*, got \[\]"),
        ({"epochs": 10, "schedule": [5, 9]}, ValueError, r"rising steps up to epochs=10, got \[5, 9\]"),
        ({"epochs": 10, "schedule": [5, 5, 10]}, ValueError, "schedule must be .* rising steps"),
        ({"epochs": 10, "schedule": [6, 5, 10]}, ValueError, "schedule must be .* rising steps"),
        ({"schedule": [0, 10]}, ValueError, "schedule must be .* rising steps"),
        ({"schedule": [2.5, 10]}, ValueError, "schedule must be .* rising steps"),
        ({"schedule": 3}, ValueError, "schedule must be .*, got 3"),
        ({"schedule": torch.tensor([1, 2])}, ValueError, "schedule must be .*, got tensor"),
        ({"schedule": None, "epochs": 5}, ValueError, "schedule must be .*, got None"),
        ({"epochs": 10, "spec": "resnet20"}, TypeError, "spec must be a dict or None, got str"),
        ({"epochs": 10, "spec": {"layer": nn.Linear}}, TypeError, "spec must be a dict that JSON can hold"),
        ({"epochs": 10, "spec": {"rate": math.nan}}, TypeError, "spec must be a dict that JSON can hold"),
        ({"epochs": 10, "done": 11}, ValueError, "done must be from 0 to 10, got 11"),
        ({"epochs": 10, "done": -1}, ValueError, "done must be from 0 to 10, got -1"),
        ({"epochs": 10, "done": None}, TypeError, "done must be an int, got None"),
        ({"epochs": 10, "done": 1}, FileNotFoundError, "manifest.json is missing"),
    ],
)
def test_recorder_refuses(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        SnapshotRecorder(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "model, metrics, error, message",
    [
        ({}, None, TypeError, "model must be an nn.Module, got dict"),
        (None, None, TypeError, "model must be an nn.Module, got NoneType"),
        (nn.Linear(1, 1), {"loss": "low"}, TypeError, r"metrics\['loss'\] must be a number, got 'low'"),
        (nn.Linear(1, 1), {"loss": torch.ones(2)}, TypeError, r"metrics\['loss'\] must be a number"),
        (nn.Linear(1, 1, device="meta"), None, TypeError, "'weight' must be .* meta"),
        (nn.LazyLinear(1), None, TypeError, "'weight' must be .* got one that has no shape before the first batch"),
    ],
)
def test_step_refuses_and_counts_nothing(tmp_path, model, metrics, error, message):
    recorder = SnapshotRecorder(tmp_path, 1, snapshots=1)
    before = folder(tmp_path)
    with pytest.raises(error, match=message):
        recorder.step(model, metrics)
    assert folder(tmp_path) == before and not recorder.complete
    assert recorder.step(nn.Linear(1, 1))["step"] == 1


@pytest.mark.bad_input
def test_a_step_past_the_last_is_an_error(tmp_path):
    record(tmp_path, [build(**SPEC)])
    with pytest.raises(RuntimeError, match="step was called again after the last of 1 steps"):
        SnapshotRecorder(tmp_path, 1, snapshots=1, spec=SPEC, done=1).step(nn.Linear(1, 1))


@pytest.mark.parametrize("failing", ["save_tensors", "write_json_atomic"])
def test_a_failed_save_can_be_tried_again(tmp_path, monkeypatch, failing):
    recorder = SnapshotRecorder(tmp_path, 2, snapshots=2)
    recorder.step(nn.Linear(1, 1))
    manifest = read_manifest(tmp_path)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(recorder_module if failing == "write_json_atomic" else tensor_files, failing, fail)
        recorder.step(nn.Linear(1, 1))
    assert read_manifest(tmp_path) == manifest == recorder.manifest
    assert recorder.step(nn.Linear(1, 1))["step"] == 2 and len(read_manifest(tmp_path)["snapshots"]) == 2


def test_a_run_continues_after_a_crash_and_makes_later_snapshots_again(tmp_path):
    models = [build(**SPEC) for _ in range(6)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for directory in (whole, broken):
        recorder = SnapshotRecorder(directory, 6, snapshots=3, spec=SPEC)
        for model in models if directory == whole else models[:4]:
            recorder.step(model)
    recorder = SnapshotRecorder(broken, 6, snapshots=3, spec=SPEC, done=3)
    assert [entry["step"] for entry in read_manifest(broken)["snapshots"]] == [2]
    for model in models[3:]:
        recorder.step(model)
    assert recorder.complete and folder(broken) == folder(whole)


def test_a_run_that_has_recorded_nothing_may_start_again(tmp_path):
    SnapshotRecorder(tmp_path, epochs=10)
    assert len(record(tmp_path, [nn.Linear(1, 1)], spec=None)) == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "prepare",
    [
        lambda path: None,
        lost("manifest.json"),
        updated(snapshots=[]),
        lambda path: [file.unlink() for file in path.glob("snapshot-*")],
    ],
)
def test_a_run_is_not_overwritten(run, prepare):
    path, _ = run
    prepare(path)
    before = folder(path)
    with pytest.raises(FileExistsError, match="run already holds snapshots: choose another directory"):
        SnapshotRecorder(path, 3, snapshots=3, spec=SPEC)
    assert folder(path) == before


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options, prepare, error, message",
    [
        ({"total_steps": 4}, None, ValueError, r"schedule must be that of .*json .*, got \[1, 2, 4\]"),
        ({"spec": None}, None, ValueError, "spec must be that of .*manifest.json .*, got None"),
        ({"spec": {**SPEC, "num_classes": 4}}, None, ValueError, "spec must be that of .*manifest.json"),
        ({}, edited(last_lost), ValueError, r"manifest.json must list all .* got none of \[3\]"),
        ({}, lost("snapshot-2.safetensors"), FileNotFoundError, "snapshot-2.safetensors is missing"),
        ({}, filled("snapshot-2.safetensors", ""), ValueError, "snapshot-2.safetensors was changed"),
        ({}, lost("manifest.json"), FileNotFoundError, "manifest.json is missing"),
        ({}, filled("manifest.json", "{"), ValueError, "manifest.json is not JSON"),
        ({"done": 0}, filled("manifest.json", "{}"), ValueError, "manifest.json is no manifest of snapshots"),
    ],
)
def test_only_the_same_run_is_continued(run, options, prepare, error, message):
    path, _ = run
    if prepare:
        prepare(path)
    before = folder(path)
    with pytest.raises(error, match=message):
        SnapshotRecorder(path, **{"total_steps": 3, "snapshots": 3, "spec": SPEC, "done": 3, **options})
    assert folder(path) == before
