"""A perceptron with one hidden layer: a student that costs next to nothing."""

from torch import nn


def mlp(width: int, *, num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """Pixels, `width` hidden units with batch norm and ReLU, classes."""
    pixels = in_channels * image_size**2
    hidden = nn.Linear(pixels, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))
