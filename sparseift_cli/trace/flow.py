"""Which summands each tensor consists of: products of weights, parameters, outputs of norms.

Why: a LayerNorm of a widened model computes what the dense one did only if the mean of its input is under control,
hence the mean of every summand of its input. `transforms/preserve` needs to know these summands, and whether anything
other than a norm reads them.

How: every tensor carries a set of summands as an attribute, and each op passes sets on. In `x = tok(ids) + pos +
proj(y)` the tensor x has the summands {"value:tok.weight", "value:pos", "proj.weight", "value:proj.bias"}. An op that
is not linear, or that treats channels differently, makes the summand UNKNOWN, and what it reads is noted in
`read_by_others`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from .ops import ALLOCATING, LINEAR, SCALING, is_view

# A summand is the state_dict key of a weight (the product with that weight), or one of these:
UNKNOWN = "?"
NORM_PREFIX = "norm:"  # "norm:encoder.ln", the output of that norm module
PARAMETER_PREFIX = "value:"  # "value:pos_embedding", the values of that parameter: a bias, a row of an embedding
Summands = frozenset[str]


def summands_of(tensor: Tensor) -> Summands:
    """The summands of a tensor of any shape; none for the model's inputs and for constants."""
    return getattr(tensor, "_sparseift_summands", frozenset())


def set_summands(tensor: Tensor, summands: Summands) -> Tensor:
    """Store what a tensor of any shape is the sum of; returns it."""
    tensor._sparseift_summands = summands  # type: ignore[attr-defined]
    return tensor


def layer_of(tensor: Tensor) -> str | None:
    """The key of the one weight whose product a tensor (any shape) is; None where it is more than that.

    Its bias, a norm behind it, and moving, slicing or pooling make no difference.
    """
    behind_norm = getattr(tensor, "_sparseift_layer", None)
    weights = [summand for summand in summands_of(tensor) if not summand.startswith(PARAMETER_PREFIX)]
    one = len(weights) == 1 and weights[0] != UNKNOWN and NORM_PREFIX not in weights[0]
    return behind_norm or (weights[0] if one else None)


def _is_parameter(tensor: Tensor) -> bool:
    """Made of parameters alone, as a bias or a scale: it belongs to the layer that it is added to."""
    summands = summands_of(tensor)
    return bool(summands) and all(summand.startswith(PARAMETER_PREFIX) for summand in summands)


def pass_through_norm(tensor: Tensor, out: Tensor) -> Tensor:
    """Note that `out` is a norm of `tensor` (same shape), so that `layer_of(out)` is still its layer; returns `out`."""
    out._sparseift_layer = layer_of(tensor)  # type: ignore[attr-defined]
    return out


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module normalises over the channels of each token: LayerNorm, RMSNorm and the like of any library."""
    name = type(module).__name__.lower()
    return "norm" in name and not module._modules and not isinstance(module, (_NormBase, nn.GroupNorm))


class Flow:
    """The summands that norms and weights read, and who else reads them; filled in while the forward pass runs."""

    def __init__(self) -> None:
        self.norm_inputs: dict[str, Summands] = {}  # path of a norm over channels -> what it reads
        self.weight_inputs: dict[str, Summands] = {}  # key of a weight -> what it multiplies
        self.read_by_others: set[str] = set()  # summands that something other than a norm reads
        self.merged: set[str] = (
            set()
        )  # keys of weights whose output is added to, multiplied with or joined with another
        self.channel_norms: dict[str, str] = {}  # key of a weight -> path of the BatchNorm that reads its output
        self.norm_depth = 0  # norm modules on the call stack

    def note_channel_norm(self, path: str, x: Tensor) -> None:
        """The BatchNorm at `path` reads `x` [N, C, ..]."""
        if key := layer_of(x):
            self.channel_norms[key] = path

    def enter_norm(self, path: str, args: Any) -> None:
        """A norm module is called; the primitive ops inside it count as the norm, not as other readers."""
        x = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
        if x is not None:
            self.norm_inputs[path] = self.norm_inputs.get(path, frozenset()) | (summands_of(x) or {UNKNOWN})
        self.norm_depth += 1

    def leave_norm(self, path: str, output: Any) -> None:
        """A norm module returned; its output is a summand of its own."""
        self.norm_depth -= 1
        if isinstance(output, Tensor):
            set_summands(output, frozenset([NORM_PREFIX + path]))

    def note_weight_input(self, key: str, x: Tensor) -> None:
        """The weight `key` multiplies `x` [..., features]."""
        self.weight_inputs[key] = self.weight_inputs.get(key, frozenset()) | (summands_of(x) or {UNKNOWN})

    def note_read(self, tensors: Iterable[Any]) -> None:
        """An op reads these; only outside of norms is it another reader."""
        if not self.norm_depth:
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    self.read_by_others |= summands_of(tensor)

    def propagate(self, op: Any, tensors: Sequence[Tensor], out: Any) -> None:
        """Set the summands of `out`, the result (tensors of any shape) of an op that is no product with a weight."""
        packet = op.overloadpacket
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not results:
            return
        operands = [t for t in tensors if t.dim() and t.is_floating_point()]
        summands: Summands = frozenset().union(*map(summands_of, operands))
        linear = packet in LINEAR or is_view(op) or (packet in SCALING and len(operands) == 1)
        layer = getattr(operands[0], "_sparseift_layer", None) if linear and len(operands) == 1 else None
        if packet in LINEAR or packet in SCALING:
            activations = [t for t in operands if not _is_parameter(t)]
            if len(activations) > 1:
                self.merged |= {key for t in activations if (key := layer_of(t))}
        if linear:
            if len(operands) > 1 and not all(map(summands_of, operands)):
                summands |= {UNKNOWN}  # a constant, or the model's input
        elif summands:
            if packet not in ALLOCATING:  # new_empty(x) reads the shape of x, not its values
                self.note_read(operands)
            summands = frozenset([UNKNOWN])
        for tensor in results:
            set_summands(tensor, summands)
            tensor._sparseift_layer = layer  # type: ignore[attr-defined]  # in place, y += x keeps y but not its layer
            if tensor._base is not None and summands_of(tensor._base):  # y[:, :2] = x writes into y through a view
                set_summands(tensor._base, summands_of(tensor._base) | summands)
