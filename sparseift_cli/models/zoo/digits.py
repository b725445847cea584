"""Two small networks for the 8x8 digits of scikit-learn, which train in well under a minute on two CPU cores.

    digits_mlp    flatten -> six linear layers of 32 with batch norm and ReLU -> linear
    digits_cnn    four 3x3 convolutions with batch norm and ReLU (8, 8, 16 at half size, 16 channels) -> average -> linear

Small on purpose, so that the dense ones do not learn their data by heart.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import nn


@dataclass(frozen=True)
class DigitsConfig:
    """Sizes of one network for small images."""

    widths: tuple[int, ...]
    """Outputs of each layer before the classifier."""
    strides: tuple[int, ...] = ()
    """Stride of each convolution; empty for linear layers."""
    num_classes: int = 10
    image: tuple[int, int, int] = (1, 8, 8)
    """Channels, height and width of the input in pixels."""


CONFIGS = {
    "digits_mlp": DigitsConfig(widths=(32,) * 6),
    "digits_cnn": DigitsConfig(widths=(8, 8, 16, 16), strides=(1, 1, 2, 1)),
}


class DigitsNet(nn.Sequential):
    """Images [B, C, H, W] -> logits [B, num_classes]."""

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(*(_convolutions(config) if config.strides else _linear_layers(config)))


def _linear_layers(config: DigitsConfig) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]  # [B, C, H, W] -> [B, C * H * W]
    inputs = prod(config.image)
    for width in config.widths:
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        inputs = width
    return [*layers, nn.Linear(inputs, config.num_classes)]


def _convolutions(config: DigitsConfig) -> list[nn.Module]:
    layers: list[nn.Module] = []
    inputs = config.image[0]
    for width, stride in zip(config.widths, config.strides, strict=True):
        layers += [nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    # [B, 16, H/2, W/2] -> [B, 16]
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, config.num_classes)]


MODEL = DigitsNet
