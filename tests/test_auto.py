"""precision and channels_last "auto": asked of the device, kept in the run, and a warning where bf16 is emulated."""

import dataclasses
import os
import subprocess
import sys
import warnings

import pytest
import torch

from eekd.train import runtime
from eekd.train.config import Config, settled, switched
from eekd.train.presets import preset
from eekd.train.runtime import chosen, natively, slowdown

CPU = torch.device("cpu")


@pytest.mark.parametrize("native, precision", [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_device_computes_in(monkeypatch, native, precision):
    monkeypatch.setattr(runtime, "natively", lambda precision, device: native or precision in ("auto", "fp32"))
    with warnings.catch_warnings(action="error"):
        config = chosen(Config(), CPU)
    assert (config.precision, config.channels_last) == (precision, True)
    given = Config(precision="fp32", channels_last=False, students=("ce",))
    assert chosen(given, CPU) == given


def test_weights_to_be_sharded_are_contiguous():
    assert chosen(Config(parallel="fsdp"), CPU).channels_last is False
    assert chosen(Config(parallel="fsdp", channels_last=True), CPU).channels_last is True


def test_emulated_bf16_warns_with_a_measured_factor(monkeypatch):
    monkeypatch.setattr(runtime, "natively", lambda precision, device: False)
    monkeypatch.setattr(runtime, "slowdown", lambda precision, device: 9.0)
    with pytest.warns(UserWarning, match="bf16 is emulated by this cpu: a convolution took 9.0 times as long"):
        assert chosen(Config(precision="bf16"), CPU).precision == "bf16"


def test_the_factor_is_measured():
    assert 0 < slowdown("bf16", CPU) < 1000


def test_a_gpu_is_asked_whether_it_emulates(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not natively("bf16", torch.device("cuda")) and natively("fp16", torch.device("cuda"))
    monkeypatch.setattr(runtime, "natively", lambda precision, device: True)
    assert chosen(Config(), torch.device("cuda")).channels_last is False


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_onednn_limited_to_avx2_emulates():
    program = "import torch; from eekd.train.runtime import natively; print(natively('bf16', torch.device('cpu')))"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "False\n", ran.stderr


def test_a_choice_is_taken_from_settings_that_made_it():
    made = Config(precision="bf16", channels_last=True, interpolation="bilinear", seed=3)
    assert settled(Config(), made) == dataclasses.replace(made, seed=0)
    given = Config(precision="fp32", channels_last=False, interpolation="bicubic", students=())
    assert settled(given, made) == given
    assert Config.from_json(Config().to_json()) == Config()
    assert (preset("fashion-mnist-cpu").precision, preset("fashion-mnist-cpu").channels_last) == ("auto", "auto")


@pytest.mark.parametrize("flags, value", [
    (["--channels-last"], "True"), (["--no-channels-last"], "False"), (["--channels-last", "true"], "True"),
    (["--channels_last=false"], "False"), (["--channels-last", "auto"], "auto"), (["--channels-last=auto"], "auto"),
])  # fmt: skip
def test_channels_last_may_stand_alone(flags, value):
    assert switched([*flags, "--seed", "1"]) == ["--channels-last", value, "--seed", "1"]
    assert switched([]) == [] and switched([*flags]) == ["--channels-last", value]


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_channels_last_is_auto_true_or_false(value):
    with pytest.raises(ValueError, match="channels_last must be one of auto, true, false, got "):
        Config(channels_last=value)
