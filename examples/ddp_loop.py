"""EEKD in a loop of your own, under DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/ddp_loop.py

Rank r of R sees every R-th sample. What learns is wrapped and called through its wrapper: the teacher, and then the
student together with its loss, whose attention learns too.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import eekd
from eekd import models, parallel
from eekd.data import Loader, load


def main(epochs: int = 4, snapshots: int = 2) -> float:
    """Trains a teacher and a student on digits; returns the student's accuracy on the validation images."""
    data = load("digits")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loader = Loader(data.train, batch_size=32, drop_last=True, rank=rank, world_size=world_size)
    folder = parallel.broadcast(tempfile.mkdtemp)  # all processes read the snapshots that rank 0 writes

    def network(name):
        torch.manual_seed(0)
        return models.build(name, num_classes=10, in_channels=1, image_size=data.image_size)

    teacher = DistributedDataParallel(network("resnet8"))
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    recorder = eekd.SnapshotRecorder(folder, epochs=epochs, snapshots=snapshots)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels, _ in loader:
            optimizer.zero_grad()
            F.cross_entropy(teacher(images), labels).backward()
            optimizer.step()
        recorder.step(teacher)
    dist.barrier()  # until the last snapshot is written

    ensemble = eekd.SnapshotEnsemble.load(folder, lambda: network("resnet8"))
    distilled = DistributedDataParallel(eekd.Distilled(network("resnet8_w4"), ensemble))
    optimizer = torch.optim.SGD(distilled.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels, _ in loader:
            optimizer.zero_grad()
            distilled(images, labels=labels).loss.backward()
            optimizer.step()

    student = distilled.module.student.eval()
    with torch.no_grad():
        val = Loader(data.val, batch_size=len(data.val), train=False)
        return next((student(images).argmax(1) == labels).float().mean().item() for images, labels, _ in val)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    accuracy = main(*map(int, sys.argv[1:]))
    if dist.get_rank() == 0:
        print(f"validation accuracy {accuracy:.1%}")
    dist.destroy_process_group()
