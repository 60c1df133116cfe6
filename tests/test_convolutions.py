"""The guard against oneDNN's strided 1×1 convolution: the same function, and no model of ours meets the other."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from eekd import LastFeatures, SnapshotEnsemble, models
from eekd.models import convolutions
from eekd.models.convolutions import Strided, guard, needs_guard

HERE = Path(__file__).resolve().parent
FIVE_LINES = (HERE / "onednn_convolution.py").read_text()
CL = torch.channels_last
HEAVY = "resnet110", "resnet56", "resnet44", "resnet32x4", "ResNet50", "vgg11", "vgg13", "vgg16", "vgg19", "wrn_40_2"
onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="needs oneDNN and AVX2",
)


def on_avx2(program: str, isa: str = "AVX2") -> subprocess.CompletedProcess:
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=env,
        cwd=HERE.parent,
        timeout=500,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def affected(monkeypatch):
    monkeypatch.setattr(convolutions, "needs_guard", lambda: True)


@onednn
@pytest.mark.parametrize("isa, channels, dtype", [
    ("AVX2", 4, "float32"), ("ALL", 4, "float32"), ("ALL", 15, "float32"), ("ALL", 15, "bfloat16"),
])  # fmt: skip
def test_the_convolution_dies_without_the_guard_and_not_with_it(isa, channels, dtype):
    program = FIVE_LINES.replace("(4,", f"({channels},").replace("(8, 4,", f"(8, {channels},")
    program = program.replace("memory_format=", f"torch.{dtype}, memory_format=")
    bare = on_avx2(program, isa)
    guard = "from eekd.models import convolutions\nconvolutions.guard(conv)\nfor _"
    guarded = on_avx2(program.replace("for _", guard), isa)
    assert (guarded.returncode, guarded.stdout) == (0, "survived\n"), guarded.stderr
    if bare.returncode == 0:
        pytest.skip(f"torch {torch.__version__} survives: is it mended? Then limit the guard to the versions before")
    assert bare.returncode < 0 and "survived" not in bare.stdout


# Looks at every backward before it is computed, for a write outside memory need not be noticed.
EVERY_MODEL = """
import torch, torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from eekd.models import convolutions
from eekd.train.runtime import Runtime

class Watch(TorchDispatchMode):
    seen = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.convolution_backward.default:
            dy, x, weight, bias, stride = args[:5]
            Watch.seen += 1
            few = set(weight.shape[2:]) == {1} and max(stride) > 1 and weight.shape[1] < 16
            assert not few, f"{name} met {tuple(weight.shape)} with stride {stride}"
        return op(*args, **(kwargs or {}))

assert convolutions.needs_guard()
if not GUARDED:
    convolutions.needs_guard = lambda: False
runtime = Runtime("fp32", True, torch.device("cpu"))
for name in NAMES:
    network = runtime.build(dict(name=name, num_classes=10, in_channels=3, image_size=32)).train()
    with Watch():
        F.cross_entropy(runtime.run(network, torch.randn(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters()), name
print(Watch.seen)
"""


def train_each(names: list[str], guarded: bool = True) -> subprocess.CompletedProcess:
    return on_avx2(EVERY_MODEL.replace("NAMES", repr(names)).replace("GUARDED", repr(guarded)))


@onednn
@pytest.mark.parametrize(
    "names",
    [[name for name in models.names() if name not in HEAVY], pytest.param([*HEAVY], marks=pytest.mark.slow)],
    ids=["light", "heavy"],
)
def test_every_named_model_trains_a_step_in_channels_last(names):
    assert set(names) <= set(models.names())
    ran = train_each(names)
    assert ran.returncode == 0 and int(ran.stdout) > 5 * len(names), ran.stderr[-2000:]


@onednn
def test_without_the_guard_a_model_meets_the_convolution():
    assert "resnet8_w4 met (16, 8, 1, 1) with stride [2, 2]" in train_each(["resnet8_w4"], guarded=False).stderr


def strided(kind=nn.Conv2d, channels=4, stride=2, **more) -> nn.Module:
    torch.manual_seed(0)
    return kind(channels, 8, 1, stride=stride, **more)


@pytest.mark.parametrize("kind, stride, shape", [
    (nn.Conv1d, 3, (10,)), (nn.Conv2d, 2, (14, 14)), (nn.Conv2d, (2, 3), (7, 9)), (nn.Conv2d, (1, 2), (5, 1)),
    (nn.Conv3d, 2, (6, 5, 4)),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_a_guarded_convolution_is_the_same_function(affected, kind, stride, shape, bias):
    plain = strided(kind, stride=stride, bias=bias).double()
    guarded = guard(copy.deepcopy(plain))
    assert isinstance(guarded._conv_forward, Strided) and type(guarded) is kind
    assert [*guarded.state_dict()] == [*plain.state_dict()] and repr(guarded) == repr(plain)
    results = []
    for module in (plain, guarded, copy.deepcopy(guarded), pickle.loads(pickle.dumps(guarded))):
        torch.manual_seed(1)
        x = torch.randn(3, 4, *shape, dtype=torch.float64, requires_grad=True)
        module.zero_grad()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad.clone() for p in module.parameters())])
    for other in results[1:]:
        for mine, own in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, own)


def test_a_guarded_convolution_compiles_and_is_traced(affected):
    plain, x = strided(), torch.randn(3, 4, 14, 14)
    guarded = guard(copy.deepcopy(plain))
    traced = torch.fx.symbolic_trace(nn.Sequential(guarded))
    exported = torch.export.export(guarded, (x,)).module()
    for made in (torch.compile(guarded, fullgraph=True, backend="eager"), traced, exported):
        torch.testing.assert_close(made(x), plain(x))


@pytest.mark.parametrize("module", [
    strided(channels=16), strided(stride=1), strided(groups=2), strided(padding=1), nn.Conv2d(4, 8, 3, 2),
    nn.Linear(4, 8), nn.ConvTranspose2d(4, 8, 1, 2),
], ids=repr)  # fmt: skip
def test_other_layers_stay_as_they_are(affected, module):
    before = {**module.__dict__}
    assert guard(module) is module and module.__dict__ == before


def test_padding_as_a_word_is_understood(affected):
    assert isinstance(guard(strided(padding="valid"))._conv_forward, Strided)


def test_nothing_is_done_where_it_is_not_needed(monkeypatch):
    monkeypatch.setattr(convolutions, "needs_guard", lambda: False)
    assert "_conv_forward" not in guard(strided()).__dict__


def test_only_a_processor_of_x86_needs_it(monkeypatch):
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert needs_guard() == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not needs_guard()


def guarded_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "_conv_forward" in module.__dict__]


def test_what_reaches_a_users_network_guards_it(affected, tmp_path):
    (tmp_path / "mine.py").write_text("""
from torch import nn
def net(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 5, 1, 2, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1, 2),
                         nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))
""")
    sizes = dict(num_classes=3, in_channels=3, image_size=8)
    built = models.build(f"{tmp_path}/mine.py:net", **sizes)
    assert guarded_in(built) == ["0", "2"]
    assert len(guarded_in(models.build("resnet8_w4", **sizes))) == 2
    sys.path.insert(0, str(tmp_path))
    try:
        from mine import net
    finally:
        sys.path.remove(str(tmp_path))
    assert guarded_in(LastFeatures(net(**sizes)).model) == ["0", "2"]
    own = [net(**sizes).eval() for _ in range(3)]
    ensemble, x = SnapshotEnsemble(own), torch.randn(4, 3, 8, 8).to(memory_format=CL)
    with torch.no_grad():
        torch.testing.assert_close(ensemble(x)[0], torch.stack([model(x) for model in own]))
    graphs = ensemble._folded._graphs[None]  # which a hook would have kept from being made
    assert all(len(guarded_in(graph)) == 2 for graph in graphs)
