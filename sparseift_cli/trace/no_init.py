"""Building a model on the meta device without initialising what has no memory.

PyTorch runs the random fills of meta tensors through Python code that imports torch._dynamo, a second that buys nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLS = frozenset(
    {Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, torch.nn.init.normal_, torch.nn.init.uniform_}
)


class _NoFill(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def no_init(device: str) -> Iterator[None]:
    """Skip random and constant fills of meta tensors; on any other device change nothing."""
    with _NoFill() if device == "meta" else nullcontext():
        yield
