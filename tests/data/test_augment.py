"""Augmentation is a pure function of its numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import images

from eekd.data import AUGMENTATIONS
from eekd.data import augment as aug


def splitmix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(0, 6), st.integers(0, 2**40))
def test_random_bits_are_those_of_splitmix64(seed, view, stream, index):
    key = 0
    for part in (seed, view, stream):
        key = splitmix((key + part + 0x9E3779B97F4A7C15) % 2**64)
    want = splitmix((key + index * 0x9E3779B97F4A7C15) % 2**64)
    assert aug.random_bits(seed, view, stream, torch.tensor([index])).item() % 2**64 == want


def test_random_numbers_are_uniform_and_unrelated():
    index = torch.arange(90000)
    draws = torch.stack([aug.random_below(9, *key, index) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))])
    for row in draws:
        assert ((row.bincount(minlength=9) - 10000).abs() < 500).all()
    assert torch.corrcoef(draws.double()).fill_diagonal_(0).abs().max() < 0.02
    assert torch.corrcoef(torch.stack([draws[0, 1:], draws[0, :-1]]).double())[0, 1].abs() < 0.02


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 57, 57)])
def test_a_view_depends_on_nothing_but_its_numbers(kind, shape, device):
    x, index = torch.randint(0, 256, (40, *shape), dtype=torch.uint8), torch.randperm(1000)[:40]
    out = aug.augment(x.to(device), index.to(device), kind=kind, seed=3, view=5).cpu()
    assert out.shape == x.shape and out.dtype == torch.uint8
    assert torch.equal(out, aug.augment(x, index, kind=kind, seed=3, view=5))
    one_by_one = [aug.augment(a[None], i[None], kind=kind, seed=3, view=5) for a, i in zip(x, index, strict=True)]
    assert torch.equal(out, torch.cat(one_by_one))
    for seed, view in ((4, 5), (3, 6)):
        assert torch.equal(out, aug.augment(x, index, kind=kind, seed=seed, view=view)) == (kind == "none")


def test_pad_crop_is_a_window_of_the_padded_image(device):
    x = torch.randint(0, 256, (81, 2, 6, 7), dtype=torch.uint8, device=device)
    top, left = (v.flatten().to(device) for v in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    out = aug.pad_crop(x, top, left, 4)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for i in range(81):
        assert torch.equal(out[i], padded[i, :, top[i] : top[i] + 6, left[i] : left[i] + 7])


def test_half_the_images_are_mirrored_left_to_right(device):
    x = torch.from_numpy(images(200, 2, 8)).to(device)
    out = aug.random_flip(x, torch.arange(200, device=device), seed=0, view=0)
    kept, mirrored = ((out == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert (kept ^ mirrored).all() and 80 < kept.sum() < 120


def test_resized_crop_is_bilinear(device):
    x = torch.randint(0, 256, (64, 3, 40, 40), dtype=torch.uint8, device=device)
    boxes = aug.resized_crop_boxes(torch.arange(64, device=device), 40, 40, seed=0, view=0)
    boxes[0] = torch.tensor([0, 0, 40, 40])
    boxes[1] = torch.tensor([39, 39, 1, 1])
    out = aug.resized_crop(x, boxes)
    assert torch.equal(out[0], x[0]) and out[1].eq(x[1, :, 39:, 39:]).all()
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        part = x[i : i + 1, :, top : top + height, left : left + width].float()
        want = torch.nn.functional.interpolate(part, 40, mode="bilinear")[0]
        assert (out[i] - want).abs().max() < 2


@pytest.mark.parametrize(("height", "width"), [(224, 224), (100, 300), (301, 77), (1, 1), (1, 50)])
def test_resized_crop_boxes_fit(height, width):
    top, left, h, w = aug.resized_crop_boxes(torch.arange(5000), height, width, seed=0, view=0).unbind(1)
    assert top.min() >= 0 and left.min() >= 0 and h.min() >= 1 and w.min() >= 1
    assert (top + h).max() <= height and (left + w).max() <= width
    choosers = aug.resized_crop_choosers(torch.arange(5000), seed=0, view=0)
    boxes = zip(*(x.tolist() for x in (top, left, h, w)), strict=True)
    assert [choose(height, width) for choose in choosers] == list(boxes)
    if height == width == 224:
        area, ratio = (h * w).double() / 224**2, w.double() / h
        assert 0.07 < area.min() < 0.09 and area.max() > 0.95 and area.mean() == pytest.approx(0.48, abs=0.01)
        assert ratio.min() > 0.73 and ratio.max() < 1.36 and ratio.log().mean().abs() < 0.01
