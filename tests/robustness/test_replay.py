"""The batch that was kept is run again, and shows the bad tensor."""

import dataclasses

import pytest
import torch
from faults import faulty, start, taught

from eekd.io.files import read_json, write_json_atomic
from eekd.io.tensors import load_tensors
from eekd.train.replay import replay
from eekd.train.runtime import Runtime
from eekd.train.session import Session


@pytest.mark.parametrize("fault", ["image", "logits", "gradient"])
def test_what_was_kept_shows_the_bad_tensor(run, tmp_path, mark, fault):
    session, name, value = faulty(run, fault)
    [sample] = mark(session, value, 1)
    with pytest.raises(FloatingPointError):
        start(session, name, tmp_path / "phase", run[1] / "teacher")
    torch.manual_seed(99)
    path, draws = tmp_path / "phase/non-finite-2.json", torch.get_rng_state()
    found, known = replay(path), read_json(path)
    assert str(found) == known["found"] and not found.tensor.isfinite().all()
    tensors = load_tensors(path.with_suffix(".safetensors"))
    assert tensors["index"][found.rows].tolist() == [sample]
    assert torch.equal(draws, torch.get_rng_state())
    assert known["settings"]["train_limit"] == 200 and known["made_with"]["torch"] == torch.__version__
    if name == "attention":
        assert ("snapshot_logits" in tensors) and tensors["snapshot_features"].shape == (2, 60, 12)
    data = bytearray(path.with_suffix(".safetensors").read_bytes())
    data[-1] ^= 1
    path.with_suffix(".safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="non-finite-2.safetensors was changed or damaged"):
        replay(path)


def test_a_replay_reads_the_features_of_the_layer_that_was_named(run, tmp_path, mark):
    session = taught(run, "spare")
    student = dataclasses.replace(session.config.student, layer="head")
    session = Session(dataclasses.replace(session.config, student=student), run[0].data)
    mark(session, 200.0, 1)
    with pytest.raises(FloatingPointError):
        start(session, "attention", tmp_path / "phase", run[1] / "teacher")
    assert replay(tmp_path / "phase/non-finite-2.json").name == "the gradient of the output of 0.body.6 (Flatten)"


@pytest.mark.bad_input
@pytest.mark.parametrize("content, told", [
    ([], "must be an object, got a list"), ("x", "must be an object, got a str"), ({}, "must have format 1, got None"),
    ({"format": 2}, "must have format 1, got 2"), ({"format": 1}, "must have sha256, classes, criterion, settings"),
], ids=str)  # fmt: skip
def test_a_file_that_cannot_be_replayed_is_named(tmp_path, content, told):
    write_json_atomic(tmp_path / "kept.json", content)
    with pytest.raises(ValueError) as caught:
        replay(tmp_path / "kept.json")
    assert str(caught.value).startswith(f"{tmp_path}/kept.json {told}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_replay_runs_as_the_training_did(run, tmp_path, mark, monkeypatch, precision):
    session, name, value = faulty(run, "overflow", precision=precision, channels_last=True)
    mark(session, value, 1)
    ran = []
    monkeypatch.setattr(Runtime, "run", lambda self, *args, then=Runtime.run: ran.append(self) or then(self, *args))
    with pytest.raises(FloatingPointError):
        start(session, name, tmp_path / "phase", run[1] / "teacher")
    ran.clear()
    assert replay(tmp_path / "phase/non-finite-2.json").name.startswith("the output of 0.trap")
    assert [(forward.dtype, forward.layout) for forward in ran] == [(session.dtype, torch.channels_last)]
