"""Shows again, on any machine, what was wrong with a step or a loss (eekd.train.evidence)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from eekd.io.files import read_json
from eekd.io.tensors import load_state, load_tensors
from eekd.method.losses import EEKDLoss
from eekd.method.topk import TopKLogits
from eekd.snapshots.features import LastFeatures
from eekd.train.evidence import FORMAT
from eekd.train.loss_check import differs
from eekd.train.random_state import random_state, set_random_state
from eekd.train.runtime import Runtime
from eekd.train.watch import Found, Watch


def replay(path: str | Path, device: str = "cpu") -> Found | str | None:
    """Repeats the batch in `path` on this machine and returns the first bad tensor, or how the loss differs.

    None if nothing is wrong. ValueError or FileNotFoundError if a file is damaged, missing, of another format, or of
    your own method.
    """
    generators = random_state(torch.device(device))
    try:
        return _replay(Path(path), device)
    finally:
        set_random_state(generators, torch.device(device))


def _replay(path: Path, device: str) -> Found | str | None:
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path} must be an object, got a {type(record).__name__}")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {record.get('format')!r:.100}")
    if missing := [name for name in ("sha256", "classes", "criterion", "settings") if name not in record]:
        raise ValueError(f"{path} must have {', '.join(missing)}, got {', '.join(record):.100}")
    if own := record.get("method"):
        raise ValueError(f"{path} must be of one of eekd's methods, got {own!r:.100}, which has a loss of its own")
    tensors = load_tensors(path.with_suffix(".safetensors"), record["sha256"])
    weights = {name.removeprefix("network."): tensors.pop(name) for name in [*tensors] if name.startswith("network.")}
    generators = tensors.pop("random", torch.empty(0))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    criterion, settings = record["criterion"], record["settings"]
    loss = criterion and EEKDLoss(**criterion).to(device)
    snapshot_logits, snapshot_features = tensors.get("snapshot_logits"), tensors.get("snapshot_features")
    if "snapshot_atoms" in tensors:
        logits, indices, atoms = (tensors[f"snapshot_{part}"] for part in ("logits", "indices", "atoms"))
        snapshot_logits = TopKLogits(logits, indices, atoms, record["classes"])
    if "images" not in tensors:
        load_state(loss, weights, path)
        given = tensors["student_logits"], snapshot_logits, tensors.get("labels"), tensors.get("student_features")
        return differs(loss, *given, snapshot_features)
    runtime = Runtime(settings["precision"], settings["channels_last"], torch.device(device))
    network = runtime.build(record["spec"])
    trained = nn.ModuleList([network, loss]) if loss else network
    load_state(trained, weights, path)
    capture = LastFeatures(network.train(), settings["student"]["layer"], features=bool(loss and loss.attention))
    set_random_state(generators, torch.device(device))
    with Watch(trained.train(), len(tensors["images"])) as watch:
        watch.look("the images", tensors["images"])
        logits, features = runtime.run(capture, tensors["images"])
        if loss:
            watch.run(loss(logits, snapshot_logits, tensors["labels"], features, snapshot_features)[0])
        else:
            watch.run(F.cross_entropy(logits.float(), tensors["labels"]))
    return watch.found
