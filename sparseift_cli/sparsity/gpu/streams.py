"""Branches of a CUDA graph: work for single layers that runs beside that for others, as most of it is too small for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch

STREAMS = 8  # each has memory of its own for what is computed on it


@lru_cache(maxsize=8)
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """The same ones at every recording, and none that a recording is made on: those have the usual priority."""
    return tuple(torch.cuda.Stream(device, priority=-1) for _ in range(STREAMS))


@contextmanager
def branches(device: torch.device) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
    """Gives `branch`: work under `branch(k)` goes to the (k mod STREAMS)-th stream. Leaving the block waits for all of them.

    No tensor that was made outside the block may lose its last reference inside: its memory is given to who asks next there.
    Outside a recording there is one stream: kernels that Python launches one by one have nothing to run beside.
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
    finally:  # a recording that fails must end with no stream left open, or its own error would hide the reason
        for stream in streams:
            here.wait_stream(stream)
