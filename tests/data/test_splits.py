"""Names, arguments, splits, and what a fingerprint covers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import fashion, folder, ids, images, png

from eekd.data import Encoded, load
from eekd.data.dataset import statistics, stratified

bad_input = pytest.mark.bad_input


@bad_input
@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"name": "cifar-10"}, FileNotFoundError, "did you mean 'cifar10'"),
        ({"name": "fasion-mnist"}, FileNotFoundError, "did you mean 'fashion-mnist'"),
        (
            {"name": "imagenet"},
            FileNotFoundError,
            "it must be glyphs, digits, fashion-mnist, cifar10, cifar100, a path",
        ),
        ({"name": "./no/where"}, FileNotFoundError, "there is no dataset"),
        ({"name": "/no"}, FileNotFoundError, "there is no dataset '/no'"),
        ({"name": ""}, TypeError, "name must be .* got ''"),
        ({"name": None}, TypeError, "name must be .* got None"),
        ({"root": "/no/where"}, FileNotFoundError, "root must be a folder, got /no/where, which does not exist"),
        ({"name": "fashion-mnist", "root": "."}, FileNotFoundError, "train-images-idx3-ubyte"),
        ({"name": "cifar10", "root": "."}, FileNotFoundError, "cifar-10-binary.tar.gz"),
        ({"name": "cifar10", "root": __file__}, ValueError, "is damaged or no tar archive"),
        ({"name": __file__}, ValueError, "must be CLASS/.*, got a file .py"),
        ({"name": "tests"}, ValueError, "tests must hold images as tests/CLASS/.*, got "),
        ({"channels": 2}, ValueError, "channels must be 1 or 3, got 2"),
        ({"channels": 3}, ValueError, "channels must be 1, which these images have, got 3"),
        ({"bad_images": "drop"}, ValueError, "bad_images must be stop or skip, got 'drop'"),
        ({"bad_image_budget": -1}, ValueError, "bad_image_budget must be at least 0, got -1"),
        ({"split": "a,a"}, ValueError, "split must be TRAIN, TRAIN,TEST or TRAIN,VAL,TEST, each another, got 'a,a'"),
        ({"split": "a"}, ValueError, "split must not be given for digits, got .'a',"),
        ({"label_column": "x"}, ValueError, "label_column must not be given for digits, got 'x'"),
        ({"streaming": True}, ValueError, "train_limit must be the number of training images"),
        ({"streaming": True, "train_limit": 50}, ValueError, "streaming must not be given for digits"),
        ({"classes": "/no/where"}, FileNotFoundError, "/no/where"),
        ({"classes": []}, ValueError, "classes must be a list of class names"),
        ({"classes": ["a", "a"]}, ValueError, "classes must name each class once, got 'a' twice"),
        ({"classes": ["a", "b"]}, ValueError, "classes must name all classes of the data, got none of 10 classes .0,"),
        ({"val_fraction": -0.1}, ValueError, "val_fraction must be .*, got -0.1"),
        ({"val_fraction": 1.0}, ValueError, "val_fraction must be .*, got 1.0"),
        ({"val_fraction": float("nan")}, ValueError, "val_fraction must be .*, got nan"),
        ({"val_fraction": "0.1"}, ValueError, "val_fraction must be .*, got '0.1'"),
        ({"val_fraction": 0.9999}, ValueError, "val_fraction must leave an image for training, got 0.9999"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"train_limit": 0}, ValueError, "train_limit must be at least 1, got 0"),
        ({"train_limit": 9}, ValueError, "train_limit must be from 10 .*, got 9"),
        ({"train_limit": 10**6}, ValueError, "train_limit must be from 10 .* to 1294, got 1000000"),
        ({"train_limit": True}, TypeError, "train_limit must be .*, got True"),
        ({"image_size": 0}, ValueError, "image_size must be .*, got 0"),
        ({"image_size": 8.0}, TypeError, "image_size must be .*, got 8.0"),
    ],
)
def test_an_impossible_load_is_refused(monkeypatch, arguments, error, said):
    monkeypatch.chdir(Path(__file__).parents[2])
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
