"""What the families share: convolution with batch norm, two ways to join branches, a head for the trunk."""

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Bias-free convolution that keeps the image size at stride 1."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def conv_bn(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs))


def conv_bn_relu(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return conv_bn(inputs, outputs, size, stride, groups).append(nn.ReLU(inplace=True))


class Sum(nn.Module):
    """left(x) + right(x)."""

    def __init__(self, left: nn.Module, right: nn.Module | None = None):
        super().__init__()
        self.left, self.right = left, right or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Concat(nn.Module):
    """The channels of left(x), then those of right(x)."""

    def __init__(self, left: nn.Module, right: nn.Module):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Classifier(nn.Module):
    """classifier(mean over pixels of trunk(x)): images (B, channels, H, W) to logits (B, C), H and W free.

    Convolutions start as He et al. 2015 propose: normal, variance 2 / (outputs · kernel area), biases zero.
    """

    def __init__(self, trunk: nn.Module, width: int, num_classes: int):
        super().__init__()
        self.trunk = trunk
        self.classifier = nn.Linear(width, num_classes)
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.trunk(x).mean((2, 3)))
