"""Vision Transformers on 16x16 patches: ViT-B/16 and ViT-S/16.

    image -> conv_proj 16x16/16 -> [class token | patches] + positions -> 12 pre-LN blocks -> ln -> heads.head(class)

Papers: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929 (ViT-B/16, table 1); Touvron et al., DeiT,
arXiv 2012.12877 (the sizes of ViT-S/16). `state_dict` keys and initialisation: torchvision's VisionTransformer, whose
attention is an nn.MultiheadAttention (`in_proj_weight` stacks Q, K and V by rows).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError
from .common import init_weights


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of one ViT."""

    hidden: int
    """Width of the residual stream."""
    num_heads: int
    mlp: int
    """Inner width of the feed-forward layers."""
    depth: int = 12
    """Transformer blocks."""
    patch: int = 16
    """Side of a patch in pixels."""
    dropout: float = 0.0
    num_classes: int = 1000
    image: tuple[int, int, int] = (3, 224, 224)
    """Channels, height and width of the input in pixels; the table of positions has a row per patch and the class."""


CONFIGS = {
    "vit_s_16": ViTConfig(hidden=384, num_heads=6, mlp=1536),
    "vit_b_16": ViTConfig(hidden=768, num_heads=12, mlp=3072),
}


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, [B, N, hidden] -> [B, N, hidden]."""

    def __init__(self, hidden: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden // num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden))
        self.out_proj = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each [B, heads, N, head_dim]
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-LN transformer block: attention, then a GELU feed-forward, each added to the stream [B, N, hidden]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden, eps=1e-6)
        self.self_attention = SelfAttention(config.hidden, config.num_heads, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.ln_2 = nn.LayerNorm(config.hidden, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden, config.mlp),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.mlp, config.hidden),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attention(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Adds learned positions and runs the blocks, [B, N, hidden] -> [B, N, hidden], for the one N it was built for."""

    def __init__(self, config: ViTConfig, tokens: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, config.hidden))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.Sequential(OrderedDict((f"encoder_layer_{i}", Block(config)) for i in range(config.depth)))
        self.ln = nn.LayerNorm(config.hidden, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


class VisionTransformer(nn.Module):
    """Images [B, *config.image] -> logits [B, num_classes].

    Raises UsageError where a side of the image is not a whole number of patches.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        channels, height, width = config.image
        if height % config.patch or width % config.patch:
            raise UsageError(
                f"an image of {height}x{width} pixels does not divide into patches of {config.patch}x{config.patch}",
                hint=f"give an image whose sides are multiples of {config.patch}",
            )
        tokens = 1 + (height // config.patch) * (width // config.patch)
        self.conv_proj = nn.Conv2d(channels, config.hidden, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.hidden))
        self.encoder = Encoder(config, tokens)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(config.hidden, config.num_classes)))
        init_weights(self, reset)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)  # [B, patches, hidden], row by row
        class_token = self.class_token.expand(patches.shape[0], -1, -1)
        x = self.encoder(torch.cat((class_token, patches), dim=1))
        return self.heads(x[:, 0])


def reset(module: nn.Module) -> None:
    """As torchvision: Xavier projections, small positions, and a classifier that starts at zero."""
    if isinstance(module, SelfAttention):
        nn.init.xavier_uniform_(module.in_proj_weight)
        nn.init.zeros_(module.in_proj_bias)
        nn.init.zeros_(module.out_proj.bias)
    elif isinstance(module, Block):
        for layer in module.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)
    elif isinstance(module, Encoder):
        nn.init.normal_(module.pos_embedding, std=0.02)
    elif isinstance(module, VisionTransformer):
        fan_in = module.conv_proj.weight[0].numel()
        nn.init.trunc_normal_(module.conv_proj.weight, std=math.sqrt(1 / fan_in))
        for parameter in (module.conv_proj.bias, module.class_token, *module.heads.parameters()):
            if parameter is not None:
                nn.init.zeros_(parameter)


MODEL = VisionTransformer
