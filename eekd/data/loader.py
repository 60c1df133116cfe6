"""Batches of normalised images on the device; order and augmentation depend on (seed, epoch, sample) only."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import AUGMENTATIONS, ORDER, augment, random_bits, random_flip, resized_crop_boxes
from .dataset import Split
from .encoded import Encoded
from .opened import check_int


class Batch(NamedTuple):
    """Images (B, C, S, S) float32, normalised; labels (B,) int64; index (B,) int64, places in the split."""

    images: Tensor
    labels: Tensor
    index: Tensor


class Loader:
    """Batches of a split on `device`, once through per iteration.

    train=True shuffles by a hash of (seed, epoch, sample) and augments by one of (view_seed, view, sample);
    train=False does neither. The view is the epoch, modulo `views` where given, and view_seed is `seed` where
    not given: a logit bank names both. A split in memory moves to the device whole; an encoded one is decoded
    by `workers` processes (0: by this one).

    Rank r of `world_size` takes every world_size-th sample from the r-th on, so that the k-th batches of all
    ranks together are the k-th batch of one loader world_size times as large, `rows(k)` samples. Every rank has
    equally many batches: of a last one that is too small for all, training leaves the samples out, and else some
    ranks get a batch of none.

    Raises TypeError or ValueError for impossible arguments, and for training without a single batch.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        augment: str = "none",
        seed: int = 0,
        device: str | torch.device = "cpu",
        train: bool = True,
        drop_last: bool = False,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        views: int | None = None,
        view_seed: int | None = None,
    ):
        if not isinstance(split, Split):
            raise TypeError(f"split is a {type(split).__name__}, wanted a Split such as load(...).train")
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment is {augment!r}, wanted one of {', '.join(AUGMENTATIONS)}")
        self.split, self.train, self.drop_last = split, train, drop_last
        self.augment = augment if train else "none"
        self.seed = check_int("seed", seed)
        self.views = None if views is None else check_int("views", views, 1)
        self.view_seed = seed if view_seed is None else check_int("view_seed", view_seed)
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.world_size = check_int("world_size", world_size, 1)
        self.rank = check_int("rank", rank, 0)
        check_int("workers", workers, 0)
        if rank >= world_size:
            raise ValueError(f"rank is {rank}, wanted less than world_size, which is {world_size}")
        if train and not len(self):
            raise ValueError(f"{len(split)} samples make no batch of {batch_size} on {world_size} ranks")
        self.device = torch.device(device)
        self.set_epoch(0)

        mean, std = 255 * torch.tensor([split.mean, split.std], dtype=torch.float64)[:, None, :, None, None]
        self._mean, self._scale = mean.float().to(self.device), (1 / std).float().to(self.device)
        self._labels = split.labels.to(self.device)
        self._encoded = split.images if isinstance(split.images, Encoded) else None
        if isinstance(split.images, Encoded):
            self._work = []  # of the epoch: (view, samples of a batch), each batch for one process
            self._decoder = DataLoader(
                _Decoder(split.images, split.labels, self.view_seed, crop=self.augment == "imagenet"),
                batch_size=None,
                sampler=self._work,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # else every epoch would draw from the global one
            )
        else:
            self._images = split.images.to(self.device)

    def set_epoch(self, epoch: int, view: int | None = None):
        """Makes the next iteration that of `epoch`, augmented as `view`: by default the epoch, modulo `views`."""
        self.epoch = check_int("epoch", epoch, 0)
        if view is None:
            view = epoch % self.views if self.views else epoch
        self.view = check_int("view", view, 0)
        self.skip(0)

    def skip(self, batches: int):
        """Leaves out the first `batches` of the next iteration and of `indices`, until `set_epoch`."""
        self.first = check_int("batches", batches, 0)

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.world_size * self.batch_size)
        return full + (not self.drop_last and rest >= (self.world_size if self.train else 1))

    def rows(self, batch: int) -> int:
        """How many samples the batches of that number hold on all ranks together."""
        whole = self.world_size * self.batch_size
        return min(whole, len(self.split) - batch * whole)

    def indices(self, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
        """The samples of each of the epoch's batches that are not skipped, as `Batch.index` will name them."""
        order = torch.arange(len(self.split), device=device)
        if self.train:
            order = random_bits(self.seed, self.epoch, ORDER, order).argsort(stable=True)
        parts = order[self.rank :: self.world_size].split(self.batch_size)
        return (*parts, order[:0])[self.first : len(self)]  # the last one of none is beyond the end, mostly

    def __iter__(self) -> Iterator[Batch]:
        indices = self.indices("cpu" if self._encoded is not None else self.device)
        return self.replay([(self.view, index) for index in indices])

    def replay(self, work: Sequence[tuple[int, Tensor]]) -> Iterator[Batch]:
        """A batch for each (view, index) of `work`: the samples `index` (B,) int64 augmented as that view."""
        seed, work = self.view_seed, list(work)
        if self._encoded is not None:
            self._work[:] = work
            for (view, _), (index, images, faults) in zip(work, self._decoder, strict=True):
                if isinstance(images, Exception):
                    raise images
                self._encoded.bad.note(faults)
                index, images = (x.to(self.device, non_blocking=True) for x in (index, images))
                if self.augment == "imagenet":  # the crop was cut where the image was decoded
                    yield self._batch(random_flip(images, index, seed=seed, view=view), index)
                else:
                    yield self._batch(augment(images, index, kind=self.augment, seed=seed, view=view), index)
        else:
            for view, index in work:
                index = index.to(self.device)
                images = augment(self._images[index], index, kind=self.augment, seed=seed, view=view)
                yield self._batch(images, index)

    def _batch(self, images: Tensor, index: Tensor) -> Batch:
        # Two kernels, since a fused multiply-add would round differently from one device to another.
        return Batch(images.float().sub_(self._mean).mul_(self._scale), self._labels[index], index)


class _Decoder(Dataset):
    """Decodes a batch of images, cut by a random resized crop if asked; an error is returned in their place.

    Raised in a worker, it would come with the worker's traceback in its text.
    """

    def __init__(self, images: Encoded, labels: Tensor, seed: int, crop: bool):
        self.images, self.labels, self.seed, self.crop = images, labels, seed, crop

    def __getitem__(self, work: tuple[int, Tensor]) -> tuple[Tensor, Tensor | Exception, list[str]]:
        view, index = work
        images, faults = [], []
        try:
            for i in index:

                def choose(height, width, i=i):
                    return resized_crop_boxes(i[None], height, width, seed=self.seed, view=view)[0].tolist()

                image, said = self.images.decode_or_stand_in(int(i), self.labels, choose if self.crop else None)
                images.append(image)
                faults += said
            empty = torch.empty(0, *self.images.shape[1:], dtype=torch.uint8)
            return index, torch.stack(images) if images else empty, faults
        except (ImportError, OSError, ValueError) as error:
            return index, error, faults
