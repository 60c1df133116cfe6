"""A teacher whose weights are the mean of those of several snapshots of one training."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from eekd.io.files import write_json_atomic
from eekd.io.tensors import save_tensors
from eekd.snapshots import MANIFEST, read_manifest
from eekd.train import Session


@torch.no_grad()
def soup(session: Session, teacher: Path, which: Sequence[int] | None, run: Path) -> None:
    """Writes the mean of the snapshots `which` in the folder `teacher` as the one snapshot in RUN/teacher.

    Buffers are averaged, too, those of whole numbers are the last snapshot's; then batch norms take the mean and
    variance of a pass over the training images.
    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima" (2018), of snapshots of one training as Sanyal
    et al. (arXiv 2306.03241).
    """
    networks = session.load_snapshots(teacher, which, features=False).models
    network, states = copy.deepcopy(networks[-1]), [network.state_dict() for network in networks]
    for name, x in network.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.stack([state[name] for state in states]).mean(0))
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # all batches count alike
    if norms:
        network.train()
        for batch in session.loader("train", session.config.teacher, train=True):
            session.run(network, batch.images)
    folder, manifest = run / "teacher", read_manifest(teacher)
    folder.mkdir(parents=True)
    file, last = "snapshot-1.safetensors", manifest["snapshots"][-1]
    entry = {"file": file, "sha256": save_tensors(folder / file, network.state_dict()), "step": last["step"]}
    manifest |= {"schedule": [last["step"]], "snapshots": [entry | {"metrics": {}}]}
    write_json_atomic(folder / MANIFEST, manifest)
