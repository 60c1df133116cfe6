"""A bank that does not fit is refused by the name of what is wrong."""

import dataclasses
import os
import re

import pytest
import torch
from banks import CONFIG, bad_input, edit, flip_a_bit, make, taught_from

from eekd import LogitBank
from eekd.data import Loader
from eekd.io.files import read_json
from eekd.train import __main__ as train_cli
from eekd.train import prepare, train, train_student
from eekd.train.session import Session


@bad_input
@pytest.mark.parametrize(("changes", "wanted"), [
    (dict(split_seed=3), "split_seed must be 0, with which BANK was made, got 3"),
    (dict(val_fraction=0.2), "val_fraction must be 0.1, with which BANK was made, got 0.2"),
    (dict(train_limit=140), "train_limit must be 150, with which BANK was made, got 140"),
    (dict(image_size=10), "image_size must be 8, with which BANK was made, got 10"),
    (dict(augment="none"), "augment must be 'crop', with which BANK was made, got 'none'"),
    (dict(augment="crop-flip"), "augment must be 'crop', with which BANK was made, got 'crop-flip'"),
], ids=str)  # fmt: skip
def test_other_images_are_refused(bank, tmp_path, changes, wanted):
    config = taught_from(bank, **changes)
    for call in (
        lambda: train(config, tmp_path / "run"),
        lambda: train_student(config, bank.run / "teacher", "ce", tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(wanted.replace('BANK', str(bank.path)))}$"):
            call()
    assert not (tmp_path / "run").exists()


@bad_input
@pytest.mark.parametrize(("changes", "wanted"), [
    (dict(data="fashion-mnist", fingerprint="0" * 64), "data must be 'fashion-mnist', with which BANK was made"),
    (dict(fingerprint="0" * 64), f"fingerprint must be '{'0' * 64}', with which BANK was made, got"),
    (dict(augmented_sha256="0" * 64), f"augmented_sha256 must be '{'0' * 64}', with which BANK was made, got"),
    (dict(seed=5), "augmented_sha256"),
], ids=str)  # fmt: skip
def test_changed_images_are_refused(copy, changes, wanted):
    edit(copy / "bank", images=read_json(copy / "bank/manifest.json")["images"] | changes)
    with pytest.raises(ValueError, match=wanted.replace("BANK", str(copy / "bank"))):
        prepare(dataclasses.replace(CONFIG, bank=str(copy / "bank")))


@bad_input
def test_other_snapshots_are_refused(bank, tmp_path):
    other = train(dataclasses.replace(CONFIG, seed=1), tmp_path / "other")
    config = dataclasses.replace(CONFIG, bank=str(bank.path), teacher_run=str(other))
    with pytest.raises(ValueError, match="^snapshot 1 must have SHA-256 [0-9a-f]{64}, .* was made, got [0-9a-f]{64}$"):
        prepare(config)
    fewer = train(dataclasses.replace(CONFIG, teacher=dataclasses.replace(CONFIG.teacher, snapshots=1)), tmp_path / "1")
    with pytest.raises(ValueError, match="^snapshot"):
        prepare(dataclasses.replace(config, teacher_run=str(fewer)))


@bad_input
def test_attention_without_features_is_refused(run, tmp_path, capsys):
    make(run, "--views", 1, "--out", tmp_path / "bank", "--features", "none")
    command = ["student", "--bank", str(tmp_path / "bank"), "--out", str(tmp_path / "out"), "--students"]
    assert train_cli.main([*command, "uniform", "attention"]) == 2
    assert "must hold features for student attention" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert train_cli.main([*command, "uniform", "--student.epochs", "1"]) == 0


@bad_input
@pytest.mark.parametrize("damage", ["a bit", "the end"])
def test_a_damaged_shard_is_refused_by_name(copy, damage, tmp_path, capsys):
    name = "view-1-shard-2.safetensors"
    path = copy / "bank" / name
    flip_a_bit(path) if damage == "a bit" else os.truncate(path, path.stat().st_size - 10)
    bank = LogitBank.open(copy / "bank")
    bank.rows(1, torch.arange(128))
    with pytest.raises(ValueError, match=f"{name} was changed or damaged"):
        bank.rows(1, torch.tensor([128]))
    with pytest.raises(ValueError, match=f"{name} was changed or damaged"):
        list(bank.prefetch(1, torch.arange(150).split(30)))
    command = ["student", "--bank", str(copy / "bank"), "--students", "uniform", "--out", str(tmp_path / "out")]
    assert train_cli.main(command) == 2
    assert f"{name} was changed or damaged" in capsys.readouterr().err


@bad_input
def test_a_missing_shard_or_manifest_is_refused_by_name(copy):
    (copy / "bank" / "view-2-shard-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="view-2-shard-0.safetensors is missing"):
        LogitBank.open(copy / "bank")
    (copy / "bank" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json is missing: no bank, or one that eekd.bank has not"):
        LogitBank.open(str(copy / "bank"))
    assert train_cli.main(["student", "--bank", str(copy / "bank")]) == 2


@bad_input
@pytest.mark.parametrize(("field", "value"), [
    ("format", 2), ("format", None), ("views", 0), ("views", 2), ("views", 10**12), ("views", True), ("samples", 99),
    ("samples", "150"), ("snapshots", 2), ("classes", 1.5), ("features", -1), ("features", None),
    ("dtype", "float32"), ("dtype", []), ("run", 3), ("shard_rows", 0), ("projection", 3), ("projection", {"width": 3}),
    ("teacher", None), ("teacher", {"sha256": ["x"] * 3}), ("images", {}), ("images", []), ("shards", {}),
    ("shards", {"../../secret.safetensors": "0" * 64}),
])  # fmt: skip
def test_a_damaged_manifest_is_refused(copy, field, value):
    edit(copy / "bank", **{field: value})
    wanted = "manifest.json (must have format 1|is damaged: its [a-z_]+ cannot be)"
    with pytest.raises(ValueError, match=wanted) as caught:
        LogitBank.open(copy / "bank")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@bad_input
def test_rows_that_are_not_there_are_refused(bank):
    index = torch.arange(3)
    for view in (-1, 3, 10**9):
        with pytest.raises(ValueError, match="view must be from 0 to 2, got"):
            bank.rows(view, index)
    for index in (torch.tensor([0, 150]), torch.tensor([-1, 4])):
        with pytest.raises(ValueError, match="index must be from 0 to 149, got"):
            bank.rows(0, index)
    for index in (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2), [0, 1]):
        with pytest.raises(TypeError, match=r"index must be int64 of shape \(B,\), got"):
            bank.rows(0, index)
    assert bank.rows(0, torch.zeros(0, dtype=torch.long))[0].shape == (3, 0, 10)


def test_the_loader_is_needed_for_nothing_but_order_and_views(bank):
    """A bank belongs to anybody's loop: check() says so, or what differs."""
    session = Session(CONFIG)
    data = session.data
    bank.check(data, Loader(data.train, batch_size=9, augment=bank.augment, seed=3, view_seed=bank.seed))
    with pytest.raises(ValueError, match="^augment must be 'crop', with which .* was made, got 'none'$"):
        bank.check(data, Loader(data.train, batch_size=9, augment="none"))
    with pytest.raises(ValueError, match="^seed must be 0, with which .* was made, got 3$"):
        bank.check(data, Loader(data.train, batch_size=9, augment=bank.augment, seed=3))
