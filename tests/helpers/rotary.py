"""Rotary position embeddings for small test models, as Hugging Face's libraries write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Angles(nn.Module):
    """Cosines and sines [tokens, head_dim] of its frequencies, the buffer `inv_freq` [head_dim / 2]."""

    inv_freq: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.arange(x.shape[1]).float()[:, None] * self.inv_freq
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., tokens, head_dim], turned."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
