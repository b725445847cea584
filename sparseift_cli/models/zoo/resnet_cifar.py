"""The CIFAR ResNets of section 4.2 of the ResNet paper: 20, 32, 44 and 56 layers, 0.27 to 0.85 M parameters.

    image -> conv1 3x3 -> bn1 -> relu -> layer1..layer3 (16, 32, 64 channels; 32, 16, 8 pixels) -> average -> linear

Shortcuts are the paper's option A: where a stage begins, every second pixel of the input is added, with zero channels
before and behind it. They have no weights and no MACs.

Paper: He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385. `state_dict` keys and initialisation:
github.com/akamaster/pytorch_resnet_cifar10, whose checkpoints (`resnet20-12fca82f.th`) fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .common import init_weights


@dataclass(frozen=True)
class CifarResNetConfig:
    """Sizes of one CIFAR ResNet: 6 * depth + 2 weighted layers."""

    depth: int
    """Residual blocks in each of the three stages."""
    num_classes: int = 10
    image: tuple[int, int, int] = (3, 32, 32)
    """Channels, height and width of the input in pixels. The weights depend on the channels alone."""


CONFIGS = {
    "resnet20": CifarResNetConfig(depth=3),
    "resnet32": CifarResNetConfig(depth=5),
    "resnet44": CifarResNetConfig(depth=7),
    "resnet56": CifarResNetConfig(depth=9),
}


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """Zero channels before and behind those of `x` [B, C, H, W] until there are `channels` (the odd one behind)."""
    missing = channels - x.shape[1]
    before = missing // 2
    return F.pad(x, (0, 0, 0, 0, before, missing - before))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))): [B, in, H, W] -> [B, channels, H/stride, W/stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.subsamples = stride == 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.subsamples:
            x = pad_channels(x[:, :, ::2, ::2], y.shape[1])
        return self.relu(y + x)


class CifarResNet(nn.Module):
    """Images [B, C, H, W] (the paper's are 32x32) -> logits [B, num_classes]."""

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.image[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(16, 16, config.depth, stride=1)
        self.layer2 = stage(16, 32, config.depth, stride=2)
        self.layer3 = stage(32, 64, config.depth, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, config.num_classes)
        init_weights(self, reset)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def stage(in_channels: int, channels: int, depth: int, *, stride: int) -> nn.Sequential:
    """`depth` blocks, of which the first changes the width and takes the stride."""
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(depth - 1)))


def reset(module: nn.Module) -> None:
    """He initialisation by fan-in for convs and the classifier, as akamaster's code does."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)


MODEL = CifarResNet
