"""Every named model has the benchmark's parameter count and feature width, and takes images of any size."""

import pytest
import torch
from torch import nn

from eekd import models

# 100 classes, 3×32×32: trainable parameters and the width of the last feature.
BENCHMARK = {
    "resnet8": (83_892, 64),
    "resnet14": (181_108, 64),
    "resnet20": (278_324, 64),
    "resnet32": (472_756, 64),
    "resnet44": (667_188, 64),
    "resnet56": (861_620, 64),
    "resnet110": (1_736_564, 64),
    "resnet8x4": (1_233_540, 256),
    "resnet32x4": (7_433_860, 256),
    "ResNet50": (23_705_252, 2048),
    "wrn_16_1": (180_916, 64),
    "wrn_16_2": (703_284, 128),
    "wrn_40_1": (569_780, 64),
    "wrn_40_2": (2_255_156, 128),
    "vgg8": (3_965_028, 512),
    "vgg11": (9_277_284, 512),
    "vgg13": (9_462_180, 512),
    "vgg16": (14_774_436, 512),
    "vgg19": (20_086_692, 512),
    "MobileNetV2": (812_836, 1280),
    "ShuffleNetV1": (949_258, 960),
    "ShuffleNetV2": (1_355_528, 1024),
}


def test_every_name_is_a_benchmark_model_but_a_few_small_ones():
    assert set(models.names()) == set(BENCHMARK) | {"resnet8_w4", "resnet8_s2", "resnet8_s2_w4", "mlp64"}


@pytest.mark.parametrize("name", BENCHMARK)
def test_parameters_and_feature_width_are_the_benchmarks(name):
    with torch.device("meta"):
        model = models.build(name, num_classes=100)
    parameters, width = BENCHMARK[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [m.in_features for m in model.modules() if isinstance(m, nn.Linear)] == [width]


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("in_channels, image_size", [(1, 8), (1, 28), (3, 32), (3, 64)])
def test_adapts_to_channels_and_image_size(name, in_channels, image_size):
    with torch.device("meta"):
        model = models.build(name, num_classes=7, in_channels=in_channels, image_size=image_size)
        assert model(torch.empty(2, in_channels, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize(
    "name, relus",
    [
        ("resnet20", 1 + 9 * 2),
        ("ResNet50", 1 + 16 * 3),
        ("wrn_16_2", 6 * 2 + 1),
        ("vgg13", 10),
        ("MobileNetV2", 1 + 17 * 2 + 1),
        ("ShuffleNetV1", 1 + 16 * 3),
        ("ShuffleNetV2", 1 + 3 * 3 + 13 * 2 + 1),
    ],
)
def test_has_as_many_relus_as_the_benchmark(name, relus):
    with torch.device("meta"):
        model = models.build(name, num_classes=10)
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == relus


# Pixels left before the mean: the resolution at which each family works, as in the benchmark.
@pytest.mark.parametrize(
    "name, size, left",
    [
        ("resnet20", 32, 8),
        ("resnet8x4", 32, 8),
        ("ResNet50", 32, 4),
        ("wrn_16_2", 32, 8),
        ("MobileNetV2", 32, 2),
        ("ShuffleNetV1", 32, 4),
        ("ShuffleNetV2", 32, 4),
        ("vgg8", 32, 4),
        ("vgg13", 64, 4),
        ("vgg13", 28, 3),
        ("vgg13", 8, 4),
    ],
)
def test_resolution_of_the_last_feature_map(name, size, left):
    with torch.device("meta"):
        trunk = models.build(name, num_classes=10, image_size=size).trunk
        assert trunk(torch.empty(1, 3, size, size)).shape[2:] == (left, left)


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet8_w4", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleNetV1", "ShuffleNetV2", "ResNet50"]
)
def test_every_parameter_learns(name, device):
    torch.manual_seed(0)
    model = models.build(name, num_classes=10, in_channels=1, image_size=16).to(device)
    model(torch.randn(4, 1, 16, 16, device=device)).square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still
    silent = [n for n, p in model.named_parameters() if p.ndim > 1 and not p.grad.any()]
    assert not silent


def test_residual_branches_see_the_same_input(device):
    """In-place ReLUs must not touch what a shortcut still needs: without them the output is the same."""
    for name in ("resnet8", "wrn_16_1", "wrn_16_2", "ShuffleNetV1", "ShuffleNetV2", "MobileNetV2"):
        torch.manual_seed(0)
        model = models.build(name, num_classes=5, image_size=16).to(device).eval()
        x = torch.randn(2, 3, 16, 16, device=device)
        expected = model(x)
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        assert torch.equal(model(x), expected)


def test_the_same_seed_builds_the_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.build("resnet8_w4", num_classes=10).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_traces_into_one_graph(device):
    model = models.build("ShuffleNetV2", num_classes=10, image_size=16).to(device).eval()
    x = torch.randn(2, 3, 16, 16, device=device)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.full
@pytest.mark.parametrize("name, image_size", [("resnet18", 32), ("vit_tiny_patch16_224", 64)])
def test_timm_models_by_name(name, image_size):
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = models.build(f"timm:{name}", num_classes=11, in_channels=1, image_size=image_size)
        assert model(torch.empty(2, 1, image_size, image_size)).shape == (2, 11)


USER_FILE = """
from torch import nn

def tiny(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))

def any_keyword(**sizes):
    return tiny(**sizes)

def narrow(num_classes):
    return nn.Linear(4, num_classes)

def words(num_classes, in_channels, image_size):
    return "a model"

number = 3
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    return path


@pytest.mark.parametrize("factory", ["tiny", "any_keyword"])
def test_a_users_own_factory(user_file, factory):
    spec = {"name": f"{user_file}:{factory}", "num_classes": 4, "in_channels": 1, "image_size": 8}
    assert models.build(**spec)(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, nearest",
    [
        ("resnet9", "resnet8"),
        ("ResNet-20", "resnet20"),
        ("wrn-40-2", "wrn_40_2"),
        ("mobilenet", "MobileNetV2"),
        ("MobileNetv2", "MobileNetV2"),
        ("ShuffleV1", "ShuffleNetV1"),
        ("resnet50", "ResNet50"),
        ("vgg", "vgg8"),
        ("", ""),
        ("timm", ""),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"name must be a model of eekd, got {name!r}; did you mean '{nearest}"):
        models.build(name, num_classes=10)


@pytest.mark.full
@pytest.mark.bad_input
def test_an_unknown_timm_name_is_answered_with_the_nearest():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm:NAME must be a model of timm, got 'resnet_18'; did you mean 'resnet"):
        models.build("timm:resnet_18", num_classes=10)


@pytest.mark.bad_input
def test_timm_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'eekd\[timm\]'"):
        models.build("timm:resnet18", num_classes=10)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_classes": 0},
        {"num_classes": -1},
        {"num_classes": 10.0},
        {"num_classes": "10"},
        {"num_classes": True},
        {"num_classes": 10, "in_channels": 0},
        {"num_classes": 10, "in_channels": None},
        {"num_classes": 10, "image_size": 0},
        {"num_classes": 10, "image_size": (32, 32)},
    ],
)
def test_impossible_sizes_are_refused(sizes):
    key = list(sizes)[-1]
    with pytest.raises(ValueError, match=f"{key} must be a whole number of at least 1, got"):
        models.build("resnet8", **sizes)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", [None, 8, ["resnet8"]])
def test_a_name_must_be_a_string(name):
    with pytest.raises(TypeError, match="name must be a string"):
        models.build(name, num_classes=10)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "factory, error, words",
    [
        ("absent", AttributeError, "must define 'absent'"),
        ("narrow", TypeError, "must be callable with the keywords num_classes, in_channels, image_size"),
        ("number", TypeError, "must be callable"),
        ("words", TypeError, "must return an nn.Module, got str"),
    ],
)
def test_a_factory_of_another_kind_is_refused(user_file, factory, error, words):
    with pytest.raises(error, match=words):
        models.build(f"{user_file}:{factory}", num_classes=10)


@pytest.mark.bad_input
def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.py"):
        models.build(f"{tmp_path}/absent.py:factory", num_classes=10)
