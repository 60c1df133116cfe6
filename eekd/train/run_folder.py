"""The run folder: what lies in it, and how it is written.

    RUN/
      config.json             every setting (eekd.train.config.Config): --config RUN/config.json runs it again
      environment.json        format, command, device, started, what eekd.info.environment() says, config_sha256, and
                              data: name, fingerprint, classes, class_names in their order, and train, val, test: how
                              many images; found: of each part as it was found, how many images of each class
      files.txt.gz            the names of the data's files, where they are files of a folder, one a line
      summary.json            format, seconds, rows: the final table (below), findings: sentences on what in it was
                              not wanted, and what to try (eekd.train.findings); absent until the run has ended
      seed-0/ seed-1/ ...     a run folder for each seed, in place of all below, where config.json asks for several
                              seeds; summary.json then speaks of all (eekd.train.seeds)
      teacher/                absent when config.json names a teacher_run, whose RUN/teacher is then meant
        manifest.json *.safetensors      the M snapshots (eekd.snapshots)
        metrics.jsonl metrics.csv        a line per epoch (below)
        checkpoints/                     the state of a phase in progress (eekd.train.checkpoints); gone at its end
        snapshots.json                   what the snapshots know (below); written last, so it marks a finished teacher
        model.py model/                  the file of a network of the user's own, as it was, and the neighbours that
                                         it imports; students have theirs
      students/WEIGHTING/     one folder per student: ce, last, uniform, attention, ...
        student.safetensors              weights at the end of the last epoch
        student.json                     provenance (below); written last, so it marks a finished student
        attention.safetensors            the attention's own weights, where the weighting is attention
        criterion.safetensors            what else was trained by a method of the user's own
        method.py method/                the file of a method of the user's own, as it was, and its neighbours
        metrics.jsonl metrics.csv checkpoints/
      **/non-finite-STEP.*, loss-differs.*   what was wrong with a step or a loss (eekd.train.evidence)
      .lock                   held by the process that trains
      **/events.out.tfevents.*           TensorBoard events, only when asked for
      **/trackers.json                   names of a phase at Weights & Biases and MLflow, only when asked for

metrics.jsonl has one object per epoch; metrics.csv the same, a list spread over columns (weights_1, ...):

    epoch, step             from 1; optimiser steps taken so far
    lr                      at the last step of the epoch
    train_loss              cross-entropy, or alpha CE + (1 - alpha) temperature^2 KL without the attention's
    train_accuracy          of the network in training mode, on augmented images
    val_loss, val_accuracy  cross-entropy and accuracy on the validation images
    seconds                 of training in the epoch, validation left out
    seconds_teacher         forward of the snapshots (0 where there are none), or the wait for their logit bank
    seconds_forward         forward of the network being trained
    seconds_backward        loss, backward and optimiser step; what remains of `seconds` is the wait for data
    skipped                 steps left out since they were not finite, counted in `step`; where non_finite is skip

A method of the user's own adds train_NAME for each measurement NAME. A student with snapshots has also:

    weights                 list of M: mean weight of each snapshot in training
    weight_entropy          mean over samples of the entropy of the weights, in nats (uniform: log M)
    train_attention_loss    -log p_y of the fused target at the student's temperature
    val_target_nll, val_target_nll_uniform   the same on validation images, under these weights and under 1/M
    val_kd_loss, val_kd_loss_uniform         alpha CE + (1 - alpha) temperature^2 KL to either target

snapshots.json: format, setup (see eekd.train.checkpoints), val and test, each with `members`, a list of M + 1 objects
(the snapshots in order, then their ensemble: the uniform mean of probabilities) of `name`, `accuracy`, `nll`, `ece`
and `reliability` (lists `confidence`, `accuracy` and `count` over 15 equal bins of the confidence, null where a bin
is empty), all at temperature 1, and with `disagreement`, M x M: the fraction of images on which two snapshots
predict different classes; metrics: SHA-256 of the metrics files. Of a teacher that others trained (--checkpoints)
also sources: path and sha256 of the checkpoint that each snapshot was copied from; its metrics have no line.

student.json: format, setup, weighting, spec (of eekd.models.build), classes (their names), preprocessing (of
eekd.data.ImageData: from an image to the network's input), sha256, attention_sha256 (or null), loss
(its settings), weights (at the end, or null), ema (decay of the average of its weights that was kept, or null), seed,
commit, metrics (SHA-256 of its files), val and test (loss, accuracy), seconds_per_epoch, and teacher: null for ce,
else run (relative to this folder), spec, snapshots: file, sha256 and step of each that taught, and bank: null, or path
(relative to this folder) and sha256 of the manifest of the bank it was taught from.

A row of summary.json: kind (teacher | snapshot | ensemble | student), name (a student's is its weighting),
model, parameters, epochs, val_accuracy, test_accuracy, gain (of a student over the ce student in test
accuracy, else null) and seconds_per_epoch (null for snapshots and ensemble). Accuracies are fractions of 1.

Every JSON object ends with the SHA-256 of the rest of its file (eekd.io.tensors), which is checked when it is read.

Test images are touched once, at the end of a phase, and what is reported is the last epoch.
"""

import gzip
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error
from typing import Any

import torch

from eekd.data import ImageData
from eekd.data.formats import read_bytes
from eekd.data.walk import counted
from eekd.info import environment
from eekd.io.files import printable, read_checked, read_json, sha256_of, write_atomic, write_json_atomic
from eekd.train.config import Config

FORMAT = 1
METRICS = "metrics.jsonl", "metrics.csv"
FILES = "files.txt.gz"


def metrics_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of the metrics files of a phase that has ended, for the record that marks its end."""
    return {name: sha256_of(folder / name) for name in METRICS}


def read_record(path: Path, *keys: str) -> dict:
    """The object in a JSON file that has these keys; ValueError where it has not, or another format."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT or not record.keys() >= set(keys):
        wanted = f"an object with format {FORMAT}" + f" and {', '.join(keys)}" * bool(keys)
        raise ValueError(f"{path} must be {wanted}, got {repr(record)}")
    return record


def check_metrics(folder: Path, record: dict) -> None:
    """ValueError or FileNotFoundError where a metrics file is not the one that `record` of its phase names."""
    if "metrics" not in record:
        return
    hashes = record["metrics"]
    if not isinstance(hashes, dict) or hashes.keys() != set(METRICS):
        raise ValueError(f"{folder} must have a record with metrics of {' and '.join(METRICS)}, got {repr(hashes)}")
    for name, sha256 in hashes.items():
        read_checked(folder / name, sha256)


def read_metrics(folder: Path, record: dict) -> list[dict]:
    """The rows of metrics.jsonl; raises what `check_metrics` does."""
    check_metrics(folder, record)
    return [json.loads(line) for line in (folder / METRICS[0]).read_text().splitlines()]


def finite(value: Any) -> Any:
    """`value` with None in place of NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_folder(out: str | Path | None, name: str) -> Path:
    """Makes the folder `out`, or the first free runs/NAME-1, -2, ...; FileExistsError if it is not empty.

    What a kill left there before config.json was written does not count.
    """
    if out is not None:
        out = Path(out)
        early = {".lock", FILES, f".{FILES}.tmp", "environment.json", ".environment.json.tmp", ".config.json.tmp"}
        left = (".nfs", ".fuse_hidden", ".DS_Store", "._")  # what disks of a network and systems leave behind
        if (
            out.is_file()
            or out.is_dir()
            and any(path.name not in early and not path.name.startswith(left) for path in out.iterdir())
        ):
            raise FileExistsError(f"{out} already holds something; choose another run folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        return out
    number = 1
    while True:
        out = Path("runs", f"{name}-{number}")
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError:
            number += 1


def write_settings(run: Path, config: Config, data: ImageData, device: torch.device) -> None:
    """Writes environment.json and then config.json, with which the run has begun."""
    facts, settings = environment(), config.to_json().encode()
    write_json_atomic(run / "environment.json", {
        "format": FORMAT,
        "command": sys.orig_argv,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else facts["cpu"],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": {"name": data.name, "fingerprint": data.fingerprint, "classes": len(data.classes),
                 "train": len(data.train), "val": len(data.val), "test": len(data.test),
                 "class_names": data.classes, "found": data.contents and data.contents.counts},
        **facts,
        "config_sha256": hashlib.sha256(settings).hexdigest(),
    })  # fmt: skip
    if data.contents and data.contents.files is not None:
        listing = "".join(f"{printable(name)}\n" for name in data.contents.files)
        write_atomic(run / FILES, gzip.compress(listing.encode(), 6, mtime=0))
    write_atomic(run / "config.json", settings)


def changes(run: Path, before: dict, data: ImageData) -> str:
    """What is not as it was when `run` wrote down its data, the entry `before` of environment.json, in words."""
    sentences = []
    if before.get("class_names") not in (None, list(data.classes)):
        sentences.append("the classes, or their order, are others")
    if (run / FILES).is_file() and data.contents and data.contents.files is not None:
        was = set(read_bytes(run / FILES).decode().splitlines())
        now = set(map(printable, data.contents.files))
        for what, names in (("gone", was - now), ("new", now - was)):
            if names:
                sentences.append(f"{what}: {counted(sorted(names), 'file')}")
    elif isinstance(before.get("found"), dict) and data.contents:
        now = data.contents.counts
        sentences += [
            f"{part} has {sum(now.get(part, [])):,} images instead of {sum(was):,}"
            for part, was in before["found"].items()
            if isinstance(was, list) and was != now.get(part)
        ]
    return "; ".join(sentences) or "their content, or the settings they are read with, differ"


def read_settings(run: str | Path) -> Config:
    """The settings a run was begun with; FileNotFoundError where none was, ValueError where its files changed since."""
    path = Path(run, "config.json")
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no config.json")
    noted = path.with_name("environment.json")
    facts = read_json(noted) if noted.exists() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{noted} must be an object, got a {type(facts).__name__}")
    digest = facts.get("config_sha256")
    if digest and digest != sha256_of(path):
        raise ValueError(
            f"{path} was changed or damaged since the run began: copy it and give the copy by --config to "
            "run other settings"
        )
    return Config.load(path)
