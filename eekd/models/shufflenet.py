"""ShuffleNetV1 with 3 groups (Zhang et al., CVPR 2018) and ShuffleNetV2 at width 1 (Ma et al., ECCV 2018).

Both as the CIFAR benchmark has them: a 1×1 stem, and an image halved three times.
"""

import torch
from torch import Tensor, nn

from eekd.models.blocks import Classifier, Concat, Sum, conv_bn, conv_bn_relu


def grouped(inputs: int, outputs: int, stride: int, first_groups: int = 3) -> nn.Sequential:
    """ShuffleNetV1's unit: the shortcut is added at stride 1, and brings its own channels at stride 2."""
    new = outputs if stride == 1 else outputs - inputs
    middle = new // 4
    body = nn.Sequential(
        conv_bn_relu(inputs, middle, groups=first_groups),
        nn.ChannelShuffle(first_groups),
        conv_bn_relu(middle, middle, 3, stride, groups=middle),
        conv_bn(middle, new, groups=3),
    )
    return nn.Sequential(Sum(body) if stride == 1 else Concat(body, nn.AvgPool2d(3, 2, 1)), nn.ReLU(inplace=True))


def shufflenetv1(*, num_classes: int, in_channels: int, image_size: int) -> Classifier:
    """Stages of 4, 8 and 4 units with 240, 480 and 960 channels; the very first convolution has one group."""
    layers, inputs = [conv_bn_relu(in_channels, 24)], 24
    for outputs, units in (240, 4), (480, 8), (960, 4):
        layers.append(grouped(inputs, outputs, 2, first_groups=1 if inputs == 24 else 3))
        layers += [grouped(outputs, outputs, 1) for _ in range(units - 1)]
        inputs = outputs
    return Classifier(nn.Sequential(*layers), 960, num_classes)


class HalfUnit(nn.Module):
    """ShuffleNetV2's unit at stride 1: passes one half of the channels on, transforms the other."""

    def __init__(self, width: int):
        super().__init__()
        self.body = branch(width // 2, width // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return torch.cat([kept, self.body(changed)], 1)


def branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn_relu(inputs, outputs),
        conv_bn(outputs, outputs, 3, stride, groups=outputs),
        conv_bn_relu(outputs, outputs),
    )


def shufflenetv2(*, num_classes: int, in_channels: int, image_size: int) -> Classifier:
    """Stages of 4, 8 and 4 units with 116, 232 and 464 channels, then 1024 by a 1×1 convolution."""
    layers, inputs = [conv_bn_relu(in_channels, 24)], 24
    for outputs, units in (116, 4), (232, 8), (464, 4):
        left = nn.Sequential(conv_bn(inputs, inputs, 3, 2, groups=inputs), conv_bn_relu(inputs, outputs // 2))
        layers += [Concat(left, branch(inputs, outputs // 2, stride=2)), nn.ChannelShuffle(2)]
        for _ in range(units - 1):
            layers += [HalfUnit(outputs), nn.ChannelShuffle(2)]
        inputs = outputs
    return Classifier(nn.Sequential(*layers, conv_bn_relu(inputs, 1024)), 1024, num_classes)
