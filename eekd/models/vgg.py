"""VGG with batch norm and one linear layer (Simonyan and Zisserman, ICLR 2015, in the form used on CIFAR)."""

from torch import nn

from eekd.models.blocks import Classifier

# Convolutions in each of the five stages; vgg8 is the benchmark's own.
DEPTHS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(depth: int, *, num_classes: int, in_channels: int, image_size: int) -> Classifier:
    """Five stages of 3×3 convolutions; the image is halved between them while it is larger than 4×4."""
    layers, inputs, size = [], in_channels, image_size
    for outputs, convolutions in zip((64, 128, 256, 512, 512), DEPTHS[depth], strict=True):
        if inputs != in_channels and size > 4:
            layers.append(nn.MaxPool2d(2))
            size //= 2
        for _ in range(convolutions):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            layers += nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
            inputs = outputs
    return Classifier(nn.Sequential(*layers), 512, num_classes)
