"""Checkpoints that others wrote: what their trainers leave on disk is loaded, or refused in one sentence."""

import argparse
import json
import re
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from eekd import SnapshotEnsemble, SnapshotRecorder
from eekd.io.state_dicts import load_state
from eekd.io.tensors import load_weights, weights_sha256
from eekd.snapshots.files import checkpoint_files


class Net(nn.Module):
    """A body with batch norm, a shared matrix and a head."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.mix = nn.Linear(6, 6, bias=False)
        self.mix_again = nn.Linear(6, 6, bias=False)
        self.mix_again.weight = self.mix.weight
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.mix_again(self.mix(self.body(x))))


def nets(count=2):
    torch.manual_seed(0)
    made = [Net() for _ in range(count)]
    for net in made:
        net(torch.randn(32, 4))
    return made


def images():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def check(paths, wanted, **options):
    """The ensemble of the checkpoints says what the nets say."""
    ensemble = SnapshotEnsemble.from_files(paths, **({"factory": Net} | options))
    logits, _ = ensemble(images())
    assert len(ensemble) == len(ensemble.hashes) == len(wanted)
    for m, net in enumerate(wanted):
        torch.testing.assert_close(logits[m], net.eval()(images()).detach())
    return ensemble


def prefixed(prefix):
    return lambda net: {prefix + name: tensor for name, tensor in net.state_dict().items()}


def without(*endings):
    return lambda net: {name: x for name, x in net.state_dict().items() if not name.endswith(endings)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda net: net.state_dict(), None),
        (lambda net: nn.DataParallel(net).state_dict(), None),
        (prefixed("_orig_mod."), None),
        (prefixed("module._orig_mod."), None),
        (lambda net: {"model": prefixed("_fsdp_wrapped_module.")(net)}, None),
        (prefixed("model."), "'model.'"),
        (prefixed("student."), "'student.'"),
        (prefixed("network.module."), "'network.module.'"),
        (lambda net: {"state_dict": prefixed("model._orig_mod.")(net), "epoch": 3, "loops": {}}, "'model.'"),
        (lambda net: prefixed("model.")(net) | {"criterion.weight": torch.ones(3)}, "criterion.weight"),
        (lambda net: prefixed("student.")(net) | {"teacher.head.weight": torch.ones(9, 9)}, "teacher.head.weight"),
        (lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(), None),
        (lambda net: {"net": torch.optim.swa_utils.AveragedModel(net).state_dict()}, None),
        (lambda net: {"weights": net.state_dict(), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, None),
        (without("num_batches_tracked"), None),
        (without("mix_again.weight"), None),
        (without("mix.weight"), None),
        (lambda net: {"checkpoint": {"inner": {"model": net.state_dict()}}}, None),
        (lambda net: OrderedDict(net.half().state_dict()), None),
    ],
)  # fmt: skip
def test_what_trainers_and_wrappers_write(tmp_path, content, said, recwarn):
    written = nets()
    for i, net in enumerate(written):
        torch.save(content(net), tmp_path / f"{i}.pt")
    check([tmp_path / "0.pt", tmp_path / "1.pt"], [net.float() for net in written])
    messages = [str(warning.message) for warning in recwarn]
    assert all("0.pt" in messages[0] and said in message for message in messages) if said else not messages
    assert len(messages) == (2 if said else 0)


@pytest.mark.parametrize("ending", [".pt", ".bin", ""])
def test_safetensors_are_read_by_any_ending(tmp_path, ending):
    [net] = nets(1)
    save_file({name: x for name, x in net.state_dict().items() if name != "mix_again.weight"}, tmp_path / f"n{ending}")
    check(tmp_path / f"n{ending}", [net])


def test_what_thop_leaves_behind_is_left_out(tmp_path):
    [net] = nets(1)
    counts = {f"{name}total_{what}": torch.ones(1) for name in ("", "head.") for what in ("ops", "params")}
    torch.save(net.state_dict() | counts, tmp_path / "n.pt")
    check(tmp_path / "n.pt", [net])


def test_nan_in_weights_is_said(tmp_path):
    [net] = nets(1)
    net.head.weight.data[0, 0] = float("nan")
    torch.save(net.state_dict(), tmp_path / "n.pt")
    with pytest.warns(UserWarning, match=r"n.pt holds NaN or infinity in head.weight: was it saved after"):
        SnapshotEnsemble.from_files(tmp_path / "n.pt", Net)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must be a checkpoint, got an empty file$"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "got a pointer of Git LFS: `git lfs pull`"),
        (b"\n<!DOCTYPE html><title>404</title>", "got a page of HTML$"),
        (b"\x1f\x8b\x08" + b"x" * 50, "got a gzip archive: unpack it$"),
        (b"\x89HDF\r\n\x1a\n" + b"x" * 50, "got a file of HDF5, as Keras writes them$"),
        (b'{"epoch": 3}', "got text: JSON$"),
        (b"PK\3\4" + b"x" * 50, "unpickling: it is cut off or damaged$"),
        (b"lr: 0.1\n", "unpickling: it is no file of torch.save, or damaged$"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, said):
    (tmp_path / "n.pt").write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        SnapshotEnsemble.from_files(tmp_path / "n.pt", Net)
    assert "\n" not in str(caught.value)


@pytest.mark.bad_input
def test_a_sparse_tensor_is_refused(tmp_path):
    [net] = nets(1)
    torch.save(net.state_dict() | {"head.weight": net.head.weight.data.to_sparse()}, tmp_path / "n.pt")
    with pytest.raises(ValueError, match="of another layout: head.weight torch.sparse_coo$"):
        SnapshotEnsemble.from_files(tmp_path / "n.pt", Net)


def test_a_model_with_a_prefix_of_its_own_takes_a_bare_state():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Net()

    [net], wrapper = nets(1), Wrapper()
    with pytest.raises(ValueError, match="^bare does not fit this Wrapper: missing: model.body.0.weight"):
        load_state(wrapper, net.state_dict(), "bare")
    load_state(wrapper, wrapper.state_dict(), "own")


def test_the_old_and_the_new_weight_norm():
    old = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 3)))
    new = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    load_state(new, old.state_dict(), "old.pt")
    torch.testing.assert_close(new(images()), old(images()))


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        (lambda net, ema: {"model": net, "model_ema": ema}, "ema"),
        (lambda net, ema: {"state_dict": net, "state_dict_ema": ema}, "state_dict_ema"),
        (lambda net, ema: {"model": net, "ema": {"module": ema}}, "ema"),
        (lambda net, ema: {f"model.{n}": x for n, x in net.items()} | {f"ema.{n}": x for n, x in ema.items()}, "ema"),
        (
            lambda net, ema: {
                "state_dict": {f"student.{n}": x for n, x in net.items()} | {f"teacher.{n}": x for n, x in ema.items()}
            },
            "teacher",
        ),
        (lambda net, ema: {"model": net, "ema_model": {"n_averaged": torch.tensor(3), **ema}}, "ema_model"),
    ],
)
def test_an_entry_can_be_chosen(tmp_path, content, entry):
    net, ema = nets()
    averaged = {f"module.{n}": x for n, x in ema.state_dict().items()} if entry == "ema_model" else ema.state_dict()
    torch.save(content(net.state_dict(), averaged), tmp_path / "both.pth")
    check([tmp_path / "both.pth"], [ema], entry=entry)


def test_which_of_several_entries_is_taken_is_said(tmp_path):
    net, ema = nets()
    torch.save({"model_ema": ema.state_dict(), "model": net.state_dict()}, tmp_path / "both.pth")
    with pytest.warns(UserWarning, match="both.pth holds weights under model and model_ema: took model; entry= choos"):
        check([tmp_path / "both.pth"], [net])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (lambda a, b: {"a": a, "b": b}, {}, "both.pt holds weights under a, b: choose by entry="),
        (lambda a, b: {"model": a}, {"entry": "ema"}, "both.pt has no entry 'ema'; it has model, model.body"),
        (
            lambda a, b: {"x_ema": a, "y_ema": b},
            {"entry": "ema"},
            "both.pt has more than one entry 'ema': x_ema, y_ema",
        ),
        (
            lambda a, b: {f"student.{n}": x for n, x in a.items()} | {f"teacher.{n}": x for n, x in b.items()},
            {},
            "both.pt fits under student., teacher.: choose by entry=",
        ),
        (
            lambda a, b: {**a, "mix_again.weight": b["mix.weight"]},
            {},
            "both.pt has two tensors, .*mix.*weight and mix.*weight, where the model has one",
        ),
        (lambda a, b: {"shadow_params": [*a.values()]}, {}, "both.pt must hold a state_dict of tensors"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path, content, options, message):
    a, b = (net.state_dict() for net in nets())
    torch.save(content(a, b), tmp_path / "both.pt")
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble.from_files([tmp_path / "both.pt"], Net, **options)


@pytest.mark.bad_input
def test_more_than_tensors_is_refused_with_the_way_to_allow_it(tmp_path):
    [net] = nets(1)
    torch.save({"model": net.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "their.pth")
    message = (
        r"their.pth cannot be read as tensors without unpickling: .*argparse.Namespace.*; where you trust the file, "
        r"unpickle it yourself and save its state_dict alone, or allow argparse.Namespace by "
        r"torch.serialization.add_safe_globals"
    )
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble.from_files([tmp_path / "their.pth"], Net)
    with torch.serialization.safe_globals([argparse.Namespace]):
        check([tmp_path / "their.pth"], [net])


@pytest.mark.bad_input
def test_a_script_names_its_loader(tmp_path):
    [net] = nets(1)
    torch.jit.save(torch.jit.script(net.eval()), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="it is a TorchScript archive; give it as .*load=torch.jit.load"):
        SnapshotEnsemble.from_files([tmp_path / "net.pt"], Net)
    check([tmp_path / "net.pt"], [net], factory=None, load=torch.jit.load, features=False)


# folders


def hugging_face(folder, net, shards=1, ending="safetensors"):
    """What save_pretrained and Trainer leave of a model, shared tensors once."""
    folder.mkdir(parents=True)
    state = {name: x.clone() for name, x in net.state_dict().items() if name != "mix_again.weight"}
    stem = "model" if ending == "safetensors" else "pytorch_model"
    write = save_file if ending == "safetensors" else torch.save
    (folder / "config.json").write_text("{}")
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save(torch.get_rng_state(), folder / "rng_state.pth")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    if shards == 1:
        write(state, folder / f"{stem}.{ending}")
        return
    names = {f"{stem}-{i + 1:05}-of-{shards:05}.{ending}": [*state][i::shards] for i in range(shards)}
    for file, inside in names.items():
        write({name: state[name] for name in inside}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in names.items() for name in inside}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_of_checkpoints_is_read_in_numeric_order(tmp_path, shards, ending):
    written = nets(3)
    for step, net in zip((500, 1000, 20000), written, strict=True):
        hugging_face(tmp_path / f"checkpoint-{step}", net, shards, ending)
    (tmp_path / "runs").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    ensemble = check(tmp_path, written)
    check([tmp_path / "checkpoint-500", tmp_path / "checkpoint-20000"], [written[0], written[2]])
    assert check(str(tmp_path), written, sha256=ensemble.hashes).hashes == ensemble.hashes


def test_a_final_model_beside_its_checkpoints_is_said(tmp_path):
    written = nets()
    for step, net in zip((9, 10), written, strict=True):
        hugging_face(tmp_path / f"checkpoint-{step}", net)
    hugging_face(tmp_path / "out", written[1])
    shutil.move(tmp_path / "out" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="is read as its 3 folders of checkpoints, without model.safetensors"):
        (tmp_path / "out" / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
        check(tmp_path, [*written, written[1]])


def test_files_in_a_folder_are_read_in_numeric_order(tmp_path):
    written = nets(3)
    for epoch, net in zip((2, 10, 100), written, strict=True):
        torch.save({"state_dict": net.state_dict()}, tmp_path / f"epoch={epoch}-step={epoch * 7}.ckpt")
    (tmp_path / "log.csv").write_text("epoch,loss")
    check(tmp_path, written)
    check([tmp_path], written)


def test_a_list_keeps_its_order_and_the_order_of_letters_is_said(tmp_path):
    written = nets(3)
    paths = [tmp_path / f"ck-{epoch}.pt" for epoch in (1, 2, 10)]
    for path, net in zip(paths, written, strict=True):
        torch.save(net.state_dict(), path)
    check(paths[::-1], written[::-1])
    with pytest.warns(UserWarning, match="in the order of letters: ck-1.pt, ck-10.pt, ck-2.pt; is the last the fin"):
        check(sorted(paths), [written[0], written[2], written[1]])


@pytest.mark.parametrize(
    ("names", "kept", "said"),
    [
        (("epoch=1", "epoch=2", "last", "best"), (0, 1), "left out best.pt, last.pt, for the best and the last are"),
        (("checkpoint-9.pth", "checkpoint-10.pth", "model_best"), (0, 1), "left out model_best.pt, for the best"),
        (("model_9", "model_10", "final"), (0, 1, 2), None),
        (
            ("best", "epoch-3"),
            (1, 0),
            "not all numbers tell the order of epoch-3.pt, best.pt; is the last the finished",
        ),
        (("epoch=1-acc0.9", "epoch=2-acc0.8"), (0, 1), None),
        (
            ("acc0.7-epoch2", "acc0.8-epoch1"),
            (0, 1),
            "different numbers tell different orders, and the first the order",
        ),
        (("early", "late"), (0, 1), "no number tells the order of early.pt, late.pt; is the last the finished model"),
    ],
)
@pytest.mark.parametrize("folders", [False, True])
def test_names_beside_numbers(tmp_path, names, kept, said, folders, recwarn):
    written = nets(len(names))
    for name, net in zip(names, written, strict=True):
        if folders:
            hugging_face(tmp_path / name, net)
        else:
            torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    check(tmp_path, [written[k] for k in kept])
    messages = [str(warning.message) for warning in recwarn]
    said = said and (said.replace(".pt", "") if folders else said)
    assert len(messages) == bool(said) and all(said in message for message in messages)


def test_a_version_of_lightning_is_its_checkpoints(tmp_path):
    [net] = nets(1)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "checkpoints" / "epoch=1-step=3.ckpt")
    check(tmp_path, [net])


@pytest.mark.bad_input
def test_shards_without_their_index_and_pointers_are_told(tmp_path):
    hugging_face(tmp_path / "a", nets(1)[0], 2)
    (tmp_path / "a" / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="00002.safetensors must be a safetensors file, got a pointer of Git LFS"):
        SnapshotEnsemble.from_files(tmp_path / "a", Net)
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="a must hold the index of its shards, model-00001.*, got none, .*json$"):
        checkpoint_files(tmp_path / "a")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "zero_to_fp32.py").write_text("")
    with pytest.raises(ValueError, match="zero_to_fp32.py .* makes weights of the shards of ZeRO$"):
        checkpoint_files(tmp_path / "zero")
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match="it is a zip archive of config.json, which torch.save does not write$"):
        load_weights(tmp_path / "m.keras")


@pytest.mark.bad_input
def test_a_folder_without_checkpoints_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty must hold checkpoints .*, got nothing$"):
        checkpoint_files(tmp_path / "empty")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="dcp_to_torch_save makes a file of it$"):
        checkpoint_files(tmp_path / "sharded")
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        checkpoint_files([tmp_path / "nowhere"])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "must be an object with a weight_map"),
        (lambda index: index.update(weight_map={"head.bias": "../../etc/passwd"}), "must name .safetensors or .bin"),
        (lambda index: index.update(weight_map={"head.bias": 3}), "must name .safetensors or .bin files"),
        (lambda index: index["weight_map"].update(more="model-00001-of-00002.safetensors"), "must hold more, as model"),
        (lambda index: index["weight_map"].update(more="model-9.safetensors"), "model-9.safetensors is missing"),
        (lambda index: index["weight_map"].pop("head.bias"), None),
    ],
)
def test_an_index_that_does_not_fit_its_files(tmp_path, change, message):
    [net] = nets(1)
    hugging_face(tmp_path / "checkpoint-1", net, shards=2)
    path = tmp_path / "checkpoint-1" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    if message is None:  # the file has it all the same
        check(path, [net])
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check(path, [net])


def test_the_hash_of_an_index_is_that_of_all_its_files(tmp_path):
    [net] = nets(1)
    hugging_face(tmp_path / "c", net, shards=2)
    index = tmp_path / "c" / "model.safetensors.index.json"
    before = weights_sha256(index)
    assert load_weights(index, before).keys() == load_weights(index).keys()
    path = tmp_path / "c" / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert weights_sha256(index) != before
    with pytest.raises(ValueError, match="or one of its files was changed or damaged"):
        load_weights(index, before)


# models that load themselves


def test_models_that_load_themselves_are_hashed_over_their_files(tmp_path):
    written = nets(3)
    for step, net in zip((9, 10, 11), written, strict=True):
        hugging_face(tmp_path / f"checkpoint-{step}", net)

    def from_pretrained(path):
        assert path.is_dir()
        net = Net()
        load_state(net, load_weights(path / "model.safetensors"), path)
        return net

    ensemble = check(tmp_path, written, factory=None, load=from_pretrained)
    assert len(set(ensemble.hashes)) == 3
    check(tmp_path, written, factory=None, load=from_pretrained, sha256=ensemble.hashes)
    (tmp_path / "checkpoint-10" / "config.json").write_text("{} ")
    with pytest.raises(ValueError, match="checkpoint-10 was changed or damaged: its SHA-256 must be"):
        SnapshotEnsemble.from_files(tmp_path, load=from_pretrained, sha256=ensemble.hashes)
    [alone] = SnapshotEnsemble.from_files(tmp_path / "checkpoint-9", load=from_pretrained).hashes
    assert alone == ensemble.hashes[0]


# the recorder


@pytest.mark.parametrize(
    "wrap", [torch.optim.swa_utils.AveragedModel, nn.DataParallel, torch.compile, lambda net: nn.DataParallel(net)]
)
def test_what_is_recorded_of_a_wrapped_model_can_be_loaded(tmp_path, wrap):
    [net] = nets(1)
    recorder = SnapshotRecorder(tmp_path, 1, snapshots=1)
    recorder.step(wrap(net))
    logits, _ = SnapshotEnsemble.load(tmp_path, Net)(images())
    torch.testing.assert_close(logits[0], net.eval()(images()).detach())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("model", "spec", "error", "message"),
    [
        (nn.LazyLinear(3), None, TypeError, "'weight' must be a dense tensor with data, got one that has no shape"),
        (
            nn.Linear(3, 2),
            {"name": "mlp64", "num_classes": 3},
            ValueError,
            "spec must be that of the recorded Linear, w",
        ),
        (
            nn.Linear(3, 2),
            {"name": "mlp65", "num_classes": 3},
            ValueError,
            "spec must be one that can be built, got .*65",
        ),
        (nn.Linear(3, 2), {"model": "mlp64"}, ValueError, "spec must be one that can be built"),
    ],
)
def test_what_could_not_be_loaded_again_is_said_at_the_first_step(tmp_path, model, spec, error, message):
    recorder = SnapshotRecorder(tmp_path, 100, snapshots=2, spec=spec)
    with pytest.raises(error, match=message):
        recorder.step(model)
    assert recorder.done == 0


def test_looking_at_the_spec_moves_no_generator(tmp_path):
    from eekd.models import build

    spec = {"name": "mlp64", "num_classes": 3, "in_channels": 1, "image_size": 8}
    recorder, model = SnapshotRecorder(tmp_path, 1, snapshots=1, spec=spec), build(**spec)
    before = torch.get_rng_state()
    recorder.step(model)
    assert torch.equal(torch.get_rng_state(), before)


# the command line

SPEC = {"name": "mlp64", "num_classes": 10, "in_channels": 1, "image_size": 8}


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """Three checkpoints of a teacher that others trained, each of another form."""
    from eekd.models import build

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    states = [build(**SPEC).state_dict() for _ in range(3)]
    torch.save({f"model.{name}": x for name, x in states[0].items()}, "a.pt")
    save_file(states[1], "b.safetensors")
    torch.save({"state_dict": {f"module.{name}": x for name, x in states[2].items()}, "epoch": 3}, "c.ckpt")
    return states


SMALL = "--train-limit 100 --device cpu --student.epochs 1 --student.model mlp64 --teacher.model mlp64 --out run"
STUDENT = ["student", "--checkpoints", "a.pt", "b.safetensors", "c.ckpt", *SMALL.split()]


def test_a_student_learns_from_checkpoints_of_others(theirs, tmp_path, capsys):
    from eekd.report import report
    from eekd.snapshots import read_manifest
    from eekd.train import __main__ as cli

    assert cli.main([*STUDENT, "--students", "last", "attention"]) == 0
    manifest = read_manifest("run/teacher")
    assert (manifest["spec"], manifest["schedule"]) == (SPEC, [1, 2, 3])
    ensemble = SnapshotEnsemble.load("run/teacher")
    for model, state in zip(ensemble.models, theirs, strict=True):
        assert all(torch.equal(model.state_dict()[name], x) for name, x in state.items())
    sources = json.loads((tmp_path / "run/teacher/snapshots.json").read_text())["sources"]
    assert [source["path"] for source in sources] == [str(tmp_path / n) for n in ("a.pt", "b.safetensors", "c.ckpt")]
    rows = json.loads((tmp_path / "run/summary.json").read_text())["rows"]
    names = ["teacher", "snapshot 1", "snapshot 2", "snapshot 3", "ensemble", "last", "attention"]
    assert [row["name"] for row in rows] == names and rows[0]["seconds_per_epoch"] is None
    assert "attention" in report("run").read_text()
    # Everything after is as with a teacher that was trained here, and needs the sources no more.
    for path in ("a.pt", "b.safetensors", "c.ckpt"):
        (tmp_path / path).unlink()
    shutil.rmtree("run/students/attention")
    (tmp_path / "run/summary.json").unlink()
    assert cli.main(["--resume", "run"]) == 0
    assert cli.main(["student", "--teacher", "run", "--students", "uniform", "--out", "more"]) == 0
    assert (tmp_path / "more/students/uniform/student.json").is_file()


def test_a_folder_of_checkpoints_from_the_command_line(theirs, tmp_path, capsys):
    from eekd.train import __main__ as cli

    for step, state in zip((5, 10), theirs[:2], strict=True):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors")
    command = ["student", "--checkpoints", "out", *SMALL.split(), "--students", "uniform"]
    assert cli.main([*command, "--dry-run"]) == 0 and not (tmp_path / "run").exists()
    assert cli.main(command) == 0
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert [path.rsplit("/", 2)[1] for path in settings["checkpoints"]] == ["checkpoint-5", "checkpoint-10"]
    assert (settings["teacher"]["snapshots"], settings["teacher"]["epochs"]) == (2, 2)


def test_checkpoints_of_the_same_weights_are_said(theirs, tmp_path, capsys):
    from eekd.train import __main__ as cli

    torch.save({"model": theirs[0]}, "last.pt")  # a.pt, in another form
    assert cli.main(["student", "--checkpoints", "a.pt", "last.pt", *SMALL.split(), "--dry-run"]) == 0
    told = f"{tmp_path}/a.pt and {tmp_path}/last.pt hold the same weights, so that two snapshots are one"
    assert told in capsys.readouterr().err
    assert cli.main([*STUDENT, "--dry-run"]) == 0
    assert "the same weights" not in capsys.readouterr().err


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher.model", "resnet8"], "a.pt does not fit this .*: missing: "),
        (["--checkpoints", "a.pt", "nowhere.pt"], "nowhere.pt is missing or not a file"),
        (["--checkpoint-entry", "ema"], "a.pt has no entry 'ema'"),
        (["--bank", "somewhere"], "somewhere"),
        (["--students"], "students must be at least one when checkpoints are given"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_checkpoints_are_checked_before_anything_is_trained(theirs, tmp_path, capsys, more, message, dry):
    from eekd.train import __main__ as cli

    assert cli.main([*STUDENT, *more, *dry]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.bad_input
def test_a_copied_checkpoint_that_was_damaged_is_found(theirs, tmp_path, capsys):
    from eekd.train import __main__ as cli

    assert cli.main([*STUDENT, "--students", "uniform"]) == 0
    path = tmp_path / "run/teacher/snapshot-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert cli.main(["--resume", "run"]) == 2
    assert "snapshot-2.safetensors was changed or damaged" in capsys.readouterr().err
