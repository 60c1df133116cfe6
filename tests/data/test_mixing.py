"""Mixed, erased and otherwise changed images are what their papers say, and the same whoever asks for them."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import images, png

from eekd.data import Encoded, Loader, Split, mixing, policies
from eekd.data.augment import random_erase
from eekd.data.dataset import statistics

bad_input = pytest.mark.bad_input
ALL = dict(augment="crop-flip", auto_augment="trivial", erasing=0.5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def split_of(n=60, channels=3, size=16):
    x = torch.from_numpy(images(n, channels, size))
    return Split(x, torch.arange(n) % 10, *statistics(x))


def pixels(batch, split):
    """The images (B, C, S, S) as they were before they were normalised."""
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (split.mean, split.std))
    return (batch.images * std + mean) * 255


@pytest.mark.parametrize("samples", [1, 2, 7, 60])
def test_samples_go_in_pairs_that_change_with_the_view(samples):
    partner = mixing.partners(mixing.pairs(samples, seed=0, view=3))
    assert torch.equal(partner[partner], torch.arange(samples))
    assert (partner == torch.arange(samples)).sum() == samples % 2
    others = [mixing.partners(mixing.pairs(samples, seed=s, view=v)) for s, v in ((0, 4), (1, 3))]
    assert samples < 3 or not any(torch.equal(partner, other) for other in others)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 2.0, 20.0])
def test_shares_are_those_of_the_beta_distribution(alpha):
    special = pytest.importorskip("scipy.special")
    edges = (np.arange(256) + 0.5) / 256
    np.testing.assert_allclose(
        mixing._thresholds(alpha).numpy() / 2**24, special.betainc(alpha, alpha, edges), atol=2e-5
    )


def test_mixup_is_the_weighted_mean_of_image_and_labels(device):
    split, index = split_of(), torch.arange(60, device=device)
    x = split.images.to(device)
    mixed, share = mixing.mix(x, x.flip(0), index, mixup=1.0, cutmix=0.0, seed=0, view=1)
    s = share[:, None, None, None].double()
    assert ((mixed - (s * x + (1 - s) * x.flip(0))).abs() <= 0.5).all() and share.std() > 0.2
    soft = mixing.soft_labels(split.labels.to(device), 10, 0.0, split.labels.flip(0).to(device), share)
    rows = torch.arange(60, device=device)
    same = split.labels == split.labels.flip(0)
    assert torch.equal(soft[rows, split.labels.to(device)][~same], share[~same])
    torch.testing.assert_close(soft.sum(1), torch.ones(60, device=device))


def test_cutmix_pastes_a_box_whose_area_is_its_share(device):
    index = torch.arange(500, device=device)
    white, black = (torch.full((500, 1, 16, 16), value, dtype=torch.uint8, device=device) for value in (255, 0))
    mixed, share = mixing.mix(white, black, index, mixup=0.0, cutmix=1.0, seed=0, view=1)
    assert mixed.unique().tolist() == [0, 255]
    torch.testing.assert_close(share, mixed.float().mean((1, 2, 3)) / 255)
    pasted = mixed[:, 0] == 0
    heights, widths = pasted.any(2).sum(1), pasted.any(1).sum(1)
    assert torch.equal(heights * widths, pasted.sum((1, 2)))  # one box each
    assert 0.3 < (1 - share).mean() < 0.45  # one half, less what is cut at the edge
    both, _ = mixing.mix(white, black, index, mixup=20.0, cutmix=1.0, seed=0, view=1)
    boxes = (both.flatten(1).sort().values.unique(dim=1).size(1), (both % 255 == 0).flatten(1).all(1).float().mean())
    assert 0.4 < boxes[1] < 0.6


def test_smoothed_labels_are_torchs():
    logits, labels = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 5
    soft = mixing.soft_labels(labels, 5, 0.1, None, None)
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, soft.double()), wanted, rtol=1e-6, atol=0)


def test_a_rectangle_is_erased_in_so_many_images(device):
    index, fill = torch.arange(2000, device=device), torch.tensor([7, 8, 9], dtype=torch.uint8, device=device)
    x = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8, device=device)
    erased = random_erase(x, index, fill, 0.25, seed=0, view=0)
    assert x.device.type == "cpu" or torch.equal(
        erased.cpu(), random_erase(x.cpu(), index.cpu(), fill.cpu(), 0.25, seed=0, view=0)
    )
    hit = (erased != 0).all(1)
    assert torch.equal(erased, torch.where(hit[:, None], fill[:, None, None], x))
    share = hit.flatten(1).float().mean(1)
    assert 0.22 < (share > 0).float().mean() < 0.28
    assert share[share > 0].min() > 0.015 and share.max() < 0.36
    assert torch.equal(hit.any(2).sum(1) * hit.any(1).sum(1), hit.sum((1, 2)))
    assert torch.equal(random_erase(x, index, fill, 0.0, seed=0, view=0), x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_operations_are_those_of_torchvision(policy, channels):
    v2 = pytest.importorskip("torchvision.transforms.v2.functional")
    image_of = pytest.importorskip("PIL.Image").fromarray
    array = images(1, 3, 48)[0].transpose(1, 2, 0)
    image = image_of(np.ascontiguousarray(array if channels == 3 else array[..., 0]))
    most = policies.strengths(policy, 48)

    def shear(image, x, y):
        return v2.affine(
            image,
            angle=0,
            translate=[0, 0],
            scale=1,
            shear=[np.degrees(np.arctan(x)), np.degrees(np.arctan(y))],
            center=[0, 0],
        )

    theirs = [
        lambda image, by: image,
        lambda image, by: shear(image, by, 0),
        lambda image, by: shear(image, 0, by),
        lambda image, by: v2.affine(image, angle=0, translate=[int(by), 0], scale=1, shear=[0, 0]),
        lambda image, by: v2.affine(image, angle=0, translate=[0, int(by)], scale=1, shear=[0, 0]),
        lambda image, by: v2.rotate(image, angle=by),
        lambda image, by: v2.adjust_brightness(image, 1 + by),
        lambda image, by: v2.adjust_saturation(image, 1 + by),
        lambda image, by: v2.adjust_contrast(image, 1 + by),
        lambda image, by: v2.adjust_sharpness(image, 1 + by),
        lambda image, by: v2.posterize(image, bits=8 - round(by)),
        lambda image, by: v2.solarize(image, threshold=255 - by),
        lambda image, by: v2.autocontrast(image),
        lambda image, by: v2.equalize(image),
    ]
    for (kind, signed, change), their in zip(policies.OPERATIONS, theirs, strict=True):
        for level in (0, 9, 30):
            by = most.get(kind, 0) * level / 30
            ours = np.array(change(image, by), dtype=int)
            # Where an image moves, the sign is a matter of taste, and half of the time the other one is taken.
            found = [np.array(their(image, sign * by), dtype=int) for sign in ((1, -1) if signed else (1,))]
            differ = min((abs(ours - x) > 1).mean() for x in found)
            assert differ < (0.05 if kind in ("shear", "translate", "rotate") else 1e-9), (kind, level, differ)


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_a_policy_changes_images_by_their_own_numbers_alone(policy):
    pytest.importorskip("PIL")
    x, index = split_of(40).images, torch.arange(40)
    changed = policies.apply_policy(x, index, policy, seed=1, view=2)
    back = policies.apply_policy(x.flip(0)[:7], index.flip(0)[:7], policy, seed=1, view=2)
    assert torch.equal(back, changed.flip(0)[:7]) and changed.shape == x.shape
    assert 0.6 < (changed != x).flatten(1).any(1).float().mean() <= 1
    assert not torch.equal(policies.apply_policy(x, index, policy, seed=1, view=3), changed)


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_half_the_signs_are_the_other_one(policy, monkeypatch):
    pytest.importorskip("PIL")
    seen = []
    monkeypatch.setattr(policies, "OPERATIONS", (("rotate", True, lambda image, by: seen.append(by) or image),))
    policies.apply_policy(split_of(60).images, torch.arange(60), policy, seed=0, view=0)
    assert 0.35 < np.mean(np.array(seen)[np.nonzero(seen)] < 0) < 0.65
    levels = len({abs(by) for by in seen})
    assert (len(seen), levels) == (120, 1) if policy == "rand" else len(seen) == 60 and 20 < levels <= 31


def test_every_image_of_a_batch_is_erased_somewhere_else():
    split = Split(torch.zeros(20, 3, 16, 16, dtype=torch.uint8), torch.arange(20) % 10, (0.5,) * 3, (0.25,) * 3)
    (batch,) = Loader(split, batch_size=20, erasing=1.0)
    assert len((batch.images != batch.images.min()).flatten(1).unique(dim=0)) > 15


def views(loader, view):
    """What every sample shows, by its number."""
    loader.set_epoch(view)
    batches = list(loader)
    index = torch.cat([batch.index for batch in batches]).cpu()
    return [torch.cat([x.cpu() for x in part])[index.argsort()] for part in list(zip(*batches, strict=True))[:2]]


@pytest.mark.parametrize("options", [dict(mixup=0.2), dict(cutmix=1.0, erasing=0.3), ALL])
def test_a_view_is_the_same_whatever_the_batch(options, device):
    """So it can be replayed, banked and shared out."""
    split, options = split_of(61), dict(options, seed=3, classes=10, device=device)
    whole = views(Loader(split, batch_size=61, **options), 5)
    for other in (dict(batch_size=7), dict(batch_size=8, workers=2), dict(batch_size=61, seed=9, view_seed=3)):
        again = views(Loader(split, **options | other), 5)
        assert all(map(torch.equal, whole, again))
    index = torch.tensor([4, 60, 4, 17])
    (batch,) = Loader(split, batch_size=61, **options).replay([(5, index)])
    assert torch.equal(batch.images.cpu(), whole[0][index]) and torch.equal(batch.labels.cpu(), whole[1][index])
    assert not torch.equal(views(Loader(split, batch_size=61, **options), 6)[0], whole[0])


def test_a_gpu_mixes_images_that_it_made_twice():
    split = split_of(20)
    plain, twice = (Loader(split, batch_size=8, erasing=0.5, mixup=0.8, cutmix=1.0, classes=10) for _ in range(2))
    twice._twice = True
    for one, two in zip(plain, twice, strict=True):
        assert all(map(torch.equal, one, two))


def test_mixed_images_are_those_of_two_samples():
    split = split_of(20)
    loader = Loader(split, batch_size=20, mixup=1.0, classes=10)
    loader.set_epoch(2)
    (batch,) = loader
    partner = mixing.partners(mixing.pairs(20, seed=0, view=2))[batch.index]
    plain = split.images.double()
    labels = F.one_hot(split.labels, 10).float()
    own = labels[batch.index], labels[partner]
    for row in range(20):
        a, b = plain[batch.index[row]], plain[partner[row]]
        share = ((batch.labels[row] - own[1][row]).abs().sum() / (own[0][row] - own[1][row]).abs().sum()).item()
        if share == share:  # else both have one label
            assert (pixels(batch, split)[row] - (share * a + (1 - share) * b)).abs().max() < 0.51


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [3, 4])
def test_ranks_share_mixed_batches_and_pairs_stay_together(world_size, batch_size):
    split = split_of(60)
    one = Loader(split, batch_size=12, mixup=1.0, classes=10)
    ranks = [
        Loader(split, batch_size=12 // world_size, mixup=1.0, classes=10, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for whole, *parts in zip(one, *ranks, strict=True):
        index = torch.cat([part.index for part in parts])
        assert sorted(index.tolist()) == sorted(whole.index.tolist())
        for part in parts:
            assert len(part.index) == 12 // world_size
            if len(part.index) % 2 == 0:
                assert set(one._partner(0, part.index).tolist()) == set(part.index.tolist())


def test_an_image_is_decoded_once_for_a_batch(tmp_path):
    pytest.importorskip("PIL")
    stored = split_of(20)
    for i, image in enumerate(stored.images):
        (tmp_path / f"{i:02}.png").write_bytes(png(image.permute(1, 2, 0).numpy()))
    files = Encoded([str(path) for path in sorted(tmp_path.iterdir())], channels=3, image_size=16)
    split, decode, decoded = Split(files, stored.labels, stored.mean, stored.std), files.decode, []
    files.decode = lambda i, *box: decoded.append(i) or decode(i, *box)
    loader = Loader(split, batch_size=4, **ALL, classes=10)
    assert all(map(torch.equal, views(loader, 1), views(Loader(stored, batch_size=20, **ALL, classes=10), 1)))
    assert sorted(decoded) == list(range(20))


def test_validation_is_neither_mixed_nor_smoothed():
    split = split_of(20)
    (batch,) = Loader(split, batch_size=20, train=False, **ALL, classes=10)
    (plain,) = Loader(split, batch_size=20, train=False)
    assert torch.equal(batch.images, plain.images) and torch.equal(batch.labels, plain.labels)


@bad_input
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(auto_augment="best"), "auto_augment must be one of none, trivial, rand, got 'best'"),
        (dict(erasing=1.5), "erasing must be from 0 to 1"),
        (dict(mixup=-1.0, classes=10), "mixup and cutmix at least 0"),
        (dict(mixup=0.1), "classes must be given"),
        (dict(label_smoothing=1.0, classes=10), "label_smoothing from 0 to below 1"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Loader(split_of(20), batch_size=4, **arguments)


@bad_input
def test_without_pillow_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"auto_augment needs Pillow: pip install 'eekd\[data\]'"):
        Loader(split_of(20), batch_size=4, auto_augment="trivial")
