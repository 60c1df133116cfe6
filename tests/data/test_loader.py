"""Loaders give the same batches on every device, from memory and from files, to one process or several."""

import pytest
import torch
from samples import images, png

from eekd.data import AUGMENTATIONS, Encoded, Loader, Split
from eekd.data import augment as aug
from eekd.data.dataset import statistics

bad_input = pytest.mark.bad_input


def split_of(n=100, channels=3, size=16):
    x = torch.from_numpy(images(n, channels, size))
    return Split(x, torch.arange(n) % 10, *statistics(x))


@pytest.fixture
def encoded(tmp_path):
    """The same images in memory and as files."""
    pytest.importorskip("PIL")
    stored = split_of(20)
    for i, image in enumerate(stored.images):
        (tmp_path / f"{i:02}.png").write_bytes(png(image.permute(1, 2, 0).numpy()))
    files = Encoded([str(path) for path in sorted(tmp_path.iterdir())], channels=3, image_size=16)
    return stored, Split(files, stored.labels, stored.mean, stored.std)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_a_batch_is_normalised_and_indexed(device):
    split = split_of()
    batches = list(Loader(split, batch_size=32, device=device))
    assert [len(b.labels) for b in batches] == [32, 32, 32, 4]
    index = torch.cat([b.index for b in batches]).cpu()
    assert sorted(index.tolist()) == list(range(100)) and index.tolist() != list(range(100))
    assert all(b.images.device.type == b.labels.device.type == b.index.device.type == device for b in batches)
    x = torch.cat([b.images for b in batches]).cpu()
    assert x.dtype == torch.float32 and x.mean().abs() < 1e-5 and x.std() == pytest.approx(1, abs=1e-3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (split.mean, split.std))
    torch.testing.assert_close(x, (split.images[index] / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat([b.labels for b in batches]).cpu(), split.labels[index])


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_an_epoch_can_be_replayed_on_any_device(kind, device):
    loader, again = (Loader(split_of(), batch_size=32, augment=kind, seed=1, device=d) for d in (device, "cpu"))
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append([[x.cpu() for x in batch] for batch in loader])
    for epoch in (2, 0, 1):
        again.set_epoch(epoch)
        assert same(epochs[epoch], list(again))
    assert not same(epochs[0], epochs[1])


@pytest.mark.parametrize("kind", ["crop", "crop-flip", "imagenet"])
def test_a_view_can_be_replayed_in_another_order(kind):
    loader = Loader(split_of(), batch_size=100, augment=kind)
    loader.set_epoch(7)
    (first,) = loader
    loader.set_epoch(8, view=7)
    (second,) = loader
    assert not torch.equal(first.index, second.index)
    assert torch.equal(first.images[first.index.argsort()], second.images[second.index.argsort()])


def test_views_take_turns_under_a_seed_of_their_own():
    loader = Loader(split_of(), batch_size=100, augment="crop", seed=1, views=3, view_seed=2)
    (other,) = Loader(split_of(), batch_size=100, augment="crop", seed=2).replay([(1, torch.arange(100))])
    loader.set_epoch(4)
    (batch,) = loader
    order = Loader(split_of(), batch_size=100, seed=1)
    order.set_epoch(4)
    assert torch.equal(batch.index, order.indices()[0])
    assert torch.equal(batch.images, other.images[batch.index])


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_several_views_are_replayed_in_the_order_asked_for(encoded, workers):
    work = [(2, torch.tensor([5, 1])), (0, torch.tensor([1])), (2, torch.tensor([1, 5, 0]))]
    for split in encoded:
        loader = Loader(split, batch_size=8, augment="imagenet", workers=workers)
        first, second, third = loader.replay(work)
        assert [batch.index.tolist() for batch in (first, second, third)] == [index.tolist() for _, index in work]
        assert torch.equal(first.images, third.images[[1, 0]]) and torch.equal(first.labels, split.labels[[5, 1]])
        assert not torch.equal(second.images[0], first.images[1])


def test_iterating_draws_no_global_random_numbers(encoded):
    state = torch.get_rng_state()
    for split in encoded:
        list(Loader(split, batch_size=8, augment="imagenet"))
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_keeps_order_and_images():
    loader = Loader(split_of(), batch_size=30, augment="imagenet", train=False)
    loader.set_epoch(3)
    assert torch.equal(torch.cat([b.index for b in loader]), torch.arange(100))
    assert same(list(loader), list(Loader(split_of(), batch_size=30, train=False)))


@pytest.mark.parametrize("mixed", [{}, {"mixup": 1.0, "classes": 10}])
def test_each_sample_of_an_epoch_is_shown_in_several_views(mixed):
    split = split_of()
    loader, single = (
        Loader(split, batch_size=12, augment="crop", seed=1, repeats=repeats, **mixed) for repeats in (3, 1)
    )
    assert len(loader) == 9 and sum(map(loader.rows, range(9))) == 99
    shown = []
    for epoch in (0, 2):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch.labels) for batch in batches] == [12] * 8 + [3] == [loader.rows(k) for k in range(9)]
        for batch, index in zip(batches, loader.indices(), strict=True):
            assert torch.equal(batch.index, index) and torch.equal(*batch.index.view(3, -1)[:2])
        samples = torch.cat([batch.index.view(3, -1)[0] for batch in batches])
        assert len(samples.unique()) == 33
        shown.append(set(samples.tolist()))
        if not mixed:  # whose pairs are those of the epoch
            first = batches[0].index.view(3, -1)[0]
            for view, images in enumerate(batches[0].images.view(3, -1, *split.images.shape[1:])):
                [wanted] = single.replay([(3 * epoch + view, first)])
                assert torch.equal(images, wanted.images)
    assert shown[0] != shown[1]


def test_several_views_are_shared_by_ranks_and_skipped():
    options = dict(augment="crop", seed=1, repeats=2, cutmix=1.0, classes=10)
    whole = list(Loader(split_of(), batch_size=16, **options))
    ranks = [list(Loader(split_of(), batch_size=8, rank=rank, world_size=2, **options)) for rank in (0, 1)]
    for together, *parts in zip(whole, *ranks, strict=True):
        views = zip(*(part.images.chunk(2) for part in parts), strict=True)
        assert torch.equal(
            torch.cat([torch.cat(view).sort(0).values for view in views]),
            torch.cat([view.sort(0).values for view in together.images.chunk(2)]),
        )
    loader = Loader(split_of(), batch_size=16, **options)
    loader.skip(2)
    assert same(list(loader), whole[2:])


@bad_input
@pytest.mark.parametrize("more", [{"repeats": 0}, {"repeats": 3}, {"repeats": 2, "views": 2}])
def test_views_that_do_not_fit_a_batch_are_refused(more):
    with pytest.raises(ValueError, match="^repeats "):
        Loader(split_of(), batch_size=8, **more)


def test_drop_last():
    assert len(Loader(split_of(), batch_size=30)) == 4
    loader = Loader(split_of(), batch_size=30, drop_last=True)
    assert len(loader) == 3 and [len(b.index) for b in loader] == [30, 30, 30]
    assert list(Loader(split_of(0), batch_size=4, train=False)) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_batches_of_one_loader(world_size, drop_last):
    ranks = [
        Loader(split_of(), batch_size=5, drop_last=drop_last, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    whole = Loader(split_of(), batch_size=5 * world_size, drop_last=drop_last)
    for loader in (*ranks, whole):
        loader.set_epoch(4)
    assert all(len(list(loader)) == len(loader) for loader in (*ranks, whole))
    seen = [torch.cat([b.index for b in step]) for step in zip(*ranks, strict=True)]
    for k, (together, batch) in enumerate(zip(seen, whole, strict=False)):
        assert sorted(together.tolist()) == sorted(batch.index.tolist())
        assert len(together) == whole.rows(k) == ranks[0].rows(k)
    left_out = 100 - sum(map(len, seen))
    assert left_out < (5 * world_size if drop_last else world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_ranks_share_an_evaluation(world_size):
    shards = [Loader(split_of(), batch_size=5, train=False, rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(i for loader in shards for b in loader for i in b.index.tolist()) == list(range(100))
    assert len({len(list(loader)) for loader in shards}) == 1, "a network in shards runs everywhere or nowhere"
    assert all(len(list(loader)) == len(loader) for loader in shards)


@pytest.mark.parametrize("kind", ["none", "crop-flip"])
def test_decoded_batches_are_those_of_memory(encoded, kind, device):
    loaders = [Loader(split, batch_size=8, augment=kind, device=device) for split in encoded]
    for epoch in (0, 1):
        for loader in loaders:
            loader.set_epoch(epoch)
        assert same(*map(list, loaders))


def test_files_are_cropped_from_what_they_hold(encoded, device):
    loader = Loader(encoded[1], batch_size=20, augment="imagenet", seed=2, device=device)
    loader.set_epoch(3, view=1)
    (batch,) = loader
    index = batch.index.cpu()
    boxes = aug.resized_crop_boxes(index, 16, 16, seed=2, view=1).tolist()
    pairs = zip(index, boxes, strict=True)
    cut = [encoded[1].images.decode(i, lambda height, width, box=box: box) for i, box in pairs]
    want = aug.random_flip(torch.stack(cut), index, seed=2, view=1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoded[1].mean, encoded[1].std))
    torch.testing.assert_close(batch.images.cpu(), (want / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_workers_change_nothing(encoded):
    none, two = (Loader(encoded[1], batch_size=8, augment="imagenet", workers=w) for w in (0, 2))
    for epoch, view in ((0, None), (5, None), (6, 0)):
        for loader in (none, two):
            loader.set_epoch(epoch, view)
        assert same(list(none), list(two))


@bad_input
def test_a_broken_image_is_named_by_a_worker(encoded):
    path = encoded[1].images.items[7]
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(ValueError, match="07.png is damaged or no image"):
        list(Loader(encoded[1], batch_size=8, workers=1))


@bad_input
@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got 2.5"),
        ({"batch_size": None}, TypeError, "batch_size must be .*, got None"),
        ({"augment": "flip"}, ValueError, "augment must be one of none, crop, crop-flip, imagenet, got 'flip'"),
        ({"augment": None}, ValueError, "augment must be .*, got None"),
        ({"seed": "x"}, TypeError, "seed must be .*, got 'x'"),
        ({"workers": -1}, ValueError, "workers must be .*, got -1"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be below world_size, 2, got 2"),
        ({"rank": -1}, ValueError, "rank must be .*, got -1"),
        ({"world_size": 0}, ValueError, "world_size must be .*, got 0"),
        ({"batch_size": 101, "drop_last": True}, ValueError, "split must hold a batch of 101 on 1 ranks, got 100"),
        ({"world_size": 101}, ValueError, "split must hold a batch of 10 on 101 ranks, got 100 samples"),
        ({"split": split_of(0)}, ValueError, "split must hold a batch of .*, got 0 samples"),
        ({"split": torch.zeros(3)}, TypeError, "split must be a Split such as .*, got a Tensor"),
    ],
)
def test_an_impossible_loader_is_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        Loader(**({"split": split_of(), "batch_size": 10} | arguments))


@bad_input
@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (0.5, TypeError), (None, TypeError)])
def test_an_impossible_epoch_is_refused(epoch, error):
    with pytest.raises(error, match=f"epoch must be .*, got {epoch}"):
        Loader(split_of(), batch_size=10).set_epoch(epoch)
