"""Every format is written here in miniature, read back, then broken in every way that comes to mind."""

import gzip
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    NAMES,
    cifar10_files,
    cifar100_files,
    cifar_binary,
    cifar_python2,
    cifar_python3,
    cycle,
    fashion,
    ids,
    idx,
    images,
    packed,
    unpacked,
)

from eekd.data import load
from eekd.data.formats import parse_cifar_binary, parse_cifar_python, parse_idx, read_bytes, read_members
from eekd.data.named import _DEBIAN_FASHION_MNIST, _GLYPHS

bad_input = pytest.mark.bad_input
fuzz = settings(max_examples=150, deadline=None)


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bytes, ""), (gzip.compress, "")])
def test_fashion_mnist_reads_idx_packed_or_not(tmp_path, pack, suffix):
    data = load("fashion-mnist", fashion(tmp_path, pack=pack, suffix=suffix), val_fraction=0.5)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 30, 20)
    assert (data.channels, data.image_size, len(data.classes), data.augment) == (1, 28, 10, "crop")
    assert torch.equal(data.test.images, torch.from_numpy(images(20)))
    assert torch.equal(data.test.labels, torch.from_numpy(cycle(20)).long())
    assert ids(data.train) | ids(data.val) == set(range(60))


@pytest.mark.full
@pytest.mark.skipif(not _DEBIAN_FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian_is_found():
    data = load("fashion-mnist")
    assert (len(data.train), len(data.val), len(data.test)) == (54000, 6000, 10000)
    assert data.train.labels.bincount().tolist() == [5400] * 10
    assert data.mean == pytest.approx((0.2860,), abs=1e-3) and data.std == pytest.approx((0.3530,), abs=1e-3)


def test_glyphs_are_real_and_no_design_is_in_two_parts():
    data, about = load("glyphs"), json.loads(_GLYPHS.with_suffix(".json").read_text())
    faces = {"train": 0, "val": 0, "test": 0}
    for package in about["packages"]:
        faces[package["part"]] += len(package["faces"])
    assert len({package["name"] for package in about["packages"]}) == len(about["packages"])
    assert all(package["licence"] and package["version"] for package in about["packages"])
    assert "".join(data.classes) == about["characters"] and len(data.classes) == 62
    for name, count in faces.items():
        split = getattr(data, name)
        assert split.images.shape == (62 * count, 1, 16, 16) and count > 50
        assert split.labels.bincount().tolist() == [count] * 62
        assert split.images.max() == 255 and not (split.images % 17).any()
    images = [{bytes(image) for image in getattr(data, name).images.numpy()} for name in faces]
    assert len(images[0] & images[2]) < 0.01 * len(images[2])  # dots and bars, which all fonts share


def test_digits_are_real_and_split_three_ways():
    data = load("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1294, 144, 359)
    assert (data.channels, data.image_size, data.augment) == (1, 8, "crop")
    assert data.train.images.max() == 255
    assert all(split.labels.bincount(minlength=10).min() > 0 for split in (data.train, data.val, data.test))


@pytest.mark.parametrize("kind", ["binary", "python2", "python3"])
@pytest.mark.parametrize("place", ["folder", "subfolder", "archive", "archive in folder"])
def test_cifar10_reads_every_archive_anywhere(tmp_path, kind, place):
    files = cifar10_files(kind)
    form = "binary" if kind == "binary" else "python"
    root = {
        "folder": lambda: unpacked(tmp_path / "any", files),
        "subfolder": lambda: unpacked(tmp_path / f"cifar-10-batches-{form[:3].replace('pyt', 'py')}", files).parent,
        "archive": lambda: packed(tmp_path / "any.tar.gz", files),
        "archive in folder": lambda: packed(tmp_path / f"cifar-10-{form}.tar.gz", files).parent,
    }[place]()
    data = load("cifar10", root)
    assert (len(data.train), len(data.val), len(data.test)) == (45, 5, 10)
    assert data.classes == tuple(NAMES[:10]) and data.augment == "crop-flip"
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert torch.equal(data.test.images, torch.from_numpy(images(60, 3, 32)[50:]))
    assert data.test.labels.tolist() == list(range(10))


@pytest.mark.parametrize("kind", ["binary", "python2"])
def test_cifar100_uses_the_fine_labels(tmp_path, kind):
    data = load("cifar100", unpacked(tmp_path, cifar100_files(kind)), val_fraction=0.5)
    assert len(data.classes) == 100 and data.train.labels.bincount().tolist() == [1] * 100
    assert data.test.labels.tolist() == list(range(20))
    assert data.classes[3] == ("class3" if kind == "binary" else "3")
    assert data.std == (0.2675, 0.2565, 0.2761)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_python_reads_what_numpy_pickles_today(protocol):
    x, y = images(4, 3, 32), cycle(4)
    pixels, labels = parse_cifar_python(cifar_python3(x, y, protocol=protocol), "f", "labels", 10)
    assert torch.equal(pixels, torch.from_numpy(x)) and labels.tolist() == [0, 1, 2, 3]


X, Y = images(3, 3, 32), cycle(3)


class Call:
    """Pickles into a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@bad_input
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "call",
    [
        Call(os.system, "touch HACKED"),
        Call(eval, "open('HACKED', 'w')"),
        Call(exec, "open('HACKED', 'w')"),
        Call(open, "HACKED", "w"),
        Call(getattr, str, "join"),
        Call(np.save, "HACKED.npy", 1),
        {"data": Call(os.mkdir, "HACKED"), "labels": [0, 1, 2]},
        [Call(__import__, "antigravity")],
    ],
    ids=lambda c: type(c).__name__ if not isinstance(c, Call) else c.call[0].__name__,
)
def test_a_pickle_that_calls_anything_is_refused(tmp_path, monkeypatch, call, protocol):
    monkeypatch.chdir(tmp_path)
    files = cifar10_files("python3") | {"data_batch_3": pickle.dumps(call, protocol=protocol)}
    with pytest.raises(ValueError, match="data_batch_3 is no pickle of plain values.*it asks for"):
        load("cifar10", unpacked(tmp_path, files))
    assert not [path for path in tmp_path.iterdir() if "HACKED" in path.name]


@bad_input
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"data": np.zeros((3, 3072), object), "labels": [0, 1, 2]}, "not one of bytes"),
        ({"data": np.zeros((3, 3072), np.float32), "labels": [0, 1, 2]}, "not one of bytes"),
        ({"data": np.zeros((3, 3072), np.uint8, order="F"), "labels": [0, 1, 2]}, "not one of bytes"),
        ({"data": np.zeros((3, 3071), np.uint8), "labels": [0, 1, 2]}, "no array 'data'"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "no array 'data'"),
        ({"data": b"\0" * 3072, "labels": [0]}, "no array 'data'"),
        ({"labels": [0]}, "no array 'data'"),
        ({"data": np.zeros((3, 3072), np.uint8)}, "no list 'labels'"),
        ({"data": np.zeros((3, 3072), np.uint8), "fine_labels": [0, 1, 2]}, "no list 'labels'"),
        ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1]}, "no list 'labels'"),
        ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 2.0]}, "no list 'labels'"),
        ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 10]}, "labels from 0 to 9, got 0 to 10"),
        ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, -1, 2]}, "labels from 0 to 9, got -1 to 2"),
        ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 10**30]}, "labels from 0 to 9, got 0 to"),
        ([1, 2], "must hold a dict, got a list"),
    ],
)
def test_a_pickle_of_the_wrong_things_is_refused(value, said):
    with pytest.raises(ValueError, match=said) as caught:
        parse_cifar_python(pickle.dumps(value, protocol=4), "somewhere/batch", "labels", 10)
    assert str(caught.value).startswith("somewhere/batch")


@bad_input
@pytest.mark.parametrize(
    "forged",
    [
        b"",
        b"no pickle",
        b"\x80\x02}r\xff\xff\xff\xff.",  # a memo index of 2^32
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # 2^63 bytes
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a bytearray of that size
        b"\x80\x02cnumpy\nndarray\n}b.",  # state for a class
        b"\x80\x02cnumpy\nndarray\n)R}b.",  # a wrong state
        b"\x80\x02ccopyreg\n_reconstructor\n.",
        b"\x80\x04\x8c\x03o\ns\x8c\x02\n\n\x93.",  # line breaks in a name
    ],
)
def test_a_forged_pickle_is_refused_before_it_costs_anything(forged):
    with pytest.raises(ValueError, match="^f (is no pickle|has no array)") as caught:
        parse_cifar_python(forged, "f", "labels", 10)
    assert "\n" not in str(caught.value)


@bad_input
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "starts with 000008, got $"),
        (b"\0\0", "starts with 000008, got 0000$"),
        (b"\0\0\x08", "starts with 000008, got"),
        (b"\0\0\x08\x00", "starts with 000008, got"),
        (b"\0\0\x08\x05" + bytes(30), "starts with 000008, got"),
        (b"\0\0\x0d\x01\0\0\0\x01" + bytes(4), "starts with 000008, got 00000d01"),
        (b"PNG!" + bytes(30), "starts with 000008, got 504e4721"),
        (idx(cycle(5))[:6], "starts with 000008, got"),
        (idx(cycle(5))[:-1], r"must hold bytes of shape \[5\], as its header says, got 4"),
        (idx(cycle(5)) + b"\0", r"must hold bytes of shape \[5\], as its header says, got 6"),
        (idx(images(3)[:, 0])[:-100], "its header says"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "its header says"),
        (b"\0\0\x08\x04" + bytes(4) + b"\xff" * 12, "its header says"),
    ],
)
def test_a_damaged_idx_file_is_refused(data, said):
    with pytest.raises(ValueError, match=said) as caught:
        parse_idx(data, "somewhere/idx")
    assert str(caught.value).startswith("somewhere/idx")


@bad_input
@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("train-images-idx3-ubyte", idx(cycle(60)), "must have shape .images, side, side., got"),
        ("train-images-idx3-ubyte", idx(images(60)), "must have shape .images, side, side., got"),
        ("train-images-idx3-ubyte", idx(images(60)[:, 0, :, 1:]), "must have shape .images, side, side., got"),
        ("train-images-idx3-ubyte", idx(images(59)[:, 0]), "one label for each of 59"),
        ("train-labels-idx1-ubyte", idx(cycle(59)), "one label for each of 60"),
        ("train-labels-idx1-ubyte", idx(images(60)[:, 0]), "one label for each of 60"),
        ("train-labels-idx1-ubyte", idx(cycle(60) + 1), "labels from 0 to 9, got 1 to 10"),
        ("t10k-labels-idx1-ubyte", gzip.compress(idx(cycle(20)), mtime=0)[:-9], "damaged gzip"),
        ("t10k-labels-idx1-ubyte", gzip.compress(idx(cycle(20)), mtime=0)[:5], "damaged gzip"),
        ("t10k-labels-idx1-ubyte", b"\x1f\x8b" + bytes(50), "damaged gzip"),
    ],
)
def test_fashion_mnist_names_the_file_at_fault(tmp_path, name, data, said):
    (fashion(tmp_path, pack=bytes, suffix="") / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        load("fashion-mnist", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{name.split('-')[0]}-")


@bad_input
@pytest.mark.parametrize("size", [0, 1, 3072, 3074, 2 * 3073 - 1])
def test_a_cifar_binary_of_the_wrong_size_is_refused(size):
    with pytest.raises(ValueError, match=f"^f must hold a positive multiple of 3073 bytes, got {size}$"):
        parse_cifar_binary(bytes(size), "f", 1, 10)


@bad_input
@pytest.mark.parametrize(("label_bytes", "classes", "label"), [(1, 10, 10), (1, 10, 255), (2, 100, 100)])
def test_a_cifar_label_out_of_range_is_refused(label_bytes, classes, label):
    with pytest.raises(ValueError, match=f"^f must have labels from 0 to {classes - 1}, got {label} to {label}$"):
        parse_cifar_binary(bytes([label] * label_bytes) + bytes(3072), "f", label_bytes, classes)


def tar_with(path, **fields):
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("fine/test_batch")
        for key, value in fields.items():
            setattr(member, key, value)
        tar.addfile(member)
    return path


@bad_input
@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../test_batch"},
        {"name": "a/../../test_batch"},
        {"name": "/tmp/test_batch"},
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "../other"},
        {"type": tarfile.CHRTYPE},
        {"type": tarfile.FIFOTYPE},
    ],
)
def test_a_tar_that_leads_elsewhere_is_refused(tmp_path, fields):
    with pytest.raises(ValueError, match="is refused: .* is no plain file or folder in it"):
        load("cifar10", tar_with(tmp_path / "cifar.tar.gz", **fields))


@bad_input
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_tar_is_refused(tmp_path, keep):
    path = packed(tmp_path / "cifar-10-python.tar.gz", cifar10_files("python3"))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz is damaged or no tar archive"):
        load("cifar10", tmp_path)


@bad_input
@pytest.mark.parametrize("kind", ["binary", "python2"])
@pytest.mark.parametrize("missing", ["data_batch_1", "data_batch_5", "test_batch"])
def test_an_incomplete_cifar_is_refused(tmp_path, kind, missing):
    files = {name: data for name, data in cifar10_files(kind).items() if not name.startswith(missing)}
    with pytest.raises(FileNotFoundError, match=f"must hold cifar10: .*{missing}.*, got none of them"):
        load("cifar10", unpacked(tmp_path, files))


def only_value_errors(read, data, name, *arguments):
    try:
        return read(data, *arguments)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(f"{name} ")


@st.composite
def damaged(draw, whole):
    """`whole` with a few bytes overwritten, then cut or lengthened."""
    data = bytearray(whole)
    for place in draw(st.lists(st.integers(0, min(len(data), 400) - 1), max_size=8)):
        data[place] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))]) + draw(st.binary(max_size=4))


@fuzz
@given(st.one_of(st.binary(max_size=40), damaged(idx(images(2, 1, 5)[:, 0])), damaged(idx(cycle(9)))))
def test_fuzz_idx(data):
    out = only_value_errors(parse_idx, data, "f", "f")
    assert out is None or idx(out.numpy()) == data


@fuzz
@given(st.one_of(st.binary(max_size=40), damaged(cifar_binary(X, Y)), damaged(cifar_binary(X, Y, True))))
def test_fuzz_cifar_binary(data):
    out = only_value_errors(parse_cifar_binary, data, "f", "f", 1, 10)
    assert out is None or cifar_binary(out[0].numpy(), out[1].numpy()) == data


@fuzz
@given(
    st.one_of(
        st.binary(max_size=80), damaged(cifar_python2(X[:1], Y[:1])), damaged(cifar_python3(X[:1], Y[:1], protocol=4))
    )
)
def test_fuzz_cifar_python(data):
    out = only_value_errors(parse_cifar_python, data, "f", "f", "labels", 10)
    assert out is None or (out[0].shape[1:] == (3, 32, 32) and out[1].min() >= 0 and out[1].max() < 10)


@fuzz
@given(data=damaged(gzip.compress(idx(cycle(40)), mtime=0)))
def test_fuzz_gzip(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("gz") / "f"
    path.write_bytes(data)
    only_value_errors(read_bytes, path, path)


@fuzz
@given(st.data())
def test_fuzz_tar(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("tar")
    whole = packed(root / "whole", {"test": bytes(50), "train": bytes(700)}).read_bytes()
    (root / "f").write_bytes(gzip.compress(data.draw(damaged(gzip.decompress(whole)))))
    only_value_errors(read_members, root / "f", root / "f", {"test"})
