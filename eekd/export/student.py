"""A trained student as one object: network, class names, and the way from an image to its input."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import eekd
from eekd import models
from eekd.data.encoded import RESAMPLE, Encoded
from eekd.io.files import first_line, read_json, write_atomic, write_json_atomic
from eekd.io.tensors import load_state, load_tensors, save_tensors
from eekd.kept_code import check_code
from eekd.models.outputs import take_output
from eekd.snapshots.wrappers import logits_of

try:  # the extra "hub"
    from huggingface_hub import ModelHubMixin
except ImportError:
    ModelHubMixin = object  # pyright: ignore[reportAssignmentType]

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class Student(nn.Module, ModelHubMixin):  # pyright: ignore[reportGeneralTypeIssues]
    """A classifier that takes images as people have them.

        student = eekd.load_student("runs/digits-1/students/attention")
        x = student.preprocess("photo.png")  # (1, C, S, S)
        logits = student(x)                  # (1, classes)
        student.predict("photo.png")         # [("seven", 0.98)]

    Attributes:
        network: the nn.Module, in eval mode.
        facts: the content of config.json, see `eekd.export`.
        classes: the names of the classes, in the order of the logits.
    """

    def __init__(self, network: nn.Module, facts: dict):
        super().__init__()
        self.network = network
        self.facts: dict = facts
        self.classes = tuple(facts["classes"])
        preprocessing = facts["preprocessing"]
        mean, std = 255 * torch.tensor([preprocessing["mean"], preprocessing["std"]], dtype=torch.float64)
        self.register_buffer("_mean", mean.float()[:, None, None], persistent=False)
        self.register_buffer("_scale", (1 / std).float()[:, None, None], persistent=False)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self._mean.device

    def preprocess(self, images) -> Tensor:
        """An image, or a list of images, as the network's input (B, C, S, S) float32 on the student's device.

        An image is a path, encoded bytes, a PIL image, or an array (H, W) or (H, W, 1 | 3) of uint8. The centred square
        of `zoom` times its shorter side is resized as validation images were. ValueError where it is none.
        """
        images = images if isinstance(images, list | tuple) else [images]
        data = self.facts["preprocessing"]
        items = [_encoded(image) for image in images]
        options = {key: data[key] for key in ("channels", "image_size", "zoom", "interpolation") if key in data}
        decoder = Encoded(items, **options)
        size = 0, data["channels"], data["image_size"], data["image_size"]
        pixels = [decoder.decode(i) for i in range(len(items))]
        x = torch.stack(pixels) if pixels else torch.empty(size, dtype=torch.uint8)
        return self.normalize(x.to(self.device))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, S, S) uint8 as the network's input: in training to the bit, or up to rounding where that had a
        normalisation of its own."""
        return pixels.float().sub_(self._mean).mul_(self._scale)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of preprocessed images (B, C, S, S)."""
        return logits_of(self.network(images))

    def predict(self, images, top: int = 1) -> list:
        """The `top` likeliest classes of an image, [(name, probability), ...]; of a list of images, a list of those."""
        rows = self.classify(self.preprocess(images), top)
        return rows if isinstance(images, list | tuple) else rows[0]

    @torch.inference_mode()
    def classify(self, images: Tensor, top: int = 1) -> list[list[tuple[str, float]]]:
        """The `top` likeliest classes of each preprocessed image (B, C, S, S), with their probabilities."""
        values, places = self(images).float().softmax(-1).topk(min(top, len(self.classes)))
        return [
            [(self.classes[place], value) for value, place in zip(*row, strict=True)]
            for row in zip(values.tolist(), places.tolist(), strict=True)
        ]

    def save(self, folder: str | Path) -> Path:
        """Writes config.json, model.safetensors and README.md; FileExistsError where the folder holds anything."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} must be new or empty, got {next(folder.iterdir()).name} in it")
        self._save_pretrained(folder)
        return folder

    def _save_pretrained(self, save_directory: Path) -> None:
        sha256 = save_tensors(save_directory / WEIGHTS, self.network.state_dict())
        self.facts = {key: value for key, value in self.facts.items() if key != "exported"} | {"sha256": sha256}
        self.describe(save_directory)

    def describe(self, folder: Path) -> None:
        """Writes config.json and README.md of the facts."""
        from eekd.export.card import card

        write_json_atomic(folder / CONFIG, self.facts)
        write_atomic(folder / CARD, card(self.facts).encode())

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision=None, cache_dir=None, force_download=False,
                         local_files_only=False, token=None, **options) -> "Student":  # fmt: skip
        if Path(model_id).is_dir():
            return load_student(model_id)
        from huggingface_hub import snapshot_download

        patterns = [CONFIG, WEIGHTS]
        return load_student(snapshot_download(
            model_id, revision=revision, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only, token=token, allow_patterns=patterns,
        ))  # fmt: skip

    if ModelHubMixin is object:

        def push_to_hub(self, *args, **kwargs):
            """Uploads the student to the Hugging Face hub; needs the extra "hub"."""
            raise ImportError("push_to_hub needs huggingface_hub: pip install 'eekd[hub]'")


def load_student(
    path: str | Path, factory: Callable[[], nn.Module] | None = None, device: str | torch.device = "cpu"
) -> Student:
    """The student in RUN/students/NAME, in a RUN with one student, or in a folder that `export` or `save` wrote.

    `factory()` makes the network; None builds it from the recorded architecture. If an exported folder names a Python
    file, that file is not run: give a factory. FileNotFoundError or ValueError names the file that is missing, damaged,
    or of another network.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be the folder of a student, got no such folder")
    folder = only_student(folder)
    exported = not (folder / "student.json").exists()
    facts = _read_config(folder) if exported else facts_of(folder)
    weights = folder / (WEIGHTS if exported else "student.safetensors")
    state = load_tensors(weights, facts["sha256"])
    spec = facts["model"]
    if factory is None:
        if not exported:
            check_code(folder, read_json(folder / "student.json"))
        if exported and ".py:" in spec["name"]:
            raise ValueError(
                f"factory must be given, for the network in {folder} is from a Python file, {spec['name']!r}, got None"
            )
        network = models.build(**spec)
    else:
        network = take_output(factory(), spec.get("output"))
    load_state(network, state, weights)
    try:
        return Student(network, facts).to(device)
    except (AssertionError, RuntimeError) as error:  # of a torch without CUDA, of a machine without a GPU
        raise ValueError(
            f"device must be one that torch finds here, got {str(device)!r}: {first_line(error)}"
        ) from None


def only_student(folder: Path) -> Path:
    """The folder of the one student of a RUN; another folder as it is. ValueError where a RUN has several, or none."""
    if not (folder / "students").is_dir():
        return folder
    names = sorted(path.parent.name for path in (folder / "students").glob("*/student.json"))
    if len(names) == 1:
        return folder / "students" / names[0]
    got = f"{', '.join(names)}: name one, as {folder / 'students' / names[0]}" if names else "none that is finished"
    raise ValueError(f"{folder} must be the folder of one student, got {got}")


def _read_config(folder: Path) -> dict:
    facts = read_json(folder / CONFIG)
    wanted = {"format": int, "model": dict, "classes": list, "preprocessing": dict, "sha256": str}
    for key, kind in wanted.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(key), kind):
            raise ValueError(f"{folder / CONFIG} must be what eekd export wrote, got no {key} in it")
    if facts["format"] != FORMAT:
        raise ValueError(f"{folder / CONFIG} must have format {FORMAT}, got {facts['format']!r}")
    _check(folder / CONFIG, facts)
    return facts


def _check(path: Path, facts: dict) -> None:
    data, channels = facts["preprocessing"], facts["preprocessing"].get("channels")
    sizes = channels in (1, 3) and isinstance(data.get("image_size"), int) and 0 < data["image_size"] <= 1 << 14
    numbers = [data.get("zoom"), *(data.get("mean") or [None]), *(data.get("std") or [None])]
    counts = sizes and len(numbers) == 1 + 2 * channels
    if (
        not counts
        or data.get("interpolation", "bilinear") not in RESAMPLE
        or not all(isinstance(x, int | float) for x in numbers)
        or min(numbers[1 + channels :] + [data["zoom"]]) <= 0
    ):
        raise ValueError(
            f"{path} must have a preprocessing of 1 or 3 channels, a size, a zoom, means and deviations, got {data!r}"
        )
    if len(facts["classes"]) != facts["model"].get("num_classes"):
        raise ValueError(f"{path} must name {facts['model'].get('num_classes')!r} classes, got {len(facts['classes'])}")


def facts_of(folder: Path) -> dict:
    """The facts of a student in a run, from its student.json and its run's summary.json."""
    record = read_json(folder / "student.json")
    if lacking := [key for key in ("spec", "sha256", "weighting") if not isinstance(record, dict) or key not in record]:
        raise ValueError(
            f"{folder / 'student.json'} must be the record of a student, got no {', '.join(lacking)} in it"
        )
    if "classes" not in record:
        raise ValueError(f"{folder} was trained before eekd saved the classes of students: train it again")
    run, teacher = folder.parent.parent, record.get("teacher")
    summary, begun = (
        read_json(run / name) if (run / name).exists() else {} for name in ("summary.json", "environment.json")
    )
    return {
        "format": FORMAT,
        "library_name": "eekd",
        "eekd": eekd.__version__,
        "model": {key: value for key, value in record["spec"].items() if key != "normalization"},
        "classes": record["classes"],
        "preprocessing": record["preprocessing"] | record["spec"].get("normalization", {}).get("own", {}),
        "sha256": record["sha256"],
        "provenance": {
            "method": record["weighting"],
            "loss": record.get("loss"),
            "snapshot_weights": record.get("weights"),
            "ema": record.get("ema"),
            "teacher": teacher and {"model": teacher["spec"], "snapshots": teacher["snapshots"]},
            "data": _public(begun.get("data", {}).get("name")),
            "images_sha256": record["setup"]["images"],
            "epochs": record["setup"]["settings"]["epochs"],
            "seed": record["seed"],
            "commit": record["commit"],
        },
        "results": {"val": record["val"], "test": record["test"], "run": summary.get("rows", [])},
    }


def _public(name: str | None) -> str | None:
    """What data are called without the folders that lead to them."""
    return Path(name).name if name and Path(name).is_absolute() else name


def _encoded(image):
    """A path or bytes as they are; another image as the bytes of a PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise FileNotFoundError(f"{image} is missing or not a file")
        return str(image)
    from PIL import Image

    if isinstance(image, Tensor):
        raise TypeError("image must be a path, bytes, a PIL image or an array (H, W[, 3]) of uint8, got a tensor: give "
                        "preprocessed tensors to student(...)")  # fmt: skip
    if not isinstance(image, Image.Image):
        if getattr(image, "dtype", None) != "uint8" or image.ndim not in (2, 3):
            kind = f"{image.dtype} {image.shape}" if hasattr(image, "shape") else type(image).__name__
            raise TypeError(f"image must be a path, bytes, a PIL image or an array (H, W[, 3]) of uint8, got {kind}")
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    data = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")).save(data, "PNG")
    return data.getvalue()
