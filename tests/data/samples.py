"""Small data sets of every kind: archives, folders of images, tables."""

import gzip
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest


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
