"""What a tensor is the sum of: the weights whose products, the parameters and the norms whose values add up to it.

A LayerNorm of a wider model computes what the dense one did only if every summand of what it reads has its mean under
control; so one has to know them. Everything that is not plainly linear and blind to channels makes `OPAQUE`, and what
it reads is *exposed*: something else than a norm sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from .free_ops import is_view

aten = torch.ops.aten

OPAQUE = "?"
NORM = "norm:"  # and the path of the norm module whose output it is
VALUE = "value:"  # and the key of a parameter that is itself a summand: a position embedding, a row of a table
Parts = frozenset[str]

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


def parts_of(tensor: Tensor) -> Parts:
    """The summands of a tensor: keys of weights, `value:key`, `norm:path`, `?`; empty for inputs and constants."""
    return getattr(tensor, "_sparseift_parts", frozenset())


def write(tensor: Tensor, parts: Parts) -> Tensor:
    """Note what a tensor is the sum of; returns it."""
    tensor._sparseift_parts = parts  # type: ignore[attr-defined]
    return tensor


def layer_of(tensor: Tensor) -> str | None:
    """The weight whose product this is: with its bias, behind its norm, and moved, sliced or pooled; None for any other."""
    behind = getattr(tensor, "_sparseift_layer", None)
    weights = [part for part in parts_of(tensor) if not part.startswith(VALUE)]
    return behind or (weights[0] if len(weights) == 1 and weights[0] != OPAQUE and NORM not in weights[0] else None)


def _is_parameter(tensor: Tensor) -> bool:
    """A bias, a scale: what belongs to the layer beside it."""
    parts = parts_of(tensor)
    return bool(parts) and all(part.startswith(VALUE) for part in parts)


def normed(tensor: Tensor, out: Tensor) -> Tensor:
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
        self.streams: dict[str, Parts] = {}
        self.reads: dict[str, Parts] = {}
        self.exposed: set[str] = set()
        self.summed: set[str] = set()  # keys of weights whose layer meets something else in a sum, a product or a list
        self.inside = 0  # norms on the stack of modules

    def enter_norm(self, path: str, args: Any) -> None:
        """A norm is called; what happens inside exposes nothing."""
        x = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
        if x is not None:
            self.streams[path] = self.streams.get(path, frozenset()) | (parts_of(x) or {OPAQUE})
        self.inside += 1

    def leave_norm(self, path: str, output: Any) -> None:
        """Its output is a summand by itself."""
        self.inside -= 1
        if isinstance(output, Tensor):
            write(output, frozenset([NORM + path]))

    def read(self, key: str, x: Tensor) -> None:
        """A weight multiplies `x`."""
        self.reads[key] = self.reads.get(key, frozenset()) | (parts_of(x) or {OPAQUE})

    def expose(self, tensors: Iterable[Any]) -> None:
        """Something other than a norm reads these."""
        if not self.inside:
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    self.exposed |= parts_of(tensor)

    def through(self, op: Any, tensors: Sequence[Tensor], out: Any) -> None:
        """An op that is no product of a weight ran."""
        packet = op.overloadpacket
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not results:
            return
        shaped = [t for t in tensors if t.dim() and t.is_floating_point()]
        parts: Parts = frozenset().union(*map(parts_of, shaped))
        linear = packet in _LINEAR or is_view(op) or (packet in _SCALED and len(shaped) == 1)
        carried = getattr(shaped[0], "_sparseift_layer", None) if linear and len(shaped) == 1 else None
        met = [t for t in shaped if not _is_parameter(t)] if packet in _LINEAR or packet in _SCALED else []
        if len(met) > 1:
            self.summed |= {key for t in met if (key := layer_of(t))}
        if linear:
            if len(shaped) > 1 and not all(map(parts_of, shaped)):
                parts |= {OPAQUE}  # a constant, or the model's input
        elif parts:
            if packet not in _NEW:
                self.expose(shaped)
            parts = frozenset([OPAQUE])
        for tensor in results:
            write(tensor, parts)
            tensor._sparseift_layer = carried  # type: ignore[attr-defined]  # y += x is y still, and no longer a layer's
            if tensor._base is not None and parts_of(tensor._base):  # y[:, :2] = x writes into y through a view
                write(tensor._base, parts_of(tensor._base) | parts)
