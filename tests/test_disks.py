"""Disks that cannot do what a local one can: a warning says what is then not promised, and the work goes on."""

import errno
import fcntl
import os
import warnings

import pytest

from eekd.io import files
from eekd.io.files import write_atomic
from eekd.io.lock import locked
from eekd.train.run_folder import new_folder

bad_input = pytest.mark.bad_input


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(files, "_warned", set())


def failing(number, real=None, when=lambda *arguments: True):
    def call(*arguments, **settings):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **settings)

    return call


def inside(folder):
    return sorted(path.name for path in folder.iterdir())


@bad_input
@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_disk_without_locks(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.warns(RuntimeWarning, match="has no locks .*, so nothing keeps a second process out"), locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("process ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(tmp_path):  # it is said once
            pass


@bad_input
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_breaks_while_it_locks(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(OSError) as caught, locked(tmp_path):
        pass
    assert caught.value.errno == number and caught.value.filename.endswith(".lock")


@bad_input
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_wait(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.warns(
        RuntimeWarning, match="cannot wait until files are written .*, so a power cut may cost"
    ) as caught:
        write_atomic(tmp_path / "a", b"1")
        write_atomic(tmp_path / "a", b"2")
    assert len(caught) == 1 and (tmp_path / "a").read_bytes() == b"2" and inside(tmp_path) == ["a"]


@bad_input
@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.EINVAL])
def test_a_folder_that_cannot_be_opened_to_wait_for_it(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "open", failing(number, os.open, lambda path, *flags: os.path.isdir(path)))
    with pytest.warns(RuntimeWarning, match="cannot wait until files are written"):
        write_atomic(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


@bad_input
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_or_broken_disk_ends_the_write_and_names_the_file(tmp_path, monkeypatch, number, call):
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(OSError) as caught:
        write_atomic(tmp_path / "a", b"new")
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == b"old" and inside(tmp_path) == ["a"]


@bad_input
@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.EACCES, errno.EBUSY, errno.ENOTSUP])
def test_a_disk_that_cannot_replace_in_one_step(tmp_path, monkeypatch, number):
    write_atomic(tmp_path / "a", b"old")
    (tmp_path / ".a.old").write_bytes(b"older")  # left by a kill
    monkeypatch.setattr(os, "replace", failing(number, os.replace, lambda source, target: os.path.lexists(target)))
    with pytest.warns(RuntimeWarning, match="cannot replace a file in one step .* under the name .NAME.old only"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and inside(tmp_path) == ["a"]
    write_atomic(tmp_path / "b", b"1")
    assert inside(tmp_path) == ["a", "b"]


@bad_input
def test_a_disk_that_cannot_rename_either_keeps_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "replace", failing(errno.EPERM))
    monkeypatch.setattr(
        os, "rename", failing(errno.EIO, os.rename, lambda source, target: str(source).endswith(".tmp"))
    )
    with pytest.raises(OSError) as caught:
        write_atomic(tmp_path / "a", b"new")
    assert caught.value.errno == errno.EIO and (tmp_path / "a").read_bytes() == b"old" and inside(tmp_path) == ["a"]


def test_what_network_disks_leave_in_a_folder_does_not_count(tmp_path):
    for name in (".nfs0001", ".fuse_hidden1", ".DS_Store", "._x"):
        (tmp_path / name).touch()
    assert new_folder(tmp_path, "x") == tmp_path
    (tmp_path / "weights").touch()
    with pytest.raises(FileExistsError):
        new_folder(tmp_path, "x")
