"""Why attention over the snapshots gains, or does not: students and targets on validation images -> attention.json.

python results/attention.py --seeds 0 1 2 3 4 5 [--cells ce last ...]  # goes on from what the file already holds
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from eekd.config import Config, Student, Teacher
from eekd.snapshots import SnapshotEnsemble, SnapshotRecorder
from eekd.trainers import Session
from eekd.trainers.loop import learning_rate

HERE = Path(__file__).parent
WORK = HERE.parent / "runs" / "attention"  # teachers and what they say, kept for the next start
CONFIG = Config(
    data="fashion-mnist", train_limit=10_000, val_fraction=0.5, augment="none", precision="bf16", channels_last=True,
    teacher=Teacher(model="resnet8", epochs=20, batch_size=128, schedule="cosine"),
    student=Student(model="resnet8_w4", epochs=10, batch_size=128, schedule="cosine"),
)  # fmt: skip


def sgd(phase, *groups: dict) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=phase.lr, momentum=0.9, nesterov=phase.nesterov, weight_decay=phase.weight_decay)


def teacher(session: Session, seed: int) -> dict:
    """Logits, features (M, N, ...) and labels of a teacher's snapshots on training and validation images."""
    folder, phase = WORK / f"teacher-{seed}", session.config.teacher
    known = folder / "known.safetensors"
    if known.is_file():
        return load_file(known)
    model, loader = session.network(phase, 2 * seed), session.loader("train", phase, train=True)
    recorder = SnapshotRecorder(folder, epochs=phase.epochs, snapshots=phase.snapshots, spec=session.spec(phase))
    optimizer, total = sgd(phase, {"params": model.parameters()}), phase.epochs * len(loader)
    for epoch in range(phase.epochs):
        model.train()
        loader.set_epoch(epoch)
        for step, (images, labels, _) in enumerate(loader, epoch * len(loader)):
            optimizer.param_groups[0]["lr"] = learning_rate(phase, step, total)
            optimizer.zero_grad()
            F.cross_entropy(session.run(model, images).float(), labels).backward()
            optimizer.step()
        recorder.step(model)
    ensemble, said = SnapshotEnsemble.load(folder).to(memory_format=session.layout), {}
    for split in ("train", "val"):
        batches = [
            (*(x.float().clone() for x in session.run(ensemble, images)), labels)
            for images, labels, _ in session.loader(split, phase)
        ]
        logits, features, labels = zip(*batches, strict=True)
        said |= {f"{split}_logits": torch.cat(logits, 1), f"{split}_features": torch.cat(features, 1),
                 f"{split}_labels": torch.cat(labels)}  # fmt: skip
    save_file(said, known)
    return said


if __name__ == "__main__":
    import dataclasses
    import sys

    for seed in map(int, sys.argv[1:]):
        teacher(Session(dataclasses.replace(CONFIG, seed=seed)), seed)
