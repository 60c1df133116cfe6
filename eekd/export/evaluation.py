"""How good, how large and how fast a student is, on anybody's data."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from eekd.data import ImageData, load
from eekd.data.dataset import Split
from eekd.data.encoded import Encoded
from eekd.export.latency import latencies
from eekd.export.student import Student, only_student
from eekd.io.files import read_json
from eekd.kept_code import check_code
from eekd.models.normalization import Renormalize
from eekd.snapshots import SnapshotEnsemble
from eekd.snapshots.wrappers import logits_of
from eekd.train.metrics import Calibration
from eekd.train.run_folder import read_settings


def data_of(student: Student, folder: str | Path | None = None, data: str | None = None, root=None) -> ImageData:
    """The images that a run was made with, where `folder` is that of its student; or `data`, as `eekd.data.load`."""
    size = student.facts["preprocessing"]["image_size"]
    if data is not None:
        return load(data, root, image_size=size)
    run = None if folder is None else run_of(Path(folder))
    if run is None:
        raise ValueError(f"data must be given, for {folder} is not in the run that trained it, got None")
    config = read_settings(run)
    return load(config.data, config.root, **config.reading())


def run_of(folder: Path) -> Path | None:
    """The run folder of RUN/students/NAME, or of a RUN; None for an exported folder."""
    for run in (folder, folder.absolute().parent.parent):
        if (run / "students").is_dir() and (run / "environment.json").exists():
            return run
    return None


def teacher_of(folder: Path) -> nn.Module | None:
    """The last snapshot that taught the student that `load_student` takes; None where it is not there, or for `ce`."""
    folder = only_student(folder)
    record = folder / "student.json"
    content = read_json(record) if record.exists() else {}
    noted = content.get("teacher")
    if not noted or not (folder / noted["run"] / "manifest.json").exists():
        return None
    run = folder / noted["run"]
    if (run / "snapshots.json").exists():
        check_code(run, read_json(run / "snapshots.json"))
    teacher = SnapshotEnsemble.load(run, which=[-1]).models[0]
    if student := content["spec"].get("normalization"):  # in which images come here, where a run's come as the data's
        teacher.register_forward_pre_hook(Renormalize(student["own"], student["given"]), prepend=True)
    return teacher


def batches(student: Student, data: ImageData, split: str, size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
    """Preprocessed images (B, C, S, S) and the student's class numbers (B,) of a split of any data set.

    Classes are matched by name; ValueError for one that the student does not know, and for colour images where it
    knows grey ones only.
    """
    number_of = {name: number for number, name in enumerate(student.classes)}
    if unknown := [name for name in data.classes if name not in number_of]:
        raise ValueError(
            f"{data.name} must have classes that the student knows ({', '.join([*number_of][:5])}"
            f"{', ...' * (len(number_of) > 5)}), got {unknown[0]!r}"
        )  # fmt: skip
    numbers = torch.tensor([number_of[name] for name in data.classes])
    part: Split = getattr(data, split)
    wanted, images = student.facts["preprocessing"], part.images
    if isinstance(images, Encoded):
        images = copy.copy(images)
        images.channels, images.image_size, images.zoom = wanted["channels"], wanted["image_size"], wanted["zoom"]
        images.interpolation = wanted.get("interpolation", "bilinear")
    elif images.shape[1] > wanted["channels"]:
        raise ValueError(f"{data.name} must have grey images, on which the student was trained, got images in colour")
    for index in torch.arange(len(part)).split(size):
        pixels = images.subset(index).decode_all() if isinstance(images, Encoded) else images[index]
        if pixels.shape[1] < wanted["channels"]:
            pixels = pixels.expand(-1, wanted["channels"], -1, -1)
        yield student.normalize(pixels.to(student.device)), numbers[part.labels[index]].to(student.device)


@torch.inference_mode()
def evaluate(
    student: Student, data: ImageData, split: str = "test", *, teacher: nn.Module | None = None, batch_size: int = 128,
    seconds: float = 1.0,
) -> dict:  # fmt: skip
    """Accuracy, calibration, confusion, size and latency of a student, and of its teacher if given.

    Returns images; student and teacher (or None), each with accuracy and nll (fractions of 1, nats), ece (expected
    calibration error over 15 equal bins of the confidence), parameters, bytes, and latency (milliseconds of one image:
    p50, p95); per_class: name to images and accuracy (None where the split has none of it); confusion (C, C) lists: row
    the true class, column the predicted one.
    """
    networks: dict[str, nn.Module] = {"student": student}
    if teacher is not None:
        networks["teacher"] = teacher.to(student.device).eval()
    classes = len(student.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    calibrations = {name: Calibration(1, torch.device(student.device)) for name in networks}
    first = None
    for images, labels in batches(student, data, split, batch_size):
        first = images[:1] if first is None else first
        for name, network in networks.items():
            logits = logits_of(network(images))
            predicted = calibrations[name].add(logits.double().log_softmax(-1)[None], labels)
            if name == "student":
                cells = (labels * classes + predicted[0]).cpu()
                confusion.view(-1).index_add_(0, cells, torch.ones_like(cells))
    if first is None:
        raise ValueError(f"the split {split} of {data.name} must hold images, got none")
    results: dict = {"images": int(confusion.sum()), "student": None, "teacher": None}
    times = latencies(networks, first, seconds)
    for name, network in networks.items():
        measured = calibrations[name].all()[0]
        results[name] = {key: measured[key] for key in ("accuracy", "nll", "ece")} | {
            "parameters": sum(p.numel() for p in network.parameters()),
            "bytes": sum(x.nbytes for x in network.state_dict().values()),
            "latency": times[name],
        }
    results["per_class"] = {
        name: {"images": sum(row), "accuracy": row[number] / sum(row) if sum(row) else None}
        for number, (name, row) in enumerate(zip(student.classes, confusion.tolist(), strict=True))
    }
    return results | {"confusion": confusion.tolist()}
