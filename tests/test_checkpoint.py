"""Files are written whole or not at all, and nothing damaged or foreign is read in silence."""

import hashlib
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

from eekd.io import tensors as tensor_files
from eekd.io.files import read_checked, read_json, sha256_of, write_atomic, write_json_atomic

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, -1.0])}


def folder(path):
    return sorted(file.name for file in path.iterdir())


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_write_returns_the_hash_makes_folders_and_leaves_one_file(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    assert write_atomic(path, b"old") == hashlib.sha256(b"old").hexdigest()
    assert write_atomic(path, b"new") == sha256_of(path)
    assert path.read_bytes() == b"new" and folder(path.parent) == ["file"]


def test_files_are_readable_by_whom_the_umask_allows(tmp_path):
    umask = os.umask(0o022)
    try:
        tensor_files.save_tensors(tmp_path / "file", STATE)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    write_atomic(tmp_path / "file", b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and folder(tmp_path) == ["file"]


def test_the_bytes_are_on_disk_before_they_take_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the last one is the folder's


def test_a_process_killed_before_replace_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "file", b"old")
    crash = (
        "import os, sys; from eekd.io.files import write_atomic; os.replace = lambda *_: os.kill(os.getpid(), 9);"
        "write_atomic(sys.argv[1], b'new')"
    )
    assert subprocess.run([sys.executable, "-c", crash, tmp_path / "file"]).returncode == -9
    assert (tmp_path / "file").read_bytes() == b"old"
    write_atomic(tmp_path / "file", b"newer")
    assert (tmp_path / "file").read_bytes() == b"newer" and folder(tmp_path) == ["file"]


def test_tensors_of_any_kind_come_back_as_they_were(tmp_path):
    shared = torch.arange(4.0)
    tensors = {
        "transposed": torch.arange(6).view(2, 3).t(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 2).expand(3, 2),
        "slice": torch.arange(10.0)[2:5],
        "shared": shared,
        "again": shared,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.tensor([0.1, float("nan")], dtype=torch.bfloat16),
        "needs grad": nn.Parameter(torch.ones(2)),
    }
    sha256 = tensor_files.save_tensors(tmp_path / "file", tensors, {"note": "ü"})
    loaded = tensor_files.load_tensors(tmp_path / "file", sha256)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].nan_to_num(), tensor.detach().nan_to_num())


def test_tensors_come_back_from_the_device(tmp_path, device):
    tensor_files.save_tensors(tmp_path / "file", {name: tensor.to(device) for name, tensor in STATE.items()})
    assert same(tensor_files.load_tensors(tmp_path / "file"), STATE)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    assert tensor_files.save_tensors(tmp_path / "a", STATE) == tensor_files.save_tensors(tmp_path / "b", STATE)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "entry, reason",
    [
        (1.0, "a float"),
        ({}, "a dict"),
        (torch.ones(2).to_sparse(), "sparse_coo"),
        (torch.ones(2, device="meta"), "meta"),
    ],
)
def test_only_dense_tensors_are_saved(tmp_path, entry, reason):
    with pytest.raises(TypeError, match=f"file: 'x' must be a dense tensor with data, got .*{reason}"):
        tensor_files.save_tensors(tmp_path / "file", {"x": entry})
    assert folder(tmp_path) == []


@pytest.mark.bad_input
def test_metadata_are_strings(tmp_path):
    with pytest.raises(TypeError, match="file: metadata 'step' must be a str, got a int"):
        tensor_files.save_tensors(tmp_path / "file", STATE, {"step": 1})
    assert folder(tmp_path) == []


@pytest.mark.bad_input
def test_every_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "file"
    sha256 = tensor_files.save_tensors(path, STATE)
    whole = path.read_bytes()
    for position in range(len(whole)):  # the header's length, the header, the tensors
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"file was changed or damaged: its SHA-256 must be \w{64}, got"):
            tensor_files.load_tensors(path, sha256)


@pytest.mark.bad_input
@pytest.mark.parametrize("cut", [0, 7, 8, 40, -1])
@pytest.mark.parametrize("name", ["file.safetensors", "file.pt"])
def test_a_truncated_file_is_an_error_without_a_hash_too(tmp_path, name, cut):
    path = tmp_path / name
    if name.endswith("pt"):
        torch.save(STATE, path)
    else:
        tensor_files.save_tensors(path, STATE)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=name):
        tensor_files.load_weights(path)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "read", [read_checked, sha256_of, read_json, tensor_files.load_tensors, tensor_files.load_weights]
)
@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_missing_file_is_named(tmp_path, read, name):
    with pytest.raises(FileNotFoundError, match="is missing or not a file"):
        read(tmp_path / name)


def test_json_comes_back(tmp_path):
    path, value = tmp_path / "file.json", {"a": [1, 2.5, None, "ü"], "b": {}}
    assert write_json_atomic(path, value) == sha256_of(path)
    assert read_json(path) == value


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.ones(1), {1, 2}, b"bytes", {(1, 2): 3}])
def test_what_json_lacks_is_not_written(tmp_path, value):
    write_json_atomic(tmp_path / "file.json", "old")
    with pytest.raises(ValueError, match="file.json cannot be written as JSON"):
        write_json_atomic(tmp_path / "file.json", {"x": value})
    assert read_json(tmp_path / "file.json") == "old" and folder(tmp_path) == ["file.json"]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe\x00", b"{} {}", b"[NaN]", b"[-Infinity]", b"[" * 100_000, b'{"a": 1,}', b"9" * 5000]
)
def test_what_is_not_json_is_named(tmp_path, text):
    (tmp_path / "file.json").write_bytes(text)
    with pytest.raises(ValueError, match="file.json is not JSON: "):
        read_json(tmp_path / "file.json")


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "best_acc": 0.5, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"net": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"module": {"state_dict": state}},
        lambda state: {"weights": state, "epoch": 1},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    ],
)
def test_anybodys_torch_save_is_read(tmp_path, nest):
    torch.save(nest(nn.Linear(3, 2).state_dict() | STATE), tmp_path / "file.pth")
    model = nn.Linear(3, 2)
    tensor_files.load_state(model, tensor_files.load_weights(tmp_path / "file.pth"), "file.pth")
    assert same(model.state_dict(), STATE)


class Custom:
    pass


def endless():
    content = {}
    content["model"] = content
    return content


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content, reason",
    [
        (nn.Linear(3, 2), "cannot be read as tensors without unpickling: "),
        ({"model": STATE, "args": Custom()}, "cannot be read as tensors without unpickling: "),
        (torch.ones(2), "must hold a state_dict of tensors, .*; got a torch.strided tensor on cpu$"),
        ([STATE], "must hold a state_dict of tensors, .*; got a list$"),
        ({}, "must hold a state_dict of tensors, .*; got a dict of nothing$"),
        ({"state_dict": {}}, "must hold a state_dict of tensors, .*; got a dict of 'state_dict'$"),
        ({"weights": STATE, "other": {**STATE}, "epoch": 1}, "holds weights under weights, other: choose by entry= "),
        ({str(n): n for n in range(9)}, "must hold a state_dict .*; got a dict of '0', '1', '2' and 6 more$"),
        (endless(), "must hold a state_dict of tensors, .*; got a dict of 'model'$"),
    ],
)
def test_what_holds_no_weights_is_named(tmp_path, content, reason):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=f"file.pt .*{reason}"):
        tensor_files.load_weights(tmp_path / "file.pt")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
@pytest.mark.parametrize("data", [b"PK\x03\x04", b"\x80\x02.", b"hello", json.dumps({}).encode()])
def test_any_other_file_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        tensor_files.load_weights(tmp_path / name)


@pytest.mark.bad_input
def test_nothing_in_a_pickle_is_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    torch.save({"state_dict": STATE, "x": Attack()}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="without unpickling"):
        tensor_files.load_weights(tmp_path / "file.pt")
    assert folder(tmp_path) == ["file.pt"]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda state: state.pop("bias"), "missing: bias$"),
        (lambda state: state.update(extra=torch.ones(1)), "unexpected: extra$"),
        (lambda state: state.update(bias=torch.ones(3)), r"of another shape: bias \(3,\) for \(2,\)$"),
        (lambda state: state.update(bias=torch.ones(2).int()), "of another kind: bias torch.int32 for torch"),
        (
            lambda state: state.update({str(n): state.pop("bias", None) for n in range(5)}),
            "missing: bias; unexpected: 0, 1, 2 and 2 more$",
        ),
        (lambda state: state.clear(), "missing: weight, bias$"),
    ],
)
def test_a_state_of_another_architecture_is_refused_whole(change, reason):
    model, state = nn.Linear(3, 2), dict(STATE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=f"^their.pt does not fit this Linear: {reason}"):
        tensor_files.load_state(model, state, "their.pt")
    assert same(model.state_dict(), before)


class Wrapped(nn.Module):
    """A model of one's own may look like a wrapper."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 2)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: nn.Linear(3, 2),
        lambda: torch.compile(nn.Linear(3, 2)),
        lambda: nn.DataParallel(nn.Linear(3, 2)),
        lambda: nn.DataParallel(torch.compile(nn.Linear(3, 2))),
        lambda: torch.compile(nn.DataParallel(nn.Linear(3, 2))),
        Wrapped,
    ],
)
def test_state_goes_in_and_out_of_wrapped_models(wrap):
    model, other = wrap(), wrap()
    tensor_files.load_state(model, STATE, "file")
    assert same(tensor_files.bare_names(model.state_dict()), STATE)
    tensor_files.load_state(other, model.state_dict(), "file")
    assert same(tensor_files.bare_names(other.state_dict()), STATE)


def test_a_part_may_be_compiled_and_dtypes_of_floats_may_differ():
    model = nn.Sequential(torch.compile(nn.Linear(3, 2)), nn.BatchNorm1d(2))
    state = tensor_files.bare_names(model.state_dict())
    assert "0.weight" in state and state["1.num_batches_tracked"].dtype == torch.int64
    tensor_files.load_state(model.half(), {name: tensor.clone() for name, tensor in state.items()}, "file")
    assert model[1].weight.dtype == torch.float16
