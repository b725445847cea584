"""Wide ResNets for CIFAR: WRN-22-2 and WRN-28-10 (layers - widening factor).

    image -> conv1 3x3 -> block1..block3 (16k, 32k, 64k channels; 32, 16, 8 pixels) -> bn1 -> relu -> average -> fc

Pre-activation blocks: bn, relu, conv, twice. Where a block changes the width, the shortcut convolves the *activated*
input, and block1 does so too (16 -> 16k channels at stride 1).

Paper: Zagoruyko & Komodakis, Wide Residual Networks, arXiv 1605.07146. `state_dict` keys and initialisation:
github.com/xternalz/WideResNet-pytorch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .common import init_weights


@dataclass(frozen=True)
class WideResNetConfig:
    """Sizes of WRN-(6 * depth + 4)-(factor)."""

    depth: int
    """Residual blocks in each of the three stages."""
    factor: int
    """The paper's widening factor k: stages have 16k, 32k and 64k channels."""
    num_classes: int = 100
    image: tuple[int, int, int] = (3, 32, 32)
    """Channels, height and width of the input in pixels. The weights depend on the channels alone."""


CONFIGS = {
    "wrn22_2": WideResNetConfig(depth=3, factor=2),
    "wrn28_10": WideResNetConfig(depth=4, factor=10),
}


class PreActBlock(nn.Module):
    """x + conv2(relu(bn2(conv1(relu(bn1(x)))))): [B, in, H, W] -> [B, channels, H/stride, W/stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        widens = in_channels != channels
        self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if widens else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        identity = x if self.convShortcut is None else self.convShortcut(activated)
        return y + identity


class Stage(nn.Module):
    """`depth` blocks, of which the first changes the width and takes the stride."""

    def __init__(self, in_channels: int, channels: int, depth: int, stride: int) -> None:
        super().__init__()
        first = PreActBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(PreActBlock(channels, channels, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Images [B, C, H, W] (the paper's are 32x32) -> logits [B, num_classes]."""

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__()
        k = config.factor
        self.conv1 = nn.Conv2d(config.image[0], 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, 16 * k, config.depth, stride=1)
        self.block2 = Stage(16 * k, 32 * k, config.depth, stride=2)
        self.block3 = Stage(32 * k, 64 * k, config.depth, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * k)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * k, config.num_classes)
        init_weights(self, reset)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        return self.fc(self.avgpool(x).flatten(1))


def reset(module: nn.Module) -> None:
    """He initialisation by fan-out for convs, a zero bias for the classifier."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


MODEL = WideResNet
