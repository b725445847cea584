"""Places of a weight in the order in which it lies in memory, so that a pass over a channels_last weight copies nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Every place [N], in the order in which `like` lies in memory: a view wherever `tensor` lies so too."""
    return tensor.permute(0, 2, 3, 1).reshape(-1) if _channels_last(like) else tensor.reshape(-1)


def unflat(flattened: Tensor, like: Tensor) -> Tensor:
    """`flat` undone: the shape and strides of `like`."""
    if not _channels_last(like):
        return flattened.view(like.shape)
    rows, channels, height, width = like.shape
    return flattened.view(rows, height, width, channels).permute(0, 3, 1, 2)


def row_major(places: Tensor, like: Tensor) -> Tensor:
    """What places [*] of `flat` are called row by row: a place's number that does not depend on the memory format."""
    if not _channels_last(like):
        return places
    _, channels, height, width = like.shape
    pixels = height * width
    pixel, row = places // channels, places // (channels * pixels)
    # (row * channels + channel) * pixels + within, where channel = place - pixel * channels and within = pixel - row * pixels
    return (places * pixels).add_(pixel, alpha=1 - channels * pixels).add_(row, alpha=pixels * (channels - 1))


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
