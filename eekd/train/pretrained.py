"""Where a network starts: from weights of others, and with the normalisation that belongs to them."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eekd import models
from eekd.data.encoded import RESAMPLE
from eekd.io.files import first_line
from eekd.io.state_dicts import bare_names, load_state, some, without_prefix
from eekd.io.tensors import load_weights, tensors_sha256, weights_sha256
from eekd.snapshots.features import classifier_of
from eekd.snapshots.files import checkpoint_files
from eekd.train.config import Config, Phase


class Start(NamedTuple):
    """Weights to start from: where they come from, a hash of them, and the tensors by name."""

    source: str
    sha256: str
    state: dict[str, Tensor]

    def load(self, network: nn.Module, num_classes: int) -> str:
        """Copies the weights into a network, and says so; ValueError where they do not fit.

        A classifier that the weights have for another number of classes, or not at all, stays as it is in the network.
        """
        own, state = bare_names(network.state_dict()), bare_names(self.state)
        modules = dict(network.named_modules())
        heads = {name: f"{name}." for name, module in modules.items() if num_classes in _outputs(module)}
        body = {name: x for name, x in own.items() if not name.startswith(tuple(heads.values()))}
        state, anew = without_prefix(body, state, self.source), []
        for head, start in heads.items():
            names = [name for name in own if name.startswith(start)]
            missing = head == classifier_of(modules) and not any(name in state for name in names)
            alike = all(name in state and state[name].shape[1:] == own[name].shape[1:] for name in names)
            if missing or (alike and any(len(state[name]) != num_classes for name in names)):
                had = "none" if missing else f"one of {len(state[names[0]]):,}"
                anew.append(f"{head} made anew for {num_classes:,} classes (there was {had})")
                state = state | {name: own[name] for name in names}
        load_state(network, state, self.source)
        return f"starts from {self.source}, {', '.join(anew) or f'with its classifier for {num_classes:,} classes'}."


def _outputs(module: nn.Module) -> tuple:
    return getattr(module, "out_features", None), getattr(module, "out_channels", None)


def read_start(phase: Phase, spec: dict, entry: str | None = None) -> Start | None:
    """What the network of a phase starts from; None for random weights.

    ValueError, one sentence, where it cannot be read, and for a folder of several checkpoints.
    """
    if phase.weights is None:
        return None
    if phase.weights == "timm":
        return _from_timm(phase, spec)
    files = checkpoint_files(phase.weights)
    if len(files) > 1:
        names = some(path.name for path in files)
        raise ValueError(f"{phase._prefix}weights must be one checkpoint, got {len(files)} in {phase.weights}: {names}")
    [path] = files
    sha256 = weights_sha256(path)
    return Start(str(path), sha256, load_weights(path, sha256, entry=entry))


def _from_timm(phase: Phase, spec: dict) -> Start:
    name = phase.model.removeprefix("timm:")
    cfg = models.timm_config(name)
    if cfg is None or not cfg.has_weights:
        raise ValueError(f"{phase._prefix}model must be one that timm has weights for, got {phase.model!r}")
    sizes = {key: spec[key] for key in ("num_classes", "in_channels", "image_size")}
    generators = torch.random.get_rng_state()
    try:
        with _without_retries():
            network = models.from_timm(name, phase.arguments(), **sizes, pretrained=True)
    except Exception as error:  # of the hub, of the network, of the disk
        raise ValueError(
            f"{phase._prefix}weights timm needs the weights of {name} from the Hugging Face hub or its cache, and "
            f"neither has them now: {first_line(error)}; give a FILE in place of timm"
        ) from error
    finally:
        torch.random.set_rng_state(generators)
    heads = [cfg.classifier] if isinstance(cfg.classifier, str) else cfg.classifier or ()
    random = tuple(f"{head}." for head in heads if sizes["num_classes"] != cfg.num_classes)  # which timm has left out
    state = {key: x for key, x in network.state_dict().items() if not (random and key.startswith(random))}
    return Start(f"timm's weights of {name}", tensors_sha256(state), state)


@contextmanager
def _without_retries() -> Iterator[None]:
    """Puts the hub's library offline while nothing connects to the hub, which it would find out in a minute.

    A connection that is only slow stays as it is. Offline, the library still reads its cache.
    """
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session
    except ImportError:  # timm then says what it needs
        yield
        return
    was = constants.HF_HUB_OFFLINE
    for wait in (0.5, 1, 0):
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            break
        except Exception as error:  # of httpx, or of requests before it
            if "Timeout" in type(error).__name__ or "Connect" not in type(error).__name__:
                break
            time.sleep(wait)
    else:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was


def normalization(phase: Phase, given: dict) -> tuple[dict | None, str | None]:
    """The mean and std that a network wants in place of those `given`, or None; and a sentence that says so.

    `given` are the `mean` and `std` that its images have. ValueError where the numbers are not one for each channel.
    """
    own, source = None, f"{phase._prefix}mean and {phase._prefix}std"
    if isinstance(phase.mean, tuple) and isinstance(phase.std, tuple):
        own = {"mean": list(phase.mean), "std": list(phase.std)}
    elif phase.mean == "timm" or (phase.mean is None and phase.weights == "timm"):
        own, source = _of_timm(phase.model.removeprefix("timm:")), f"timm's of {phase.model.removeprefix('timm:')}"
    elif phase.mean is None and phase.weights:
        own, source = stored_with(Path(phase.weights)) or (None, "")
    if own is None or own == given:
        return None, None
    channels = len(given["mean"])
    if len(own["mean"]) != channels or len(own["std"]) != channels:
        raise ValueError(
            f"{phase._prefix}mean must be {channels} numbers, one for each channel of the images, got "
            f"{len(own['mean'])} ({source}); --channels {len(own['mean'])}, or {phase._prefix}mean data, would fit"
        )
    numbers = " and ".join(f"{key} {', '.join(f'{x:.3g}' for x in own[key])}" for key in ("mean", "std"))
    return {"given": given, "own": own}, f"sees images normalised by {numbers} ({source})."


def interpolation_of(config: Config) -> str:
    """How the images of a run are resized: as asked for; else as its networks' weights want it; else bilinear.

    All networks see the same views, so that a bank is exact. ValueError where two of them want different ones.
    """
    if config.interpolation != "auto":
        return config.interpolation
    phases = (config.teacher, *([config.student] if config.students != () else []))
    wanted = {own: f"{phase._prefix}model {phase.model}" for phase in phases if (own := resized_by(phase))}
    if len(wanted) > 1:
        each = " and ".join(f"{own} for {model}" for own, model in wanted.items())
        raise ValueError(
            f"interpolation must be given, for all networks see the same views, and their weights want {each}: "
            f"--interpolation {' or '.join(wanted)}"
        )
    return next(iter(wanted), "bilinear")


def resized_by(phase: Phase) -> str | None:
    """How the images were resized that the weights were trained on from which a network starts; None: not known."""
    own = None
    if "timm" in (phase.weights, phase.mean):
        own = getattr(models.timm_config(phase.model.removeprefix("timm:")), "interpolation", None)
    elif phase.weights:
        stored = (content for content, _ in _stored_with(Path(phase.weights)))
        numbers = {str(number): name for name, number in RESAMPLE.items()}  # as a Hugging Face processor has them
        kinds = (str(own.get("interpolation") or numbers.get(str(own.get("resample")), "")) for own in stored)
        own = next(filter(None, kinds), None)
    return own if own in RESAMPLE else None


def resized_otherwise(phase: Phase, interpolation: str) -> str | None:
    """A sentence where the weights were trained on images that were resized otherwise."""
    own = resized_by(phase)
    if own in (None, interpolation):
        return None
    return f"starts from weights for images resized by {own}, got {interpolation}: --interpolation {own} resizes so."


def _of_timm(name: str) -> dict | None:
    cfg = models.timm_config(name)
    return cfg and {"mean": list(cfg.mean), "std": list(cfg.std)}


def stored_with(path: Path) -> tuple[dict, str] | None:
    """The mean and std that lie beside a checkpoint, and in which file."""
    for content, name in _stored_with(path):
        if _numbers(content.get("mean")) and _numbers(content.get("std")):
            return {"mean": content["mean"], "std": content["std"]}, name
    return None


def _stored_with(path: Path) -> Iterator[tuple[dict, str]]:
    """What lies beside a checkpoint and can say how its images were made: eekd's, timm's or a processor's."""
    folder = path if path.is_dir() else path.parent
    for name, places in (
        ("student.json", (("spec", "normalization", "own"), ("preprocessing",))),
        ("config.json", (("preprocessing",), ("pretrained_cfg",))),
        ("preprocessor_config.json", ((),)),
    ):
        try:
            content = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        for place in places:
            part = content
            for key in place:
                part = part.get(key) if isinstance(part, dict) else None
            if isinstance(part, dict):
                yield part if place else _of_processor(part), name


def _of_processor(settings: dict) -> dict:
    """What a Hugging Face processor does to images from 0 to 1: `mean`, `std` and, where it resizes, `resample`."""
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if settings.get("do_normalize") is False:
        channels = len(mean) if isinstance(mean, list) else 3
        mean, std = [0.0] * channels, [1.0] * channels
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale") is not False else 1
    processing = {"resample": settings.get("resample")} if settings.get("do_resize") is not False else {}
    try:
        shift, scale = float(bool(settings.get("rescale_offset"))), 255 * factor
        return processing | {"mean": [(x + shift) / scale for x in mean], "std": [x / scale for x in std]}
    except (TypeError, ZeroDivisionError):  # no mean and std
        return processing


def _numbers(value) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) < 5
        and all(isinstance(x, float | int) and 0 <= x <= 1 for x in value)
    )
