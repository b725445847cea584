"""What a model returns: which tensors are its results, which are by-products, and which layers make the results.

Every tensor that a model returns keeps its shape, so its widths are fixed. Exceptions are *by-products*: what a model
computes on the way and returns beside its results (hidden states, attention weights, caches). They are recognised by
the names that Hugging Face gives them, listed here and only here, and may change their shapes with the widths inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .record import CountedOp, Recorder
from .symint import poly_of
from .union_find import UnionFind

FEEDS_LOSS = "made by the last layer in front of the loss that the model returns"
"""Why a width is fixed where a model returns a loss alone."""

# By-products beside any result: decoder_hidden_states, cross_attentions, past_key_values, the output of a part (CLIP's
# text_model_output), ... `cache` is also how `named_tensors` names an object whose class is called a cache.
_BY_PRODUCT = re.compile(
    r"(?!last_hidden_state$).*hidden_states?|(.*_)?attentions|past_key_values|(.*_)?cache(_params)?|mems|.*_model_outputs?"
)
# What a base model returns: its results, unless a head returns something beside them.
_FEATURES = re.compile(r"last_hidden_state|pooler_output")


@dataclass(frozen=True)
class Returned:
    """The tensors (any shape) of an output by name: `logits`, `boxes.0`, `0` in a tuple; `` for an output that is a tensor."""

    results: Mapping[str, Tensor]
    by_products: Mapping[str, Tensor]

    @property
    def is_loss(self) -> bool:
        """Whether it is numbers alone, as a loss."""
        return bool(self.results) and all(tensor.dim() == 0 for tensor in self.results.values())


def returned(output: Any) -> Returned:
    """What the output of a forward pass consists of: tensors in lists, tuples, mappings, dataclasses and caches.

    By-products are results where nothing else but numbers (a loss) is returned.

    >>> from torch import zeros
    >>> sorted(returned({"loss": zeros(()), "logits": zeros(2, 5), "hidden_states": (zeros(2, 8),)}).by_products)
    ['hidden_states.0']
    >>> sorted(returned({"last_hidden_state": zeros(2, 8), "hidden_states": (zeros(2, 8),)}).by_products)
    ['hidden_states.0']
    >>> sorted(returned({"loss": zeros(()), "hidden_states": (zeros(2, 8),)}).by_products)
    []
    """
    tensors = dict(named_tensors(output))
    beside = {name for name in tensors if any(map(_BY_PRODUCT.fullmatch, name.split(".")))}
    features = {name for name in tensors if _FEATURES.fullmatch(name)}
    by_products: set[str] = set()
    for chosen in (beside, beside | features):
        if any(tensor.dim() for name, tensor in tensors.items() if name not in chosen):
            by_products = chosen
    return Returned(
        {name: tensor for name, tensor in tensors.items() if name not in by_products},
        {name: tensor for name, tensor in tensors.items() if name in by_products},
    )


def named_tensors(output: Any, name: str = "", inside: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor of any shape) in an output; `name` is that of the output, `inside` the ids of what holds it."""
    if isinstance(output, Tensor):
        yield name, output
        return
    if "cache" in type(output).__name__.lower() and "cache" not in name:
        name = f"{name}.cache" if name else "cache"
    for key, value in _items(output) if id(output) not in inside else ():
        yield from named_tensors(value, f"{name}.{key}" if name else str(key), (*inside, id(output)))


def _items(output: Any) -> Iterator[tuple[Any, Any]]:
    """The (key or field or position, value) pairs of a container; none of anything else."""
    if isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, tuple) and (fields := getattr(output, "_fields", ())):  # a named tuple
        yield from zip(fields, output, strict=True)
    elif isinstance(output, (list, tuple)):
        yield from enumerate(output)
    elif hasattr(output, "__dict__") and not isinstance(output, (type, nn.Module)) and not callable(output):
        yield from vars(output).items()


def variables_of(tensor: Tensor) -> set[int]:
    """The variables of the dims of a tensor of any shape."""
    return {v for dim in tensor.shape for v in poly_of(dim).variables}


def mark_output_layers(recorder: Recorder, outputs: list[Returned], variables: UnionFind) -> None:
    """Set `CountedOp.output` of the layers that make the results: the last layer on every path to one.

    That is a layer whose product reaches a result, and which no other layer reads. A layer that adds to a residual
    stream is none, although the last block of a model without a head is read by nothing: the stream is what other
    layers read. A layer that others read too is one where its output dim is a dim of a result and no stream: a head
    whose output is fed back.
    """
    layers = recorder.layers()
    contracted = variables.roots(v for op in layers for v in op.inputs.variables)
    stream = variables.roots(recorder.residual) & contracted
    widths: set[int] = set()
    for tensor in (t for output in outputs for t in output.results.values()):
        widths |= variables.roots(variables_of(tensor))
        for op in recorder.writers_of(tensor):
            op.output |= not recorder.is_read(op) and not variables.roots(op.outputs.variables) & stream
    last: dict[int, CountedOp] = {}  # width of a result -> the last layer that has it as its output dim
    for op in layers:
        width = op.outputs.as_variable
        if width is not None and variables.find(width) in widths - variables.roots(recorder.residual):
            last[variables.find(width)] = op
    for op in last.values():
        op.output = True
