"""A run that nothing disturbed."""

import functools
import signal
import warnings
from contextlib import contextmanager

import pytest
import torch
from killed import NETS, VARIANTS, config_of
from torch.amp import GradScaler

from eekd.train import prepare, train


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


@contextmanager
def changing_scale():
    """The gradient scaler doubles its scale after every step until one overflows, which else takes thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", functools.partial(GradScaler, growth_interval=1))
        yield


@pytest.fixture(scope="module", autouse=True)
def a_scale_that_changes():
    with changing_scale():
        yield


@pytest.fixture(scope="session", params=VARIANTS)
def whole(request, nets, tmp_path_factory):
    """A session and a run of it that nothing disturbed, which tests only read."""
    session = prepare(config_of(nets, **VARIANTS[request.param]))
    with changing_scale():
        return session, train(session.config, tmp_path_factory.mktemp("run") / "whole", session=session)


@pytest.fixture(scope="session")
def run(nets, tmp_path_factory):
    """The same in one variant."""
    session = prepare(config_of(nets))
    with changing_scale():
        return session, train(session.config, tmp_path_factory.mktemp("run") / "whole", session=session)


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """A kill is no damage: nothing is to be passed over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts the tests in the background has SIGINT ignored, as its children then do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
