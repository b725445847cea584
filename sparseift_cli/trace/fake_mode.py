"""PyTorch's FakeTensorMode without the second that it spends on importing torch._dynamo, which a count has no use for.

FakeTensorMode reads three flags of torch._dynamo.config, and many functions ask torch._dynamo to keep out of them. Where
torch._dynamo is not loaded already, a stand-in answers for as long as the trace runs; whoever asks it for anything else gets
the real module. Afterwards nothing of the stand-in is left. Private API: this file is tested per torch version.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_NAMES = ("torch._dynamo", "torch._dynamo.config")


class _StandIn(ModuleType):
    """torch._dynamo as far as FakeTensorMode looks at it."""

    def __init__(self) -> None:
        super().__init__("torch._dynamo")
        self.config = ModuleType("torch._dynamo.config")
        self.config.__dict__.update(
            fake_tensor_cache_enabled=False, fake_tensor_cache_crosscheck_enabled=False, _custom_ops_profile=None
        )
        self.left_alone: list[Any] = []
        self.__dict__["disable"] = self._disable

    def _disable(self, fn: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """What torch keeps as the wrapped `fn`; noted, so that it can be forgotten again."""
        self.left_alone.append(fn)
        return fn

    def install(self) -> None:
        sys.modules.update(zip(_NAMES, (self, self.config), strict=True))
        torch.__dict__["_dynamo"] = self

    def remove(self) -> None:
        for name, module in zip(_NAMES, (self, self.config), strict=True):
            if sys.modules.get(name) is module:
                del sys.modules[name]
        if torch.__dict__.get("_dynamo") is self:
            del torch.__dict__["_dynamo"]
        for fn in self.left_alone:
            fn.__dict__.pop("__dynamo_disable", None)
        self.left_alone.clear()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.remove()
        return getattr(importlib.import_module("torch._dynamo"), name)


@contextmanager
def fake_mode(shape_env: Any) -> Iterator[FakeTensorMode]:
    """An entered FakeTensorMode that takes real or meta parameters and never caches shapes (its keys do not know our ints)."""
    stand_in = None if "torch._dynamo" in sys.modules else _StandIn()
    if stand_in is not None:
        stand_in.install()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True  # it prints a traceback of what is then raised and told in one line
    try:
        mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
        mode.cache_enabled = False
        with mode:
            yield mode
    finally:
        log.disabled = was_disabled
        if stand_in is not None:
            stand_in.remove()
