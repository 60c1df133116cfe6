"""What the examples with other trainers share: digits as anybody's data set, and the snapshots of a small teacher."""

import tempfile

import torch
import torch.nn.functional as F

import eekd
from eekd import models, parallel
from eekd.data import load

SIZES: dict = {"num_classes": 10, "in_channels": 1, "image_size": 8}


def _normalised(pixels) -> torch.Tensor:
    return (pixels / 255 - 0.3) / 0.4


def data_sets() -> tuple[list[dict], list[dict]]:
    """Training and validation: a dict an image, by the names of the network's input and of the labels."""
    data = load("digits")
    return tuple(  # pyright: ignore[reportReturnType]
        [{"x": x, "labels": y} for x, y in zip(_normalised(part.images), part.labels, strict=True)]
        for part in (data.train, data.val)
    )


def student() -> torch.nn.Module:
    """A network to train."""
    return models.build("resnet8_w4", **SIZES)


def snapshots(train: list[dict], epochs: int = 4, count: int = 2) -> eekd.SnapshotEnsemble:
    """Trains a teacher for some seconds, in every process, and returns its snapshots, which the first one saved."""
    torch.manual_seed(0)
    teacher, folder = models.build("resnet8", **SIZES), parallel.broadcast(tempfile.mkdtemp)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    recorder = eekd.SnapshotRecorder(folder, epochs=epochs, snapshots=count)
    for _ in range(epochs):
        for batch in torch.utils.data.DataLoader(train, 32, shuffle=True):  # pyright: ignore[reportArgumentType]
            optimizer.zero_grad()
            F.cross_entropy(teacher(batch["x"]), batch["labels"]).backward()
            optimizer.step()
        recorder.step(teacher)
    parallel.barrier()  # until the last snapshot is written
    return eekd.SnapshotEnsemble.load(folder, lambda: models.build("resnet8", **SIZES))


@torch.no_grad()
def accuracy(network: torch.nn.Module, data: list[dict]) -> float:
    """Share of images whose class the network names; it may be on any device."""
    device = next(network.parameters()).device
    images, labels = (torch.stack([row[name] for row in data]).to(device) for name in ("x", "labels"))
    return (network.eval()(images).argmax(1) == labels).float().mean().item()
