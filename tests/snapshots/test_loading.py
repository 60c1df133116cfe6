"""Snapshots come back as they were, from runs and from anybody's files."""

import pytest
import torch
from recorded import HASH, SPEC, Net, edit, edited, filled, folder, last_lost, lost, updated
from torch import nn

from eekd.io import tensors as tensor_files
from eekd.io.files import sha256_of
from eekd.snapshots import SnapshotEnsemble


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
        (edited(last_lost), {}, ValueError, "manifest.json must list 3 snapshots, got 2: let its run end"),
        (updated(spec=None), {}, ValueError, "factory must be given where .*manifest.json names no architecture"),
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
