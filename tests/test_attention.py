"""SnapshotAttention against its formula."""

import pytest
import torch

from eekd.method.attention import SnapshotAttention

B, M, DS, DT = 6, 3, 5, 7


@pytest.fixture
def features(device):
    torch.manual_seed(0)
    return torch.rand(B, DS, device=device), torch.rand(M, B, DT, device=device)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("embed_dim", [1, 8])
def test_is_its_formula(features, device, normalize, scale, embed_dim):
    v, u = features
    attention = SnapshotAttention(DS, DT, embed_dim, normalize, scale).to(device)
    query, keys = attention(v, u)
    assert query.shape == (B, embed_dim) and keys.shape == (M, B, embed_dim)
    if normalize:
        v, u = (x - x.mean(-1, keepdim=True) for x in (v, u))
        v, u = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in (v, u))
    v, u = v @ attention.student.weight.T, u @ attention.snapshots.weight.T
    expected = torch.einsum("bd,mbd->bm", v, u) * (embed_dim**-0.5 if scale is None else scale)
    torch.testing.assert_close(torch.einsum("bd,mbd->bm", query, keys), expected)


def test_has_two_bias_free_maps_that_start_gently():
    torch.manual_seed(0)
    attention = SnapshotAttention(400, 300)
    assert [tuple(p.shape) for p in attention.parameters()] == [(8, 400), (8, 300)]
    for weight in attention.parameters():
        assert abs(weight.std().item() - 0.02) < 0.002
    weights = torch.einsum("bd,mbd->bm", *attention(torch.rand(50, 400), torch.rand(5, 50, 300))).softmax(1)
    assert (weights - 0.2).abs().max() < 0.1


def test_normalised_features_make_the_scale_of_a_network_irrelevant(features, device):
    v, u = features
    attention = SnapshotAttention(DS, DT).to(device)
    torch.testing.assert_close(attention(v, u), attention(50 * v + 3, 50 * u - 3), rtol=1e-3, atol=1e-5)


def test_both_maps_and_the_student_learn(features, device):
    v, u = features
    attention = SnapshotAttention(DS, DT).to(device)
    v.requires_grad_()
    query, keys = attention(v, u)
    (query.square().sum() + keys.square().sum()).backward()
    assert all(x.grad.abs().sum() > 0 for x in (v, *attention.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_dtype_are_cast_to_the_maps(features, device, dtype):
    attention = SnapshotAttention(DS, DT).to(device)
    query, keys = attention(features[0].to(dtype), features[1].to(dtype))
    assert query.dtype == keys.dtype == torch.float32
    torch.testing.assert_close((query, keys), attention(*features), rtol=0.02, atol=0.005)


def test_under_autocast(features, device):
    attention = SnapshotAttention(DS, DT).to(device)
    with torch.autocast(device, torch.bfloat16):
        query, keys = attention(features[0].bfloat16(), features[1])
    assert query.dtype == keys.dtype == torch.bfloat16


def test_scale_and_normalisation_are_shown():
    assert "normalize=False, scale=0.5" in repr(SnapshotAttention(4, 4, 4, normalize=False))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options",
    [
        {"student_dim": 0},
        {"student_dim": None},
        {"student_dim": 2.0},
        {"snapshot_dim": -1},
        {"snapshot_dim": "8"},
        {"embed_dim": 0},
        {"embed_dim": 0.5},
        {"scale": 0.0},
        {"scale": -1},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"scale": "auto"},
    ],
)
def test_impossible_options_are_refused(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"^{name} must be a .*, got"):
        SnapshotAttention(**{"student_dim": DS, "snapshot_dim": DT, **options})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "student, snapshots, name",
    [
        ((B, DS + 1), (M, B, DT), "student_features"),
        ((B, 1, DS), (M, B, DT), "student_features"),
        ((DS,), (M, B, DT), "student_features"),
        ((B, DS), (M, B, DT + 1), "snapshot_features"),
        ((B, DS), (M, B + 1, DT), "snapshot_features"),
        ((B, DS), (B, M, DT), "snapshot_features"),
        ((B, DS), (B, DT), "snapshot_features"),
    ],
)
def test_features_of_other_shapes_are_refused(student, snapshots, name):
    with pytest.raises(ValueError, match=f"^{name} must have shape .*, got"):
        SnapshotAttention(DS, DT)(torch.zeros(student), torch.zeros(snapshots))
