"""Every image is read once, and all that is wrong is listed, by --check-data too."""

import json
import os
import shutil

import numpy as np
import pytest
from samples import folder, png

from eekd.data import check_images
from eekd.train.__main__ import main

Image = pytest.importorskip("PIL.Image")
bad_input = pytest.mark.bad_input


@pytest.fixture
def sound(tmp_path):
    return folder(tmp_path / "data", ["train", "test"], each=10, size=(16, 16))


def test_nothing_is_wrong_with_sound_data(sound):
    seen = []
    checked = check_images(str(sound), progress=lambda done, total: seen.append((done, total)))
    assert checked.images == 40 and checked.faults == [] and seen == [(k + 1, 40) for k in range(40)]
    assert checked.notes == ["From 16 x 16 to 16 x 16 pixels."]


@bad_input
def test_all_that_is_wrong_is_listed(sound):
    train = sound / "train" / "cat"
    for k in range(12):  # more than any budget
        (train / f"cut{k}.png").write_bytes((train / "003.png").read_bytes()[:90])
    (train / "none.png").write_bytes(b"")
    shutil.copy(train / "001.png", sound / "test" / "cat" / "leak.png")
    shutil.copy(train / "002.png", sound / "train" / "dog" / "other.png")
    (train / "grey.png").write_bytes(png(np.zeros((8, 9), np.uint8)))
    (train / "movie.mp4").write_bytes(b"")
    checked = check_images(str(sound))
    assert checked.images == 40 + 16
    faults = "\n".join(checked.faults)
    assert faults.count("is damaged or no image") == 13 and "none.png is damaged or no image (it is empty)" in faults
    assert "1 image (" in faults and "leak.png = " in faults and "test shares 1 image" in faults
    assert "equal images are of different classes: 1 pair (" in faults
    assert "002.png (cat) = " in faults and "other.png (dog))" in faults
    notes = " ".join(checked.notes)
    for part in (
        "1 image: grey.",
        "2 images: copies of others",
        "From 9 x 8 to 16 x 16",
        "1 file of other kinds (1 .mp4)",
    ):
        assert part in notes


@bad_input
def test_the_command_line_lists_it_and_trains_nothing(sound, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", str(sound), "--check-data"]) == 0
    assert "40 images of" in capsys.readouterr().out
    (sound / "train" / "cat" / "x\x1b.png").write_bytes(b"\0")
    assert main(["--data", "data", "--check-data"]) == 2
    out = capsys.readouterr().out
    assert "41 images of data were read: 1 thing is wrong" in out and "x\\x1b.png is damaged or no image" in out
    assert "\x1b" not in out and os.listdir(tmp_path) == ["data"]
    assert main(["--data", "nowhere", "--check-data"]) == 2
    assert "there is no dataset 'nowhere'" in capsys.readouterr().err


def test_the_dry_run_shows_what_was_decided(sound, capsys):
    assert main(["--data", str(sound), "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("- train/ is the training data.", "- 3 channels: 20 of 20",
                 "- Size 16 x 16: 20 of 20", "- 2 classes, in the order of the alphabet: cat, dog."):  # fmt: skip
        assert part in out


NETWORKS = "--teacher.model resnet8_w4 --student.model resnet8_w4 --students ce --device cpu"
FLAGS = f"{NETWORKS} --teacher.epochs 1 --teacher.snapshots 1 --student.epochs 1".split()


@bad_input
def test_a_run_whose_data_changed_says_what_changed_and_what_may_be_done(sound, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "data", "--out", "run", *FLAGS]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    gone, kept = sound / "train" / "cat" / "003.png", (sound / "train" / "cat" / "003.png").read_bytes()
    gone.unlink()
    capsys.readouterr()
    assert main(["--resume", "run"]) == 2
    said = capsys.readouterr().err
    assert "gone: 1 file (train/cat/003.png)): put the data back as they were" in said and said.count("\n") == 1
    assert "or train again, by --config run/config.json" in said
    shutil.copy(sound / "train" / "dog" / "001.png", sound / "train" / "dog" / "new.png")
    gone.write_bytes(kept)
    assert main(["--resume", "run"]) == 2
    assert "(new: 1 file (train/dog/new.png))" in capsys.readouterr().err
    (sound / "train" / "dog" / "new.png").unlink()
    gone.write_bytes((sound / "train" / "cat" / "004.png").read_bytes())
    assert main(["--resume", "run"]) == 2
    assert "(their content, or the settings they are read with, differ)" in capsys.readouterr().err
    gone.write_bytes(kept)
    assert main(["--resume", "run"]) == 0


@bad_input
def test_a_run_goes_on_past_bad_images_where_it_may(sound, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (sound / "train" / "cat" / "003.png").write_bytes(b"")
    assert main(["--data", "data", "--out", "run", *FLAGS]) == 2
    assert "003.png is damaged or no image" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main(["--data", "data", "--out", "run", "--bad-images", "skip", *FLAGS]) == 0
    assert "another image of its class stands in for it" in capsys.readouterr().err
    assert main(["--resume", "run", "--bad-images", "skip"]) == 0


def test_a_run_goes_on_from_any_folder_and_with_data_that_moved(sound, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    assert main(["--data", "data", "--classes", "names.txt", "--out", "run", *FLAGS]) == 0
    summary, again = tmp_path / "run" / "summary.json", ["--resume", str(tmp_path / "run")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    summary.unlink()
    assert main(again) == 0 and summary.exists()
    summary.unlink()
    sound.rename(tmp_path / "moved")
    assert main(again) == 2 and "there is no dataset" in capsys.readouterr().err
    assert main([*again, "--data", str(tmp_path / "moved")]) == 0 and summary.exists()
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    summary.unlink()
    assert main([*again, "--data", "../moved"]) == 2
    assert "the classes, or their order, are others" in capsys.readouterr().err


@pytest.mark.bad_input
def test_a_bad_image_names_the_ways_on(sound, monkeypatch, capsys):
    (sound / "train/cat/bad.png").write_bytes(b"")
    monkeypatch.chdir(sound.parent)
    assert main(["--data", sound.name, *FLAGS, "--dry-run"]) == 2
    told = "bad.png is damaged or no image (it is empty); --check-data lists all such images, --bad-images skip takes"
    assert told in capsys.readouterr().err
    assert main(["--data", sound.name, *FLAGS, "--image-size", "9000", "--dry-run"]) == 2
    assert "image_size must be at most 8192, got 9000" in capsys.readouterr().err


def test_runs_and_the_record_name_their_classes(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "data", *FLAGS]) == 0
    assert json.loads((tmp_path / "runs/data-1/environment.json").read_text())["data"]["class_names"] == ["cat", "dog"]
