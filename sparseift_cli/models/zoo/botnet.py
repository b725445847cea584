"""BoTNet-50: ResNet-50 with self-attention in place of the 3x3 convs of its last stage (c5).

Each of the three blocks of layer4 attends globally over its feature map with 4 heads of 128 channels and 2-D relative
positions. This is the paper's BoTNet-50 of table 1, which keeps ResNet's strides: the first block attends at 14x14 (for
224 pixels) and a 2x2 average pool follows; the BoTNet-S1 variants with stride 1 in c5 are other models.

    logits(i, j) = (q_i . k_j + q_i . r_height[y_j - y_i] + q_i . r_width[x_j - x_i]) / sqrt(head_dim)

The products with the relative positions are matrix products and count as MACs (4*H*W*(2H-1 + 2W-1)*128 a block).

Paper: Srinivas et al., Bottleneck Transformers for Visual Recognition, arXiv 2101.11605; relative positions as in Bello
et al., arXiv 1904.09925. `state_dict` keys: torchvision's ResNet-50, with the names of timm's BottleneckAttn inside
`layer4.*.conv2`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import init_weights
from .resnet import Bottleneck, ResNet, ResNetConfig


@dataclass(frozen=True)
class BoTNetConfig:
    """Sizes of one BoTNet: those of its ResNet, and the heads of the attention in layer4."""

    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Residual blocks in layer1 .. layer4."""
    num_heads: int = 4
    num_classes: int = 1000
    image: tuple[int, int, int] = (3, 224, 224)
    """Channels, height and width of the input in pixels; the tables of relative positions fit this size only."""


CONFIGS = {"botnet50": BoTNetConfig()}


class RelativePosition(nn.Module):
    """The part of the logits that depends on where key and query lie: one vector per distance along each axis."""

    def __init__(self, height: int, width: int, head_dim: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * height - 1, head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * width - 1, head_dim))

    def forward(self, q: Tensor, height: int, width: int) -> Tensor:
        """Queries [B, heads, H*W, head_dim] -> logits [B, heads, H*W, H*W], scaled.

        Raises ValueError where H and W are not those that the tables were made for.
        """
        if self.height_rel.shape[0] != 2 * height - 1 or self.width_rel.shape[0] != 2 * width - 1:
            raise ValueError(f"the relative positions were made for another size than {height}x{width}")
        q = (q * q.shape[-1] ** -0.5).unflatten(2, (height, width))
        along_x = by_position(q @ self.width_rel.T)  # [B, heads, y, x, x']
        along_y = by_position(q.transpose(2, 3) @ self.height_rel.T)  # [B, heads, x, y, y']
        logits = along_x.unsqueeze(4) + along_y.transpose(2, 3).unsqueeze(5)  # [B, heads, y, x, y', x']
        return logits.flatten(4).flatten(2, 3)


def by_position(logits: Tensor) -> Tensor:
    """Logits by distance d, in column d + N - 1, [..., N, 2N-1] -> logits by position of the key [..., N, N]."""
    n = logits.shape[-2]
    query = torch.arange(n, device=logits.device).unsqueeze(1)
    key = torch.arange(n, device=logits.device)
    return logits[..., query, key - query + n - 1]


class MHSA(nn.Module):
    """Global self-attention over a feature map, [B, channels, H, W] -> [B, channels, H/stride, W/stride]."""

    def __init__(self, channels: int, num_heads: int, *, height: int, width: int, stride: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = channels // num_heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.pos_embed = RelativePosition(height, width, self.head_dim)
        # A partial window at an odd edge is averaged over the pixels it has, so the sides match a conv of stride 2.
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        qkv = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each [B, heads, H*W, head_dim]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.pos_embed(q, height, width))
        return self.pool(x.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)))


class BoTNet(ResNet):
    """Images [B, *config.image] -> logits [B, num_classes]."""

    def __init__(self, config: BoTNetConfig) -> None:
        super().__init__(
            ResNetConfig(config.depths, bottleneck=True, num_classes=config.num_classes, image=config.image)
        )
        for index, block in enumerate(self.layer4):
            assert isinstance(block, Bottleneck)
            # The first block sees the image after four halvings, the others after the fifth; each rounds up.
            height, width = (math.ceil(side / (16 if index == 0 else 32)) for side in config.image[1:])
            stride = 2 if index == 0 else 1
            block.conv2 = MHSA(block.bn2.num_features, config.num_heads, height=height, width=width, stride=stride)
        init_weights(self.layer4, reset)


def reset(module: nn.Module) -> None:
    """Initialise attention: qkv weights with std 1/sqrt(in_channels), relative-position tables with std 1/sqrt(head_dim)."""
    if isinstance(module, MHSA):
        nn.init.normal_(module.qkv.weight, std=module.qkv.in_channels**-0.5)
        for table in module.pos_embed.parameters():
            nn.init.normal_(table, std=module.head_dim**-0.5)


MODEL = BoTNet
