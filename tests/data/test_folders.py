"""Folders of images, as people have them: understood, or refused in one sentence."""

import shutil

import numpy as np
import pytest
import torch
from samples import folder, images, png

from eekd.data import Encoded, Loader, load

bad_input = pytest.mark.bad_input


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
    whole = Encoded([str(path) for path in tmp_path.glob("train/*/*")], channels=3, image_size=224).decode_all(
        torch.arange(10)
    )
    assert all((whole == image).flatten(1).all(1).any() for image in data.train.images)
    assert load(str(tmp_path), image_size=24).test.images.shape == (10, 3, 24, 24)


def test_random_crops_are_cut_from_the_files(tmp_path):
    """The squares in memory hold fewer pixels."""
    root = str(folder(tmp_path, ["train", "val"], size=(90, 120), each=5))
    memory, files = (load(root, image_size=70, memory_budget=budget) for budget in (1 << 30, 0))
    assert isinstance(memory.train.images, torch.Tensor) and isinstance(files.train.images, Encoded)
    for kind in ("imagenet", "none"):
        views = [next(iter(Loader(data.train, batch_size=8, augment=kind))) for data in (memory, files)]
        assert torch.equal(views[0].images, views[1].images), kind
    assert Loader(memory.train, batch_size=8, augment="none").encoded is None  # what is in memory is used
    assert memory.val.files is None and memory.test.files is None


def test_crops_of_squares_of_the_right_size_are_cut_in_memory(tmp_path):
    data = load(str(folder(tmp_path, ["train", "val"], size=(70, 70), each=5)), image_size=70)
    assert data.augment == "imagenet" and Loader(data.train, batch_size=8, augment="imagenet").encoded is None


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
        (lambda root: shutil.copytree(root / "train/cat", root / "val/cow"), "val/cow is a class that train has not"),
        (lambda root: shutil.copytree(root / "train/cat", root / "val/Cat"), "train has not; did you mean 'cat'"),
        (lambda root: (root / "val").mkdir(), "val must hold images as .*, got "),
        (lambda root: (root / "test" / "cat").mkdir(parents=True), "test must hold images as .*, got "),
        (lambda root: [path.unlink() for path in root.rglob("*.png")], "train must hold images as .*, got "),
        (lambda root: [path.unlink() or path.parent.rmdir() for path in root.glob("train/dog/*")], "at least two"),
    ],
)
def test_an_impossible_folder_is_refused(tmp_path, break_, said):
    break_(folder(tmp_path, ["train"], each=1))
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path))
