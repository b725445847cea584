"""PyTorch's FakeTensorMode as this trace uses it, without the one-second import of torch._dynamo.

In fake mode every tensor has a shape, a dtype and a device, but no memory, and ops compute shapes alone. So a model of
any size runs in seconds, with symbolic sizes.

FakeTensorMode reads three flags of torch._dynamo.config, and many PyTorch functions call torch._dynamo.disable. A count
needs nothing else of torch._dynamo, and its import takes a second. Where it is not imported already, a substitute
module with those flags is installed while the trace runs. Any other access imports the real module in its place.
Afterwards the substitute is removed completely. All of this is private API; checked with torch 2.11 and 2.13.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

# --- building a model on the meta device ---

# Initialising a meta tensor (shape without memory) does nothing, but PyTorch runs random fills of meta tensors through
# Python code that imports torch._dynamo: skip them.

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


# --- a substitute for torch._dynamo ---

_NAMES = ("torch._dynamo", "torch._dynamo.config")


class _Flags(ModuleType):
    """torch._dynamo.config: the flags that FakeTensorMode reads; any other name imports the real module."""

    def __init__(self, substitute: _DynamoSubstitute) -> None:
        super().__init__("torch._dynamo.config")
        self.__dict__.update(
            fake_tensor_cache_enabled=False, fake_tensor_cache_crosscheck_enabled=False, _custom_ops_profile=None
        )
        self.__dict__["substitute"] = substitute

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["substitute"].import_real().config, name)


class _DynamoSubstitute(ModuleType):
    """torch._dynamo as far as FakeTensorMode uses it, and an import finder for its submodules."""

    def __init__(self) -> None:
        super().__init__("torch._dynamo")
        self.__path__ = []  # marks a package, so that imports of submodules reach find_spec
        self.config = _Flags(self)
        self.disabled: list[Any] = []
        self.imported = ExitStack()  # closed at the end of the trace
        self.__dict__["disable"] = self._disable

    def _disable(self, fn: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """As torch._dynamo.disable, which torch caches on `fn`: remembered, to remove the cached value at the end."""
        self.disabled.append(fn)
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
        for fn in self.disabled:
            fn.__dict__.pop("__dynamo_disable", None)
        self.disabled.clear()

    def import_real(self) -> ModuleType:
        """Replace this substitute by the real torch._dynamo; returns it."""
        self.remove()
        real = importlib.import_module("torch._dynamo")
        self.imported.enter_context(_uncompiled())
        return real

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The import spec of `torch._dynamo.<submodule>`, from the real package.

        PyTorch imports one when a forward pass makes a constant.
        """
        if not name.startswith("torch._dynamo."):
            return None
        self.import_real()
        return ModuleSpec(name, _AlreadyLoaded()) if name in sys.modules else importlib.util.find_spec(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.import_real(), name)


class _AlreadyLoaded(Loader):
    """Returns a module that is imported already, unchanged."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.spec = sys.modules[spec.name].__spec__
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def _uncompiled() -> AbstractContextManager[Any]:
    """What torch.compile made runs as it was written: a compiler has nothing to gain from shapes, and would trace this trace."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


def _symbolic_sizes() -> AbstractContextManager[object]:
    """Symbolic sizes in linear and matmul of three dimensions.

    Their native code asks for a plain number of elements in torch 2.11 (no longer in 2.13), which a symbolic size does
    not have. The Python versions, which torch.export uses, do not.
    """
    if torch.__version__ >= "2.13":
        return nullcontext()
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def _hash_of_size(size: Any) -> int:
    """The hash of a symbolic size, as `facts.keys` says: None makes it unhashable, as in PyTorch."""
    keys = size.node.facts.keys
    if keys is None:
        raise TypeError("unhashable type: a size of a tensor")
    return hash(size.node.value if keys == "values" else size.node.expr)


@contextmanager
def _sizes_as_numbers() -> Iterator[None]:
    """What Python does with an int and PyTorch's SymInt lacks.

    `math.sqrt(size)`, `float(size)` and `numpy.sqrt(size)` read a float, as `size ** 0.5` does. Such a float is a scale,
    not the size of a tensor. Without `__float__` Python would call `__index__`, and the size would look like one that
    must not change. Text of a size is its digits (`f"stage_{depth}"`), and a size can be a key of a dict.
    """
    methods = {
        "__float__": lambda size: size.node.guard_float("", 0),
        "sqrt": lambda size: torch.sym_float(size) ** 0.5,
        "__divmod__": lambda size, other: (size // other, size % other),
        "__rdivmod__": lambda size, other: (other // size, other % size),
        "__str__": lambda size: str(size.node.value),
        "__format__": lambda size, spec: format(size.node.value, spec),
        "__hash__": _hash_of_size,
    }
    before = {name: vars(torch.SymInt).get(name) for name in methods}
    for name, method in methods.items():
        setattr(torch.SymInt, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                delattr(torch.SymInt, name)
            else:
                setattr(torch.SymInt, name, method)


@contextmanager
def fake_mode(shape_env: Any) -> Iterator[FakeTensorMode]:
    """A FakeTensorMode, entered, with our symbolic ints (`shape_env` is a `symint.Facts`).

    Its cache of output shapes is off: the keys of the cache do not support nodes other than PyTorch's own.
    """
    substitute = None if "torch._dynamo" in sys.modules else _DynamoSubstitute()
    if substitute is not None:
        substitute.install()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True  # it logs a traceback of errors that we report in one line
    try:
        mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
        mode.cache_enabled = False
        with nullcontext() if substitute else _uncompiled(), _symbolic_sizes(), _sizes_as_numbers(), mode:
            yield mode
    finally:
        log.disabled = was_disabled
        if substitute is not None:
            substitute.remove()
            substitute.imported.close()
