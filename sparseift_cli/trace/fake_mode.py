"""PyTorch's FakeTensorMode without the second that it spends on importing torch._dynamo, which a count has no use for.

FakeTensorMode reads two flags from torch._dynamo.config when it is made, and its dispatch asks torch._dynamo to keep out of
it at the first op. Where torch._dynamo is not loaded already, the flags come from a stand-in for that moment, and the dispatch
is marked as needing no such help for as long as the trace runs. Private API, so any surprise falls back to the plain mode.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

_MARK = "__dynamo_disable"  # where torch._compile keeps the wrapped function


@contextmanager
def fake_mode(shape_env: Any) -> Iterator[FakeTensorMode]:
    """An entered FakeTensorMode that takes real or meta parameters and never caches shapes (its keys do not know our ints)."""
    lean = "torch._dynamo" not in sys.modules
    mode = _made_lean(shape_env) if lean else FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    mode.cache_enabled = False
    dispatch = getattr(FakeTensorMode.__torch_dispatch__, "__wrapped__", None)
    marked = lean and dispatch is not None and not hasattr(dispatch, _MARK)
    if marked:
        setattr(dispatch, _MARK, dispatch)
    try:
        with mode:
            yield mode
    finally:
        if marked:
            delattr(dispatch, _MARK)


def _made_lean(shape_env: Any) -> FakeTensorMode:
    config = ModuleType("torch._dynamo.config")
    config.__dict__.update(fake_tensor_cache_enabled=False, fake_tensor_cache_crosscheck_enabled=False)
    package = ModuleType("torch._dynamo")
    package.__dict__.update(config=config, __path__=[])
    stand_ins = {"torch._dynamo": package, "torch._dynamo.config": config}
    sys.modules.update(stand_ins)
    try:
        return FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    except Exception:
        for name in stand_ins:
            sys.modules.pop(name, None)
        return FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        torch_module = sys.modules["torch"]
        if torch_module.__dict__.get("_dynamo") is package:
            del torch_module.__dict__["_dynamo"]
