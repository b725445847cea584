"""Small models that recipes train: three in well under a minute on two CPU cores, one in seconds on a GPU.

They are SOURCEs like any other (`sparseift flops sparseift_cli.models.examples:digits_mlp`): functions without arguments that
return a module and an example input. Small on purpose, so that the dense ones do not learn their data by heart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .zoo.gpt import GPT, GPTConfig

Made = tuple[nn.Module, Tensor]


def digits_mlp() -> Made:
    """[B, 1, 8, 8] -> six hidden layers of 32 with batch norm -> 10: five of its layers are 32 x 32."""
    width = 32
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, *[width] * 5):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10)), torch.zeros(1, 1, 8, 8)


def digits_cnn() -> Made:
    """[B, 1, 8, 8] -> four 3x3 convolutions with batch norm (8, 8, 16 at half size, 16) -> mean -> 10."""

    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, 8), *block(8, 8), *block(8, 16, stride=2), *block(16, 16)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), torch.zeros(1, 1, 8, 8)


def bytes_gpt() -> Made:
    """Bytes [B, T up to 128] -> logits [B, T, 256]: four GPT blocks of width 64 with four heads, tied head, no dropout."""
    config = GPTConfig(hidden=64, depth=4, num_heads=4, max_seq=128, vocab=256, dropout=0.0)
    return GPT(config), torch.zeros(1, 128, dtype=torch.int64)


def wikitext_gpt() -> Made:
    """Bytes [B, T up to 256] -> logits [B, T, 256]: six GPT blocks of width 256 with four heads, tied head, no dropout."""
    config = GPTConfig(hidden=256, depth=6, num_heads=4, max_seq=256, vocab=256, dropout=0.0)
    return GPT(config), torch.zeros(1, 256, dtype=torch.int64)
