"""Three networks, and a run of theirs."""

import pytest
import torch
from recorded import SPEC, Net, record

from eekd.models import build


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def images(device):
    return torch.randn(4, 1, 8, 8, device=device)


@pytest.fixture
def nets():
    nets = [Net() for _ in range(3)]
    for net in nets:
        net(torch.randn(8, 1, 8, 8))  # running statistics that tell eval from train
    return nets


@pytest.fixture
def run(tmp_path):
    """A finished run of 3 snapshots and its models."""
    models = record(tmp_path / "run", [build(**SPEC) for _ in range(3)])
    return tmp_path / "run", models


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("manifests")
