"""Joins block-sparse layers with the activation that follows them, in the graph that torch.compile sees.

`torch.compile(model, backend="sparseift")` is torch's own compiler after this. The model stays as it is, module or function:
what is joined is found in the graph, `linear -> activation -> linear` first, then `linear -> activation`, where nothing else
reads what is in between.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from . import feedforward as _feedforward  # registers the operator

assert _feedforward
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    "relu": "relu",
    F.silu: "silu",
    F.gelu: "gelu",
}
_RESHAPES = ("view", "reshape", "flatten", "unflatten")
_MODES = (
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._set_grad_enabled,
)
"""Calls between which all nodes run in one mode: only nodes of one mode are joined."""


def sparseift(module: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """The backend of torch.compile: join, then compile with inductor."""
    from torch._inductor.compile_fx import compile_fx

    return joined_before(compile_fx)(module, inputs, **options)


def joined_before(compiler: Callable[..., Any]) -> Callable[..., Any]:
    """A backend of torch.compile that joins layers in a graph before `compiler` gets it."""

    def compile_joined(module: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        if join(module.graph):
            module.recompile()
        return compiler(module, inputs, **options)

    return compile_joined


def join(graph: fx.Graph) -> int:
    """Join layers of a graph that Dynamo made, in place; the number of joined activations."""
    modes = _modes(graph)
    found = 0
    for node in filter(_is_plain_layer, list(graph.nodes)):
        activation = _only_user(_behind(node))
        name = activation and _activation(activation)
        if not activation or not name or modes[activation] != modes[node]:
            continue
        after = _only_user(_behind(activation))
        if after is not None and _is_plain_layer(after) and _takes(after, node) and modes[after] == modes[node]:
            _join_two(graph, node, name, after)
        else:
            _join_activation(node, name, activation)
        found += 1
    if found:
        graph.eliminate_dead_code()
        graph.lint()
    return found


def _modes(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many changes of mode come before each node."""
    modes: dict[fx.Node, int] = {}
    changes = 0
    for node in graph.nodes:
        changes += node.op == "call_function" and node.target in _MODES
        modes[node] = changes
    return modes


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _behind(node: fx.Node) -> fx.Node:
    """The last node that passes the values of `node` on as they are: reshapes, and dropout that drops nothing."""
    while (after := _only_user(node)) is not None and _passes_on(after):
        node = after
    return node


def _passes_on(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target) in _RESHAPES
    if node.target is F.dropout:
        given: dict[str, Any] = {**dict(zip(("input", "p", "training"), node.args, strict=False)), **node.kwargs}
        return bool(given.get("p", 0.5) == 0.0 or given.get("training", True) is False)
    return node.target is getitem and str(node.args[1]) == "0" and _is_block_linear(node.args[0])


def _is_plain_layer(node: fx.Node) -> bool:
    """A block-sparse linear layer, called as `ops.block_linear` calls it, without an activation."""
    return _is_block_linear(node) and len(node.args) == 7 and not node.kwargs and str(node.args[4]) == "none"


def _is_block_linear(node: Any) -> bool:
    ours = torch.ops.sparseift.block_linear
    return isinstance(node, fx.Node) and bool(node.target in (ours, ours.default))


def _activation(node: fx.Node) -> str | None:
    """The name of the activation that `node` computes, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = _ACTIVATIONS.get(node.target)
    if name != "gelu":
        return name
    approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))


def _shape(node: Any) -> tuple[int, ...] | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _takes(after: fx.Node, before: fx.Node) -> bool:
    """Does layer `after` take the rows of layer `before` as they are, by the same backend?"""
    made = before.meta.get("example_value")
    rows = _shape(after.args[0])
    same = rows is not None and isinstance(made, tuple | list) and tuple(made[0].shape) == rows
    return same and str(before.args[6]) == str(after.args[6])


def _join_two(graph: fx.Graph, before: fx.Node, name: str, after: fx.Node) -> None:
    """Replace after(activation(before(x))) by one operator."""
    x, up, up_bias, first, _, _, backend = before.args
    _, down, down_bias, second, _, _, _ = after.args
    assert isinstance(first, list | tuple)
    assert isinstance(second, list | tuple)
    with graph.inserting_before(after):
        arguments = (x, up, up_bias, down, down_bias, [*first, *second], name, torch.is_grad_enabled(), backend)
        new = graph.call_function(torch.ops.sparseift.block_feedforward, arguments)
    after.replace_all_uses_with(new)  # y comes first in the results of both


def _join_activation(before: fx.Node, name: str, activation: fx.Node) -> None:
    """Let `before` compute the activation that reads it."""
    before.args = (*before.args[:4], name, torch.is_grad_enabled(), before.args[6])
    source = activation.args[0]
    assert isinstance(source, fx.Node)
    activation.replace_all_uses_with(source)
