"""What a tensor is the sum of: the weights whose products, the parameters and the norms whose values add up to it.

A LayerNorm of a wider model computes what the dense one did only if every summand of what it reads has its mean under
control; so one has to know them. Everything that is not plainly linear and blind to channels makes `UNKNOWN`, and what
it reads is *read_by_others*: something else than a norm sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from .ops import is_view

aten = torch.ops.aten

UNKNOWN = "?"
NORM_PREFIX = "norm:"  # and the path of the norm module whose output it is
PARAMETER_PREFIX = (
    "value:"  # and the key of a parameter that is itself a summand: a position embedding, a row of a table
)
Summands = frozenset[str]

_LINEAR = {
    getattr(aten, name)
    for name in [
        "add",
        "add_",
        "sub",
        "sub_",
        "rsub",
        "neg",
        "clone",
        "_to_copy",
        "contiguous",
        "cat",
        "stack",
        "roll",
        "flip",
        "index",
        "index_select",
        "gather",
        "repeat",
        "_unsafe_view",
        "constant_pad_nd",
        "mean",
        "sum",
        "avg_pool1d",
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "upsample_bilinear2d",
        "upsample_nearest2d",
        "upsample_bicubic2d",
        "im2col",
    ]
}
_SCALED = {aten.mul, aten.mul_, aten.div, aten.div_}
_NEW = {aten.new_empty, aten.new_zeros, aten.empty_like, aten.zeros_like, aten.new_empty_strided}


def summands_of(tensor: Tensor) -> Summands:
    """The summands of a tensor: keys of weights, `value:key`, `norm:path`, `?`; empty for inputs and constants."""
    return getattr(tensor, "_sparseift_summands", frozenset())


def set_summands(tensor: Tensor, summands: Summands) -> Tensor:
    """Note what a tensor is the sum of; returns it."""
    tensor._sparseift_summands = summands  # type: ignore[attr-defined]
    return tensor


def layer_of(tensor: Tensor) -> str | None:
    """The weight whose product this is: with its bias, behind its norm, and moved, sliced or pooled; None for any other."""
    behind = getattr(tensor, "_sparseift_layer", None)
    weights = [part for part in summands_of(tensor) if not part.startswith(PARAMETER_PREFIX)]
    return behind or (
        weights[0] if len(weights) == 1 and weights[0] != UNKNOWN and NORM_PREFIX not in weights[0] else None
    )


def _is_parameter(tensor: Tensor) -> bool:
    """A bias, a scale: what belongs to the layer beside it."""
    summands = summands_of(tensor)
    return bool(summands) and all(part.startswith(PARAMETER_PREFIX) for part in summands)


def pass_through_norm(tensor: Tensor, out: Tensor) -> Tensor:
    """Note that `out` is `tensor` behind a norm; returns it."""
    out._sparseift_layer = layer_of(tensor)  # type: ignore[attr-defined]
    return out


def is_layer_norm(module: nn.Module) -> bool:
    """A norm over the channels of each token by itself, of whatever library: LayerNorm, RMSNorm and their like."""
    name = type(module).__name__.lower()
    return "norm" in name and not module._modules and not isinstance(module, (_NormBase, nn.GroupNorm))


class Flow:
    """Who reads what, as it is met: `streams` by the path of a norm, `reads` by the key of a weight."""

    def __init__(self) -> None:
        self.norm_inputs: dict[str, Summands] = {}
        self.weight_inputs: dict[str, Summands] = {}
        self.read_by_others: set[str] = set()
        self.merged: set[str] = set()  # keys of weights whose layer meets something else in a sum, a product or a list
        self.norm_depth = 0  # norms on the stack of modules

    def enter_norm(self, path: str, args: Any) -> None:
        """A norm is called; what happens inside exposes nothing."""
        x = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
        if x is not None:
            self.norm_inputs[path] = self.norm_inputs.get(path, frozenset()) | (summands_of(x) or {UNKNOWN})
        self.norm_depth += 1

    def leave_norm(self, path: str, output: Any) -> None:
        """Its output is a summand by itself."""
        self.norm_depth -= 1
        if isinstance(output, Tensor):
            set_summands(output, frozenset([NORM_PREFIX + path]))

    def note_weight_input(self, key: str, x: Tensor) -> None:
        """A weight multiplies `x`."""
        self.weight_inputs[key] = self.weight_inputs.get(key, frozenset()) | (summands_of(x) or {UNKNOWN})

    def note_read(self, tensors: Iterable[Any]) -> None:
        """Something other than a norm reads these."""
        if not self.norm_depth:
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    self.read_by_others |= summands_of(tensor)

    def propagate(self, op: Any, tensors: Sequence[Tensor], out: Any) -> None:
        """An op that is no product of a weight ran."""
        packet = op.overloadpacket
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not results:
            return
        shaped = [t for t in tensors if t.dim() and t.is_floating_point()]
        summands: Summands = frozenset().union(*map(summands_of, shaped))
        linear = packet in _LINEAR or is_view(op) or (packet in _SCALED and len(shaped) == 1)
        carried = getattr(shaped[0], "_sparseift_layer", None) if linear and len(shaped) == 1 else None
        activations = [t for t in shaped if not _is_parameter(t)] if packet in _LINEAR or packet in _SCALED else []
        if len(activations) > 1:
            self.merged |= {key for t in activations if (key := layer_of(t))}
        if linear:
            if len(shaped) > 1 and not all(map(summands_of, shaped)):
                summands |= {UNKNOWN}  # a constant, or the model's input
        elif summands:
            if packet not in _NEW:
                self.note_read(shaped)
            summands = frozenset([UNKNOWN])
        for tensor in results:
            set_summands(tensor, summands)
            tensor._sparseift_layer = carried  # type: ignore[attr-defined]  # y += x is y still, and no longer a layer's
            if tensor._base is not None and summands_of(tensor._base):  # y[:, :2] = x writes into y through a view
                set_summands(tensor._base, summands_of(tensor._base) | summands)
