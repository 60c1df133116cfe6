"""A bank holds what the snapshots say of the images that students see."""

import threading

import pytest
import torch
from banks import CONFIG, bad_input, make

from eekd import LogitBank, SnapshotEnsemble, ensemble_kd
from eekd.bank import __main__ as cli
from eekd.bank.reader import projection
from eekd.train.session import Session


def test_rows_are_what_the_snapshots_say(run, bank):
    """To the last bit of the stored dtype, where the ensemble sees the same batches as when the bank was written."""
    session = Session(CONFIG)
    ensemble = SnapshotEnsemble.load(run / "teacher")
    loader = session.loader("train", CONFIG.teacher, train=True)
    parts = torch.arange(150).split(64)
    assert (bank.views, len(bank), bank.snapshots, bank.classes, bank.feature_dim) == (3, 150, 3, 10, 16)
    for view in range(3):
        for batch in loader.replay([(view, part) for part in parts]):
            for stored, online in zip(bank.rows(view, batch.index), ensemble(batch.images), strict=True):
                assert stored.dtype == torch.float16 and torch.equal(stored, online.half())
    index = torch.tensor([149, 0, 70, 70, 3, 128])
    (batch,) = loader.replay([(2, index)])
    for stored, online in zip(bank.rows(2, index), ensemble(batch.images), strict=True):
        torch.testing.assert_close(stored.float(), online, rtol=1e-3, atol=1e-3)
    assert not torch.equal(bank.rows(0, index)[0], bank.rows(1, index)[0])


def test_the_op_takes_rows_without_a_copy(bank):
    logits, features = bank.rows(1, torch.arange(7))
    assert logits.shape == (3, 7, 10) and logits.stride() == (10, 30, 1)
    assert features.shape == (3, 7, 16) and features.stride() == (16, 48, 1)
    student = torch.randn(7, 10, requires_grad=True)
    labels = torch.arange(7)
    ensemble_kd(student, logits, labels).loss.backward()
    other = student.detach().clone().requires_grad_()
    ensemble_kd(other, logits.float().contiguous(), labels).loss.backward()
    torch.testing.assert_close(student.grad, other.grad)


def test_prefetched_batches_are_those_of_rows(bank, device):
    for block in (1, 4 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("eekd.bank.reader.BLOCK", block)
            indices = torch.randperm(150, generator=torch.Generator().manual_seed(0)).split(40)
            got = list(bank.prefetch(1, indices, device))
            assert len(got) == 4
            for index, (logits, features) in zip(indices, got, strict=True):
                want, keys = bank.rows(1, index.to(device))
                assert torch.equal(logits, want) and torch.equal(features, keys)
                assert logits.device.type == device and logits.stride() == want.stride()
    assert [features for _, features in bank.prefetch(1, indices, features=False)] == [None] * 4
    assert list(bank.prefetch(1, ())) == []


def test_a_reader_that_stops_early_leaves_no_thread(bank):
    reader = bank.prefetch(0, torch.arange(150).split(1))
    next(reader)
    assert any(thread.name.startswith("eekd.bank") for thread in threading.enumerate())
    reader.close()
    assert not any(thread.name.startswith("eekd.bank") for thread in threading.enumerate())


@pytest.mark.parametrize("features", ["none", "all", "5"])
def test_features_whole_projected_or_left_out(run, bank, tmp_path, features):
    make(run, "--views", 1, "--out", tmp_path / "bank", "--features", features)
    other, index = LogitBank.open(tmp_path / "bank"), torch.arange(150)
    logits, stored = other.rows(0, index)
    whole = bank.rows(0, index)[1]
    assert torch.equal(logits, bank.rows(0, index)[0])
    if features == "none":
        assert stored is None and other.feature_dim is None
    elif features == "all":
        assert torch.equal(stored, whole) and other.project(whole) is whole
    else:
        assert other.manifest["projection"] == {"width": 16, "seed": 0} and stored.shape == (3, 150, 5)
        torch.testing.assert_close(stored.float(), other.project(whole), rtol=2e-3, atol=2e-3)


def test_the_projection_keeps_products_on_average():
    u, v = torch.randn(2, 500, generator=torch.Generator().manual_seed(1))
    v = v + u
    found = torch.stack([(u @ r) @ (v @ r) for r in (projection(500, 100, seed) for seed in range(100))])
    scale = u.norm() * v.norm()
    assert (found.mean() - u @ v).abs() < 0.03 * scale and 0.05 * scale < found.std() < 0.2 * scale
    assert (2 * projection(3, 4, 0)).tolist() == [[1, 1, -1, -1], [1, 1, 1, 1], [-1, 1, 1, 1]]  # for ever


def test_bfloat16(run, bank, tmp_path):
    make(run, "--views", 1, "--out", tmp_path / "bank", "--dtype", "bfloat16")
    logits, features = LogitBank.open(tmp_path / "bank").rows(0, torch.arange(150))
    assert logits.dtype == features.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), bank.rows(0, torch.arange(150))[0].float(), rtol=1e-2, atol=1e-2)


@bad_input
def test_logits_beyond_float16_are_refused(run, tmp_path, monkeypatch, capsys):
    forward = SnapshotEnsemble.forward
    monkeypatch.setattr(SnapshotEnsemble, "forward", lambda self, x: tuple(1e6 * y for y in forward(self, x)))
    command = ["--teacher", str(run), "--views", "1", "--out", str(tmp_path / "bank")]
    assert cli.main(command) == 2
    assert (
        "logits of the snapshots must fit into torch.float16, got some that overflow: use --dtype bfloat16"
        in capsys.readouterr().err
    )
    assert cli.main([*command, "--dtype", "bfloat16"]) == 0
