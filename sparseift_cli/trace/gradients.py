"""Which products the backward pass of a forward pass computes, and which forward products it computes again.

A pass over shapes builds no autograd graph, so a graph of the same form is kept here. Every tensor that depends on a
trainable parameter has a `Node`; its sources are the nodes of the tensors that it was computed from. When the forward
pass is over, the nodes that lead to an output are marked. A product whose result is marked costs one product of the same
size for each operand that has a node. What leads to no output costs no backward pass: an unused branch, what goes into
`detach()`, `.data`, argmax or an integer, and what runs under `torch.no_grad()` or `torch.inference_mode()`.

Conventions, where shapes cannot tell:

- The loss depends on every floating-point tensor that the forward pass returns or stores in a module. Where none of
  these has a node (the model returns classes, say), it depends on every product.
- The backward of a `torch.autograd.Function` costs what autograd's own would cost for the same forward: gradients of all
  products inside, although PyTorch switches gradients off there.
- Activation checkpointing, in the model's own forward, computes everything inside a second time. (PyTorch may stop behind
  the last tensor that it needs.) A Function that is given anything to call is checkpointing too: no other way leads to the
  gradients inside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from ..table.poly import Poly


class RecomputedPart:
    """A part of the forward pass that the backward pass computes again; inside of `outer`, if that is not None."""

    __slots__ = ("outer", "reached")

    def __init__(self, outer: RecomputedPart | None) -> None:
        self.outer = outer
        self.reached = False


class Node:
    """A tensor that depends on a trainable parameter, and what it was computed from. A parameter has no sources."""

    __slots__ = ("checkpoint", "reached", "sources")

    def __init__(self, sources: Sequence[Node] = (), checkpoint: RecomputedPart | None = None) -> None:
        self.sources = sources
        self.checkpoint = checkpoint
        self.reached = False


def node_of(tensor: Tensor) -> Node | None:
    """The node of a tensor of any shape; None where no trainable parameter leads to it."""
    return getattr(tensor, "_sparseift_node", None)


def set_node(tensor: Tensor, node: Node | None) -> Tensor:
    """Set the node of a tensor of any shape; returns the tensor."""
    tensor._sparseift_node = node  # type: ignore[attr-defined]
    return tensor


def differentiable(tensor: Tensor) -> bool:
    """Whether a tensor of any shape can have a gradient: integers and booleans cannot."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def in_backward_pass() -> bool:
    """Whether autograd runs at this moment, because the forward pass itself asked for a gradient."""
    return torch._C._current_graph_task_id() != -1


class BackwardCosts(Protocol):
    """What a product adds its gradients to; all in MACs."""

    grad_inputs: Poly
    grad_weight: Poly
    recomputed: Poly


class _Product(NamedTuple):
    """One product of a forward pass: the node of its result, and the MACs of its gradients where that node is reached."""

    costs: BackwardCosts
    node: Node | None
    checkpoint: RecomputedPart | None
    macs: Poly
    grad_inputs: Poly
    grad_weight: Poly


class Backward:
    """The graph of one forward pass, and its products."""

    def __init__(self) -> None:
        self.grad_mode = True  # as Python code set it: a Function switches gradients off without doing so
        self.function_depth = 0  # Functions whose forward runs
        self.checkpoint: RecomputedPart | None = None
        self.products: list[_Product] = []

    def node_from(self, tensors: Iterable[Tensor | None]) -> Node | None:
        """A new node for what is computed from `tensors` (any shapes)."""
        return self.node([node for t in tensors if (node := getattr(t, "_sparseift_node", None)) is not None])

    def node(self, sources: Sequence[Node]) -> Node | None:
        """A new node with these sources; None where there are none, or where gradients are switched off."""
        if not sources or not self.grad_mode or torch.is_inference_mode_enabled():
            return None
        return Node(sources, self.checkpoint)

    def set_grad_mode(self, enabled: bool) -> None:
        """Python code is about to switch gradients on or off; inside of a Function, which runs without, it means nothing."""
        if not self.function_depth and torch.is_grad_enabled() == self.grad_mode:
            self.grad_mode = enabled

    def add_product(self, costs: BackwardCosts, out: Tensor, macs: Poly, grad_inputs: Poly, grad_weight: Poly) -> None:
        """A product with the result `out` (any shape). The MACs of its gradients go to `costs` if a backward pass needs them."""
        self.products.append(_Product(costs, node_of(out), self.checkpoint, macs, grad_inputs, grad_weight))

    # --- after the forward pass ---

    def finish(self, outputs: Iterable[Tensor]) -> None:
        """Add up the gradients that a backward pass from `outputs` (any shapes) computes, and what it computes again."""
        roots = [node for tensor in outputs if (node := node_of(tensor)) is not None]
        _mark(roots or [product.node for product in self.products if product.node is not None])
        for costs, node, checkpoint, macs, grad_inputs, grad_weight in self.products:
            if node is not None and node.reached:
                costs.grad_inputs += grad_inputs
                costs.grad_weight += grad_weight
            while checkpoint is not None:
                if checkpoint.reached:
                    costs.recomputed += macs
                checkpoint = checkpoint.outer
        self.products.clear()

    # --- Functions and checkpoints, while the forward pass runs ---

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """What runs inside is computed again in the backward pass."""
        outer, self.checkpoint = self.checkpoint, RecomputedPart(self.checkpoint)
        try:
            yield
        finally:
            self.checkpoint = outer

    @contextmanager
    def _inside_function(self, depth: int) -> Iterator[None]:
        before, self.function_depth = self.function_depth, depth
        try:
            yield
        finally:
            self.function_depth = before

    def run_function(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The forward of a Function: its floating-point results depend on all its tensors, whatever happens in between."""
        if any(callable(value) and not isinstance(value, type) for value in (*args, *kwargs.values())):
            with self.recomputing(), self._inside_function(self.function_depth + 1):
                results = forward(*map(self._differentiated, args), **kwargs)
        else:
            with self._inside_function(self.function_depth + 1):
                results = forward(*args, **kwargs)
        given = self.node_from(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                own = node_of(tensor)
                joined = given if given is None or own is None else Node((own, given), self.checkpoint)
                set_node(tensor, joined if differentiable(tensor) or self.function_depth else None)
        return results

    def _differentiated(self, function: Any) -> Any:
        """A function that a Function is given: it runs a second time with gradients, where no_grad has its meaning."""
        if not isinstance(function, _PLAIN_FUNCTIONS):
            return function

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(self.grad_mode), self._inside_function(0):
                return function(*args, **kwargs)

        return run


_PLAIN_FUNCTIONS = (FunctionType, MethodType, partial)


def _mark(roots: list[Node]) -> None:
    """Mark all nodes that lead to one of `roots`, and the checkpoints that they are in."""
    ahead = list(roots)
    while ahead:
        node = ahead.pop()
        if not node.reached:
            node.reached = True
            ahead.extend(node.sources)
            if node.checkpoint is not None:
                node.checkpoint.reached = True


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors (any shape) in what a forward pass returned: in lists, tuples, mappings, dataclasses and plain objects."""
    seen: set[int] = set()
    ahead = [value]
    while ahead:
        leaf = ahead.pop()
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, (str, bytes, type, ModuleType, nn.Module)):
            seen.add(id(leaf))
            if isinstance(leaf, dict):
                ahead.extend(leaf.values())
            elif isinstance(leaf, (list, tuple, set)):
                ahead.extend(leaf)
            ahead.extend(getattr(leaf, "__dict__", {}).values())


@contextmanager
def following_functions(backward: Backward) -> Iterator[None]:
    """Report to `backward` the forward of every Function and every checkpoint, until the end of the block."""
    undo: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    for function in _subclasses(Function):
        if "forward" in vars(function) and not function.__module__.startswith(_PLAIN_MODULES):
            replace(function, "forward", staticmethod(_followed(function.forward, backward)))
    checkpoints = sys.modules.get("torch.utils.checkpoint")
    if checkpoints is not None and hasattr(checkpoints, _CHECKPOINT):
        replace(checkpoints, _CHECKPOINT, _recomputed(getattr(checkpoints, _CHECKPOINT), backward))
    try:
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


# PyTorch has over a hundred Functions of its own. None but that of torch.utils.checkpoint is given a function to run.
_PLAIN_MODULES = ("torch.distributed", "torch.nn", "torch._", "torch.autograd", "torch.ao", "torch.fx", "torch.testing")

# What `checkpoint(..., use_reentrant=False)` runs to its first yield before the function, and to its end after it. With
# use_reentrant=True it is a Function that is given a function.
_CHECKPOINT = "_checkpoint_without_reentrant_generator"


def _recomputed(generator: Callable[..., Any], backward: Backward) -> Callable[..., Any]:
    @wraps(generator)
    def run(*args: Any, **kwargs: Any) -> Any:
        with backward.recomputing():
            yield from generator(*args, **kwargs)

    return run


def _followed(forward: Callable[..., Any], backward: Backward) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return backward.run_function(forward, args, kwargs)

    return run


def _subclasses(base: type) -> Iterator[Any]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)
