"""Folders as people have them: what was meant is read, what is left out is named, what cannot be meant is refused."""

import json
import os
import warnings

import numpy as np
import pytest
from samples import png

from eekd.data import load

bad_input = pytest.mark.bad_input


def put(root, *paths, size=8):
    """An image at each path; no two are alike."""
    for k, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((size, size, 3), k % 251, np.uint8)
        pixels[0, 0] = len(path), k // 251, 7
        (root / path).write_bytes(png(pixels))
    return root


def several(*folders, each=10, ending="png"):
    return [f"{folder}/{k:03}.{ending}" for folder in folders for k in range(each)]


def read(source, **settings):
    """The data, and the one warning or None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load(str(source), **settings)
    assert len(caught) <= 1, [str(warning.message) for warning in caught]
    return data, str(caught[0].message) if caught else None


def sizes(data):
    return len(data.train), len(data.val), len(data.test)


def test_class_folders_without_splits(tmp_path):
    data, warning = read(put(tmp_path, *several("dog", "cat")))
    assert data.classes == ("cat", "dog") and sizes(data) == (14, 2, 4) and warning is None
    assert any("20% of the images are the test split" in said for said in data.decisions)


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training", "Testing"), ("train", "Test"), ("TRAIN", "TEST"), ("train", "valid"), ("train", "validation"),
     ("seg_train/seg_train", "seg_test/seg_test"), ("training_set/training_set", "test_set/test_set"),
     ("train_images", "test_images"), ("trainset", "testset"), ("train2017", "val2017"), ("train/images", "val/images"),
     ("letters_train/letters_train", "letters_test/letters_test"), ("xray-train", "xray-val"),
     ("data/train", "data/test"), ("archive/data/train", "archive/data/test"), ("Train", "dev"), ("train", "eval")],
)  # fmt: skip
def test_splits_by_the_names_people_give_them(tmp_path, train, test):
    put(tmp_path, *several(f"{train}/cat", f"{train}/dog"), *several(f"{test}/cat", f"{test}/dog", each=3))
    data, warning = read(tmp_path)
    assert data.classes == ("cat", "dog") and sizes(data) == (18, 2, 6) and warning is None


def test_three_splits_by_other_names(tmp_path):
    put(tmp_path, *several(*(f"{part}/{name}" for part in ("Training", "Valid", "Testing") for name in "ab")))
    assert sizes(read(tmp_path)[0]) == (20, 20, 20)


def test_the_flat_test_of_imagenet_is_no_test(tmp_path):
    put(tmp_path, *several("train/cat", "train/dog", "val/cat", "val/dog"), *several("test", each=5, ending="JPEG"))
    data, warning = read(tmp_path)
    assert sizes(data) == (18, 2, 20) and "test/, whose images have no labels" in warning


@pytest.mark.parametrize("inner", ["images", "unknown", "test"])
def test_a_test_in_one_folder_that_is_no_class_is_no_test(tmp_path, inner):
    put(tmp_path, *several("train/cat", "train/dog", "val/cat", "val/dog"), *several(f"test/{inner}", each=5))
    data, warning = read(tmp_path)
    assert sizes(data) == (18, 2, 20) and "test/, whose images have no labels" in warning


@pytest.mark.parametrize("leftover", [
    ".ipynb_checkpoints/000-checkpoint.png", "__MACOSX/cat/._000.png", "@eaDir/000.png", ".git/x.png", ".hidden/1.png",
    "cat/._000.png", "cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini", "cat/.ipynb_checkpoints/000.png",
    "cat/@eaDir/000.png", "$RECYCLE.BIN/1.png", "cat/000.png~", "__pycache__/1.png", "lost+found/1.png",
])  # fmt: skip
@pytest.mark.parametrize("place", ["", "train/", "val/"])
def test_what_systems_leave_behind_is_passed_over(tmp_path, leftover, place):
    put(tmp_path, *several("train/cat", "train/dog", "val/cat", "val/dog"), place + leftover)
    data, warning = read(tmp_path)
    assert data.classes == ("cat", "dog") and sizes(data) == (18, 2, 20) and warning is None


def test_images_one_level_deeper_as_in_tiny_imagenet(tmp_path):
    put(tmp_path, *several("train/n01/images", "train/n02/images", ending="JPEG"), *several("val/images", each=4))
    boxes = "\t0\t32\t44\t62\n"
    lines = [f"{k:03}.png\tn0{1 + k % 2}{boxes}" for k in range(4)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    (tmp_path / "train" / "n01" / "n01_boxes.txt").write_text(f"000.JPEG{boxes}")
    put(tmp_path, *several("test/images", each=3))
    data, warning = read(tmp_path)
    assert data.classes == ("n01", "n02") and data.test.labels.tolist() == [0, 1, 0, 1]
    assert sizes(data) == (18, 2, 4) and warning.endswith("left out are test/, whose images have no labels")


def test_a_flat_val_with_the_solution_of_imagenet(tmp_path):
    put(tmp_path, *several("train/n01", "train/n02"), *several("val", each=4, ending="JPEG"))
    rows = [f"{k:03},n0{2 - k % 2} 85 1 499 272 n01 1 2 3 4\n" for k in range(4)]
    (tmp_path / "val" / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows))
    assert read(tmp_path)[0].test.labels.tolist() == [1, 0, 1, 0]


def test_classes_at_different_depths_and_links(tmp_path):
    put(tmp_path, *several("train/cat", "train/dog/a/b", "train/dog/c"), *several("elsewhere", each=5))
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / "cow")
    os.symlink(tmp_path / "train", tmp_path / "train" / "dog" / "round")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "train" / "cat" / "gone.png")
    data, warning = read(tmp_path, val_fraction=0)
    assert data.classes == ("cat", "cow", "dog") and len(data.train) + len(data.test) == 35
    assert "1 link without a target" in warning


def test_classes_without_images_and_files_of_other_kinds_are_named_in_one_warning(tmp_path):
    put(tmp_path, *several("train/cat", "train/dog", "val/cat", "val/dog"), "train/loose.png", "more/cat/1.png")
    (tmp_path / "train" / "cow").mkdir()
    for name in ("a.heic", "b.HEIC", "c.avif", "clip.mp4", "notes.txt", "boxes.xml", "none"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"?")
    data, warning = read(tmp_path)
    assert data.classes == ("cat", "dog") and sizes(data) == (18, 2, 20)
    for part in (
        "1 folder (train/cow) without images",
        "5 files of other kinds (2 .heic, 1 .avif, 1 .mp4, 1 no ending)",
        "1 image (loose.png) of train/ outside its classes",
        "1 folder (more) beside train/",
    ):
        assert part in warning


@pytest.mark.parametrize("name", ["train", "val", "test", "dev"])
def test_a_class_that_is_called_as_a_split_is(tmp_path, name):
    data, warning = read(put(tmp_path, *several(name, "bus", "car")))
    assert data.classes == tuple(sorted((name, "bus", "car"))) and warning is None


def test_images_beside_folders_of_other_things(tmp_path):
    """CUB's: a number for each image, which is no label; Food-101's: lists of the splits."""
    put(tmp_path, *several("images/cat", "images/dog"))
    paths = enumerate(several("cat", "dog"), 1)
    (tmp_path / "images.txt").write_text("".join(f"{number} {path}\n" for number, path in paths))
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "notes.txt").write_text("words")
    data, warning = read(tmp_path)
    assert data.classes == ("cat", "dog") and warning is None
    (tmp_path / "meta" / "train.txt").write_text("cat/000\n")
    assert read(tmp_path)[1].endswith("left out are 1 list (meta/train.txt), which could tell the splits")


@bad_input
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "got an empty folder$"),
        (("train.zip", "test.zip"), r"got none among 2 names \(test.zip, train.zip\): unpack it and give the folder$"),
        (("data_batch_1", "test_batch"), "--data cifar10 --root FOLDER reads it$"),
        (("train-images-idx3-ubyte.gz",), "a function of your own reads it, --data FILE.py:NAME$"),
        (("train-00000-of-00004",), "a function of your own reads it"),
        (("a/1.dcm", "b/2.dcm"), r"got 2 files of other kinds \(2 .dcm\): a function of your own reads it"),
        (("a/1", "b/2"), r"got 2 files of other kinds \(2 no ending\)$"),
    ],
)
def test_what_is_there_in_place_of_images_is_told(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path))


@bad_input
@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (
            several("learn/cat", "learn/dog", "holdout/cat", "holdout/dog"),
            "name them by --split TRAIN,TEST; .*--classes",
        ),
        (several("fold1/a", "fold1/b", "fold2/a", "fold2/b", "fold3/a", "fold3/b"), "the same folders a, b in each"),
        (several("val/cat", "test/cat"), "got test/, val/ and no train/"),
        (several("train"), "train holds 10 images and no folders of classes: give a table"),
        (several("pictures"), "at least two"),
        (several(".hidden/cat", ".hidden/dog"), "must hold images as .*, got "),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, paths, said):
    put(tmp_path, *paths)
    with pytest.raises(ValueError, match=said) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_splits_by_any_name(tmp_path):
    put(tmp_path, *several("learn/cat", "learn/dog", "holdout/cat", "holdout/dog", "rest/cat", "rest/dog"))
    data, warning = read(tmp_path, split="learn,holdout")
    assert sizes(data) == (18, 2, 20) and "1 folder (rest) beside train/" in warning
    assert sizes(read(tmp_path, split=("learn", "rest", "holdout"))[0]) == (20, 20, 20)
    assert sizes(read(tmp_path, split="learn")[0]) == (14, 2, 4)
    with pytest.raises(ValueError, match="split must name folders of .*, got 'x'; there are holdout, learn, rest"):
        load(str(tmp_path), split="x")


def test_classes_of_the_same_folders(tmp_path):
    put(tmp_path, *several("apple/fresh", "apple/rotten", "pear/fresh", "pear/rotten"))
    assert read(tmp_path, classes=["pear", "apple"])[0].classes == ("pear", "apple")


# ---- the order of the classes ----


@pytest.mark.parametrize("kind", ["txt", "json", "list"])
def test_the_order_of_the_classes_can_be_given(tmp_path, kind):
    put(tmp_path / "data", *several(*(f"train/{k}" for k in range(11))))
    names = [str(k) for k in range(11)]
    given = {"txt": tmp_path / "names.txt", "json": tmp_path / "names.json", "list": names}[kind]
    if kind != "list":
        given.write_text(json.dumps(names) if kind == "json" else "\ufeff" + "\r\n".join(names) + "\n\n")
    data, other = (load(str(tmp_path / "data"), classes=order, memory_budget=0) for order in (given, None))
    assert data.classes == tuple(names) and other.classes == tuple(sorted(names))
    assert any("in the order given" in said for said in data.decisions)
    assert any("10 comes before 2" in said for said in other.decisions)
    for each in (data, other):
        files = [each.train.images.read(i)[1] for i in range(len(each.train))]
        assert [file.split("/")[-2] for file in files] == [each.classes[y] for y in each.train.labels]
    assert data.fingerprint != other.fingerprint


def test_a_given_class_may_have_no_images(tmp_path):
    data, warning = read(put(tmp_path, *several("cat", "dog")), classes=["ant", "cat", "dog"])
    assert set(data.train.labels.tolist()) == {1, 2} and "no image to train on is in 1 class (ant)" in warning


@bad_input
@pytest.mark.parametrize(
    ("text", "said"),
    [("cat\n", "must name all classes of the data, got none of 1 class .dog."), ("", "must be a list of class names"),
     ("cat\ndog\ncat\n", "must name each class once, got 'cat' twice"), (b"\xff\xfe\xff", "must be text in UTF-8")],
)  # fmt: skip
def test_a_wrong_list_of_classes_is_refused(tmp_path, text, said):
    (tmp_path / "names.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    put(tmp_path / "data", *several("cat", "dog"))
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path / "data"), classes=str(tmp_path / "names.txt"))


def test_names_in_another_unicode_form_are_one_class(tmp_path):
    put(tmp_path, *several("train/caf\u00e9", "train/dog", "val/cafe\u0301", "val/dog"))
    data, _ = read(tmp_path)
    assert data.classes == ("caf\u00e9", "dog") and data.test.labels.bincount().tolist() == [10, 10]


def test_a_class_without_images_to_test_on_is_named(tmp_path):
    _, warning = read(put(tmp_path, *several("train/cat", "train/dog", "val/cat")))
    assert warning.endswith(": no image to test on is in 1 class (dog)")


def test_classes_that_differ_in_case_only_are_named(tmp_path):
    data, warning = read(put(tmp_path, *several("Cat", "cat", "dog")))
    assert len(data.classes) == 3 and "only case or spaces tell 2 classes (Cat, cat) apart" in warning


def test_names_that_differ_in_how_accents_are_written_are_named(tmp_path):
    _, warning = read(put(tmp_path, *several("caf\u00e9", "cafe\u0301", "dog")))
    assert "only case or spaces (or how accents are written) tell 2 classes" in warning


def test_a_link_to_a_folder_above_is_no_class(tmp_path):
    put(tmp_path / "data", *several("cat", "dog"))
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    data, warning = read(tmp_path / "data")
    assert data.classes == ("cat", "dog") and "left out are loop, a link to a folder that it is in" in warning


@bad_input
def test_a_split_that_is_a_link_to_another_is_refused(tmp_path):
    put(tmp_path, *several("train/cat", "train/dog"))
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(ValueError, match="val/cat must hold other images than train has, got a link to .*train/cat$"):
        load(str(tmp_path))
    (tmp_path / "val").unlink()
    put(tmp_path, *several("val/cat"))
    (tmp_path / "val" / "dog").symlink_to("../train/dog")
    with pytest.raises(ValueError, match="val/dog must hold other images than train has, got a link to .*train/dog$"):
        load(str(tmp_path))


def test_a_table_beside_folders_of_classes_is_said(tmp_path):
    put(tmp_path, *several("train/cat", "train/dog"))
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\ncat/000.png,dog\n")
    assert read(tmp_path)[1].endswith("left out are metadata.csv of train/, for the folders are the classes")


def test_two_names_of_one_folder_are_refused(tmp_path):
    put(tmp_path / "data", *several("cat", "dog"))
    (tmp_path / "data/kitten").symlink_to(tmp_path / "data/cat")
    with pytest.raises(ValueError, match="data has two classes in one folder: cat and kitten both are .*data/cat$"):
        load(str(tmp_path / "data"))


def test_what_other_programs_leave_behind_is_no_class(tmp_path):
    put(tmp_path, *several("cat", "dog"), "wandb/run/media.png", "lightning_logs/a.png", "node_modules/x/icon.png")
    put(tmp_path, "env/lib/logo.png")
    (tmp_path / "env/pyvenv.cfg").write_text("")
    data, warning = read(tmp_path)
    assert data.classes == ("cat", "dog") and warning.endswith("left out are env, an environment of Python")


def test_folders_inside_of_a_class_are_told(tmp_path):
    data, _ = read(put(tmp_path, *several("animal/cat", "animal/dog", "thing/car")))
    told = "Folders inside of a class are no classes, as in 1 class (animal: cat, dog)."
    assert data.classes == ("animal", "thing") and told in data.decisions


@bad_input
def test_too_few_images_to_validate_on_are_refused(tmp_path):
    put(tmp_path, *several("cat", "dog", each=2))
    with pytest.raises(ValueError, match="^val_fraction must leave an image of 3 for validation, got 0.1$"):
        load(str(tmp_path))
    assert sizes(read(tmp_path, val_fraction=0)[0]) == (3, 0, 1)


def test_names_that_are_no_text(tmp_path):
    """As unzip makes them of another encoding."""
    put(tmp_path, *several("dog"))
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    for k in range(10):
        (tmp_path / os.fsdecode(b"caf\xe9/%d.png" % k)).write_bytes((tmp_path / "dog/000.png").read_bytes())
    data, _ = read(tmp_path)
    assert len(data.train) == 14 and all(said.isprintable() for said in data.decisions)


def test_warnings_and_decisions_do_not_speak_to_the_terminal(tmp_path):
    hostile = "a\x1b[2J\u202e"
    put(tmp_path, *several(f"train/{hostile}", "train/dog"))
    (tmp_path / "train" / f"{hostile}x").mkdir()
    (tmp_path / "train" / "dog" / "x.\x1b[2J").write_bytes(b"")
    data, warning = read(tmp_path)
    assert warning.isprintable() and all(said.isprintable() for said in data.decisions) and "\\x1b" in warning
