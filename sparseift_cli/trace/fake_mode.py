"""PyTorch's FakeTensorMode without the second that it spends on importing torch._dynamo, which a count has no use for.

FakeTensorMode reads three flags of torch._dynamo.config, and many functions ask torch._dynamo to keep out of them.
Where torch._dynamo is not loaded already, a stand-in answers for as long as the trace runs; whoever asks it for
anything else gets the real module. Afterwards nothing of the stand-in is left. Private API: this file is tested per
torch version.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

# Building a model on the meta device without initialising what has no memory. PyTorch runs the random fills of meta
# tensors through Python code that imports torch._dynamo, a second that buys nothing.

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


_NAMES = ("torch._dynamo", "torch._dynamo.config")


class _Flags(ModuleType):
    """torch._dynamo.config: the flags that FakeTensorMode reads; the real module has the others."""

    def __init__(self, stand_in: _StandIn) -> None:
        super().__init__("torch._dynamo.config")
        self.__dict__.update(
            fake_tensor_cache_enabled=False, fake_tensor_cache_crosscheck_enabled=False, _custom_ops_profile=None
        )
        self.__dict__["stand_in"] = stand_in

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["stand_in"].make_way().config, name)


class _StandIn(ModuleType):
    """torch._dynamo as far as FakeTensorMode looks at it, and a finder of its submodules."""

    def __init__(self) -> None:
        super().__init__("torch._dynamo")
        self.__path__ = []  # a package: `find_spec` is asked for what it holds
        self.config = _Flags(self)
        self.left_alone: list[Any] = []
        self.__dict__["disable"] = self._disable

    def _disable(self, fn: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """What torch keeps as the wrapped `fn`; noted, so that it can be forgotten again."""
        self.left_alone.append(fn)
        return fn

    def install(self) -> None:
        sys.modules.update(zip(_NAMES, (self, self.config), strict=True))
        torch.__dict__["_dynamo"] = self
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        for name, module in zip(_NAMES, (self, self.config), strict=True):
            if sys.modules.get(name) is module:
                del sys.modules[name]
        if torch.__dict__.get("_dynamo") is self:
            del torch.__dict__["_dynamo"]
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for fn in self.left_alone:
            fn.__dict__.pop("__dynamo_disable", None)
        self.left_alone.clear()

    def make_way(self) -> ModuleType:
        """The real torch._dynamo, in the place of this one."""
        self.remove()
        return importlib.import_module("torch._dynamo")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Asked for a submodule (a constant made in a forward needs one): the real package, which may have loaded it."""
        if not name.startswith("torch._dynamo."):
            return None
        self.make_way()
        return ModuleSpec(name, _Loaded()) if name in sys.modules else importlib.util.find_spec(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.make_way(), name)


class _Loaded(Loader):
    """Gives a module that is there already, as it is."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.spec = sys.modules[spec.name].__spec__
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def _symbolic_sizes() -> AbstractContextManager[object]:
    """The native `linear` and `matmul` of three dimensions count elements in torch 2.11, which symbolic sizes do not have, and
    no more in 2.13; those in Python, which torch.export takes, do not.
    """
    if torch.__version__ >= "2.13":
        return nullcontext()
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


@contextmanager
def _sizes_as_floats() -> Iterator[None]:
    """`math.sqrt(size)`, `float(size)` and `numpy.sqrt(size)` read a float, as `size ** 0.5` does: a scale, no size of a tensor.

    Without `__float__` Python would ask for the index, and nobody could tell it from a size that must stay as it is.
    """
    given = {"__float__": lambda size: size.node.guard_float("", 0), "sqrt": lambda size: float(size) ** 0.5}
    ours = {name: how for name, how in given.items() if name not in vars(torch.SymInt)}
    for name, how in ours.items():
        setattr(torch.SymInt, name, how)
    try:
        yield
    finally:
        for name in ours:
            delattr(torch.SymInt, name)


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
        with _symbolic_sizes(), _sizes_as_floats(), mode:
            yield mode
    finally:
        log.disabled = was_disabled
        if stand_in is not None:
            stand_in.remove()
