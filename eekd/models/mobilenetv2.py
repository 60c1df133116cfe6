"""MobileNetV2 at half width (Sandler et al., CVPR 2018, as the CIFAR benchmark trims it)."""

from torch import nn

from eekd.models.blocks import Classifier, Sum, conv_bn, conv_bn_relu

# expansion, outputs, blocks, stride of the first block
STAGES = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))


def inverted(inputs: int, outputs: int, expansion: int, stride: int) -> nn.Module:
    wide = inputs * expansion
    body = nn.Sequential(
        conv_bn_relu(inputs, wide), conv_bn_relu(wide, wide, 3, stride, groups=wide), conv_bn(wide, outputs)
    )
    return Sum(body) if stride == 1 and inputs == outputs else body


def mobilenetv2(*, num_classes: int, in_channels: int, image_size: int) -> Classifier:
    """Inverted residuals at half the published widths; the last convolution keeps its 1280 channels."""
    layers: list[nn.Module] = [conv_bn_relu(in_channels, 16, 3, 2)]
    inputs = 16
    for expansion, outputs, blocks, stride in STAGES:
        for i in range(blocks):
            layers.append(inverted(inputs, outputs, expansion, stride if i == 0 else 1))
            inputs = outputs
    return Classifier(nn.Sequential(*layers, conv_bn_relu(inputs, 1280)), 1280, num_classes)
