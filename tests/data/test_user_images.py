"""Images as people have them: turned, transparent, of 16 bits, grey among coloured ones, or damaged."""

import hashlib
import io
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from samples import folder, images, png

from eekd.data import Encoded, Loader, load
from eekd.data.encoded import BadImages, Look, decide
from eekd.data.images import decode_image

Image = pytest.importorskip("PIL.Image")
bad_input = pytest.mark.bad_input

# Red, green over blue, white.
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)


def saved(image, kind, **settings):
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def shown(data, mode="RGB"):
    return np.array(decode_image(data, "x", mode))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(kind, orientation):
    """Stored as Exif 2.3 says for each orientation, the corners come back where they were."""
    up = np.kron(CORNERS, np.ones((8, 12, 1), np.uint8))
    stored = {
        1: up, 2: up[:, ::-1], 3: up[::-1, ::-1], 4: up[::-1], 5: up.transpose(1, 0, 2),
        6: up.transpose(1, 0, 2)[::-1], 7: up.transpose(1, 0, 2)[::-1, ::-1], 8: up.transpose(1, 0, 2)[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **settings)
    found = shown(data)
    assert found.shape == up.shape and np.abs(found.astype(int) - up).max() < 40


@pytest.mark.parametrize("wide", [False, True])
def test_a_turned_image_that_is_transparent_or_of_16_bits_stands_upright_too(wide):
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = np.zeros((4, 4), np.uint16) if wide else np.zeros((4, 4, 4), np.uint8)
    stored[3, 3] = 65535 if wide else (9, 9, 9, 255)
    found = shown(saved(Image.fromarray(stored), "PNG", exif=exif), "L")
    assert found[0, 0] == (255 if wide else 9) and (found == found[0, 0]).sum() == 1


@bad_input
def test_damaged_exif_data_leave_the_image_as_it_is():
    data = saved(Image.fromarray(CORNERS), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(shown(data), CORNERS)


def transparent(mode):
    """Hidden red beside black that is seen."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "RGB":
        image = image.convert("RGB")
        image.info["transparency"] = (255, 0, 0)
        return image
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = b"\0\xff"
        return image
    return image.convert(mode) if mode != "L" else image.convert("LA")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_laid_on_white(mode):
    image = transparent(mode)
    transparency = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    files = [saved(image, "PNG", **transparency), *([saved(image, "WEBP", lossless=True)] if mode == "RGBA" else [])]
    assert all(shown(file).tolist() == [[[255] * 3, [0] * 3]] for file in files)


def test_half_transparent_pixels_are_mixed_with_white():
    assert shown(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))[0, 0].tolist() == [127] * 3


def test_an_opaque_alpha_channel_changes_nothing():
    x = images(1, 3, 16)[0].transpose(1, 2, 0)
    opaque = np.concatenate([x, np.full((16, 16, 1), 255, np.uint8)], 2)
    assert np.array_equal(shown(saved(Image.fromarray(opaque), "PNG")), x)


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "uint16"), ("PPM", "uint16"), ("TIFF", "uint16"), ("TIFF", ">u2")])
def test_16_bits_become_8(kind, dtype):
    x = np.array([[0, 128, 129, 257], [32768, 65535, 65534, 65406]])
    found = shown(saved(Image.fromarray(x.astype(dtype)), kind), "L")
    assert found.tolist() == [[0, 0, 1, 1], [128, 255, 255, 254]]


@bad_input
@pytest.mark.parametrize("dtype", ["int32", "float32"])
@pytest.mark.parametrize("number", ["000", "003"])
def test_images_of_32_bits_are_refused(tmp_path, dtype, number):
    wide = folder(tmp_path, ["train"], each=5, grey=True) / "train" / "cat" / f"{number}.png"
    Image.fromarray(np.full((32, 32), 200, dtype)).save(wide, "tiff")
    with pytest.raises(ValueError, match=f"{number}.png must have 8 or 16 bits a pixel, got 32"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("P", "BMP"), ("1", "PNG"), ("L", "BMP"), ("YCbCr", "JPEG")],
)
def test_other_modes_are_read_in_colour(mode, kind):
    x = Image.fromarray(np.kron(CORNERS, np.ones((16, 16, 1), np.uint8)))
    found = shown(saved(x.convert(mode), kind))
    want = np.array(x.convert("L" if mode in "1L" else "RGB").convert("RGB"))
    assert np.abs(found.astype(int) - want).mean() < (80 if mode == "1" else 12)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_read_and_the_look_says_so(tmp_path, kind):
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    animated = saved(red, kind, save_all=True, append_images=[blue])
    assert np.abs(shown(animated)[0, 0].astype(int) - (255, 0, 0)).max() < 8
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for k in range(5):
            (tmp_path / name / f"{k}.gif").write_bytes(animated)
    assert any("10 of 10 images looked at are animated" in said for said in load(str(tmp_path)).decisions)


@pytest.mark.parametrize("ending", ["JPEG", "jpe", "jfif", "gif", "bmp", "tif", "webp", "PPM", "pgm", "apng"])
def test_endings_are_read_whatever_their_case(tmp_path, ending):
    kind = {"jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF", "pgm": "PPM", "apng": "PNG"}.get(ending, ending.upper())
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for k in range(5):
            (tmp_path / name / f"{k}.{ending}").write_bytes(saved(Image.new("L", (16, 16)), kind))
    assert len(load(str(tmp_path)).classes) == 2


# ---- channels and size ----


def mixed(root, grey, size=16):
    """Twenty images of two classes, the first `grey` of each in grey."""
    for name in ("cat", "dog"):
        (root / "train" / name).mkdir(parents=True)
        for k, x in enumerate(images(10, 3, size).transpose(0, 2, 3, 1)):
            (root / "train" / name / f"{k}.png").write_bytes(png(x[..., 0] if k < grey else x))
    return str(root)


@pytest.mark.parametrize(("grey", "channels"), [(0, 3), (1, 3), (9, 3), (10, 1)])
def test_one_grey_image_makes_no_grey_data_set(tmp_path, grey, channels):
    data = load(mixed(tmp_path, grey))
    assert data.channels == channels and data.train.images.shape[1] == channels
    said = next(said for said in data.decisions if said.startswith(f"{channels} channel"))
    assert said.count("20 images looked at") == 1 and (f"and {2 * grey} grey" in said) == (0 < grey < 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_can_be_set(tmp_path, channels):
    data = load(mixed(tmp_path, 5), channels=channels)
    assert data.channels == channels and any("as asked for" in said for said in data.decisions)


@pytest.mark.parametrize(
    ("sizes", "size"),
    [
        ({(32, 32): 10}, 32),
        ({(64, 64): 10}, 64),
        ({(65, 65): 10}, 224),
        ({(96, 96): 10}, 224),
        ({(64, 48): 10}, 224),
        ({(32, 32): 6, (500, 300): 4}, 32),
        ({(32, 32): 5, (500, 300): 5}, 224),
        ({(32, 32): 1, (500, 300): 9}, 224),
        ({(20, 20): 4, (24, 24): 3, (30, 30): 3}, 224),
    ],
)
def test_the_size_is_that_of_most_images(sizes, size):
    _, chosen, said = decide(Look(Counter(sizes)), None, None)
    assert chosen == size and said[1].startswith(f"Size {size} x {size}: ")
    assert ("--image-size sets another" in said[1]) == (size == 224)
    assert decide(Look(Counter(sizes)), 48, None)[1] == 48


def test_decisions_name_what_was_decided(tmp_path):
    said = " ".join(load(str(folder(tmp_path, ["train", "val"], size=(70, 100), each=5)), val_fraction=0.2).decisions)
    for part in ("train/ is the training data", "The val split is the test split",
                 "20% of the training images are held out", "3 channels: 10 of 10",
                 "Size 224 x 224: the images looked at are 100 x 70", "2 classes"):  # fmt: skip
        assert part in said


# ---- images that cannot be read ----


@pytest.fixture
def damaged(tmp_path):
    """Forty images, of which two of a class are damaged: one cut off, one empty."""
    root = folder(tmp_path, ["train", "val"], each=10, size=(16, 16))
    (root / "train/cat/003.png").write_bytes((root / "train/cat/003.png").read_bytes()[:80])
    (root / "train/cat/007.png").write_bytes(b"")
    return root


@bad_input
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_a_bad_image_stops_the_reading(damaged, budget):
    with pytest.raises(ValueError, match="00[37].png is damaged or no image"):
        list(Loader(load(str(damaged), memory_budget=budget, val_fraction=0).train, batch_size=9))


@bad_input
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_can_be_skipped_for_others_of_their_class(damaged, workers):
    def epoch(memory_budget, augment):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = load(str(damaged), bad_images="skip", memory_budget=memory_budget, val_fraction=0)
            batches = list(Loader(data.train, batch_size=9, augment=augment, workers=workers, seed=3))
            list(Loader(data.train, batch_size=9, augment=augment, workers=workers))
        said = sorted(str(warning.message) for warning in caught)
        assert len(said) == 2 and "003.png is damaged or no image" in said[0] and "007.png" in said[1]
        assert all("another image of its class stands in for it" in sentence for sentence in said)
        return data, batches

    (one, first), (two, second) = epoch(1 << 30, "crop"), epoch(0, "crop")
    assert one.train.images.shape == two.train.images.shape == (20, 3, 16, 16)
    mean = torch.tensor(one.mean).view(3, 1, 1) - torch.tensor(two.mean).view(3, 1, 1)
    assert mean.abs().max() < 0.02
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
    whole = one.train.images
    assert torch.equal(whole[3], whole[4]) and torch.equal(whole[7], whole[8])
    epoch(0, "imagenet")


@bad_input
def test_more_bad_images_than_the_budget_stop_the_run(damaged):
    with pytest.raises(
        ValueError, match=r"more than 1 images \(bad_image_budget\) cannot be read; the last: .*007.png"
    ):
        load(str(damaged), bad_images="skip", bad_image_budget=1)
    with pytest.raises(ValueError, match="more than 0 images .*003.png"):
        data = load(str(damaged), bad_images="skip", bad_image_budget=0, memory_budget=0, val_fraction=0)
        list(Loader(data.train, batch_size=20))


@bad_input
def test_a_class_without_a_readable_image_is_an_error():
    cells = Encoded([b"", b"", png(CORNERS)], channels=3, image_size=2, bad=BadImages(True))
    labels = torch.tensor([0, 0, 1])
    assert cells.decode_or_stand_in(2, labels)[1] == []
    with pytest.raises(ValueError, match="no image can stand in for others of its class: image 0 must be"):
        cells.decode_or_stand_in(0, labels)


@bad_input
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404", "a page of HTML"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"%PDF-1.4", "PDF"),
        (b"no image", "UnidentifiedImageError"),
    ],
)
def test_what_only_looks_like_an_image_is_told(data, said):
    with pytest.raises(ValueError, match=f"x is damaged or no image .*{said}") as caught:
        shown(data)
    assert "\n" not in str(caught.value)


@bad_input
def test_an_image_of_too_many_pixels_is_told(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="x is damaged or no image .*more pixels than Pillow reads"):
        shown(png(np.zeros((15, 15), np.uint8)))


@pytest.mark.parametrize("turned", [False, True])
def test_the_fingerprint_is_another_where_images_were_read_otherwise_before(tmp_path, turned):
    """A run on photographs that were shown sideways must not go on, and all others must."""
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for k, x in enumerate(images(8, 3, 16).transpose(0, 2, 3, 1)):
            (tmp_path / name / f"{k}.jpg").write_bytes(saved(Image.fromarray(x), "JPEG", exif=exif))
    data = load(str(tmp_path), memory_budget=0)
    digest = hashlib.sha256()
    for split in (data.train, data.val, data.test):
        digest.update(str((*split.images.shape, split.mean, split.std)).encode())
        digest.update(split.labels.numpy())
        for i in range(len(split)):
            digest.update(hashlib.sha256(split.images.read(i)[0]).digest())
    assert (data.fingerprint != digest.hexdigest()) == turned
