"""Any file is a manifest or one sentence."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import HASH, SPEC

from eekd.io.files import write_json_atomic
from eekd.snapshots import read_manifest


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
