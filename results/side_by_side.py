"""Plain distillation as others train it beside eekd: seconds per epoch and accuracy. results/side-by-side.json.

python results/side_by_side.py                       # the preset fashion-mnist-cpu, shortened: some minutes
python results/side_by_side.py --preset digits --epochs 2 --seeds 1 --json /tmp/side-by-side.json    # a try

Four students of one teacher, from the same weights, with the same images in the same order, optimizer and learning
rates; fp32. "torchdistill" is its KDLoss in a plain loop, "timm" its LogitDistillationTask in the same loop, both
taught by the last snapshot, as eekd's "last" is; "attention" is EEKD by all of them. The images change with every epoch
(crop), so that all run their teacher in every step. Seconds are of training alone. Needs torchdistill and timm.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from eekd.info import environment
from eekd.train import StudentTrainer, prepare, train_student, train_teacher
from eekd.train.config import Config
from eekd.train.metrics import evaluate
from eekd.train.optim import build_optimizer, learning_rate
from eekd.train.presets import preset
from eekd.train.session import Session

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # student, images, labels


def torchdistill(config: Config, student: nn.Module, teacher: nn.Module) -> Loss:
    from torchdistill.losses.mid_level import KDLoss

    phase = StudentTrainer.settings(config)
    loss = KDLoss(".", "output", ".", "output", temperature=phase.temperature, alpha=phase.alpha)

    def of(student, images, labels):
        with torch.no_grad():
            known = teacher(images)
        said = student(images)
        return loss({".": {"output": said}}, {".": {"output": known}}, labels)

    return of


def timms(config: Config, student: nn.Module, teacher: nn.Module) -> Loss:
    from timm.task.distillation import DistillationTeacher, LogitDistillationTask

    phase, same = StudentTrainer.settings(config), {"mean": (0.0,), "std": (1.0,)}  # images come normalised
    student.pretrained_cfg = teacher.pretrained_cfg = same
    task = LogitDistillationTask(
        student_model=student, teacher_model=DistillationTeacher(teacher), criterion=nn.CrossEntropyLoss(),
        task_loss_weight=phase.alpha, temperature=phase.temperature, device=torch.device("cpu"), verbose=False,
    )  # fmt: skip
    return lambda student, images, labels: task(images, labels)["loss"]


def plain(session: Session, folder: Path, make: Callable) -> dict:
    """A student by a loop as one writes it."""
    config, phase = session.config, session.config.student
    student = session.network(phase, 2 * config.seed + 1)
    teacher = session.load_snapshots(folder, [-1], features=False).models[0].eval()
    loss_of, loader = make(config, student, teacher), session.loader("train", phase, train=True)
    optimizer, total, step, seconds = build_optimizer(phase, student), phase.epochs * len(loader), 0, []
    for epoch in range(phase.epochs):
        student.train()
        loader.set_epoch(epoch)
        start = time.perf_counter()
        for images, labels, _ in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(phase, step, total)
            optimizer.zero_grad()
            loss_of(student, images.contiguous(memory_format=session.layout), labels).backward()
            optimizer.step()
            step += 1
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "test": evaluate(session, student, session.loader("test", phase))["accuracy"]}


def ours(session: Session, folder: Path, weighting: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, weighting)
        record = train_student(session.config, folder, weighting, out, session=session)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"seconds": [row["seconds"] for row in rows], "test": record["test"]["accuracy"]}


CONTENDERS: dict[str, Callable[[Session, Path], dict]] = {
    "torchdistill": lambda session, folder: plain(session, folder, torchdistill),
    "timm": lambda session, folder: plain(session, folder, timms),
    "eekd, last": lambda session, folder: ours(session, folder, "last"),
    "eekd, attention": lambda session, folder: ours(session, folder, "attention"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="fashion-mnist-cpu")
    parser.add_argument("--epochs", type=int, default=5, help="of teacher and students")
    parser.add_argument("--train-limit", type=int, default=6000, help="images to train on, at most")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("side-by-side.json"))
    args = parser.parse_args()
    config = preset(args.preset)
    changes = dict(augment="crop", precision="fp32", device="cpu", seeds=1)
    if config.data != "digits":  # which has fewer
        changes["train_limit"] = args.train_limit
    many = {"epochs": args.epochs, "snapshots": min(config.teacher.snapshots, args.epochs)}
    changes["teacher"] = dataclasses.replace(config.teacher, **many)
    changes["student"] = dataclasses.replace(config.student, epochs=args.epochs)
    config, rows = dataclasses.replace(config, **changes), {name: [] for name in CONTENDERS}
    for seed in range(args.seeds):
        session = prepare(dataclasses.replace(config, seed=seed))
        with tempfile.TemporaryDirectory() as scratch:
            train_teacher(session.config, Path(scratch, "teacher"), session=session)
            names = [*CONTENDERS]
            for name in names[seed % len(names) :] + names[: seed % len(names)]:  # no one is always the first
                found = CONTENDERS[name](session, Path(scratch, "teacher"))
                rows[name].append({"seed": seed, **found})
                print(f"seed {seed}, {name}: {mean(found['seconds']):.2f} s an epoch, {found['test']:.2%}", flush=True)
    args.json.write_text(json.dumps({
        "command": ["python", *sys.argv], "environment": environment(), "preset": args.preset,
        "config": json.loads(config.to_json()), "beside": rows,
    }, indent=2) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
