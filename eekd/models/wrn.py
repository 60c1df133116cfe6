"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016): batch norm and ReLU before convolutions."""

from torch import nn

from eekd.models.blocks import Classifier, Sum, conv
from eekd.models.resnet import stages


def bn_relu(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def preactivated(inputs: int, outputs: int, stride: int) -> nn.Module:
    convs = nn.Sequential(conv(inputs, outputs, 3, stride), bn_relu(outputs), conv(outputs, outputs, 3))
    if inputs == outputs:
        return Sum(nn.Sequential(bn_relu(inputs), convs))
    return nn.Sequential(bn_relu(inputs), Sum(convs, conv(inputs, outputs, 1, stride)))


def wrn(depth: int, factor: int, *, num_classes: int, in_channels: int, image_size: int) -> Classifier:
    """wrn_DEPTH_FACTOR: three stages of (depth - 4) / 6 blocks, `factor` times as wide as (16, 32, 64)."""
    layers = stages(preactivated, 16, (16 * factor, 32 * factor, 64 * factor), 3 * ((depth - 4) // 6,))
    trunk = nn.Sequential(conv(in_channels, 16, 3), *layers, bn_relu(64 * factor))
    return Classifier(trunk, 64 * factor, num_classes)
