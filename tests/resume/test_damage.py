"""Damage is named, or passed over where an older checkpoint is whole."""

import dataclasses
import random
import shutil
import warnings
from pathlib import Path

import pytest
from killed import EVERY_STEP, broken_off, check_same

from eekd.train import checkpoints, resume


def damage(path: Path, draw: random.Random) -> None:
    """Flips one bit of a file, or cuts it off."""
    data = bytearray(path.read_bytes())
    if draw.random() < 0.3:
        del data[draw.randrange(len(data)) :]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def files_of(run: Path) -> list[Path]:
    return sorted(
        path.relative_to(run)
        for path in run.rglob("*")
        if path.is_file() and path.stat().st_size and path.name != ".lock"
    )


def check_damage_to_a_finished_run(run, copy: Path, file: Path, draw: random.Random) -> None:
    damage(copy / file, draw)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        resume(copy, session=run[0])
    assert str(copy / file) in str(caught.value) and "\n" not in str(caught.value)
    shutil.copyfile(run[1] / file, copy / file)


def check_damage_to_an_unfinished_run(run, broken: Path, copy: Path, file: Path, draw: random.Random) -> None:
    """Named in an error, or in a warning before the same bits come out; what is never read need not be named."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(broken, copy)
    damage(copy / file, draw)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            resume(copy, session=run[0])
        except (ValueError, FileNotFoundError) as error:
            assert str(copy / file) in str(error)
            return
    named = any(str(copy / file) in str(warning.message) for warning in told)
    newest = max((int(path.stem) for path in (broken / file).parent.glob("*.json") if path.stem.isdecimal()), default=0)
    anew = (
        file.name.startswith("metrics")
        or file.name == "model.py"
        or file.name == "manifest.json"
        and not list(broken.rglob("snapshot-*"))
    )
    assert named or anew or file.parent.name == "checkpoints" and file.stem != str(newest)
    check_same(run[1], copy)


def test_damage_to_a_finished_run_is_named(run, tmp_path):
    copy, draw = shutil.copytree(run[1], tmp_path / "run"), random.Random(0)
    for file in 3 * files_of(copy):
        check_damage_to_a_finished_run(run, copy, file, draw)
    resume(copy, session=run[0])


def test_damage_to_an_unfinished_run_is_named_and_passed_over(run, tmp_path):
    broken, draw = broken_off(run, tmp_path / "broken", 12), random.Random(0)
    assert any(file.parent.name == "checkpoints" for file in files_of(broken))
    for file in files_of(broken):
        check_damage_to_an_unfinished_run(run, broken, tmp_path / "copy", file, draw)


def test_a_power_cut(run, tmp_path, monkeypatch):
    """The files that were not waited for are there, and empty."""
    monkeypatch.setattr(checkpoints, "SYNC", 1e9)
    out = broken_off(run, tmp_path / "run")
    first, *lost = sorted((out / "teacher/checkpoints").glob("*.json"), key=lambda path: int(path.stem))
    assert [int(path.stem) for path in (first, *lost)] == [1, 5, 6]
    for path in lost:
        path.write_bytes(b"")
        path.with_suffix(".safetensors").write_bytes(b"")
    with pytest.warns(RuntimeWarning) as told:
        resume(out, session=run[0])
    assert ["6.json is not JSON" in str(told[0].message), "5.json is not JSON" in str(told[1].message)] == [True, True]
    check_same(run[1], out)


def test_without_any_whole_checkpoint_one_sentence(run, tmp_path):
    out = broken_off(run, tmp_path / "run")
    for path in (out / "teacher/checkpoints").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^no checkpoint in .* is whole: .*safetensors was changed .*; remove .*"):
        resume(out, session=run[0])
    shutil.rmtree(out / "teacher")
    resume(out, session=run[0])
    check_same(run[1], out)


@pytest.mark.slow
def test_a_thousand_damages(run, tmp_path):
    copy, draw = shutil.copytree(run[1], tmp_path / "run"), random.Random(1)
    files = files_of(copy)
    for _ in range(800):
        check_damage_to_a_finished_run(run, copy, draw.choice(files), draw)
    session = run[0]
    session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)
    broken = [broken_off(run, tmp_path / f"broken-{step}", step) for step in (3, 6, 12, 14, 19, 23)]
    for _ in range(200):
        chosen = draw.choice(broken)
        check_damage_to_an_unfinished_run(run, chosen, tmp_path / "copy", draw.choice(files_of(chosen)), draw)


def test_the_json_of_checkpoints_goes_first(tmp_path, monkeypatch):
    """A kill on the way leaves nothing that is taken for a damaged checkpoint."""
    for name in ("1.safetensors", "1.json", "2.safetensors", "2.json"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).touch()
    order = []
    monkeypatch.setattr(Path, "unlink", lambda path: order.append(path.suffix))
    checkpoints.delete_checkpoints(tmp_path)
    assert order == [".json", ".json", ".safetensors", ".safetensors"]
