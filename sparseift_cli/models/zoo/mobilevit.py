"""MobileViT-S: MobileNetV2 blocks, and transformers over the patches of three feature maps.

    image -> stem 3x3/2 (16) -> stages.0, stages.1: inverted residuals -> stages.2..4: one inverted residual (stride 2)
    and one MobileViT block each -> final_conv 1x1 (640) -> global average -> head.fc

A MobileViT block runs a small transformer over the pixels that share a place in their 2x2 patch, folds the result back
and fuses it with its input. A feature map with an odd side (7x7, from 224 pixels) is resized to the next even one for
the transformer and back after it, as the reference does; at the paper's 256 pixels nothing is resized.

Paper: Mehta & Rastegari, MobileViT, arXiv 2110.02178. `state_dict` keys and initialisation: timm's `mobilevit_s`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import init_weights

PATCH = 2  # side of a patch in pixels of the feature map, in all three stages


@dataclass(frozen=True)
class MobileViTConfig:
    """Sizes of one MobileViT; the defaults are MobileViT-S."""

    stem: int = 16
    """Channels of the first conv."""
    channels: tuple[int, int, int, int, int] = (32, 64, 96, 128, 160)
    """Output channels of the five stages."""
    expansion: int = 4
    """Inner channels of an inverted residual over its input channels."""
    hidden: tuple[int, int, int] = (144, 192, 240)
    """Width of the transformers in the last three stages; their feed-forward layers are twice as wide."""
    depth: tuple[int, int, int] = (2, 4, 3)
    """Their transformer blocks."""
    num_heads: int = 4
    last: int = 640
    """Channels of the last 1x1 conv, the classifier's input."""
    num_classes: int = 1000
    image: tuple[int, int, int] = (3, 224, 224)
    """Channels, height and width of the input in pixels. The weights depend on the channels alone."""


CONFIGS = {"mobilevit_s": MobileViTConfig()}


class ConvNormAct(nn.Module):
    """Conv that keeps the sides (over the stride), BatchNorm and, if `act`, SiLU."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, *, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel - 1) // 2
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1: [B, in, H, W] -> [B, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv1_1x1 = ConvNormAct(in_channels, inner, 1)
        self.conv2_kxk = ConvNormAct(inner, inner, 3, stride, groups=inner)
        self.conv3_1x1 = ConvNormAct(inner, out_channels, 1, act=False)
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + y if self.adds_input else y


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, hidden] -> [B, N, hidden]."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden // num_heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each [B, heads, N, head_dim]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc2(silu(fc1(x))), [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Pre-LN block: attention, then feed-forward, each added to the stream [B, N, hidden]."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attn = Attention(hidden, num_heads)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = Mlp(hidden, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MobileViTBlock(nn.Module):
    """Local 3x3 conv, global transformer over patches, fusion with the input: [B, channels, H, W], the same out."""

    def __init__(self, channels: int, hidden: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.conv_kxk = ConvNormAct(channels, channels, 3)
        self.conv_1x1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.transformer = nn.Sequential(*(TransformerBlock(hidden, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(hidden)
        self.conv_proj = ConvNormAct(hidden, channels, 1)
        self.conv_fusion = ConvNormAct(2 * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_1x1(self.conv_kxk(x))
        height, width = y.shape[2:]
        rows, columns = math.ceil(height / PATCH), math.ceil(width / PATCH)
        whole = (rows * PATCH, columns * PATCH) == (height, width)
        if not whole:
            y = F.interpolate(y, (rows * PATCH, columns * PATCH), mode="bilinear", align_corners=False)
        y = self.norm(self.transformer(unfold(y, rows, columns)))
        y = fold(y, x.shape[0], rows, columns)
        if not whole:
            y = F.interpolate(y, (height, width), mode="bilinear", align_corners=False)
        return self.conv_fusion(torch.cat((x, self.conv_proj(y)), dim=1))


def unfold(x: Tensor, rows: int, columns: int) -> Tensor:
    """Map [B, C, rows*P, columns*P] -> sequences [B*P*P, rows*columns, C], one for each place in a PxP patch."""
    x = x.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))  # [B, C, rows, P, columns, P]
    return x.permute(0, 3, 5, 2, 4, 1).flatten(3, 4).flatten(0, 2)


def fold(x: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """Sequences [B*P*P, rows*columns, C] -> map [B, C, rows*P, columns*P]: the inverse of `unfold`."""
    x = x.unflatten(1, (rows, columns)).unflatten(0, (batch, PATCH, PATCH))  # [B, P, P, rows, columns, C]
    return x.permute(0, 5, 3, 1, 4, 2).flatten(4, 5).flatten(2, 3)


class MobileViT(nn.Module):
    """Images [B, C, H, W] -> logits [B, num_classes]."""

    def __init__(self, config: MobileViTConfig) -> None:
        super().__init__()
        c0, c1, *wide = config.channels
        self.stem = ConvNormAct(config.image[0], config.stem, 3, stride=2)
        stages = [
            nn.Sequential(InvertedResidual(config.stem, c0, 1, config.expansion)),
            nn.Sequential(
                InvertedResidual(c0, c1, 2, config.expansion),
                InvertedResidual(c1, c1, 1, config.expansion),
                InvertedResidual(c1, c1, 1, config.expansion),
            ),
        ]
        before = c1
        for channels, hidden, depth in zip(wide, config.hidden, config.depth, strict=True):
            down = InvertedResidual(before, channels, 2, config.expansion)
            stages.append(nn.Sequential(down, MobileViTBlock(channels, hidden, depth, config.num_heads)))
            before = channels
        self.stages = nn.Sequential(*stages)
        self.final_conv = ConvNormAct(before, config.last, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(config.last, config.num_classes)))
        init_weights(self, reset)

    def forward(self, x: Tensor) -> Tensor:
        x = self.final_conv(self.stages(self.stem(x)))
        return self.head(self.avgpool(x).flatten(1))


def reset(module: nn.Module) -> None:
    """As timm: He by fan-out for convs, 0.01 for linear layers, residual conv branches that start at zero."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
    elif isinstance(module, InvertedResidual) and module.adds_input:
        nn.init.zeros_(module.conv3_1x1.bn.weight)


MODEL = MobileViT
