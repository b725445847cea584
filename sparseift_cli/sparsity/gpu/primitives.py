"""What the fast mask update is built from: masks as 64-bit words, places in memory order, branches of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# --- masks as words: a GPU takes about as long for a byte as for eight, and counts bytes by converting them to int64 ---

_PLACES = 8  # of a mask in one word
_ONES = 0x0101010101010101
_ADDED = 16  # words that are added at a time: their 128 places fit in a byte, below 255


def as_words(*masks: Tensor) -> tuple[Tensor, ...]:
    """Views of boolean masks of one shape [*shape] for &, |, ^ and `invert_`: int64 [N / 8] each.

    uint8 [*shape], one place a byte, if the masks differ in memory layout or are not made of whole words.
    """
    first = masks[0]
    size = first.numel()
    alike = all(m.stride() == first.stride() and m.storage_offset() % _PLACES == 0 for m in masks)
    if alike and size % _PLACES == 0 and _dense(first):
        return tuple(m.as_strided((size,), (1,)).view(torch.int64) for m in masks)
    return tuple(m.view(torch.uint8) for m in masks)


def invert_(words: Tensor) -> Tensor:
    """True for False and False for True, in place: words [N / 8], or bytes of any shape."""
    return words.bitwise_xor_(_ONES if words.dtype == torch.int64 else 1)


def count(words: Tensor) -> Tensor:
    """How many places of words [N / 8], or of bytes of any shape, are True: an int64 scalar on the device."""
    flattened = words.reshape(-1)
    rows = next(n for n in (_ADDED, _ADDED // 2, _ADDED // 4, _ADDED // 8, 1) if len(flattened) % n == 0)
    # 256 is 1 modulo 255, so a word modulo 255 is the sum of its bytes
    return flattened.view(rows, -1).sum(0).remainder_(255).sum()


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


# --- memory order: a pass over a channels_last weight in the order of its memory copies nothing ---


def flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Every place of `tensor` [*shape] as [N], in the memory order of `like`: a view if `tensor` has that order too."""
    return tensor.permute(0, 2, 3, 1).reshape(-1) if _channels_last(like) else tensor.reshape(-1)


def unflat(flattened: Tensor, like: Tensor) -> Tensor:
    """The inverse of `flat`: [N] with the shape and strides of `like`."""
    if not _channels_last(like):
        return flattened.view(like.shape)
    rows, channels, height, width = like.shape
    return flattened.view(rows, height, width, channels).permute(0, 3, 1, 2)


def row_major(places: Tensor, like: Tensor) -> Tensor:
    """Indices [*] into `flat` as row-major indices [*] of `like`, which do not depend on the memory format."""
    if not _channels_last(like):
        return places
    _, channels, height, width = like.shape
    pixels = height * width
    pixel, row = places // channels, places // (channels * pixels)
    # (row * channels + channel) * pixels + within, where channel = place - pixel * channels and within = pixel - row * pixels
    return (places * pixels).add_(pixel, alpha=1 - channels * pixels).add_(row, alpha=pixels * (channels - 1))


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


# --- branches of a CUDA graph: the work for one layer is too small for a GPU, so that of several layers runs side by side ---

STREAMS = 8  # each keeps a memory pool of its own for what is computed on it


@lru_cache(maxsize=8)
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """The same streams at every recording. Their priority keeps them apart from those that a recording can be made on."""
    return tuple(torch.cuda.Stream(device, priority=-1) for _ in range(STREAMS))


@contextmanager
def branches(device: torch.device) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
    """Yields `branch`: work under `branch(k)` goes to stream k mod STREAMS. Leaving the block waits for all of them.

    No tensor made outside the block may lose its last reference inside it: the allocator would reuse its memory at once, on
    another stream. Outside a recording everything stays on the current stream: kernels that Python launches one by one do
    not overlap anyway.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda _: nullcontext()
        return
    here = torch.cuda.current_stream(device)
    streams = _streams(device)
    for stream in streams:
        stream.wait_stream(here)
    try:
        yield lambda k: torch.cuda.stream(streams[k % STREAMS])
    finally:  # a recording that fails with open streams raises another error, which hides the reason
        for stream in streams:
            here.wait_stream(stream)
