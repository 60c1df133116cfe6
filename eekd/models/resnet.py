"""Residual networks for small images (He et al., "Deep Residual Learning", CVPR 2016, section 4.2)."""

from collections.abc import Sequence

from torch import nn

from eekd.models.blocks import Classifier, Sum, conv_bn, conv_bn_relu


def basic(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    body = nn.Sequential(conv_bn_relu(inputs, outputs, 3, stride), conv_bn(outputs, outputs, 3))
    return residual(body, inputs, outputs, stride)


def bottleneck(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    middle = outputs // 4
    body = nn.Sequential(
        conv_bn_relu(inputs, middle), conv_bn_relu(middle, middle, 3, stride), conv_bn(middle, outputs)
    )
    return residual(body, inputs, outputs, stride)


def residual(body: nn.Module, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    shortcut = None if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride)
    return nn.Sequential(Sum(body, shortcut), nn.ReLU(inplace=True))


def stages(block, stem: int, widths: Sequence[int], depths: Sequence[int]) -> list[nn.Module]:
    """One stage per width: its first block halves the image, except in the first stage."""
    layers, inputs = [], stem
    for stage, (outputs, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(depth):
            layers.append(block(inputs, outputs, 2 if stage > 0 and i == 0 else 1))
            inputs = outputs
    return layers


def resnet(
    depth: int, widths=(16, 16, 32, 64), stride: int = 1, *, num_classes: int, in_channels: int, image_size: int
) -> Classifier:
    """A stem of `stride` and three stages of (depth - 2) / 6 basic blocks; `widths` are the stem's and the stages'."""
    stem, *rest = widths
    layers = stages(basic, stem, rest, 3 * ((depth - 2) // 6,))
    return Classifier(nn.Sequential(conv_bn_relu(in_channels, stem, 3, stride), *layers), widths[-1], num_classes)


def resnet50(*, num_classes: int, in_channels: int, image_size: int) -> Classifier:
    """ImageNet's ResNet-50 with a 3×3 stem that keeps the image size, as is usual on CIFAR."""
    layers = stages(bottleneck, 64, (256, 512, 1024, 2048), (3, 4, 6, 3))
    return Classifier(nn.Sequential(conv_bn_relu(in_channels, 64, 3), *layers), 2048, num_classes)
