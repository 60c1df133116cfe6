"""Parquet and the data sets of the hub: columns and splits are found, or the way to name them is said."""

import sys

import pytest
import torch
from samples import folder, ids, parquet

from eekd.data import load

bad_input = pytest.mark.bad_input


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
    with pytest.raises(FileNotFoundError, match=f"^{name} .*Hugging Face: no network and a long story$"):
        load(name)


@bad_input
@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"picture": [1, 2], "label": [0, 1]}, "must have the columns image and label, got picture, label"),
        ({"image": [b"", b""], "kind": [0, 1], "age": [0, 1]}, "got image, kind, age: --label-column names"),
        ({"image": [b"", b""], "label": [0, None]}, "in label, one class an image, got "),
        ({"image": [b"", b""], "label": [0.5, 1.0]}, "in label, one class an image, got "),
        ({"image": [b"", b""], "label": [0, 1]}, "image 0 must be bytes or the path of a file, got nothing"),
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
