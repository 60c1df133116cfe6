"""Every format is written here in miniature, read back, then broken in every way that comes to mind."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eekd.data import AUGMENTATIONS, Encoded, Loader, Split, load
from eekd.data import augment as aug
from eekd.data.dataset import statistics, stratified
from eekd.data.formats import parse_cifar_binary, parse_cifar_python, parse_idx, read_bytes, read_members
from eekd.data.sources import _DEBIAN_FASHION_MNIST, _GLYPHS

bad_input = pytest.mark.bad_input
fuzz = settings(max_examples=150, deadline=None)


# ---- small archives of every format ----


def images(n, channels=1, size=28, seed=0):
    """Random images; the first pixel tells one from another."""
    out = np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    out[:, 0, 0, 0] = np.arange(n)
    return out


def cycle(n, classes=10):
    return np.arange(n, dtype=np.uint8) % classes


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def fashion(root, n=60, pack=gzip.compress, suffix=".gz"):
    for prefix, count in (("train", n), ("t10k", 20)):
        (root / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images(count)[:, 0])))
        (root / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(cycle(count))))
    return root


def cifar_binary(x, y, coarse=False):
    rows = [bytes([0] * coarse) + bytes([label]) + image.tobytes() for image, label in zip(x, y, strict=True)]
    return b"".join(rows)


def cifar_python2(x, y, key="labels"):
    """The bytes that Python 2 wrote: protocol 2 with its byte strings, which Python 3 cannot write."""

    def text(s):
        return b"U" + bytes([len(s)]) + s.encode()

    def integer(i):
        return b"J" + struct.pack("<i", i)

    raw = x.tobytes()
    return (
        b"\x80\x02}("
        + text("batch_label")
        + text("batch 1")
        + text(key)
        + b"]("
        + b"".join(map(integer, y.tolist()))
        + b"e"
        + text("data")
        + b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + integer(len(x))
        + integer(3072)
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + integer(-1)
        + integer(-1)
        + b"K\x00tb\x89T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tbu."
    )


def cifar_python3(x, y, key="labels", protocol=2):
    return pickle.dumps({"data": x.reshape(len(x), -1), key: y.tolist()}, protocol=protocol)


NAMES = [f"class{i}" for i in range(100)]


def cifar10_files(kind):
    """{name: bytes} of a CIFAR-10 of 50 training and 10 test images."""
    write = {"binary": cifar_binary, "python2": cifar_python2, "python3": cifar_python3}[kind]
    suffix = ".bin" if kind == "binary" else ""
    x, y = images(60, 3, 32), cycle(60)
    files = {f"data_batch_{i + 1}{suffix}": write(x[10 * i : 10 * i + 10], y[:10]) for i in range(5)}
    files[f"test_batch{suffix}"] = write(x[50:], y[:10])
    if kind == "binary":
        files["batches.meta.txt"] = "\n".join([*NAMES[:10], ""]).encode()
    else:
        files["batches.meta"] = pickle.dumps({"label_names": NAMES[:10]}, protocol=2)
    return files


def cifar100_files(kind):
    x, y = images(220, 3, 32), cycle(220, 100)
    if kind == "binary":
        files = {"train.bin": cifar_binary(x[:200], y[:200], True), "test.bin": cifar_binary(x[200:], y[:20], True)}
        return files | {"fine_label_names.txt": "\n".join(NAMES).encode()}
    return {
        "train": cifar_python2(x[:200], y[:200], "fine_labels"),
        "test": cifar_python2(x[200:], y[:20], "fine_labels"),
    }


def unpacked(root, files):
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def packed(path, files, folder="cifar-10-batches-py/"):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def png(array):
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.fromarray(array).save(out, "png")
    return out.getvalue()


def folder(root, parts, size=(32, 32), classes=("cat", "dog"), each=20, grey=False):
    for k, part in enumerate(parts):
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            x = images(each, 3, max(size), seed=10 * k + c)[:, :, : size[0], : size[1]].transpose(0, 2, 3, 1)
            for i, image in enumerate(x):
                (root / part / name / f"{i:03}.png").write_bytes(png(image[..., 0] if grey else image))
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The datasets package, writing its cache to a temporary folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


def parquet(hub, path, n=40, labels=None, column="label", **features):
    cells = [{"bytes": png(x), "path": None} for x in images(n, 3, 16).transpose(0, 2, 3, 1)]
    table = {"image": cells, column: cycle(n, 4).tolist() if labels is None else labels}
    kinds = hub.Features({"image": hub.Image(), column: hub.Value("int64")} | features) if features else None
    data = hub.Dataset.from_dict(table, features=kinds)
    path.parent.mkdir(exist_ok=True)
    data.to_parquet(str(path))
    return data


def ids(split):
    return set(split.images[:, 0, 0, 0].tolist())


# ---- formats ----


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
        ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 10]}, "labels from 0 to 10, wanted 0 to 9"),
        ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, -1, 2]}, "labels from -1 to 2"),
        ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 10**30]}, "wanted 0 to 9"),
        ([1, 2], "holds a list, wanted a dict"),
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
        (b"", "starts with , not"),
        (b"\0\0", "starts with 0000, not"),
        (b"\0\0\x08", "not 000008"),
        (b"\0\0\x08\x00", "not 000008"),
        (b"\0\0\x08\x05" + bytes(30), "not 000008"),
        (b"\0\0\x0d\x01\0\0\0\x01" + bytes(4), "starts with 00000d01"),
        (b"PNG!" + bytes(30), "starts with 504e4721"),
        (idx(cycle(5))[:6], "not 000008"),
        (idx(cycle(5))[:-1], r"holds 4 bytes of data, but its header says \[5\]"),
        (idx(cycle(5)) + b"\0", r"holds 6 bytes of data, but its header says \[5\]"),
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
        ("train-images-idx3-ubyte", idx(cycle(60)), "wanted .images, side, side"),
        ("train-images-idx3-ubyte", idx(images(60)), "wanted .images, side, side"),
        ("train-images-idx3-ubyte", idx(images(60)[:, 0, :, 1:]), "wanted .images, side, side"),
        ("train-images-idx3-ubyte", idx(images(59)[:, 0]), "one label for each of 59"),
        ("train-labels-idx1-ubyte", idx(cycle(59)), "one label for each of 60"),
        ("train-labels-idx1-ubyte", idx(images(60)[:, 0]), "one label for each of 60"),
        ("train-labels-idx1-ubyte", idx(cycle(60) + 1), "labels from 1 to 10, wanted 0 to 9"),
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
    with pytest.raises(ValueError, match=f"^f holds {size} bytes, wanted a positive multiple of 3073$"):
        parse_cifar_binary(bytes(size), "f", 1, 10)


@bad_input
@pytest.mark.parametrize(("label_bytes", "classes", "label"), [(1, 10, 10), (1, 10, 255), (2, 100, 100)])
def test_a_cifar_label_out_of_range_is_refused(label_bytes, classes, label):
    with pytest.raises(ValueError, match=f"^f has labels from {label} to {label}, wanted 0 to {classes - 1}$"):
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
    with pytest.raises(FileNotFoundError, match=f"has no cifar10: wanted .*{missing}"):
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


# ---- image folders, parquet, Hugging Face ----


def test_an_image_folder_in_memory(tmp_path):
    data = load(str(folder(tmp_path, ["train", "val"])), val_fraction=0.25)
    assert data.classes == ("cat", "dog") and data.augment == "crop-flip"
    assert data.train.images.shape == (30, 3, 32, 32) and data.train.images.dtype == torch.uint8
    assert len(data.val) == 10 and len(data.test) == 40  # val/ plays the test's role
    assert torch.equal(data.test.images[:20], torch.from_numpy(images(20, 3, 32, seed=10)))
    assert data.test.labels.tolist() == [0] * 20 + [1] * 20


def test_an_image_folder_with_all_three_splits_keeps_them(tmp_path):
    data = load(folder(tmp_path, ["train", "val", "test"]).name, tmp_path.parent)
    assert (len(data.train), len(data.val), len(data.test)) == (40, 40, 40)
    assert torch.equal(data.val.images[20:], torch.from_numpy(images(20, 3, 32, seed=11)))
    assert torch.equal(data.test.images[20:], torch.from_numpy(images(20, 3, 32, seed=21)))


def test_large_images_become_squares(tmp_path):
    data = load(str(folder(tmp_path, ["train", "val"], size=(70, 100), each=5)), val_fraction=0.2)
    assert data.image_size == 224 and data.augment == "imagenet"
    assert (data.train.images.shape, data.val.images.shape) == ((8, 3, 224, 224), (2, 3, 224, 224))
    files = [str(tmp_path / "val" / "cat" / "000.png")]
    shown = Encoded(files, channels=3, image_size=224, zoom=7 / 8).decode(0)
    assert torch.equal(data.test.images[0], shown)  # as ImageNet's protocol has it
    assert torch.equal(load(str(tmp_path), memory_budget=0).test.images.decode(0), shown)
    whole = Encoded([str(path) for path in tmp_path.glob("train/*/*")], channels=3, image_size=224).decode_all()
    assert all((whole == image).flatten(1).all(1).any() for image in data.train.images)
    assert load(str(tmp_path), image_size=24).test.images.shape == (10, 3, 24, 24)


def test_grey_files_have_one_channel(tmp_path):
    data = load(str(folder(tmp_path, ["train"], grey=True)))
    assert data.channels == 1 and data.augment == "crop" and len(data.test) == 8


def test_the_centre_is_shown():
    array = np.zeros((10, 30, 3), np.uint8)
    array[:, 10:20] = 255
    whole = Encoded([png(array)], channels=3, image_size=10)
    assert whole.decode(0).eq(255).all()
    zoomed = Encoded([png(array[:, 5:25])], channels=3, image_size=8, zoom=0.8)
    assert zoomed.decode(0).eq(255).all()
    assert whole.decode(0, lambda height, width: (0, 0, height, 10)).eq(0).all()


@bad_input
@pytest.mark.parametrize("keep", [10, 80, -300])
@pytest.mark.parametrize("number", ["000", "003"])
def test_a_truncated_image_is_named(tmp_path, number, keep):
    broken = folder(tmp_path, ["train"], each=5) / "train" / "cat" / f"{number}.png"
    broken.write_bytes(broken.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{number}.png is damaged or no image"):
        load(str(tmp_path))


@bad_input
@pytest.mark.parametrize(
    ("break_", "said"),
    [
        (lambda root: (root / "val" / "cow").mkdir(parents=True), "val/cow is a class that .*train has not"),
        (lambda root: (root / "val").mkdir(), "val holds no images, wanted"),
        (lambda root: (root / "test" / "cat").mkdir(parents=True), "test holds no images, wanted"),
        (lambda root: [path.unlink() for path in root.rglob("*.png")], "train holds no images, wanted"),
        (lambda root: [path.unlink() or path.parent.rmdir() for path in root.glob("train/dog/*")], "at least two"),
    ],
)
def test_an_impossible_folder_is_refused(tmp_path, break_, said):
    break_(folder(tmp_path, ["train"], each=1))
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path))


@bad_input
@pytest.mark.parametrize("number", ["000", "003"])
@pytest.mark.parametrize(("kind", "dtype"), [
    ("png", "uint16"), ("ppm", "uint16"), ("tiff", "uint16"), ("tiff", ">u2"), ("tiff", "int32"), ("tiff", "float32"),
])  # fmt: skip
def test_images_of_more_than_8_bits_are_refused(tmp_path, kind, dtype, number):
    image = pytest.importorskip("PIL.Image")
    wide = folder(tmp_path, ["train"], each=5, grey=True) / "train" / "cat" / f"{number}.png"
    image.fromarray(np.full((32, 32), 200, dtype)).save(wide, kind)
    with pytest.raises(ValueError, match=f"{number}.png has 16 or 32 bits a pixel, wanted 8"):
        load(str(tmp_path))


def test_parquet_files(tmp_path, hub):
    parquet(hub, tmp_path / "one" / "all.parquet")
    data = load(str(tmp_path / "one" / "all.parquet"))
    assert (len(data.train), len(data.val), len(data.test)) == (29, 3, 8)
    assert data.classes == ("0", "1", "2", "3") and data.train.images.shape[1:] == (3, 16, 16)
    assert ids(data.train) | ids(data.val) | ids(data.test) == set(range(40))
    assert torch.equal(data.train.images[:, 0, 0, 0] % 4, data.train.labels)

    for part in ("train", "validation", "test"):
        classes = hub.ClassLabel(names=["a", "b", "c", "d"])
        parquet(hub, tmp_path / "two" / f"{part}-00000-of-00001.parquet", label=classes)
    data = load("two", tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (40, 40, 40) and data.classes == ("a", "b", "c", "d")


def test_parquet_with_words_for_labels(tmp_path, hub):
    parquet(hub, tmp_path / "all.parquet", labels=["dog", "cat"] * 20)
    data = load(str(tmp_path / "all.parquet"))
    assert data.classes == ("cat", "dog") and torch.equal(data.train.images[:, 0, 0, 0] % 2, 1 - data.train.labels)


def test_hugging_face_by_id_and_by_name(tmp_path, hub, monkeypatch):
    train = parquet(hub, tmp_path / "x.parquet", labels=list(range(40)), column="fine_label")
    hidden = parquet(hub, tmp_path / "y.parquet", labels=[-1] * 40, column="fine_label")
    asked = []

    def load_dataset(name):
        asked.append(name)
        return hub.DatasetDict(train=train, validation=train.select(range(10)), test=hidden)

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    data = load("some/thing")
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 10)
    assert load("cifar100").mean == (0.5071, 0.4867, 0.4408)
    assert asked == ["some/thing", "uoft-cs/cifar100"]


@bad_input
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "some/thing"])
def test_no_hub_is_one_sentence(hub, monkeypatch, name):
    def load_dataset(name):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=f"^{name} .*Hugging Face: no network$"):
        load(name)


@bad_input
@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"picture": [1, 2], "label": [0, 1]}, "has the columns picture, label, wanted image and label"),
        ({"image": [b"", b""], "kind": [0, 1]}, "has the columns image, kind, wanted image and label"),
        ({"image": [b"", b""], "label": [0, None]}, "mixed or missing values in label"),
        ({"image": [b"", b""], "label": [0.5, 1.0]}, "mixed or missing values in label"),
        ({"image": [b"", b""], "label": [0, 1]}, "image 0 is empty"),
        ({"image": [b"abc", b""], "label": [0, 1]}, "image 0 is damaged or no image"),
    ],
)
def test_a_parquet_without_images_or_labels_is_refused(tmp_path, hub, table, said):
    hub.Dataset.from_dict(table).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path / "t.parquet"))


@bad_input
def test_a_label_that_training_never_saw_is_refused(tmp_path, hub):
    parquet(hub, tmp_path / "train.parquet", labels=["cat", "dog"] * 20)
    parquet(hub, tmp_path / "test.parquet", labels=["cat", "cow"] * 20)
    with pytest.raises(ValueError, match="has the label 'cow' in test, which is no class of it"):
        load(str(tmp_path))


@bad_input
def test_a_damaged_parquet_is_refused(tmp_path, hub):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="t.parquet cannot be read as parquet: "):
        load(str(tmp_path / "t.parquet"))


@bad_input
@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("sklearn.datasets", "digits", "train"), ("datasets", "cifar10", "data"), ("PIL", "FOLDER", "data")],
)
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, module, name, extra):
    root = folder(tmp_path, ["train"], each=1)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'eekd\[{extra}\]'"):
        load(str(root) if name == "FOLDER" else name)


# ---- names, arguments, splits ----


@bad_input
@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"name": "cifar-10"}, FileNotFoundError, "did you mean 'cifar10'"),
        ({"name": "fasion-mnist"}, FileNotFoundError, "did you mean 'fashion-mnist'"),
        ({"name": "imagenet"}, FileNotFoundError, "wanted glyphs, digits, fashion-mnist, cifar10, cifar100, a path or"),
        ({"name": "./no/where"}, FileNotFoundError, "there is no dataset"),
        ({"name": "/no"}, FileNotFoundError, "there is no dataset '/no'"),
        ({"name": ""}, TypeError, "name is ''"),
        ({"name": None}, TypeError, "name is None"),
        ({"root": "/no/where"}, FileNotFoundError, "root is /no/where, which does not exist"),
        ({"name": "fashion-mnist", "root": "."}, FileNotFoundError, "train-images-idx3-ubyte"),
        ({"name": "cifar10", "root": "."}, FileNotFoundError, "cifar-10-binary.tar.gz"),
        ({"name": "cifar10", "root": __file__}, ValueError, "is damaged or no tar archive"),
        ({"name": __file__}, ValueError, "is neither a folder with train/ in it nor parquet"),
        ({"name": "tests"}, ValueError, "is neither a folder with train/ in it nor parquet"),
        ({"val_fraction": -0.1}, ValueError, "val_fraction is -0.1"),
        ({"val_fraction": 1.0}, ValueError, "val_fraction is 1.0"),
        ({"val_fraction": float("nan")}, ValueError, "val_fraction is nan"),
        ({"val_fraction": "0.1"}, ValueError, "val_fraction is '0.1'"),
        ({"val_fraction": 0.9999}, ValueError, "leaves no image for training"),
        ({"seed": 0.5}, TypeError, "seed is 0.5, wanted an integer"),
        ({"train_limit": 0}, ValueError, "train_limit is 0, wanted at least 1"),
        ({"train_limit": 9}, ValueError, "train_limit is 9, wanted 10"),
        ({"train_limit": 10**6}, ValueError, "train_limit is 1000000, wanted 10 .* to 1294"),
        ({"train_limit": True}, TypeError, "train_limit is True"),
        ({"image_size": 0}, ValueError, "image_size is 0"),
        ({"image_size": 8.0}, TypeError, "image_size is 8.0"),
    ],
)
def test_an_impossible_load_is_refused(monkeypatch, arguments, error, said):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
    with pytest.raises(error, match=said) as caught:
        load(**({"name": "digits"} | arguments))
    assert "\n" not in str(caught.value)


def test_splits_do_not_overlap_and_follow_the_seed(tmp_path):
    root = fashion(tmp_path, n=200)
    a, b, c = (load("fashion-mnist", root, seed=seed, val_fraction=0.3) for seed in (0, 0, 1))
    assert not ids(a.train) & ids(a.val) and ids(a.train) | ids(a.val) == set(range(200))
    assert a.val.labels.bincount().tolist() == [6] * 10
    assert ids(a.val) == ids(b.val) != ids(c.val)
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_train_limit_is_stratified_and_leaves_the_rest_alone(tmp_path):
    root = fashion(tmp_path, n=200)
    whole, part = load("fashion-mnist", root), load("fashion-mnist", root, train_limit=50)
    assert part.train.labels.bincount().tolist() == [5] * 10 and ids(part.train) < ids(whole.train)
    assert ids(part.val) == ids(whole.val) and part.fingerprint != whole.fingerprint


def test_image_size_resizes_small_sets(tmp_path):
    small, large = load("digits"), load("digits", image_size=16)
    assert large.image_size == 16 and large.train.images.shape == (1294, 1, 16, 16)
    back = torch.nn.functional.avg_pool2d(large.train.images.float(), 2)
    assert (back - small.train.images).abs().mean() < 20


@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0, 1), st.integers(-(2**63), 2**63 - 1))
def test_stratified_takes_exactly_its_share(labels, fraction, seed):
    labels = torch.tensor(labels, dtype=torch.int64)
    count = int(fraction * len(labels))
    mask = stratified(labels, count, seed)
    assert mask.sum() == count
    share = labels.bincount(minlength=5) * count / max(len(labels), 1)
    assert ((labels[mask].bincount(minlength=5) - share).abs() < 1 + 1e-6).all()


def test_statistics_are_those_of_the_pixels():
    x = torch.from_numpy(images(50, 3, 7))
    mean, std = statistics(x)
    y = x.double() / 255
    assert mean == pytest.approx(y.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(y.std((0, 2, 3), correction=0).tolist())
    assert statistics(torch.zeros(4, 1, 2, 2, dtype=torch.uint8)) == ((0.0,), (1 / 255,))
    cells = [png(image.permute(1, 2, 0).numpy()) for image in x]
    assert statistics(Encoded(cells, channels=3, image_size=7)) == (mean, std)


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_the_fingerprint_notices_content_labels_and_order(tmp_path, budget):
    root = folder(tmp_path, ["train", "val"], each=6)
    first = load(str(root), memory_budget=budget)
    assert "fingerprint" not in vars(first)  # lazy
    assert first.fingerprint == load(str(root), memory_budget=budget).fingerprint
    assert first.fingerprint != load(str(root), memory_budget=budget, val_fraction=0.5).fingerprint
    (root / "train/cat/000.png").rename(root / "train/dog/006.png")
    moved = load(str(root), memory_budget=budget).fingerprint
    (root / "val/cat/000.png").write_bytes(png(np.zeros((32, 32, 3), np.uint8)))
    assert len({first.fingerprint, moved, load(str(root), memory_budget=budget).fingerprint}) == 3


def test_the_fingerprint_covers_every_part_of_every_split():
    data = load("digits")
    seen = {data.fingerprint}
    for name in ("train", "val", "test"):
        split = getattr(data, name)
        for change in ({"images": split.images.flip(0)}, {"labels": split.labels.flip(0)}, {"mean": (0.5,)}):
            seen.add(replace(data, **{name: replace(split, **change)}).fingerprint)
    assert len(seen) == 10


# ---- augmentation ----


def splitmix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(0, 6), st.integers(0, 2**40))
def test_random_bits_are_those_of_splitmix64(seed, view, stream, index):
    key = 0
    for part in (seed, view, stream):
        key = splitmix((key + part + 0x9E3779B97F4A7C15) % 2**64)
    want = splitmix((key + index * 0x9E3779B97F4A7C15) % 2**64)
    assert aug.random_bits(seed, view, stream, torch.tensor([index])).item() % 2**64 == want


def test_random_numbers_are_uniform_and_unrelated():
    index = torch.arange(90000)
    draws = torch.stack([aug.random_below(9, *key, index) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))])
    for row in draws:
        assert ((row.bincount(minlength=9) - 10000).abs() < 500).all()
    assert torch.corrcoef(draws.double()).fill_diagonal_(0).abs().max() < 0.02
    assert torch.corrcoef(torch.stack([draws[0, 1:], draws[0, :-1]]).double())[0, 1].abs() < 0.02


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 57, 57)])
def test_a_view_depends_on_nothing_but_its_numbers(kind, shape, device):
    x, index = torch.randint(0, 256, (40, *shape), dtype=torch.uint8), torch.randperm(1000)[:40]
    out = aug.augment(x.to(device), index.to(device), kind=kind, seed=3, view=5).cpu()
    assert out.shape == x.shape and out.dtype == torch.uint8
    assert torch.equal(out, aug.augment(x, index, kind=kind, seed=3, view=5))
    one_by_one = [aug.augment(a[None], i[None], kind=kind, seed=3, view=5) for a, i in zip(x, index, strict=True)]
    assert torch.equal(out, torch.cat(one_by_one))
    for seed, view in ((4, 5), (3, 6)):
        assert torch.equal(out, aug.augment(x, index, kind=kind, seed=seed, view=view)) == (kind == "none")


def test_pad_crop_is_a_window_of_the_padded_image(device):
    x = torch.randint(0, 256, (81, 2, 6, 7), dtype=torch.uint8, device=device)
    top, left = (v.flatten().to(device) for v in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    out = aug.pad_crop(x, top, left, 4)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for i in range(81):
        assert torch.equal(out[i], padded[i, :, top[i] : top[i] + 6, left[i] : left[i] + 7])


def test_half_the_images_are_mirrored_left_to_right(device):
    x = torch.from_numpy(images(200, 2, 8)).to(device)
    out = aug.random_flip(x, torch.arange(200, device=device), seed=0, view=0)
    kept, mirrored = ((out == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert (kept ^ mirrored).all() and 80 < kept.sum() < 120


def test_resized_crop_is_bilinear(device):
    x = torch.randint(0, 256, (64, 3, 40, 40), dtype=torch.uint8, device=device)
    boxes = aug.resized_crop_boxes(torch.arange(64, device=device), 40, 40, seed=0, view=0)
    boxes[0] = torch.tensor([0, 0, 40, 40])
    boxes[1] = torch.tensor([39, 39, 1, 1])
    out = aug.resized_crop(x, boxes)
    assert torch.equal(out[0], x[0]) and out[1].eq(x[1, :, 39:, 39:]).all()
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        part = x[i : i + 1, :, top : top + height, left : left + width].float()
        want = torch.nn.functional.interpolate(part, 40, mode="bilinear")[0]
        assert (out[i] - want).abs().max() < 2


@pytest.mark.parametrize(("height", "width"), [(224, 224), (100, 300), (301, 77), (1, 1), (1, 50)])
def test_resized_crop_boxes_fit(height, width):
    top, left, h, w = aug.resized_crop_boxes(torch.arange(5000), height, width, seed=0, view=0).unbind(1)
    assert top.min() >= 0 and left.min() >= 0 and h.min() >= 1 and w.min() >= 1
    assert (top + h).max() <= height and (left + w).max() <= width
    if height == width == 224:
        area, ratio = (h * w).double() / 224**2, w.double() / h
        assert 0.07 < area.min() < 0.09 and area.max() > 0.95 and area.mean() == pytest.approx(0.48, abs=0.01)
        assert ratio.min() > 0.73 and ratio.max() < 1.36 and ratio.log().mean().abs() < 0.01


# ---- loader ----


def split_of(n=100, channels=3, size=16):
    x = torch.from_numpy(images(n, channels, size))
    return Split(x, torch.arange(n) % 10, *statistics(x))


@pytest.fixture
def encoded(tmp_path):
    """The same images in memory and as files."""
    pytest.importorskip("PIL")
    stored = split_of(20)
    for i, image in enumerate(stored.images):
        (tmp_path / f"{i:02}.png").write_bytes(png(image.permute(1, 2, 0).numpy()))
    files = Encoded([str(path) for path in sorted(tmp_path.iterdir())], channels=3, image_size=16)
    return stored, Split(files, stored.labels, stored.mean, stored.std)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_a_batch_is_normalised_and_indexed(device):
    split = split_of()
    batches = list(Loader(split, batch_size=32, device=device))
    assert [len(b.labels) for b in batches] == [32, 32, 32, 4]
    index = torch.cat([b.index for b in batches]).cpu()
    assert sorted(index.tolist()) == list(range(100)) and index.tolist() != list(range(100))
    assert all(b.images.device.type == b.labels.device.type == b.index.device.type == device for b in batches)
    x = torch.cat([b.images for b in batches]).cpu()
    assert x.dtype == torch.float32 and x.mean().abs() < 1e-5 and x.std() == pytest.approx(1, abs=1e-3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (split.mean, split.std))
    torch.testing.assert_close(x, (split.images[index] / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat([b.labels for b in batches]).cpu(), split.labels[index])


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_an_epoch_can_be_replayed_on_any_device(kind, device):
    loader, again = (Loader(split_of(), batch_size=32, augment=kind, seed=1, device=d) for d in (device, "cpu"))
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append([[x.cpu() for x in batch] for batch in loader])
    for epoch in (2, 0, 1):
        again.set_epoch(epoch)
        assert same(epochs[epoch], list(again))
    assert not same(epochs[0], epochs[1])


@pytest.mark.parametrize("kind", ["crop", "crop-flip", "imagenet"])
def test_a_view_can_be_replayed_in_another_order(kind):
    loader = Loader(split_of(), batch_size=100, augment=kind)
    loader.set_epoch(7)
    (first,) = loader
    loader.set_epoch(8, view=7)
    (second,) = loader
    assert not torch.equal(first.index, second.index)
    assert torch.equal(first.images[first.index.argsort()], second.images[second.index.argsort()])


def test_views_take_turns_under_a_seed_of_their_own():
    loader = Loader(split_of(), batch_size=100, augment="crop", seed=1, views=3, view_seed=2)
    (other,) = Loader(split_of(), batch_size=100, augment="crop", seed=2).replay([(1, torch.arange(100))])
    loader.set_epoch(4)
    (batch,) = loader
    order = Loader(split_of(), batch_size=100, seed=1)
    order.set_epoch(4)
    assert torch.equal(batch.index, order.indices()[0])
    assert torch.equal(batch.images, other.images[batch.index])


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_several_views_are_replayed_in_the_order_asked_for(encoded, workers):
    work = [(2, torch.tensor([5, 1])), (0, torch.tensor([1])), (2, torch.tensor([1, 5, 0]))]
    for split in encoded:
        loader = Loader(split, batch_size=8, augment="imagenet", workers=workers)
        first, second, third = loader.replay(work)
        assert [batch.index.tolist() for batch in (first, second, third)] == [index.tolist() for _, index in work]
        assert torch.equal(first.images, third.images[[1, 0]]) and torch.equal(first.labels, split.labels[[5, 1]])
        assert not torch.equal(second.images[0], first.images[1])


def test_iterating_draws_no_global_random_numbers(encoded):
    state = torch.get_rng_state()
    for split in encoded:
        list(Loader(split, batch_size=8, augment="imagenet"))
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_keeps_order_and_images():
    loader = Loader(split_of(), batch_size=30, augment="imagenet", train=False)
    loader.set_epoch(3)
    assert torch.equal(torch.cat([b.index for b in loader]), torch.arange(100))
    assert same(list(loader), list(Loader(split_of(), batch_size=30, train=False)))


def test_drop_last():
    assert len(Loader(split_of(), batch_size=30)) == 4
    loader = Loader(split_of(), batch_size=30, drop_last=True)
    assert len(loader) == 3 and [len(b.index) for b in loader] == [30, 30, 30]
    assert list(Loader(split_of(0), batch_size=4, train=False)) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_batches_of_one_loader(world_size, drop_last):
    ranks = [
        Loader(split_of(), batch_size=5, drop_last=drop_last, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    whole = Loader(split_of(), batch_size=5 * world_size, drop_last=drop_last)
    for loader in (*ranks, whole):
        loader.set_epoch(4)
    assert all(len(list(loader)) == len(loader) for loader in (*ranks, whole))
    seen = [torch.cat([b.index for b in step]) for step in zip(*ranks, strict=True)]
    for k, (together, batch) in enumerate(zip(seen, whole, strict=False)):
        assert sorted(together.tolist()) == sorted(batch.index.tolist())
        assert len(together) == whole.rows(k) == ranks[0].rows(k)
    left_out = 100 - sum(map(len, seen))
    assert left_out < (5 * world_size if drop_last else world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_ranks_share_an_evaluation(world_size):
    shards = [Loader(split_of(), batch_size=5, train=False, rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(i for loader in shards for b in loader for i in b.index.tolist()) == list(range(100))
    assert len({len(list(loader)) for loader in shards}) == 1, "a network in shards runs everywhere or nowhere"
    assert all(len(list(loader)) == len(loader) for loader in shards)


@pytest.mark.parametrize("kind", ["none", "crop-flip"])
def test_decoded_batches_are_those_of_memory(encoded, kind, device):
    loaders = [Loader(split, batch_size=8, augment=kind, device=device) for split in encoded]
    for epoch in (0, 1):
        for loader in loaders:
            loader.set_epoch(epoch)
        assert same(*map(list, loaders))


def test_files_are_cropped_from_what_they_hold(encoded, device):
    loader = Loader(encoded[1], batch_size=20, augment="imagenet", seed=2, device=device)
    loader.set_epoch(3, view=1)
    (batch,) = loader
    index = batch.index.cpu()
    boxes = aug.resized_crop_boxes(index, 16, 16, seed=2, view=1).tolist()
    pairs = zip(index, boxes, strict=True)
    cut = [encoded[1].images.decode(i, lambda height, width, box=box: box) for i, box in pairs]
    want = aug.random_flip(torch.stack(cut), index, seed=2, view=1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoded[1].mean, encoded[1].std))
    torch.testing.assert_close(batch.images.cpu(), (want / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_workers_change_nothing(encoded):
    none, two = (Loader(encoded[1], batch_size=8, augment="imagenet", workers=w) for w in (0, 2))
    for epoch, view in ((0, None), (5, None), (6, 0)):
        for loader in (none, two):
            loader.set_epoch(epoch, view)
        assert same(list(none), list(two))


@bad_input
def test_a_broken_image_is_named_by_a_worker(encoded):
    path = encoded[1].images.items[7]
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(ValueError, match="07.png is damaged or no image"):
        list(Loader(encoded[1], batch_size=8, workers=1))


@bad_input
@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0, wanted at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size is 2.5, wanted an integer"),
        ({"batch_size": None}, TypeError, "batch_size is None"),
        ({"augment": "flip"}, ValueError, "augment is 'flip', wanted one of none, crop, crop-flip, imagenet"),
        ({"augment": None}, ValueError, "augment is None"),
        ({"seed": "x"}, TypeError, "seed is 'x'"),
        ({"workers": -1}, ValueError, "workers is -1"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank is 2, wanted less than world_size, which is 2"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"world_size": 0}, ValueError, "world_size is 0"),
        ({"batch_size": 101, "drop_last": True}, ValueError, "100 samples make no batch of 101"),
        ({"world_size": 101}, ValueError, "100 samples make no batch of 10 on 101 ranks"),
        ({"split": split_of(0)}, ValueError, "0 samples make no batch"),
        ({"split": torch.zeros(3)}, TypeError, "split is a Tensor, wanted a Split"),
    ],
)
def test_an_impossible_loader_is_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        Loader(**({"split": split_of(), "batch_size": 10} | arguments))


@bad_input
@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (0.5, TypeError), (None, TypeError)])
def test_an_impossible_epoch_is_refused(epoch, error):
    with pytest.raises(error, match=f"epoch is {epoch}"):
        Loader(split_of(), batch_size=10).set_epoch(epoch)
