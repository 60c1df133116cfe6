"""A run's snapshots: recorded in anybody's loop, checked when read, frozen whatever the student does."""

import copy
import json
import math
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eekd.io import tensors as tensor_files
from eekd.io.files import read_json, sha256_of, write_json_atomic
from eekd.models import build
from eekd.snapshots import SnapshotEnsemble, SnapshotRecorder, read_manifest
from eekd.snapshots import recorder as recorder_module
from eekd.snapshots.forward import Swapped
from eekd.snapshots.recorder import _schedule

SPEC = {"name": "resnet8_w4", "num_classes": 3, "in_channels": 1, "image_size": 8}
HASH = "0123456789abcdef" * 4
CPU = torch.device("cpu")


class Net(nn.Module):
    """Three classes, features of width 5, and everything that makes a state_dict awkward."""

    def __init__(self, classes=3, width=5):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.tied = nn.Conv2d(1, 4, 3)
        self.tied.weight = self.convolution.weight
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("table", torch.arange(6).view(2, 3).t())
        self.hidden = nn.Linear(4, width)
        self.dropout = nn.Dropout()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.dropout(self.hidden(self.norm(self.convolution(x)).relu().mean((2, 3)))))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def images(device):
    return torch.randn(4, 1, 8, 8, device=device)


@pytest.fixture
def nets():
    nets = [Net() for _ in range(3)]
    for net in nets:
        net(torch.randn(8, 1, 8, 8))  # running statistics that tell eval from train
    return nets


@pytest.fixture
def run(tmp_path):
    """A finished run of 3 snapshots and its models."""
    models = record(tmp_path / "run", [build(**SPEC) for _ in range(3)])
    return tmp_path / "run", models


def record(directory, models, spec=SPEC, **options):
    recorder = SnapshotRecorder(directory, len(models), snapshots=len(models), spec=spec, **options)
    for model in models:
        assert recorder.step(model, {"accuracy": 0.5})
    assert recorder.complete
    return models


def folder(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def edit(directory, change):
    """Let `change` do what it likes to the content of the manifest in `directory`."""
    path = directory / "manifest.json"
    manifest = read_json(path)
    change(manifest)
    path.write_text(json.dumps(manifest))


def edited(change):
    return lambda directory: edit(directory, change)


def updated(**changes):
    return edited(lambda manifest: manifest.update(changes))


def lost(name):
    return lambda directory: (directory / name).unlink()


def filled(name, text):
    return lambda directory: (directory / name).write_text(text)


def last_lost(manifest):
    manifest["snapshots"].pop()


# recording


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
        ({}, ValueError, "give total_steps or epochs, the number"),
        ({"total_steps": 10, "epochs": 10}, ValueError, "give total_steps or epochs, not both"),
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


# continuing


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


# the manifest


def manifest_of(**changes):
    files = ["snapshot-1.safetensors", "snapshot-2.safetensors"]
    entries = [
        {"file": file, "sha256": HASH, "step": step, "metrics": {"x": 1.0}} for step, file in enumerate(files, 1)
    ]
    return {"format": 1, "spec": SPEC, "schedule": [1, 2, 3], "snapshots": entries, **changes}


def entries_with(**changes):
    first, second = manifest_of()["snapshots"]
    return {"snapshots": [first, {**second, **changes}]}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content, reason",
    [
        ([], r"it must be an object of .*, got \[\]"),
        (None, "it must be an object of .*, got None"),
        ({}, "it must be an object of .*, got {}"),
        ({"format": 1, "spec": None}, "it must be an object of .*, got {"),
        (manifest_of(format=2), "format must be 1, got 2"),
        (manifest_of(format="1"), "format must be 1, got '1'"),
        (manifest_of(format=True), "format must be 1, got True"),
        (manifest_of(spec="resnet20"), "spec must be an object or null, got 'resnet20'"),
        (manifest_of(schedule=3), "schedule must be a list of rising steps, got 3"),
        (manifest_of(schedule=[2, 1]), r"schedule must be a list of rising steps, got \[2, 1\]"),
        (manifest_of(schedule=["1"]), "schedule must be a list of rising steps"),
        (manifest_of(schedule=[1]), r"steps of snapshots must be the first of schedule \[1\], got \[1, 2\]"),
        (manifest_of(snapshots={}), "snapshots must be a list, got {}"),
        (manifest_of(snapshots=[1]), "snapshot 0 must be an object, got 1"),
        (manifest_of(snapshots=[{}]), "file of snapshot 0 must be .*, got None"),
        (manifest_of(**entries_with(file="../snapshot-2.safetensors")), "in its folder"),
        (manifest_of(**entries_with(file="/etc/snapshot-2.safetensors")), "in its folder"),
        (manifest_of(**entries_with(file="sub/snapshot-2.safetensors")), "in its folder"),
        (manifest_of(**entries_with(file="..\\snapshot-2.safetensors")), "in its folder"),
        (manifest_of(**entries_with(file="snapshot\0.safetensors")), "in its folder"),
        (manifest_of(**entries_with(file="snapshot-2.pt")), "the name of a .safetensors file"),
        (manifest_of(**entries_with(file="snapshot-2.safetensors\n")), "in its folder"),
        (manifest_of(**entries_with(file=2)), "file of snapshot 1 must be .*, got 2"),
        (manifest_of(**entries_with(file="snapshot-1.safetensors")), "files of snapshots must differ"),
        (manifest_of(**entries_with(sha256=HASH[:-1])), "sha256 of snapshot 1 must be 64 .*, got '0123"),
        (manifest_of(**entries_with(sha256=HASH.upper())), "must be 64 hexadecimal digits"),
        (manifest_of(**entries_with(sha256=None)), "sha256 of snapshot 1 must be .*, got None"),
        (manifest_of(**entries_with(step=1)), r"steps of snapshots must be .*, got \[1, 1\]"),
        (manifest_of(**entries_with(step=3)), r"steps of snapshots must be .*, got \[1, 3\]"),
        (manifest_of(**entries_with(step=2.0)), r"steps of snapshots must be .*, got \[1, 2.0\]"),
        (manifest_of(**entries_with(step=None)), r"steps of snapshots must be .*, got \[1, None\]"),
        (manifest_of(**entries_with(metrics=None)), "metrics of snapshot 1 must be .*, got None"),
        (manifest_of(**entries_with(metrics={"loss": "low"})), "metrics of snapshot 1 must be .*, got {'loss"),
    ],
)
def test_what_is_no_manifest_is_named(tmp_path, content, reason):
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"manifest.json is no manifest of snapshots: .*{reason}"):
        read_manifest(tmp_path)


@pytest.mark.bad_input
def test_a_number_beyond_floats_is_no_metric(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest_of()).replace("1.0", "1e999"))
    with pytest.raises(ValueError, match="metrics of snapshot 0 must be .*, got {'x': inf}"):
        read_manifest(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a.safetensors"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = [("format",), ("spec",), ("schedule",), ("snapshots",), ("schedule", 1), ("snapshots", 1)]
KEYS += [("snapshots", 1, key) for key in ("file", "sha256", "step", "metrics")]
KEYS += [("snapshots", 1, "metrics", "x")]


def check_reading(directory, data):
    """Whatever the file holds: a manifest that keeps its promises, or a ValueError that names it."""
    (directory / "manifest.json").write_bytes(data)
    try:
        manifest = read_manifest(directory)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{directory}/manifest.json") and len(message) < 999 and "\n" not in message
        return
    steps = [entry["step"] for entry in manifest["snapshots"]]
    assert manifest["format"] == 1 and steps == sorted(set(steps)) == manifest["schedule"][: len(steps)]
    for entry in manifest["snapshots"]:
        assert (directory / entry["file"]).parent == directory and "/" not in entry["file"]
        assert len(entry["sha256"]) == 64 and set(entry["sha256"]) <= set(string.hexdigits)
    write_json_atomic(directory / "again.json", manifest)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("manifests")


@given(st.binary() | st.text().map(str.encode) | JSON.map(json.dumps).map(str.encode))
def test_any_file_is_a_manifest_or_an_error(scratch, data):
    check_reading(scratch, data)


@given(st.sampled_from(KEYS), JSON)
def test_any_value_in_a_manifest_is_sound_or_an_error(scratch, keys, value):
    manifest = inner = manifest_of()
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    check_reading(scratch, json.dumps(manifest).encode())


@given(st.integers(0), st.integers(0, 7))
def test_any_flipped_bit_of_a_manifest_is_sound_or_an_error(scratch, position, bit):
    data = bytearray(json.dumps(manifest_of()).encode())
    data[position % len(data)] ^= 1 << bit
    check_reading(scratch, bytes(data))


# loading


def test_a_run_comes_back_as_it_was(run, images, device):
    path, models = run
    ensemble = SnapshotEnsemble.load(path, device=device)
    assert len(ensemble) == 3 and ensemble.feature_dim == 16
    assert ensemble.hashes == tuple(map(sha256_of, sorted(path.glob("snapshot-*"))))
    logits, features = ensemble(images)
    for m, model in enumerate(models):
        torch.testing.assert_close(logits[m], model.to(device).eval()(images))
    assert features.shape == (3, 4, 16)


@pytest.mark.parametrize("which", [[0, 2], [-1], (1,), range(2)])
def test_some_snapshots_can_be_picked(run, which):
    path, models = run
    ensemble = SnapshotEnsemble.load(path, which=which)
    assert len(ensemble) == len(which)
    for model, index in zip(ensemble.models, which, strict=True):
        assert torch.equal(next(model.parameters()), next(models[index].parameters()))


@pytest.mark.bad_input
@pytest.mark.parametrize("which", [[], [3], [-4], [0, 9], 1, "01", [0.5], [None]])
def test_which_must_be_there(run, which):
    with pytest.raises(ValueError, match=r"which must index the 3 snapshots in .*manifest.json, got "):
        SnapshotEnsemble.load(run[0], which=which)


@pytest.mark.bad_input
@pytest.mark.parametrize("position", [0, 31, 63])
def test_a_flipped_hash_is_seen(run, position):
    def flip(manifest):
        digits = list(manifest["snapshots"][1]["sha256"])
        digits[position] = f"{int(digits[position], 16) ^ 1:x}"
        manifest["snapshots"][1]["sha256"] = "".join(digits)

    edit(run[0], flip)
    with pytest.raises(ValueError, match="snapshot-2.safetensors was changed or damaged"):
        SnapshotEnsemble.load(run[0])


@pytest.mark.bad_input
@pytest.mark.parametrize("where", [0, 0.01, 0.2, 0.9, -1])  # the header's length, the header, the tensors
def test_a_flipped_bit_is_seen(run, where):
    path = run[0] / "snapshot-3.safetensors"
    data = bytearray(path.read_bytes())
    data[int(where * len(data)) if where >= 0 else -1] ^= 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match="snapshot-3.safetensors was changed or damaged"):
        SnapshotEnsemble.load(run[0])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "prepare, options, error, message",
    [
        (lost("snapshot-2.safetensors"), {}, FileNotFoundError, "snapshot-2.safetensors is missing"),
        (filled("snapshot-2.safetensors", "x" * 9), {}, ValueError, "snapshot-2.safetensors was changed"),
        (lost("manifest.json"), {}, FileNotFoundError, "manifest.json is missing"),
        (edited(last_lost), {}, ValueError, "manifest.json lists 2 of 3 snapshots: let its run end"),
        (updated(spec=None), {}, ValueError, "manifest.json names no architecture .* give a factory"),
        (updated(spec={}), {}, ValueError, "manifest.json has a spec that cannot be built"),
        (updated(spec={**SPEC, "name": "resnet9"}), {}, ValueError, "manifest.json has a spec that cannot be"),
        (
            updated(spec={**SPEC, "num_classes": 7}),
            {},
            ValueError,
            r"snapshot-1.safetensors does not fit this \w+: of another shape: .*weight \(3, 16\) for \(7, 16\)",
        ),
        (None, {"factory": Net}, ValueError, "snapshot-1.safetensors does not fit this Net: missing: .*; unex"),
        (None, {"factory": "resnet20"}, TypeError, "factory must be a function that makes a model, got str"),
        (None, {"factory": dict}, TypeError, "factory must return an nn.Module, got dict"),
        (None, {"layer": "nowhere"}, ValueError, "nowhere"),
    ],
)
def test_load_refuses(run, prepare, options, error, message):
    if prepare:
        prepare(run[0])
    before = folder(run[0])
    with pytest.raises(error, match=message):
        SnapshotEnsemble.load(run[0], **options)
    assert folder(run[0]) == before


@pytest.mark.bad_input
def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.manifest.json is missing"):
        SnapshotEnsemble.load(tmp_path / "nowhere")


def test_an_unfinished_run_gives_the_snapshots_one_asks_for(run):
    edit(run[0], last_lost)
    assert len(SnapshotEnsemble.load(run[0], which=[0, 1])) == 2


def test_anybodys_files_are_loaded(tmp_path, nets, images, device):
    paths = [tmp_path / name for name in ("a.safetensors", "b.pt", "c.pth")]
    tensor_files.save_tensors(paths[0], nets[0].state_dict())
    torch.save({"state_dict": nn.DataParallel(nets[1]).state_dict(), "epoch": 3}, paths[1])
    torch.save({"model": nets[2].state_dict()}, paths[2])
    ensemble = SnapshotEnsemble.from_files(paths, Net, device)
    logits, _ = ensemble(images)
    for m, net in enumerate(nets):
        torch.testing.assert_close(logits[m], net.to(device).eval()(images))
    assert ensemble.hashes == tuple(map(sha256_of, paths))
    again = SnapshotEnsemble.from_files([str(path) for path in paths], Net, sha256=ensemble.hashes)
    assert again.hashes == ensemble.hashes


def test_one_model_may_serve_as_the_factory(tmp_path, nets, images):
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for net, path in zip(nets, paths, strict=False):
        torch.save(net.state_dict(), path)
    scratch = Net().to(images.device)
    logits, _ = SnapshotEnsemble.from_files(paths, lambda: scratch, images.device)(images)
    assert not torch.equal(logits[0], logits[1]) and scratch.training and scratch.head.weight.requires_grad


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "paths, options, error, message",
    [
        ([], {}, ValueError, r"paths must be a file, a folder or a list of at least one, got \[\]"),
        ("", {}, ValueError, "paths must be a file, a folder or a list of at least one, got ''"),
        ([3], {}, ValueError, r"paths must be a file, a folder or a list of at least one, got \[3\]"),
        (["a.pt"], {"load": "resnet"}, TypeError, "load must be a function that makes a model, got str"),
        (["a.pt"], {"load": Net}, ValueError, "factory must be None where load reads the models"),
        (["a.pt"], {"factory": None, "load": lambda path: 3}, TypeError, "load must return an nn.Module, got int"),
        (["nowhere.pt"], {}, FileNotFoundError, "nowhere.pt is missing"),
        (["a.pt"], {"sha256": [HASH]}, ValueError, "a.pt was changed or damaged"),
        (["a.pt"], {"sha256": [HASH, HASH]}, ValueError, "sha256 must hold a hash for each of 1 paths, got 2"),
        (["a.pt"], {"factory": None}, TypeError, "factory must be a function that makes a model, got NoneType"),
        (["a.pt"], {"factory": lambda: Net(classes=4)}, ValueError, "a.pt does not fit this Net"),
    ],
)
def test_from_files_refuses(tmp_path, monkeypatch, paths, options, error, message):
    monkeypatch.chdir(tmp_path)
    torch.save(Net().state_dict(), "a.pt")
    with pytest.raises(error, match=message):
        SnapshotEnsemble.from_files(paths, **{"factory": Net, **options})


# the ensemble


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "models, error, message",
    [
        ([], ValueError, "models must hold at least one nn.Module"),
        (Net(), TypeError, "models must be a list of nn.Modules, got one Net"),
        (nn.Sequential(nn.Linear(1, 1)), TypeError, "models must be a list of nn.Modules, got one Sequential"),
        ([Net(), "net"], TypeError, "models must be nn.Modules, got str"),
        ([nn.Conv2d(1, 1, 3)], ValueError, "Linear"),
    ],
)
def test_ensemble_refuses(models, error, message):
    with pytest.raises(error, match=message):
        SnapshotEnsemble(models)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "other, message",
    [
        ({"classes": 4}, r"logits of snapshot 1 must have snapshot 0's shape \(2, 3\), got \(2, 4\)"),
        ({"classes": 1}, r"logits of snapshot 1 must have snapshot 0's shape \(2, 3\), got \(2, 1\)"),
        ({"width": 6}, r"features of snapshot 1 must have snapshot 0's shape \(2, 5\), got \(2, 6\)"),
    ],
)
def test_snapshots_must_agree(other, message):
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble([Net(), Net(**other)])(torch.randn(2, 1, 8, 8))


@pytest.mark.bad_input
def test_outputs_must_be_rows():
    sequence = nn.Sequential(nn.Linear(5, 3), nn.Unflatten(0, (2, 1)), nn.Softmax(-1))
    with pytest.raises(ValueError, match=r"outputs of a snapshot must be \(B, width\), got"):
        SnapshotEnsemble([sequence])(torch.randn(2, 5))


class Student(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.teacher = teacher
        self.teachers = nn.ModuleList([teacher])


def test_copies_stay_frozen_whatever_the_student_does(nets, images):
    ensemble = SnapshotEnsemble(nets).to(images.device)
    student = Student(ensemble).to(images.device)
    expected = ensemble(images)[0].clone()
    student.train().requires_grad_(True)
    student.apply(lambda module: module.train())
    ensemble.train()
    assert not ensemble.training
    for model in ensemble.models:
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    logits, features = ensemble(images)
    assert torch.equal(logits, expected) and not logits.requires_grad and not features.requires_grad
    assert all(model.norm.num_batches_tracked == 1 for model in ensemble.models)


def test_a_student_does_not_carry_its_teacher(nets):
    student = Student(SnapshotEnsemble(nets))
    names = ["body.weight", "body.bias"]
    assert list(student.state_dict()) == names == [name for name, _ in student.named_parameters()]
    assert not list(student.teacher.parameters()) and not list(student.teacher.buffers())
    student.load_state_dict(nn.ModuleDict({"body": nn.Linear(3, 3)}).state_dict())


def test_given_models_stay_as_they_are(nets, images):
    ensemble = SnapshotEnsemble(nets).to(images.device)
    before = ensemble(images)[0].clone()
    assert all(net.training and net.head.weight.requires_grad for net in nets)
    nn.init.zeros_(nets[0].head.weight)
    assert torch.equal(ensemble(images)[0], before)


def test_what_moves_the_student_moves_the_copies(nets, images):
    student = Student(SnapshotEnsemble(nets))
    student.to(images.device, torch.float64).to(memory_format=torch.channels_last)
    logits, features = student.teacher(images.double().to(memory_format=torch.channels_last))
    assert logits.device == images.device and logits.dtype == features.dtype == torch.float64
    for m, net in enumerate(nets):
        assert student.teacher.models[m].convolution.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(logits[m], net.to(images.device).double().eval()(images.double()))


def test_a_copied_ensemble_is_whole_and_separate(nets, images):
    ensemble = SnapshotEnsemble(nets).to(images.device)
    logits, _ = ensemble(images)
    twin = copy.deepcopy(ensemble)
    nn.init.zeros_(ensemble.models[0].head.weight)
    expected = logits.clone()
    assert torch.equal(twin(images)[0], expected) and twin.feature_dim == 5


def test_features_are_the_input_of_the_last_linear_or_of_the_named_layer(nets, images):
    nets = [net.to(images.device).eval() for net in nets]
    logits, features = SnapshotEnsemble(nets)(images)
    for m, net in enumerate(nets):
        torch.testing.assert_close(net.head(features[m]), logits[m])
    logits, features = SnapshotEnsemble(nets, layer="hidden")(images)
    assert features.shape == (3, 4, 4)
    torch.testing.assert_close(nets[2].head(nets[2].hidden(features[2])), logits[2])


def test_memory_is_used_again_sliced_and_grown_on_request(nets, images):
    ensemble = SnapshotEnsemble(nets, reuse=True).to(images.device)
    first = ensemble(images)
    pointers = [output.data_ptr() for output in first]
    smaller = ensemble(images[:2])
    assert [output.data_ptr() for output in smaller] == pointers
    assert [output.shape for output in smaller] == [(3, 2, 3), (3, 2, 5)]
    assert all(output.stride(-1) == 1 for output in smaller)
    expected = [output.clone() for output in smaller]
    larger = ensemble(images.repeat(2, 1, 1, 1))
    assert larger[0].shape == (3, 8, 3) and larger[0].data_ptr() != pointers[0]
    for output, rows in zip(larger, expected, strict=True):
        torch.testing.assert_close(output[:, :2], rows)
        torch.testing.assert_close(output[:, 4:6], rows)
    assert ensemble(images)[0].data_ptr() == larger[0].data_ptr()
    assert ensemble(images[:0])[0].shape == (3, 0, 3)


def test_autocast_gives_its_dtype_and_leaving_it_gives_the_old_one(nets, images):
    ensemble = SnapshotEnsemble(nets).to(images.device)
    with torch.autocast(images.device.type, torch.bfloat16):
        low = ensemble(images)[0].clone()
    full = ensemble(images)[0]
    assert low.dtype == torch.bfloat16 and full.dtype == torch.float32
    torch.testing.assert_close(low.float(), full, atol=0.05, rtol=0.05)


def test_memory_born_in_inference_mode_serves_training(nets, images):
    ensemble = SnapshotEnsemble(nets, reuse=True).to(images.device)
    with torch.inference_mode():
        ensemble(images)
    logits, _ = ensemble(images)
    student = torch.randn(4, 3, device=images.device, requires_grad=True)
    (student * logits).sum().backward()
    torch.testing.assert_close(student.grad, logits.sum(0))


def test_a_loss_of_an_overwritten_batch_is_an_error_not_a_wrong_gradient(nets, images):
    ensemble = SnapshotEnsemble(nets, reuse=True).to(images.device)
    student = torch.randn(4, 3, device=images.device, requires_grad=True)
    loss = (student * ensemble(images)[0]).sum()
    ensemble(images)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_image_that_wants_a_gradient_gets_none_from_the_teacher(nets, images):
    outputs = SnapshotEnsemble(nets).to(images.device)(images.requires_grad_())
    assert not any(output.requires_grad for output in outputs)


def together(nets, images, **options):
    """The outputs of an ensemble and of its models one after another."""
    ensemble = SnapshotEnsemble(nets, **options).to(images.device)
    return ensemble, [output.clone() for output in ensemble(images)], alone(ensemble, images)


def alone(ensemble, images):
    outputs = zip(*(capture(images) for capture in ensemble._captures), strict=True)
    return [torch.stack(rows) for rows in outputs]


def agree(got, wanted, tolerance=1e-5):
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def trained(name, images):
    """Two networks whose batch norms are no identities."""
    nets = [build(name, num_classes=3, in_channels=1, image_size=8) for _ in range(2)]
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)
        net(images)
    return nets


@pytest.mark.parametrize("name", ["resnet8_w4", "wrn_16_1", "ShuffleNetV2"])
def test_snapshots_folded_say_what_they_say_alone(name):
    images = torch.randn(70, 1, 8, 8)
    ensemble, got, wanted = together(trained(name, images), images)
    agree(got, wanted)
    kinds = [type(module) for module in ensemble._folded._graphs[None][0].modules()]
    assert (nn.BatchNorm2d in kinds) == (name == "wrn_16_1")  # there some follow an addition
    with torch.autocast("cpu", torch.bfloat16):
        agree(ensemble(images), alone(ensemble, images), 0.05)
    ensemble.double()
    agree(ensemble(images.double()), alone(ensemble, images.double()), 1e-12)
    again = [output.clone() for output in ensemble(images.double())]
    assert all(map(torch.equal, ensemble(images.double()), again))


def write(model):
    with torch.no_grad():
        model.classifier.weight.zero_()


def replace(model):
    model.classifier.weight = nn.Parameter(torch.zeros_like(model.classifier.weight))


def exchange(model):
    model.trunk[1] = nn.Identity().eval()


def count(model):
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(3)


def hook(model):
    model.trunk.register_forward_hook(lambda module, inputs, output: output * 2)


def wake(model):
    model.train()


@pytest.mark.parametrize("change", [write, replace, exchange, count, hook, wake])
def test_a_changed_snapshot_says_something_else(change):
    images = torch.randn(8, 1, 8, 8)
    ensemble, before, _ = together(trained("resnet8_w4", images), images)
    change(ensemble.models[1])
    after = ensemble(images)
    assert torch.equal(after[0][0], before[0][0]) or change in (hook, wake)  # there all run one after another
    assert not torch.allclose(after[0][1], before[0][1])
    agree(after, alone(ensemble, images))


class Users(nn.Module):
    """A model that must run as it is: `how` says why."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if self.how == "branch" and x.mean() > 100:
            return x
        x = self.body(x)
        if self.how == "noise":
            x = x + torch.rand_like(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("how", ["branch", "noise"])
def test_a_model_that_must_run_as_it_is_does(how):
    images = torch.randn(70, 1, 8, 8)
    nets = [Users(how), Users(how)]
    ensemble = SnapshotEnsemble(nets)
    assert ensemble._folded(ensemble._captures, images) is None
    torch.manual_seed(1)
    got = [output.clone() for output in ensemble(images)]
    torch.manual_seed(1)
    wanted = alone(ensemble, images)
    assert all(map(torch.equal, got, wanted))


def test_a_convolution_that_serves_twice_is_folded_once_for_each():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Linear(1, 3)

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.head((self.norm(self.conv(x)) + self.conv(x)).mean((2, 3)))

    images = torch.randn(8, 1, 8, 8)
    nets = [Twice(), Twice()]
    for net in nets:
        net(images * 3 + 1)
    ensemble, got, wanted = together(nets, images)
    agree(got, wanted)
    assert ensemble._folded._graphs


def test_host_snapshots_pass_through_two_slots(nets, images):
    nets[1].head.weight.data.mul_(2)
    ensemble = SnapshotEnsemble(nets)
    swapped = Swapped(ensemble._captures)
    wanted = alone(ensemble, images.cpu())
    for _ in range(2):
        got = [torch.stack(rows) for rows in zip(*swapped(CPU, images.cpu()), strict=True)]
        assert all(map(torch.equal, got, wanted))
    held = {name: t.data_ptr() for name, t in swapped.slots[0].items()}
    with torch.no_grad():
        ensemble.models[2].head.weight.zero_()  # where it lies in host memory it is seen by the next call
    wanted = alone(ensemble, images.cpu())
    got = [torch.stack(rows) for rows in zip(*swapped(CPU, images.cpu()), strict=True)]
    assert all(map(torch.equal, got, wanted)) and not (got[0][2] - ensemble.models[2].head.bias).any()
    assert held == {name: t.data_ptr() for name, t in swapped.slots[0].items()}
    assert held.keys() == {
        "convolution.weight",
        "convolution.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "table",
        "hidden.weight",
        "hidden.bias",
        "tied.bias",
        "head.weight",
        "head.bias",
    }
    ensemble.double()
    double = list(swapped(CPU, images.cpu().double()))
    assert double[0][0].dtype == torch.float64


def test_host_snapshots_stay_there(nets, images):
    ensemble, got, wanted = SnapshotEnsemble(nets, snapshots_on="cpu"), None, None
    student = Student(ensemble).to(images.device, torch.float64)
    assert {t.device.type for model in ensemble.models for t in model.parameters()} == {"cpu"}
    got = student.teacher(images.double())
    assert got[0].device == images.device and got[0].dtype == torch.float64
    wanted = SnapshotEnsemble(nets).to(images.device, torch.float64)(images.double())
    agree(got, wanted)
    agree(copy.deepcopy(ensemble)(images.double()), wanted)


@pytest.mark.bad_input
def test_snapshots_are_on_the_device_the_host_or_the_ranks(nets):
    with pytest.raises(ValueError, match="snapshots_on must be device, cpu or ranks, got 'disk'"):
        SnapshotEnsemble(nets, snapshots_on="disk")
