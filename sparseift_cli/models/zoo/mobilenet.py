"""MobileNetV2: inverted residuals with linear bottlenecks.

    image -> conv 3x3/2 (32) -> 17 inverted residuals -> conv 1x1 (1280) -> global average -> dropout -> linear

An inverted residual expands 1x1, convolves depthwise 3x3 and projects 1x1 without an activation.

Paper: Sandler et al., MobileNetV2, arXiv 1801.04381, table 2. `state_dict` keys and initialisation: torchvision's
MobileNetV2 (`features.0` .. `features.18`, `classifier.1`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .common import init_weights


@dataclass(frozen=True)
class MobileNetV2Config:
    """Sizes of a MobileNetV2; the defaults are those of table 2 at width multiplier 1."""

    stem: int = 32
    """Channels of the first conv."""
    stages: tuple[tuple[int, int, int, int], ...] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    """Expansion factor t, output channels c, blocks n and the first block's stride s, per row of the table."""
    last: int = 1280
    """Channels of the last 1x1 conv, the classifier's input."""
    dropout: float = 0.2
    num_classes: int = 1000
    image: tuple[int, int, int] = (3, 224, 224)
    """Channels, height and width of the input in pixels. The weights depend on the channels alone."""


CONFIGS = {"mobilenet_v2": MobileNetV2Config()}


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A conv that keeps the sides (over the stride), BatchNorm and ReLU6."""
    padding = (kernel - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """[B, in, H, W] -> [B, out, H/stride, W/stride], with x added where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [conv_bn_relu(in_channels, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds_input else self.conv(x)


class MobileNetV2(nn.Module):
    """Images [B, C, H, W] -> logits [B, num_classes]."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu(config.image[0], config.stem, 3, stride=2)]
        channels = config.stem
        for expansion, out_channels, blocks, stride in config.stages:
            for i in range(blocks):
                layers.append(InvertedResidual(channels, out_channels, stride if i == 0 else 1, expansion))
                channels = out_channels
        layers.append(conv_bn_relu(channels, config.last, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(config.last, config.num_classes))
        init_weights(self, reset)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.flatten(1))


def reset(module: nn.Module) -> None:
    """He initialisation by fan-out for convs, a normal of deviation 0.01 for the classifier."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


MODEL = MobileNetV2
