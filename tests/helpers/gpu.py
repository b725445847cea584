"""What tests on a GPU share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """Where the host waits for the GPU is an error."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the mode warns that it is a prototype, once a process
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
