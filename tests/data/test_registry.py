"""A data set of one's own: registered in Python, or a function in a file that the command line names."""

import pytest
import torch
from samples import images, png

from eekd.data import Found, load, names, register
from eekd.data.registry import DATASETS

bad_input = pytest.mark.bad_input

OWN = """
import torch
from eekd.data import Found

def mine(reading):
    x = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 8, 8).clone()
    return Found({"train": (x, [k % 2 for k in range(40)])}, ("even", "odd"))

def files(reading):
    return Found({"train": (sorted(map(str, reading.root.glob("*.png"))), [0, 1] * 10)}, ["a", "b"], "none")

def none(reading):
    return {}
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


@pytest.fixture
def registry():
    before = dict(DATASETS)
    yield
    DATASETS.clear()
    DATASETS.update(before)


def test_a_function_in_a_file_is_a_data_set(tmp_path, own):
    data = load(f"{own}:mine")
    assert data.classes == ("even", "odd") and data.augment == "crop"
    assert torch.equal(data.train.images[:, 0, 0, 0] % 2, data.train.labels)
    for k, x in enumerate(images(20, 3, 16).transpose(0, 2, 3, 1)):
        (tmp_path / f"{k:02}.png").write_bytes(png(x))
    data = load(f"{own}:files", tmp_path, classes=["b", "a"])
    assert data.channels == 3 and data.augment == "none" and data.classes == ("b", "a")
    assert torch.equal(data.train.images[:, 0, 0, 0] % 2, 1 - data.train.labels)


def test_a_registered_name_is_a_data_set(registry):
    @register("checkers")
    def checkers(reading):
        x = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
        return Found({"train": (x, torch.arange(40) % 4), "test": (x[:8], torch.arange(8) % 4)}, "abcd")

    data = load("checkers")
    assert "checkers" in names() and data.augment == "crop-flip" and len(data.test) == 8


@bad_input
@pytest.mark.parametrize("name", ["digits", "", "a/b", "a:b"])
def test_a_name_that_cannot_be_registered(name):
    with pytest.raises(ValueError, match="name must be new and without / and :"):
        register(name)


X = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)


@bad_input
@pytest.mark.parametrize(
    ("found", "error", "said"),
    [
        ({}, TypeError, "return an eekd.data.Found, got a dict"),
        (Found({"test": (X, [0] * 4)}, "ab"), ValueError, "have the parts train, and perhaps val and test"),
        (Found({"train": (X, [0] * 4), "dev": (X, [0] * 4)}, "ab"), ValueError, "got train, dev"),
        (Found({"train": (X, [0] * 3)}, "ab"), ValueError, "a whole number for each image of train, got 4 images"),
        (Found({"train": (X, [0.5] * 4)}, "ab"), ValueError, "a whole number for each image"),
        (Found({"train": (X[:0], [])}, "ab"), ValueError, "a whole number for each image"),
        (Found({"train": (X, [0, 1, 2, 0])}, "ab"), ValueError, "labels from 0 to 1 in train, got 0 to 2"),
        (
            Found({"train": (X.float(), [0] * 4)}, "ab"),
            ValueError,
            "images .N, C, S, S. uint8 in train, got .4, 1, 8, 8",
        ),
        (Found({"train": (X[..., 1:], [0] * 4)}, "ab"), ValueError, "got .4, 1, 8, 7. torch.uint8"),
        (Found({"train": (X, [0] * 4), "test": (X[..., 1:, 1:], [0] * 4)}, "ab"), ValueError, "images of one shape"),
        (
            Found({"train": (X, [0] * 4), "test": ([b""], [0])}, "ab"),
            TypeError,
            "in all parts or in none, got them in train",
        ),
    ],
)
def test_what_a_reader_must_find(registry, found, error, said):
    register("mine")(lambda reading: found)
    with pytest.raises(error, match=f"^mine must .*{said}"):
        load("mine")


@bad_input
def test_a_file_without_the_function(own):
    with pytest.raises(AttributeError, match="must define 'other', a function of a Reading that returns a Found"):
        load(f"{own}:other")
    with pytest.raises(TypeError, match="must return an eekd.data.Found, got a dict"):
        load(f"{own}:none")
    with pytest.raises(FileNotFoundError, match="names a file that does not exist"):
        load("/no/where.py:mine")
