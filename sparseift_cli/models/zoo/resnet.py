"""ResNet-18 to ResNet-152, and the 3x3-stem ResNets that CIFAR papers call by the same names.

    image -> conv1 7x7/2 -> bn1 -> relu -> maxpool 3x3/2 -> layer1..layer4 -> global average -> fc

The four stages have 64, 128, 256 and 512 channels (times 4 after a bottleneck block); each but the first halves the
sides. CIFAR: conv1 is 3x3 with stride 1 and there is no maxpool, so layer1 sees the full 32x32.

Paper: He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, with the stride of a bottleneck block
in its 3x3 conv ("v1.5"), as torchvision has it. `state_dict` keys and initialisation: torchvision's ResNet.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .common import init_weights


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of one ResNet (table 1 of the paper)."""

    depths: tuple[int, int, int, int]
    """Residual blocks in layer1 .. layer4."""
    bottleneck: bool
    """Blocks of 1x1, 3x3, 1x1 convs (outputs 4 times as wide) instead of two 3x3 convs."""
    cifar_stem: bool = False
    """conv1 3x3 with stride 1, no maxpool."""
    num_classes: int = 1000
    image: tuple[int, int, int] = (3, 224, 224)
    """Channels, height and width of the input in pixels. The weights depend on the channels alone."""


CONFIGS = {
    "resnet18": ResNetConfig((2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetConfig((3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetConfig((3, 4, 6, 3), bottleneck=True),
    "resnet101": ResNetConfig((3, 4, 23, 3), bottleneck=True),
    "resnet152": ResNetConfig((3, 8, 36, 3), bottleneck=True),
    "resnet18_cifar": ResNetConfig((2, 2, 2, 2), bottleneck=False, cifar_stem=True, num_classes=100, image=(3, 32, 32)),
    "resnet34_cifar": ResNetConfig((3, 4, 6, 3), bottleneck=False, cifar_stem=True, num_classes=100, image=(3, 32, 32)),
}


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The 1x1 projection of a block that changes the shape of its input; None where the input itself is added."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """relu(x + bn2(conv2(relu(bn1(conv1(x)))))): two 3x3 convs, [B, in, H, W] -> [B, channels, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(y + identity)


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (with the stride), 1x1 up: [B, in, H, W] -> [B, 4*channels, H/stride, W/stride]."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2: nn.Module = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(y + identity)


class ResNet(nn.Module):
    """Images [B, C, H, W] -> logits [B, num_classes], for any H and W that survive five halvings (CIFAR: three)."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        if config.cifar_stem:
            self.conv1 = nn.Conv2d(config.image[0], 64, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(config.image[0], 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if config.cifar_stem else nn.MaxPool2d(3, 2, padding=1)
        block = Bottleneck if config.bottleneck else BasicBlock
        self.layer1 = stage(block, 64, 64, config.depths[0], stride=1)
        self.layer2 = stage(block, 64 * block.expansion, 128, config.depths[1], stride=2)
        self.layer3 = stage(block, 128 * block.expansion, 256, config.depths[2], stride=2)
        self.layer4 = stage(block, 256 * block.expansion, 512, config.depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, config.num_classes)
        init_weights(self, reset)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, depth: int, *, stride: int
) -> nn.Sequential:
    """`depth` blocks, of which the first changes the width and takes the stride."""
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels * block.expansion, channels, 1) for _ in range(depth - 1)))


def reset(module: nn.Module) -> None:
    """He initialisation by fan-out for convs; BatchNorm and fc keep PyTorch's own (1, 0 and uniform by fan-in)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


MODEL = ResNet
