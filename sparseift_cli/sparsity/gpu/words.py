"""Boolean masks eight places a word: a GPU takes about as long for a byte as for a word, and counts bytes by way of int64."""

from __future__ import annotations

import torch
from torch import Tensor

_PLACES = 8
_ONES = 0x0101010101010101
_LEFT = 16  # words that are added at a time: their 128 places do not overflow a byte, nor 255


def as_words(*masks: Tensor) -> tuple[Tensor, ...]:
    """Views of boolean masks of one shape for &, |, ^ and `invert_`: int64 [N / 8] each.

    uint8 [*shape], a place a byte, where the masks do not lie alike in memory or not in whole words.
    """
    first = masks[0]
    size = first.numel()
    alike = all(m.stride() == first.stride() and m.storage_offset() % _PLACES == 0 for m in masks)
    if alike and size % _PLACES == 0 and _dense(first):
        return tuple(m.as_strided((size,), (1,)).view(torch.int64) for m in masks)
    return tuple(m.view(torch.uint8) for m in masks)


def invert_(words: Tensor) -> Tensor:
    """True for False and False for True, in place."""
    return words.bitwise_xor_(_ONES if words.dtype == torch.int64 else 1)


def count(words: Tensor) -> Tensor:
    """How many places are True: an int64 scalar on the device."""
    flat = words.reshape(-1)
    rows = next(n for n in (_LEFT, _LEFT // 2, _LEFT // 4, _LEFT // 8, 1) if len(flat) % n == 0)
    # 256 is 1 modulo 255, so that a word is the sum of its bytes
    return flat.view(rows, -1).sum(0).remainder_(255).sum()


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
