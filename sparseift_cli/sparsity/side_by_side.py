"""Branches of a CUDA graph: work for single layers that runs beside that for others, as most of it is too small for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

STREAMS = 8  # each has memory of its own for what is computed on it


@contextmanager
def branches(device: torch.device) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
    """Gives `branch`: work under `branch(k)` goes to the k-th of a few streams. Leaving the block waits for all of them.

    Outside a recording there is one stream: kernels that Python launches one by one have nothing to run beside.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda _: nullcontext()
        return
    here = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]
    for stream in streams:
        stream.wait_stream(here)
    try:
        yield lambda k: torch.cuda.stream(streams[k % STREAMS])
    finally:  # a recording that fails must end with no stream left open, or its own error would hide the reason
        for stream in streams:
            here.wait_stream(stream)
