"""Batches of normalised images on the device; order and augmentation depend on (seed, epoch, sample) only."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import (
    AUGMENTATIONS,
    ORDER,
    augment,
    crop,
    flipped_rows,
    flips,
    random_bits,
    random_erase,
    random_flip,
    resized_crop_choosers,
)
from .dataset import Split
from .encoded import Encoded
from .mixing import mix, pairs, partners, shuffled, soft_labels
from .opened import check_int
from .policies import POLICIES, apply_policy, changes, pillow

_CACHED = 1 << 17  # numbers that a core's cache holds
SHOWN = ("auto_augment", "erasing", "mixup", "cutmix")  # arguments that decide what a view shows, beside augment


class Batch(NamedTuple):
    """Images (B, C, S, S) float32, normalised; labels; index (B,) int64, positions in the split.

    Labels are (B,) int64, or (B, C) float32 if they are mixed or smoothed.
    """

    images: Tensor
    labels: Tensor
    index: Tensor


class Loader:
    """Batches of a split on `device`; one iteration goes through the split once.

    train=True shuffles by a hash of (seed, epoch, sample) and augments by a hash of (view_seed, view, sample);
    train=False does neither. The view is the epoch, modulo `views` if that is given. view_seed is `seed` by default;
    for a logit bank, give the bank's views and seed. A split in memory is moved to the device as a whole. An encoded
    split, and the files that a random resized crop is cut from, are decoded by `workers` processes (0: by this one).

    In training images are cropped (`augment`), changed by `auto_augment` ("trivial" or "rand", by the workers),
    flipped, partly erased with probability `erasing`, and mixed by `mixup` and `cutmix`, the parameters of their
    Beta distributions: see eekd.data.policies and eekd.data.mixing. Mixed or smoothed labels are (B, C), with C from
    `classes`. With `repeats` R an epoch takes every R-th sample of the shuffled split, and each batch shows its samples
    in R views: view V of the epoch becomes the views R V to R V + R - 1. Source: Hoffer et al., "Augment Your Batch"
    (2020).

    Rank r of `world_size` takes every world_size-th sample from the r-th on. The k-th batches of all ranks together are
    the k-th batch of one loader with world_size times the batch size, `rows(k)` samples. Every rank has the same number
    of batches. If the last batch is too small for all ranks, training drops it, and otherwise some ranks get an empty
    batch. Samples that are mixed with each other are in the same batch, so each is decoded once.

    Attributes: `encoded`, the images that are decoded for every view, None where they are in memory.

    Raises TypeError or ValueError for impossible arguments, and for training without a single batch; ImportError for
    auto_augment without Pillow.
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
        auto_augment: str = "none",
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        classes: int | None = None,
        repeats: int = 1,
    ):
        if not isinstance(split, Split):
            raise TypeError(f"split must be a Split such as load(...).train, got a {type(split).__name__}")
        kinds = ("augment", augment, AUGMENTATIONS), ("auto_augment", auto_augment, POLICIES)
        for name, value, choices in kinds:
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if not 0 <= erasing <= 1 or not 0 <= label_smoothing < 1 or not min(mixup, cutmix) >= 0:
            raise ValueError(
                "erasing must be from 0 to 1, label_smoothing from 0 to below 1, mixup and cutmix at least 0, got "
                f"{erasing}, {label_smoothing}, {mixup} and {cutmix}"
            )
        if (mixup or cutmix or label_smoothing) and classes is None:
            raise ValueError("classes must be given, the number of them, to mix or smooth labels")
        self.split, self.train, self.drop_last = split, train, drop_last
        self.augment = augment if train else "none"
        shown = zip(SHOWN, (auto_augment, erasing, mixup, cutmix), strict=True)
        self.shown: dict[str, Any] = {name: value for name, value in shown if train and value not in (0, "none")}
        self.smoothing, self.classes = label_smoothing if train else 0.0, classes or 0
        self.mixes = not self.shown.keys().isdisjoint(("mixup", "cutmix"))
        self.varies = self.augment != "none" or bool(self.shown)
        self.seed = check_int("seed", seed)
        self.views = None if views is None else check_int("views", views, 1)
        self.view_seed = seed if view_seed is None else check_int("view_seed", view_seed)
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.repeats = check_int("repeats", repeats, 1) if train else 1
        if batch_size % self.repeats or (views is not None and self.repeats > 1):
            got = f"batches of {batch_size}" if views is None else "a bank's views"
            raise ValueError(f"repeats must divide batch_size, and be 1 with views, got {repeats} with {got}")
        self.world_size = check_int("world_size", world_size, 1)
        self.rank = check_int("rank", rank, 0)
        check_int("workers", workers, 0)
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size, {world_size}, got {rank}")
        if train and not len(self):
            raise ValueError(f"split must hold a batch of {batch_size} on {world_size} ranks, got {len(split)} samples")
        self.device = torch.device(device)
        self._pairs = lru_cache(2)(self._pairs_of)
        self.set_epoch(0)

        mean, std = 255 * torch.tensor([split.mean, split.std], dtype=torch.float64)[:, None, :, None, None]
        self._mean, self._scale = mean.float().to(self.device), (1 / std).float().to(self.device)
        self._fill = mean.flatten().round().to(torch.uint8).to(self.device)
        self._labels = split.labels.to(self.device)
        policy = self.shown.get("auto_augment", "none")
        images = split.images if self.augment != "imagenet" or split.files is None else split.files
        self.encoded = images if isinstance(images, Encoded) else None
        self._decoder: DataLoader | None = None
        self._images: Tensor | None = None
        if isinstance(images, Tensor) and policy == "none":
            self._images = images.to(self.device)
        else:
            if policy != "none":
                pillow()
            self._work = []  # of the epoch: (view, samples of a batch), each batch for one process
            self._decoder = DataLoader(
                _Decoder(images, split.labels, self._fill.cpu(), self.view_seed, self.augment, self.shown),
                batch_size=None,
                sampler=self._work,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # else every epoch would draw from the global one
            )
        # A GPU would wait for the number of different images that it mixes: there each is made as often as it is used.
        self._twice = self._images is not None and self.device.type != "cpu"

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
        full, rest = divmod(self._samples, self._whole)
        return full + (not self.drop_last and rest >= (self.world_size if self.train else 1))

    @property
    def _samples(self) -> int:
        """How many different samples an epoch shows."""
        return len(self.split) // self.repeats

    @property
    def _whole(self) -> int:
        """How many different samples a full batch of all ranks together holds."""
        return self.world_size * (self.batch_size // self.repeats)

    def rows(self, batch: int) -> int:
        """How many images the batches of that number hold on all ranks together."""
        return self.repeats * min(self._whole, self._samples - batch * self._whole)

    def indices(self, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
        """The samples of each of the epoch's batches that are not skipped, as `Batch.index` will name them."""
        return tuple(part.repeat(self.repeats) for part in self._parts(device))

    def _parts(self, device: str | torch.device) -> tuple[Tensor, ...]:
        """The different samples of each of the epoch's batches."""
        if self.train and self.mixes:
            order = shuffled(self._pairs(self.view * self.repeats)[0], self.seed, self.epoch, ORDER)
            order = self._together(order[: self._samples]).to(device)
        else:
            order = torch.arange(len(self.split), device=device)
            if self.train:
                order = random_bits(self.seed, self.epoch, ORDER, order).argsort(stable=True)[: self._samples]
        parts = order[self.rank :: self.world_size].split(self.batch_size // self.repeats)
        return (*parts, order[:0])[self.first : len(self)]  # the last one of none is beyond the end, mostly

    def __iter__(self) -> Iterator[Batch]:
        parts, first = self._parts("cpu" if self._decoder is not None else self.device), self.view * self.repeats
        batches = self.replay([(first + i, index) for index in parts for i in range(self.repeats)])
        if self.repeats == 1:
            return batches
        each = zip(*[batches] * self.repeats, strict=True)  # the views of the same samples
        return (Batch(*map(torch.cat, zip(*views, strict=True))) for views in each)

    def replay(self, work: Sequence[tuple[int, Tensor]]) -> Iterator[Batch]:
        """A batch for each (view, index) of `work`: the samples `index` (B,) int64 augmented as that view."""
        work = list(work)
        needed = [(view, self._needed(view, index)) for view, index in work]
        shown = self._decoded(needed) if self._decoder is not None else map(self._gathered, needed)
        for (view, index), (images, present) in zip(work, shown, strict=True):
            yield self._batch(images, present, index.to(self.device), view)

    def _pairs_of(self, view: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The samples in pairs, and everyone's partner by kind of device."""
        paired = pairs(len(self.split), seed=self.view_seed, view=view // self.repeats)
        partner = partners(paired)
        return paired, {"cpu": partner, self.device.type: partner.to(self.device)}

    def _partner(self, view: int, index: Tensor) -> Tensor:
        """Whom each of the samples `index` is mixed with."""
        return self._pairs(view)[1][index.device.type][index]

    def _together(self, order: Tensor) -> Tensor:
        """The order with neighbours on one rank, each taking every world_size-th sample, and the same batches."""
        full = len(order) // self._whole * self._whole
        parts = order[:full].view(-1, self.world_size, self.batch_size // self.repeats).transpose(1, 2)
        return torch.cat([parts.reshape(-1), order[full:]])

    def _needed(self, view: int, index: Tensor) -> Tensor:
        """The samples whose images make those of `index`: themselves and, where they are mixed, their partners."""
        if not self.mixes:
            return index
        both = torch.cat([index, self._partner(view, index)])
        return both if self._twice else both.unique()

    def _gathered(self, work: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Images in memory, cropped, mirrored and partly erased."""
        view, index = work
        index, draw = index.to(self.device), dict(seed=self.view_seed, view=view)
        images = augment(self._images[index], index, kind=self.augment, **draw)
        if probability := self.shown.get("erasing"):
            images = random_erase(images, index, self._fill, probability, **draw)
        return images, index

    def _decoded(self, work: list[tuple[int, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images that the workers made."""
        self._work[:] = [(view, index.cpu().numpy()) for view, index in work]  # a tensor would travel as a file
        decoded = zip(work, self._decoder, strict=True)  # pyright: ignore[reportArgumentType]
        for (_, index), (images, faults) in decoded:
            if isinstance(images, Exception):
                raise images
            if self.encoded is not None:
                self.encoded.bad.note(faults)
            yield images.to(self.device, non_blocking=True), index.to(self.device)

    def _batch(self, images: Tensor, present: Tensor, index: Tensor, view: int) -> Batch:
        """The samples `index` in view `view`, of the images of the samples `present`, which are the same or more."""
        draw, labels, others, share = dict(seed=self.view_seed, view=view), self._labels[index], None, None
        if self.mixes:
            partner = self._partner(view, index)
            if self._twice:
                own, other = images.chunk(2)
            else:
                own, other = (images[torch.searchsorted(present, x.contiguous())] for x in (index, partner))
            by = {name: self.shown.get(name, 0.0) for name in ("mixup", "cutmix")}
            images, share = mix(own, other, index, **by, **draw)
            others = self._labels[partner]
        if self.mixes or self.smoothing:
            labels = soft_labels(labels, self.classes, self.smoothing, others, share)
        return Batch(self._normalised(images), labels, index)

    def _normalised(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) uint8 as float32, less the mean, over std: the same bits on every device."""
        # Two operations, since a fused multiply-add would round otherwise.
        if images.device.type != "cpu":
            return images.float().sub_(self._mean).mul_(self._scale)
        # By NumPy, in one thread, in parts that a cache holds: torch's threads would wait for cores that workers use.
        normalised, mean, scale = torch.empty(images.shape), self._mean.numpy(), self._scale.numpy()
        step = max(1, _CACHED // max(images[:1].numel(), 1))
        for part, pixels in zip(normalised.split(step), images.split(step), strict=True):
            out = part.numpy()
            np.subtract(pixels.numpy(), mean, out=out)
            np.multiply(out, scale, out=out)
        return normalised


class _Decoder(Dataset):
    """Makes the images of a batch as a view shows them before they are mixed; an error is returned in their place.

    Raised in a worker, it would come with the worker's traceback in its text.
    """

    def __init__(self, images: Tensor | Encoded, labels: Tensor, fill: Tensor, seed: int, kind: str, shown: dict):
        self.images, self.labels, self.fill, self.seed, self.kind = images, labels, fill, seed, kind
        self.policy, self.erasing = shown.get("auto_augment", "none"), shown.get("erasing", 0.0)

    def __getitem__(self, work: tuple[int, np.ndarray]) -> tuple[Tensor | Exception, list[str]]:
        view, index = work
        try:
            return self._shown(torch.from_numpy(index), dict(seed=self.seed, view=view))
        except (ImportError, OSError, ValueError) as error:
            return error, []

    def _shown(self, index: Tensor, draw: dict) -> tuple[Tensor, list[str]]:
        """The images (B, C, S, S) uint8, and what was wrong with some."""
        if isinstance(self.images, Tensor):
            images, faults, done = self.images[index], [], False
        else:
            done = self.kind in ("none", "imagenet")  # then all is done to an image while it is Pillow's
            images, faults = self._decoded(self.images, index, done, draw)
        if not done:
            images = apply_policy(crop(images, index, kind=self.kind, **draw), index, self.policy, **draw)
            images = random_flip(images, index, **draw) if flips(self.kind) else images
        if self.erasing:
            images = random_erase(images, index, self.fill, self.erasing, **draw)
        return images, faults

    def _decoded(self, images: Encoded, index: Tensor, whole: bool, draw: dict) -> tuple[Tensor, list[str]]:
        """Images decoded and, where this is the `whole` of it, cropped, changed and mirrored."""
        none = [None] * len(index)
        chooses = resized_crop_choosers(index, **draw) if self.kind == "imagenet" else none
        by_policy = none
        if whole and self.policy != "none":
            by_policy = changes(index, self.policy, images.image_size, **draw)
        if whole and flips(self.kind):
            by_policy = [
                partial(_mirrored, change) if flipped else change
                for change, flipped in zip(by_policy, flipped_rows(index, **draw).tolist(), strict=True)
            ]
        decoded, faults = torch.empty(len(index), *images.shape[1:], dtype=torch.uint8), []
        for row, (i, choose, change) in enumerate(zip(index.tolist(), chooses, by_policy, strict=True)):
            decoded[row], problems = images.decode_or_stand_in(i, self.labels, choose, change)
            faults += problems
        return decoded, faults


def _mirrored(change: Callable | None, image):
    """A Pillow image changed and then mirrored left to right."""
    return (image if change is None else change(image)).transpose(0)
