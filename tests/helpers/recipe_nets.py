"""Narrow stand-ins for the models of the shipped recipes, as SOURCEs: the same modules by the same names, in a second.

Channels are an eighth or so of the real ones, and there are fewer blocks; a stage of each net has two, so that one block
comes without a projection in its shortcut. Images are 3x32x32 with 10 classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseift_cli.models.zoo.botnet import MHSA, reset
from sparseift_cli.models.zoo.common import init_weights
from sparseift_cli.models.zoo.gpt import GPT, GPTConfig
from sparseift_cli.models.zoo.mobilenet import MobileNetV2, MobileNetV2Config
from sparseift_cli.models.zoo.mobilevit import MobileViT, MobileViTConfig
from sparseift_cli.models.zoo.resnet import BasicBlock, Bottleneck, ResNet, ResNetConfig, stage

Made = tuple[nn.Module, Tensor]
CLASSES, SIDE = 10, 32
IMAGE = (3, SIDE, SIDE)


def _resnet(*depths: int, cifar_stem: bool = False, bottleneck: bool = False, width: int = 8) -> ResNet:
    """The zoo's, whose layers are then replaced by narrower ones."""
    a, b, c, d = depths
    with torch.device("meta"):
        model = ResNet(ResNetConfig((a, b, c, d), bottleneck, cifar_stem=cifar_stem, num_classes=CLASSES, image=IMAGE))
    block = Bottleneck if bottleneck else BasicBlock
    model.conv1 = (
        nn.Conv2d(3, width, 3, padding=1, bias=False) if cifar_stem else nn.Conv2d(3, width, 7, 2, 3, bias=False)
    )
    model.bn1, inputs = nn.BatchNorm2d(width), width
    for i, depth in enumerate(depths):
        model.set_submodule(f"layer{i + 1}", stage(block, inputs, width << i, depth, stride=2 if i else 1))
        inputs = (width << i) * block.expansion
    model.fc = nn.Linear(inputs, CLASSES)
    return model


def resnet18_cifar() -> Made:
    return _resnet(2, 1, 1, 1, cifar_stem=True), torch.zeros(1, *IMAGE)


def resnet18() -> Made:
    return _resnet(2, 1, 1, 1), torch.zeros(1, *IMAGE)


def resnet34() -> Made:
    return _resnet(2, 3, 1, 1), torch.zeros(1, *IMAGE)


def botnet50() -> Made:
    """Five blocks instead of sixteen; attention in the last two, as in the zoo's."""
    model = _resnet(1, 1, 1, 2, bottleneck=True)
    for index, block in enumerate(model.layer4):
        assert isinstance(block, Bottleneck)
        side = SIDE // (16 if index == 0 else 32)
        block.conv2 = MHSA(block.bn2.num_features, 4, height=side, width=side, stride=1 if index else 2)
    init_weights(model.layer4, reset)
    return model, torch.zeros(1, *IMAGE)


def mobilenet_v2() -> Made:
    stages = ((1, 8, 1, 1), (6, 8, 2, 2), (6, 16, 2, 2), (6, 24, 2, 1))
    config = MobileNetV2Config(stem=8, stages=stages, last=64, num_classes=CLASSES, image=IMAGE)
    return MobileNetV2(config), torch.zeros(1, *IMAGE)


def mobilevit_s() -> Made:
    config = MobileViTConfig(
        stem=8,
        channels=(8, 16, 24, 32, 40),
        hidden=(16, 24, 32),
        depth=(1, 1, 1),
        last=80,
        num_classes=CLASSES,
        image=IMAGE,
    )
    return MobileViT(config), torch.zeros(1, *IMAGE)


def gpt3_small() -> Made:
    """Hidden 96 instead of 768, two blocks, a vocabulary of 64."""
    config = GPTConfig(96, 2, 12, max_seq=32, vocab=64)
    return GPT(config), torch.zeros(1, 32, dtype=torch.int64)


def wikitext_gpt() -> Made:
    """Two blocks of width 64 instead of six of 256."""
    config = GPTConfig(64, 2, 4, max_seq=32, vocab=256, dropout=0.0)
    return GPT(config), torch.zeros(1, 32, dtype=torch.int64)


def gpt3_small_bytes() -> Made:
    """Hidden 96 instead of 768, two blocks; blocks of a mask are an eighth too, 16 instead of 128."""
    config = GPTConfig(96, 2, 12, max_seq=32, vocab=256, dropout=0.0)
    return GPT(config), torch.zeros(1, 32, dtype=torch.int64)
