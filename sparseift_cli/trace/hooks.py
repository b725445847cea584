"""A user's forward hooks while a trace runs: those that only watch are left out, those that change something run.

Hooks print shapes, collect activations, count FLOPs. On a trace they would print symbolic sizes, collect tensors without
values, fail on `.item()`, and turn sizes into plain numbers, which fixes the widths. But a hook may also be part of the
model: it replaces an output, or computes a weight. By what is known of one:

- Hooks of PyTorch itself (weight_norm, spectral_norm, pruning) run like any code of the model.
- A hook that returns nothing on any path, stores nothing in an attribute and has no hold on the model (a list of the user's,
  say) is left out.
- Any other runs once on the side: nothing that it does is recorded, and what it prints is dropped. If it fails there, it
  needs values, and is left out. If it returned something, or if it runs before forward and stores something (a weight), it
  runs again, and is recorded.
"""

from __future__ import annotations

import dis
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_hooks

from .record import Recorder
from .symint import Facts


@contextmanager
def without_watching_hooks(model: nn.Module, facts: Facts, recorder: Recorder) -> Iterator[None]:
    """Leave out the hooks of `model` that only watch, and the global ones, until the end of the block."""
    forward, before = [torch_hooks._global_forward_hooks], [torch_hooks._global_forward_pre_hooks]
    for module in model.modules():
        forward.append(module._forward_hooks)
        before.append(module._forward_pre_hooks)
    found = [(hooks, pre) for kind, pre in ((forward, False), (before, True)) for hooks in kind if hooks]
    kept = [(hooks, dict(hooks)) for hooks, _ in found]
    parts = {id(part) for m in model.modules() for part in (m, *m.__dict__.values())} if found else set()
    try:
        for hooks, pre in found:
            for number, hook in list(hooks.items()):
                if _is_of_torch(hook):
                    continue
                if _only_watches(hook, parts):
                    del hooks[number]
                else:
                    hooks[number] = _on_the_side_first(hook, pre, facts, recorder)
        yield
    finally:
        for hooks, before_trace in kept:
            hooks.clear()
            hooks.update(before_trace)


def _on_the_side_first(hook: Callable[..., Any], pre: bool, facts: Facts, recorder: Recorder) -> Callable[..., Any]:
    stores = pre and _stores(hook)

    def run(*args: Any) -> Any:
        with redirect_stdout(io.StringIO()):
            try:
                with facts.discarding(), recorder.pausing():
                    result = hook(*args)
            except Exception:  # whatever code does that meets tensors without values
                return None
            return hook(*args) if stores or result is not None else None

    return run


def _is_of_torch(hook: Any) -> bool:
    function = _function_of(hook)
    module = type(hook).__module__ if function is None else function.__module__
    return module.split(".")[0] == "torch"


def _function_of(hook: Any) -> FunctionType | None:
    """The Python function that a hook runs: of a method, a partial or an object that can be called; None for others."""
    while isinstance(hook, partial):
        hook = hook.func
    if not isinstance(hook, (FunctionType, MethodType)):
        hook = vars(type(hook)).get("__call__")
    hook = getattr(hook, "__func__", hook)
    return hook if isinstance(hook, FunctionType) else None


def _only_watches(hook: Any, parts: set[int]) -> bool:
    function = _function_of(hook)
    if function is None or _stores(hook) or _returns_something(function):
        return False
    return not any(id(held) in parts for held in _held(hook))


def _held(hook: Any) -> Iterator[Any]:
    """The objects that a hook has a hold on: its owner, bound arguments, variables of the function around it."""
    while isinstance(hook, partial):
        yield from (*hook.args, *hook.keywords.values())
        hook = hook.func
    if not isinstance(hook, FunctionType):
        yield getattr(hook, "__self__", hook)
    for cell in getattr(_function_of(hook), "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue


def _returns_something(function: FunctionType) -> bool:
    """Whether some path through a function returns anything else than a literal None."""
    before: dis.Instruction | None = None
    for step in dis.get_instructions(function):
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return True
        if step.opname == "RETURN_VALUE" and not (before and before.opname == "LOAD_CONST" and before.argval is None):
            return True
        before = step
    return False


def _stores(hook: Any) -> bool:
    """Whether a hook sets an attribute of anything."""
    function = _function_of(hook)
    if function is None:
        return True
    return "setattr" in function.__code__.co_names or any(
        step.opname == "STORE_ATTR" for step in dis.get_instructions(function)
    )
