"""Seconds of a student's epoch, from a bank, online and in plain PyTorch, and of all in all: results/cost-cpu.json.

python results/cost.py                # about 6 minutes on two quiet cores
python results/cost.py --images 256 --rounds 1 --json /tmp/cost.json

The contenders take turns, an epoch each; medians. A total is computed from the measured epochs, not measured.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from eekd import models
from eekd.bank import __main__ as bank
from eekd.info import environment
from eekd.io.tensors import load_weights
from eekd.train import Session, StudentTrainer, train, train_student
from eekd.train.config import Config, Student, Teacher

EPOCHS, VIEWS, M = 200, 8, 5


def pair(name: str, images: int) -> Config:
    """resnet56-resnet20: fp32, 32 x 32 (Fashion-MNIST resized); resnet8-resnet8_w4: preset fashion-mnist-cpu's."""
    size, batch, low = (32, 64, {})
    if name != "resnet56-resnet20":
        size, batch, low = (28, 128, {"precision": "bf16", "channels_last": True})
    teacher, student = name.split("-")
    return Config(
        data="fashion-mnist",
        image_size=size,
        train_limit=images,
        val_fraction=0.002,
        augment="crop-flip",
        teacher=Teacher(model=teacher, epochs=M, batch_size=batch, snapshots=M, lr=0.01),  # so few steps: no faster
        student=Student(model=student, epochs=1, batch_size=batch),
        students=(),
        **low,
    )


class Short(Session):
    """A session that tests on the validation images: here only time counts."""

    def loader(self, split, *args, **options):
        return super().loader("val" if split == "test" else split, *args, **options)


def plain(session: Session, folder: Path, attention: bool):
    """An epoch of online distillation as one writes it without eekd: teachers in a loop, the loss op by op.

    With attention all M snapshots teach (EEKD), without it the last one (KD).
    """
    config, phase = session.config, StudentTrainer.settings(session.config)
    device, tau, alpha = session.device, phase.temperature, phase.alpha
    teachers, taken = [], []
    for path in sorted(folder.glob("snapshot-*.safetensors"))[0 if attention else -1 :]:
        teacher = models.build(**session.spec(config.teacher))
        teacher.load_state_dict(load_weights(path))
        teacher.to(device, memory_format=session.layout).eval().requires_grad_(False)
        teacher.classifier.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
        teachers.append(teacher)
    student = session.network(phase, 1)
    student.classifier.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    query = nn.Linear(student.classifier.in_features, 8, bias=False)
    keys = nn.Linear(teachers[0].classifier.in_features, 8, bias=False)
    parameters = [*student.parameters(), *query.parameters(), *keys.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=phase.lr, momentum=0.9, nesterov=True, weight_decay=phase.weight_decay)
    loader = session.loader("train", phase, train=True)

    def epoch() -> float:
        start = time.perf_counter()
        student.train()
        for images, labels, _ in loader:
            taken.clear()
            images = images.contiguous(memory_format=session.layout)
            with torch.autocast(device.type, session.dtype, enabled=session.dtype is not torch.float32):
                with torch.no_grad():
                    z = torch.stack([teacher(images) for teacher in teachers]).float()
                    u = torch.stack(taken).float()
                taken.clear()
                logits = student(images).float()
                v = taken[0].float()
            p = (z / tau).softmax(-1)
            if attention:
                e = (
                    torch.einsum(
                        "bd,mbd->mb", query(F.layer_norm(v.detach(), v.shape[1:])), keys(F.layer_norm(u, u.shape[2:]))
                    )
                    / 8**0.5
                )
                p = (e.softmax(0)[..., None] * p).sum(0)
                learned = -p.gather(1, labels[:, None]).log().mean()
                p = p.detach()
            else:
                p, learned = p[0], 0
            kl = F.kl_div((logits / tau).log_softmax(1), p, reduction="batchmean")
            loss = alpha * F.cross_entropy(logits, labels) + (1 - alpha) * tau**2 * kl + learned
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - start

    return lambda: (epoch(), None)


def ours(session: Session, folder: Path, weighting: str, scratch: Path):
    """An epoch of eekd's own trainer; with a bank also the seconds it waited for it."""
    runs = iter(range(10**6))

    def epoch() -> tuple[float, float | None]:
        out = scratch / f"{weighting}-{session.bank is not None}-{next(runs)}"
        train_student(session.config, folder, weighting, out, session=session)
        row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        return row["seconds"], row["seconds_teacher"] if session.bank else None

    return epoch


def measure(name: str, images: int, rounds: int, scratch: Path) -> dict:
    config, run = pair(name, images), scratch / name
    session = Short(config)
    train(config, run, session=session)
    teacher = median(json.loads(x)["seconds"] for x in (run / "teacher" / "metrics.jsonl").read_text().splitlines())
    start = time.perf_counter()
    if bank.main(["--teacher", str(run), "--views", str(VIEWS)]):
        raise SystemExit("the bank could not be written")
    written = time.perf_counter() - start
    torch.use_deterministic_algorithms(False)
    banked = Short(replace(config, bank=str(run / "bank"), teacher_run=str(run), students=("uniform", "attention")))
    folder, kept = run / "teacher", scratch / "students"
    contenders = {
        "CE": ours(session, folder, "ce", kept),
        "bank, uniform": ours(banked, folder, "uniform", kept),
        "bank, attention": ours(banked, folder, "attention", kept),
        "online KD, plain PyTorch": plain(session, folder, attention=False),
        "online KD": ours(session, folder, "last", kept),
        "online EEKD, plain PyTorch": plain(session, folder, attention=True),
        "online EEKD": ours(session, folder, "attention", kept),
    }
    times = {key: [] for key in contenders}
    for turn in range(rounds + 1):
        for key, epoch in contenders.items():
            seconds = epoch()
            if turn:  # the first warms up
                times[key].append(seconds)
        print(f"{name}, round {turn}", flush=True)
    seconds = {key: median(s for s, _ in found) for key, found in times.items()}
    waits = {key: median(w / s for s, w in found) for key, found in times.items() if found[0][1] is not None}
    forwards = {key: 0 for key in seconds} | {key: VIEWS * M for key in waits}
    forwards |= {key: EPOCHS * (M if "EEKD" in key else 1) for key in seconds if key.startswith("online")}
    return {
        "pair": name, "images": len(session.data.train), "batch": config.student.batch_size,
        "precision": config.precision, "image_size": config.image_size,
        "teacher_epoch": teacher, "bank": written, "seconds": seconds, "all": times, "wait": waits,
        # per training image: a teacher's training step counts as three forwards
        "forwards": {key: 3 * EPOCHS * (key != "CE") + count for key, count in forwards.items()},
        "computed_total": {
            key: EPOCHS * s + (key != "CE") * EPOCHS * teacher + (key in waits) * written for key, s in seconds.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pair", action="append", help="resnet56-resnet20 and resnet8-resnet8_w4 by default")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "cost-cpu.json")
    args = parser.parse_args()
    record = {"command": ["python", "results/cost.py", *sys.argv[1:]], "environment": environment(),
              "epochs": EPOCHS, "views": VIEWS, "snapshots": M, "pairs": []}  # fmt: skip
    for name in args.pair or ("resnet56-resnet20", "resnet8-resnet8_w4"):
        with tempfile.TemporaryDirectory() as scratch:
            record["pairs"].append(measure(name, args.images, args.rounds, Path(scratch)))
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
