"""Models by name: the CIFAR families that distillation papers compare, timm's, and anybody's own.

The named ones have the definitions, parameter counts and feature widths of the benchmark everyone quotes
(Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020).
"""

import inspect
from collections.abc import Mapping
from functools import partial

from torch import nn
from torch.nn.parameter import UninitializedParameter

from eekd.io.files import nearest
from eekd.models.convolutions import guard
from eekd.models.mlp import mlp
from eekd.models.mobilenetv2 import mobilenetv2
from eekd.models.normalization import renormalize
from eekd.models.outputs import take_output
from eekd.models.resnet import resnet, resnet50
from eekd.models.shufflenet import shufflenetv1, shufflenetv2
from eekd.models.vgg import DEPTHS, vgg
from eekd.models.wrn import wrn
from eekd.user_code import errors_of, is_file_name, load

MODELS = {
    **{f"resnet{depth}": partial(resnet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8_w4": partial(resnet, 8, (4, 4, 8, 16)),
    "resnet8_s2": partial(resnet, 8, stride=2),
    "resnet8_s2_w4": partial(resnet, 8, (4, 4, 8, 16), stride=2),
    "mlp64": partial(mlp, 64),
    "resnet8x4": partial(resnet, 8, (32, 64, 128, 256)),
    "resnet32x4": partial(resnet, 32, (32, 64, 128, 256)),
    **{f"wrn_{depth}_{factor}": partial(wrn, depth, factor) for depth in (16, 40) for factor in (1, 2)},
    **{f"vgg{depth}": partial(vgg, depth) for depth in DEPTHS},
    "MobileNetV2": mobilenetv2,
    "ShuffleNetV1": shufflenetv1,
    "ShuffleNetV2": shufflenetv2,
    "ResNet50": resnet50,
}


def names() -> tuple[str, ...]:
    """The names of eekd's own models, which `build` takes."""
    return tuple(MODELS)


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    args: Mapping | None = None,
    normalization: dict | None = None,
    output: str | None = None,
) -> nn.Module:
    """A fresh classifier: images (B, in_channels, image_size, image_size) to logits (B, num_classes).

    `name` is one of `names()`, `timm:NAME`, or `path/to/file.py:factory`, where the factory takes the other
    three arguments by keyword and returns an nn.Module. `args` are the model's own, by name, such as timm's
    drop_path_rate. `normalization` is for images that are normalised differently than the network needs: `given` and
    `own`, each with a `mean` and a `std` for every channel of images scaled to [0, 1]. `output` names the logits among
    several outputs, see `eekd.models.outputs.TakeOutput`: the model then returns them alone. A manifest stores all
    arguments as a dict, `spec`; `build(**spec)` makes the model again. Its convolutions are guarded, see
    `eekd.models.convolutions.guard`.

    Raises ValueError for an unknown name, naming the nearest, for sizes below 1, and for args that the model does not
    take or that would load something, and, with file and line, for whatever a file or factory raises; FileNotFoundError
    and AttributeError for a missing one; TypeError for a factory of another kind.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'resnet20', got {type(name).__name__}")
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, got {value!r}")
    network = guard(_network(name, _own_arguments(args, sizes), sizes))
    if normalization is not None:
        network.register_forward_pre_hook(renormalize(normalization, in_channels))
    return take_output(network, output)


def _network(name: str, args: dict, sizes: dict) -> nn.Module:
    if name.startswith("timm:"):
        return from_timm(name.removeprefix("timm:"), args, **sizes)  # pyright: ignore[reportArgumentType]
    if is_file_name(name):
        return _from_file(name, args, **sizes)
    if name not in MODELS:
        raise ValueError(f"name must be a model of eekd, got {name!r}{nearest(name, MODELS, cutoff=0)}")
    if unknown := sorted(args.keys() - inspect.signature(MODELS[name]).parameters.keys()):
        raise ValueError(f"args must be arguments of {name!r}, got {', '.join(unknown)}")
    return MODELS[name](**sizes, **args)


def _own_arguments(args, sizes: Mapping) -> dict:
    """The args of a model, where they are numbers, truths and texts by name, and lists of them."""
    plain = bool | int | float | str
    arguments = dict(args) if isinstance(args, Mapping) else {} if args is None else None
    if arguments is None or not all(
        isinstance(name, str) and (isinstance(x, plain) or isinstance(x, list) and all(isinstance(y, plain) for y in x))
        for name, x in arguments.items()
    ):
        raise ValueError(f"args must be numbers, truths, texts or lists of them by name, got {args!r:.200}")
    if taken := sorted(arguments.keys() & sizes.keys()):
        raise ValueError(f"args must leave {', '.join(taken)} to the data, got {args!r:.200}")
    return arguments


def timm_config(name: str):
    """What timm says of its model NAME and of its weights; None where it says nothing."""
    return _timm(name).get_pretrained_cfg(name)


def _timm(name: str):
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"'timm:{name}' needs the package timm: pip install 'eekd[timm]'") from error
    return timm


def from_timm(
    name: str, args: dict, *, num_classes: int, in_channels: int, image_size: int, pretrained: bool = False
) -> nn.Module:
    """timm's model NAME, with timm's own weights if asked for."""
    timm = _timm(name)
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models(), cutoff=0)
        raise ValueError(f"timm:NAME must be a model of timm, got {name!r}{hint}")
    # Only models whose weights depend on the image size, such as vision transformers, take it as an argument.
    cfg = timm.get_pretrained_cfg(name)
    size: dict = {"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {}
    # A spec comes from a file, which may not make timm read another one or fetch something.
    loading = inspect.signature(timm.create_model).parameters.keys() | {"in_chans", "img_size"}
    if refused := sorted(key for key in args if key in loading or key.startswith("pretrained")):
        raise ValueError(f"args must be those of the model {name!r} itself, got {', '.join(refused)}")
    try:
        return timm.create_model(name, pretrained, num_classes=num_classes, in_chans=in_channels, **size, **args)
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        if not args:
            raise
        raise ValueError(f"args must be arguments of timm's {name!r}, got {args!r:.200}: {error}") from error


def _from_file(name: str, args: dict, **sizes: int) -> nn.Module:
    factory = load(name, "a function that returns an nn.Module")
    if isinstance(factory, nn.Module):
        raise TypeError(f"{name!r} must be a function that returns an nn.Module, got a {type(factory).__name__}")
    try:
        inspect.signature(factory).bind(**sizes, **args)
    except (TypeError, ValueError) as error:
        wanted = ", ".join([*sizes, *args])
        raise TypeError(f"{name!r} must be callable with the keywords {wanted}: {error}") from error
    with errors_of(name):
        model = factory(**sizes, **args)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name!r} must return an nn.Module, got {type(model).__name__}")
    if lazy := [key for key, x in model.named_parameters() if isinstance(x, UninitializedParameter)]:
        raise ValueError(f"{name!r} must give its layers their sizes, got a lazy one, with the parameter {lazy[0]}")
    return model
