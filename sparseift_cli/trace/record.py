"""Counts the multiply-accumulates (MACs) of one forward pass, op by op, each as a polynomial over width variables.

`Recorder` is a TorchDispatchMode: PyTorch calls it for each primitive op (aten.mm, aten.convolution). The common layers
never get that far: `shape_rules` answers for them one level higher, before PyTorch splits them into primitive ops, and
calls the same `count_*` methods. An op that is neither counted nor known to cost no MACs (`ops`) is listed as
uncounted, never ignored.

Beside the count, the recorder notes on every tensor where it came from, as attributes of the tensor object:

- its node in the graph that a backward pass follows (see `gradients`);
- flags: whether it was computed from the model's input and from the output of a layer, and by which layers last (see
  `Recorder.writers_of`);
- producers: the counted ops whose product it is, by which residual additions and the query of an attention are found;
- summands: what it is the sum of (see `flow`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from ..table.poly import Poly
from .constants import Uses
from .flow import PARAMETER_PREFIX, UNKNOWN, Flow, layer_of, set_summands, summands_of
from .gradients import Backward, Node, differentiable, in_backward_pass, node_of, set_node
from .ops import ALLOCATING, COPYING, MOVING, NO_GRADIENT, costs_no_macs, is_view
from .scales import Scale, Scales, Score, scale_of
from .symint import concrete, poly_of

aten = torch.ops.aten

FROM_INPUT, FROM_LAYER = 1, 2
_WRITERS = 2  # the bits from this one on: the numbers of the layers that a tensor was last computed by
Producer = tuple[Any, int | None]  # key of a counted op, and which part of its output where a dim of it was split
LAYERS = ("linear", "conv", "conv_transpose", "bilinear")  # kinds that are layers where their weight is a parameter
ATTENTION: Producer = ("attention", None)  # the producer of an attention's result


def flags_of(tensor: Tensor) -> int:
    """FROM_INPUT, FROM_LAYER and the writers of a tensor of any shape, as bits."""
    return getattr(tensor, "_sparseift_flags", 0)


def producers_of(tensor: Tensor) -> frozenset[Producer]:
    """The counted ops whose product a tensor (any shape) is. Ops without MACs pass them on, except residual additions."""
    return getattr(tensor, "_sparseift_producers", frozenset())


def annotate(tensor: Tensor, flags: int, producers: frozenset[Producer] = frozenset()) -> Tensor:
    """Set the flags and producers of a tensor of any shape; returns it."""
    tensor._sparseift_flags = flags  # type: ignore[attr-defined]
    tensor._sparseift_producers = producers  # type: ignore[attr-defined]
    return tensor


# Ops whose result is zero wherever their first operand is; of a product the second one will do as well.
_KEEPS_ZEROS = {aten.div, aten.div_, aten.neg, aten.abs, aten.clone, aten._to_copy, aten.detach, aten.alias}
_PRODUCTS = {aten.mul, aten.mul_}
_RESHAPES = {aten.view, aten._unsafe_view, aten._reshape_copy}


def set_zeros_of(tensor: Tensor, key: str | None) -> Tensor:
    """Note that a tensor (any shape) has the elements of the parameter `key`, each zero where that is; returns it."""
    tensor._sparseift_zeros_of = key  # type: ignore[attr-defined]
    return tensor


def numel(shape: Iterable[Any]) -> Poly:
    """Number of elements of a shape, as a polynomial."""
    total = Poly.const(1)
    for dim in shape:
        total = total * poly_of(dim)
    return total


def _num_distinct(tensor: Tensor) -> Poly:
    """Number of distinct elements of a tensor: expanding a matrix over a batch (stride 0) adds none."""
    return numel(
        d for d, step in zip(tensor.shape, tensor.stride(), strict=True) if not (type(step) is int and step == 0)
    )


def _sizes(sizes: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(concrete, sizes))


def _part_of(weight: Tensor, parameter: Tensor) -> tuple[tuple[int, ...] | None, Poly | None]:
    """Which part of `parameter` [out, in, ...] a view of it is: (`at`, `start`) of a `CountedOp`.

    `start` is known where the view is consecutive rows of it, or their transpose; copies for a batch make no difference.
    """
    if _num_distinct(weight) == numel(parameter.shape):
        return None, None
    sizes, whole = _sizes(weight.shape), _sizes(parameter.shape)
    own = [i for i in range(weight.dim()) if concrete(weight.stride(i)) or weight.dim() == parameter.dim()]
    if math.prod(sizes[i] for i in own) == math.prod(whole):
        return None, None
    offset, strides = weight.storage_offset(), _sizes(parameter.stride())
    at = concrete(offset), *sizes
    for order in (own, own[::-1]):
        rows = tuple(concrete(weight.stride(i)) for i in order) == strides
        if rows and tuple(sizes[i] for i in order)[1:] == whole[1:]:
            start = poly_of(offset).divided_by(poly_of(parameter.stride(0)))
            return ((at[0] // strides[0], sizes[order[0]]), start) if start is not None else (at, None)
    return at, None


def _sum_with_products(input: Tensor, batch1: Tensor, batch2: Tensor) -> Tensor:
    """baddbmm in fake mode: batch1 [b, n, m] @ batch2 [b, m, p] + input, which broadcasts -> [b, n, p].

    PyTorch's shape function reads the sizes as plain numbers. It is met where a function that is answered as a whole calls it:
    the mask in F.multi_head_attention_forward.
    """
    out = aten.bmm.default(batch1, batch2)
    for have, want in zip(reversed(input.shape), reversed(out.shape), strict=False):
        if concrete(have) != 1 and have != want:
            raise RuntimeError(f"sizes do not match: {have} and {want}")
    return out


@dataclass(slots=True)
class CountedOp:
    """All calls of one op with one weight (or, without a weight, of one module) added up. Sizes are polynomials.

    `macs` is the forward pass; `grad_inputs` and `grad_weight` are the MACs of the gradients that a backward pass
    computes (an LSTM's first step needs none for its state, the later ones do), and `recomputed` those of the forward
    products that it computes again.
    """

    owner: str  # path of the module that holds the weight, or that runs the product
    kind: str
    weight: str | None
    inputs: Poly
    outputs: Poly
    kernel: tuple[int, ...] = ()
    groups: Poly = field(default_factory=lambda: Poly.const(1))
    calls: int = 0
    macs: Poly = field(default_factory=Poly)
    activations: Poly = field(default_factory=Poly)
    grad_inputs: Poly = field(default_factory=Poly)
    grad_weight: Poly = field(default_factory=Poly)
    recomputed: Poly = field(default_factory=Poly)
    at: tuple[int, ...] | None = None  # which part of the weight it uses, in the sizes of this run; None: all of it
    start: Poly | None = None  # the part is rows [start, start + outputs) of the weight: the query of a fused QKV
    part: str = ""  # name of that part in the name of the row
    tokens: int | None = None  # of experts: how many tokens their module was called with
    computed: bool = False  # the weight is computed from the parameter, and zero where that is (weight_norm)
    projection: bool = False  # makes a query, key or value, or reads the result of an attention
    first: bool = False  # reads the model's input, not another layer's output
    causal: tuple[int, int] | None = None  # (queries, keys) under a causal mask
    users: set[str] = field(default_factory=set[str])  # other modules than the owner that multiply with the weight
    order: int = 0
    number: int = 0  # of its bit among the writers of a tensor
    output: bool = False  # the last layer in front of a result of the model (see `outputs`)

    @property
    def is_layer(self) -> bool:
        """Whether it multiplies with a weight, a parameter or one computed in forward, and not two activations."""
        return self.weight is not None or self.kind in LAYERS

    @property
    def writer(self) -> int:
        """Its bit in the flags of a tensor."""
        return 1 << (_WRITERS + self.number)


class Recorder(TorchDispatchMode):
    """Everything that one forward pass shows: `ops`, and the other facts listed in __init__.

    Order is kept by `clock`, which counts module calls, new ops and activations.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first op imports torch._dynamo (see fake_mode)

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[tuple[Any, ...], CountedOp] = {}  # by (owner, kind, weight, part of the weight)
        self.parameters: dict[int, tuple[str, Tensor]] = {}  # storage -> (state_dict key, fake parameter)
        self.by_key: dict[str, Tensor] = {}  # fake parameters
        self.tokens: dict[str, int] = {}  # module path -> positions of the first tensor that it was last called with
        self.keys: dict[int, dict[str, str]] = {}  # storage -> module path -> key there: several, if it is tied
        self.stack: list[str] = [""]
        self.first_seen: dict[str, int] = {}  # module path -> clock at its first call
        self.clock = 0
        self.residual: set[int] = set()  # variables of dims in which two layers' outputs are added
        self.attention: set[int] = set()  # variables of dims of attention products
        self.softmaxed: set[str] = set()  # modules that took a softmax: their next product is attention x values
        self.uncounted: dict[str, None] = {}  # a dict as an ordered set
        self.activations: list[tuple[int, str]] = []  # (clock, function name or module:path)
        self.own_activations: dict[
            str, str
        ] = {}  # weight key -> activation that reads its output, or a norm of it, directly
        self.contracted_dims: dict[str, list[Poly]] = {}  # module -> dims that its attention products sum over
        self.query_parts: dict[str, int | None] = {}  # weight key -> which part of its output is the query
        self.product_shapes: dict[str, tuple[Poly, ...]] = {}  # weight key -> shape of its last product
        self.computes_more: set[str] = set()  # paths of layers whose forward is not one product of their weight
        self.read = 0  # writer bits of the layers whose output another layer reads
        self.paused = False  # what runs is not recorded
        self.flow = Flow()
        self.backward = Backward()
        self.uses = Uses()  # what is done with buffers and plain tensors
        self.scales = Scales()

    def second_pass(self) -> Recorder:
        """A recorder for a second forward pass over the same parameters; what it counts is not used."""
        other = Recorder()
        other.parameters, other.keys, other.uses = self.parameters, self.keys, self.uses
        other.by_key = self.by_key
        return other

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Record nothing of what runs in the block."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    # --- modules and parameters ---

    def enter_module(self, module: str, args: Any = ()) -> None:
        """The module at this path is called with `args`."""
        first = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
        if first is not None and first.dim():
            self.tokens[module] = math.prod(map(concrete, first.shape[:-1]))
        self.clock += 1
        self.first_seen.setdefault(module, self.clock)
        self.stack.append(module)

    def note_activation(self, name: str, args: Any) -> None:
        """An activation runs on `args`. `name`: the function's name, or `module:` and the path of an activation module."""
        x = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
        if x is not None and (key := layer_of(x)):
            self.own_activations.setdefault(key, name)  # a module comes before the function that it calls
        self.clock += 1
        if not (self.activations and name[:7] != "module:" and self.activations[-1][1] == f"module:{self.stack[-1]}"):
            self.activations.append((self.clock, name))

    def leave_module(self) -> None:
        """The running module returned."""
        self.stack.pop()

    def note_layer_output(self, output: Any, *, by_input: bool) -> None:
        """The running linear or conv layer returned `output`; `by_input`: it was called with its input alone.

        Where the output is not the product of its weight, plus its bias, the forward pass computes more than a plain
        layer: a second output, an added adapter, an activation. Then a transformed layer cannot replace it.
        """
        path = self.stack[-1]
        key, bias = (f"{path}.{name}" if path else name for name in ("weight", "bias"))
        if (
            by_input
            and isinstance(output, Tensor)
            and summands_of(output) - {PARAMETER_PREFIX + bias} == frozenset([key])
        ):
            made, shape = self.product_shapes[key], tuple(map(poly_of, output.shape))
            if shape[-1] == made[-1] and numel(output.shape) == math.prod(made, start=Poly.const(1)):
                return  # x @ W.T may flatten x in between; but a transposed output ends with another dim
        self.computes_more.add(path)

    def register_parameter(self, key: str, parameter: Tensor, requires_grad: bool) -> None:
        """Remember the fake tensor (any shape) of the parameter `key`, found again by its storage."""
        annotate(set_node(parameter, Node() if requires_grad else None), 0)
        set_summands(parameter, frozenset([PARAMETER_PREFIX + key]))
        storage = parameter.untyped_storage()._cdata
        self.parameters.setdefault(storage, (key, parameter))
        self.keys.setdefault(storage, {})[key.rpartition(".")[0]] = key
        self.by_key[key] = parameter

    def register_constant(self, key: str, tensor: Tensor) -> None:
        """Remember the fake tensor (any shape) of the buffer or plain tensor `key`: see `constants`."""
        self.uses.register(key, tensor)
        if tensor.is_floating_point():
            set_summands(tensor, summands_of(tensor) or frozenset([PARAMETER_PREFIX + key]))

    def converted(self, old: Tensor, new: Tensor) -> Tensor:
        """`new` in place of the parameter or buffer `old` (both any shape), which it is in another dtype: under the same keys."""
        before, after = old.untyped_storage()._cdata, new.untyped_storage()._cdata
        if before in self.parameters and after not in self.parameters:
            key, parameter = self.parameters[before]
            self.parameters[after], self.keys[after] = (key, new), self.keys[before]
            set_summands(annotate(new, flags_of(parameter)), summands_of(parameter))
        return new

    def zeros_of(self, tensor: Tensor) -> str | None:
        """The key of a parameter where `tensor` [*shape] has its elements in its order, each zero where the parameter's is."""
        if key := getattr(tensor, "_sparseift_zeros_of", None):
            return key
        key, parameter = self.parameter_of(tensor) or (None, None)
        if parameter is None or parameter.dim() < 2 or not tensor.is_contiguous():
            return None
        return key if math.prod(_sizes(tensor.shape)) == math.prod(_sizes(parameter.shape)) else None

    def _note_zeros(self, op: Any, args: Sequence[Any], out: Any) -> None:
        """Where `out`, the result of an op, is a parameter times or divided by something, note whose zeros it has."""
        packet = op.overloadpacket
        if packet not in _PRODUCTS | _KEEPS_ZEROS | _RESHAPES:
            for tensor in tree_leaves(out) if not is_view(op) else ():
                if isinstance(tensor, Tensor):  # it may be an operand that was changed in place, or a view of one
                    set_zeros_of(tensor if tensor._base is None else tensor._base, None)
            return
        for operand in args[: 2 if packet in _PRODUCTS else 1]:
            key = self.zeros_of(operand) if isinstance(operand, Tensor) else None
            if key is not None and (packet in _RESHAPES or _sizes(operand.shape) == _sizes(out.shape)):
                set_zeros_of(out, key)

    def parameter_of(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """(key, fake parameter) whose memory a tensor of any shape shares, or that it is a copy of.

        A tied parameter by its key in the running module.
        """
        found = self.parameters.get(tensor.untyped_storage()._cdata, getattr(tensor, "_sparseift_copied", None))
        if found is None:
            return None
        return self.keys[found[1].untyped_storage()._cdata].get(self.stack[-1], found[0]), found[1]

    def _note_copy(self, op: Any, tensors: Sequence[Tensor], out: Any) -> None:
        """Note that `out` is all of a parameter, moved or in another dtype: `weight.to(x.dtype)`, or as einsum arranges it."""
        same_values = len(tensors) == 1 and (op.overloadpacket in COPYING or is_view(op))
        owned = self.parameter_of(tensors[0]) if same_values else None
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (owned or hasattr(tensor, "_sparseift_copied")):
                whole = owned is not None and numel(tensor.shape) == numel(owned[1].shape)
                tensor._sparseift_copied = owned if whole else None  # type: ignore[attr-defined]
                if not same_values and tensor._base is not None:  # changed in place, through a view
                    tensor._base._sparseift_copied = None  # type: ignore[attr-defined]

    # --- counting ---

    def count_weighted(
        self,
        kind: str,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        macs: Poly,
        inputs: Poly,
        outputs: Poly,
        kernel: tuple[int, ...] = (),
        groups: Poly | None = None,
        *,
        grad_inputs: Poly | None = None,
        stored: bool = True,
    ) -> None:
        """Count one product of activations `x` [..., inputs, ...] with `weight`, of the kind's own shapes, into `out`.

        `macs` of the forward pass; `inputs`, `outputs`, `kernel` and `groups` are those of the layer. A weight that is
        not a parameter (computed in forward) makes it a product of two activations. `grad_inputs`: MACs of the gradient
        of x, where it is not a product of the same size as the forward one. `stored`: whether `out` is in memory as it is.
        """
        key, parameter = self.parameter_of(weight) or (None, None)
        at, start = (None, None) if parameter is None else _part_of(weight, parameter)
        owner, computed = self._owner(key), self.zeros_of(weight) if key is None else None
        gathered = None if key is not None else gathered_from(weight)
        if gathered is not None:
            owner, key, parameter = self._owner(gathered), gathered, self.by_key[gathered]
        elif computed is not None and kind in LAYERS and _sizes(self.by_key[computed].shape) == _sizes(weight.shape):
            key, parameter = computed, self.by_key[computed]  # its mask is a mask of what is computed from it
        op = self._op(owner, kind, key, inputs, outputs, kernel, groups, at)
        op.at, op.start, op.computed = at, start, key is not None and key == computed
        op.macs += macs
        op.activations += numel(out.shape) if stored else Poly()
        op.projection |= ATTENTION in producers_of(x)
        op.first |= bool(flags_of(x) & FROM_INPUT) and not flags_of(x) & FROM_LAYER
        of_x = (macs if grad_inputs is None else grad_inputs) if node_of(x) is not None else Poly()
        of_weight = macs if node_of(weight) is not None else Poly()
        if parameter is None:
            of_x, of_weight = of_x + of_weight, Poly()
        self.backward.add_product(op, out, macs, of_x, of_weight)
        if kind == "experts":
            op.tokens = self.tokens.get(self.stack[-1])
        flags = flags_of(out)
        if op.is_layer and not in_backward_pass():  # what wrote its operands, a layer has read
            self.read |= (flags_of(x) | flags_of(weight)) >> _WRITERS << _WRITERS
            flags = flags & ((1 << _WRITERS) - 1) | op.writer
        if poly_of(x.shape[-1] if kind == "matmul" else 0) != Poly.const(1):
            self.uses.note_product(x, weight)
        annotate(out, flags, frozenset([((op.owner, kind, key, at), None)]))
        set_summands(out, frozenset([UNKNOWN if key is None else key]))
        if key is not None and parameter is not None:
            if self.stack[-1] != key.rpartition(".")[0]:
                op.users.add(self.stack[-1])
            self.flow.note_weight_input(key, x)
            self.product_shapes[key] = tuple(map(poly_of, out.shape))

    def _owner(self, key: str | None) -> str:
        """What an op with the parameter `key` is named after: its module, or the parameter itself if it is no `weight`."""
        if key is None:
            return self.stack[-1]
        if key == "weight" or key.endswith(".weight"):
            return key.rpartition(".")[0]
        return key.removesuffix("_weight")  # in_proj_weight of nn.MultiheadAttention, or a bare parameter

    def count_product(
        self,
        part: str,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        macs: Poly,
        causal: tuple[int, int] | None = None,
        *,
        stored: bool = True,
        scale: Scale | None = None,
    ) -> None:
        """Count a product of two activations, `a` [..., m, k] with `b` [..., n, k] or [..., k, n]; `part`: qk, av or matmul.

        Not `stored` is the score matrix of a fused attention, which is multiplied with `scale`; then `out` is what follows
        from it, the attention's result.
        """
        op = self._op(self.stack[-1], part, None, Poly(), Poly(), (), None)
        op.macs += macs
        if stored:
            op.activations += numel(out.shape)
        if part == "av":
            annotate(out, flags_of(out), frozenset([ATTENTION]))
            set_summands(out, frozenset([UNKNOWN]))
        gradients = Poly.const(sum(node_of(t) is not None for t in (a, b)))
        self.backward.add_product(op, out, macs, macs * gradients, Poly())
        op.causal = causal
        if poly_of(a.shape[-1]) != Poly.const(1):  # an outer product sums over nothing
            self.uses.note_product(a, b)
        for producer, _ in producers_of(a) | producers_of(b):
            if producer in self.ops:
                self.ops[producer].projection = True
        if part == "qk":
            dim = poly_of(a.shape[-1])
            self.contracted_dims.setdefault(self.stack[-1], []).append(dim)
            queries = tuple(self._query_weights(producers_of(a), producers_of(b)))
            score = Score(self.stack[-1], dim, queries, softmaxed=not stored)
            self.scales.note_score(score, a, b, out if stored else None, scale or {})
        for tensor in (a, b):
            for dim in tensor.shape:
                self.attention |= poly_of(dim).variables

    def note_query_weight(self, weight: Tensor, head_dim: Poly, part: int | None) -> None:
        """`weight` [out, in] makes the query (part `part` of its output) of an attention that scales by head_dim ** -0.5."""
        owned = self.parameter_of(weight)
        if owned:
            self.query_parts[owned[0]] = part
            score = Score(self.stack[-1], head_dim, (owned[0],), {head_dim: -0.5}, softmaxed=True)
            self.scales.scores.append(score)

    def _query_weights(self, q: frozenset[Producer], k: frozenset[Producer]) -> Iterator[str]:
        """The weights that make the query; `query_parts` gets which part of its output it is where one makes the key too."""
        keys = {producer for producer, _ in k}
        for producer, part in q:
            if producer in self.ops and producer[2] is not None and (producer not in keys or part is not None):
                rows = self.ops[producer].start is not None and self.ops[producer].at  # equal parts; the query is one
                self.query_parts[producer[2]] = rows[0] // rows[1] if rows else part if producer in keys else None
                yield producer[2]

    def _op(
        self,
        owner: str,
        kind: str,
        weight: str | None,
        inputs: Poly,
        outputs: Poly,
        kernel: tuple[int, ...],
        groups: Poly | None,
        at: tuple[int, ...] | None = None,
    ) -> CountedOp:
        """The op of this key, new or met before, with one call more."""
        op = self.ops.get((owner, kind, weight, at))
        if op is None:
            self.clock += 1
            groups = groups or Poly.const(1)
            number = len(self.ops)
            op = CountedOp(owner, kind, weight, inputs, outputs, kernel, groups, order=self.clock, number=number)
            self.ops[owner, kind, weight, at] = op
        op.calls += 1
        return op

    def count_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        causal: bool,
        *,
        scale: Scale | None = None,
        batch: Sequence[Any] | None = None,
    ) -> None:
        """Count a fused attention softmax(q k^T) v: two products of batch x heads x T_q x T_k x head_dim MACs.

        q [..., T_q, d], k [..., T_k, d], v [..., T_k, d_v], out [..., T_q, d_v]. `scale`: what multiplies the scores,
        d ** -0.5 by default. `batch`: the leading sizes of the scores where they are not those of q, as when one query
        is shared by all samples.
        """
        keys = poly_of(k.shape[-2])
        scores = numel(q.shape[:-2] if batch is None else batch) * poly_of(q.shape[-2]) * keys
        lengths = (int(q.shape[-2]), int(k.shape[-2])) if causal else None
        dim = poly_of(q.shape[-1])
        factor: Scale = {dim: -0.5} if scale is None else scale
        self.count_product("qk", q, k, out, scores * dim, lengths, stored=False, scale=factor)
        self.count_product("av", q, v, out, numel(out.shape) * keys, lengths)

    # --- which layers wrote a tensor ---

    def layers(self) -> list[CountedOp]:
        """All layers in the order of execution."""
        return sorted((op for op in self.ops.values() if op.is_layer), key=lambda op: op.order)

    def writers_of(self, tensor: Tensor) -> list[CountedOp]:
        """The layers that a tensor (any shape) was last computed by: on some path from each to it there is no other layer."""
        return [op for op in self.layers() if flags_of(tensor) & op.writer]

    def is_read(self, op: CountedOp) -> bool:
        """Whether another layer computes with what `op` wrote."""
        return bool(self.read & op.writer)

    # --- primitive ops ---

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one primitive op; count it if it costs MACs, and annotate its results."""
        kwargs = kwargs or {}
        if self.paused or isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs) if self.paused else self._higher_order(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        flags, producers = 0, frozenset[Producer]()
        for tensor in tensors:
            flags |= flags_of(tensor)
            producers |= producers_of(tensor)
        packet = func.overloadpacket
        out = func(*args, **kwargs) if packet is not aten.baddbmm else _sum_with_products(*args[:3])
        count = _counting(packet, args)
        if count is not None:
            flags |= FROM_LAYER
        elif packet in (aten.add, aten.add_):
            if self._is_residual(args, out):
                producers = frozenset[Producer]()  # a residual stream is not the product of one layer
        elif packet in (aten._softmax, aten._safe_softmax):
            self.softmaxed.add(self.stack[-1])
        elif not costs_no_macs(func):
            self.uncounted[f"{packet} in {self.stack[-1] or 'the model'}"] = None
        if packet in NO_GRADIENT:  # the result has nothing of its operands but a shape
            flags, node = flags & (FROM_INPUT | FROM_LAYER), None
        else:
            node = self.backward.node_from(tensors)
        self._note_copy(func, tensors, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._annotate_result(tensor, flags, producers, node, tensors)
        self._note_zeros(func, args, out)
        if count is None:
            self.flow.propagate(func, tensors, out)
            if packet not in ALLOCATING:
                moves = packet in MOVING or is_view(func)
                self.uses.follow(tensors, tree_leaves(out), of_layer=FROM_LAYER, linear=moves)
            self.scales.propagate(func, tensors, out)
        else:
            count(self, args, kwargs, out)
            self.flow.note_read(tensors)
        return out

    def _higher_order(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """An operator that is given functions. flex_attention is an attention; of others the cost is not known.

        Raises:
            UsageError: it is another one.
        """
        if func.name() != "flex_attention":
            raise UsageError(
                f"calls torch.{func.name()}, and what runs in it, or how often, depends on the values of tensors",
                hint="count a model that calls what it would run",
            )
        q, k, v = args[:3]  # [batch, heads, T, d]
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        node = self.backward.node_from(tensors)
        flags = FROM_LAYER
        for tensor in (q, k, v):
            flags |= flags_of(tensor)
        self._annotate_result(out[0], flags, frozenset(), node, tensors)
        self.count_attention(q, k, v, out[0], False, scale=None if args[5] is None else scale_of(args[5]))
        self.flow.note_read(tensors)
        return out

    def _annotate_result(
        self, tensor: Tensor, flags: int, producers: frozenset[Producer], node: Node | None, operands: list[Tensor]
    ) -> None:
        """Set flags, producers and node of a result, and of the tensor whose memory it is a view of."""
        if node is not None and not (differentiable(tensor) or self.backward.function_depth):
            node = None
        owned = self.parameter_of(tensor)
        if owned:  # a parameter that is changed in place keeps its node
            annotate(tensor, 0)
            if tensor is not owned[1]:
                set_node(tensor, node)
            return
        annotate(tensor, flags, producers)
        set_node(tensor, node)
        base = tensor._base
        if base is not None:  # y[:, :2] = f(x) writes into y through a view
            if flags & ~flags_of(base):
                annotate(base, flags_of(base) | flags, producers_of(base))
            if node is not None and any(tensor is operand for operand in operands):
                own = node_of(base)
                set_node(base, node if own is None else Node((own, node), self.backward.checkpoint))

    def _is_residual(self, args: Sequence[Any], out: Tensor) -> bool:
        """Whether an addition adds the outputs of two layers; then its dims are those of a residual stream."""
        both = [t for t in args[:2] if isinstance(t, Tensor) and flags_of(t) & FROM_LAYER]
        # rotary embeddings add a projection to itself, rotated: that is no residual stream
        same = len({frozenset(m for m, _ in producers_of(t)) for t in both}) == 1 and producers_of(both[0])
        if len(both) == 2 and both[0].dim() == both[1].dim() and not same:
            for dim in out.shape:
                self.residual |= poly_of(dim).variables
            return True
        return False


def matmul(rec: Recorder, a: Tensor, b: Tensor, out: Tensor) -> None:
    """Count a [(batch,) m, k] @ b [(batch,) k, n] -> out. Either operand may be a parameter or a view of one, or a vector [k]."""
    inner = poly_of(a.shape[-1])
    macs = numel(out.shape) * inner

    def columns(of: Tensor, dim: int) -> Poly:
        return poly_of(of.shape[dim]) if of.dim() > 1 else Poly.const(1)

    weight, x = (b, a) if rec.parameter_of(b) or gathered_from(b) else (a, b)
    owned = rec.parameter_of(weight)
    if gathered_from(weight):
        rec.count_weighted("experts", x, weight, out, macs, inner, columns(weight, -1 if weight is b else -2))
    elif owned:
        _, parameter = owned
        across = columns(weight, -1 if weight is b else -2)
        # with a vector it is no layer: the matrix of a spectral norm
        matrices = min(a.dim(), b.dim()) > 1
        kind = _kind_of_product(parameter, weight, x.shape[-1 if x is a else -2]) if matrices else "matmul"
        distinct = numel(weight.shape) == _num_distinct(weight)  # or matmul expanded one matrix over a batch
        batch = poly_of(weight.shape[0]) if distinct and (weight.dim(), parameter.dim()) == (3, 2) else Poly.const(1)
        if kind == "linear" and batch != Poly.const(1):  # a view [groups, out, in] of a matrix [groups * out, in]
            rec.count_weighted("grouped linear", x, weight, out, macs, batch * inner, batch * across, groups=batch)
        else:
            outputs = _num_distinct(weight).divided_by(inner) or across
            rec.count_weighted(kind, x, weight, out, macs, inner, outputs)
    elif a.dim() == 3:
        part = "av" if rec.stack[-1] in rec.softmaxed else "qk"
        rec.count_product(part, a, b, out, macs)
    else:
        rec.count_weighted("matmul", a, b, out, macs, inner, columns(b, -1))


def gathered_from(tensor: Tensor) -> str | None:
    """The key of the stacked parameter [experts, ...] that a tensor [tokens, ...] holds one matrix of for each token."""
    return getattr(tensor, "_sparseift_gathered_from", None)


def _kind_of_product(parameter: Tensor, weight: Tensor, inner: Any) -> str:
    """What a product with `weight`, a view of `parameter`, is: linear, experts, or matmul, which is no layer.

    A parameter of two dims is a layer where the dim `inner` that it sums over is a whole one; where that is a part of a dim
    that a view takes apart (the entries of a head, or the heads), it is a table, of relative positions say. One of more dims
    (XLNet's [d_model, heads, head_dim]) is a layer where it is used as one matrix, and holds experts where it is used as a
    batch of matrices along its first dim, each for its own rows of the other operand.
    """
    one, dims = Poly.const(1), [poly_of(size) for size in parameter.shape]
    if len(dims) == 2:
        return "matmul" if _is_factor(inner) else "linear"
    if weight.dim() == 2 or poly_of(weight.shape[0]) == one:
        return "linear" if sum(dim != one for dim in dims) > 2 else "matmul"
    return "experts" if len(dims) == weight.dim() == 3 and poly_of(weight.shape[0]) == dims[0] else "matmul"


def _is_factor(dim: Any) -> bool:
    """Whether a view showed that `dim` is one of several that make up a larger one."""
    if not isinstance(dim, torch.SymInt):
        return False
    layouts = dim.node.facts.all_layouts.values()
    return any(kind == "product" and poly_of(dim) in parts for seen in layouts for kind, parts in seen)


def _convolution(rec: Recorder, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    x, weight, transposed, groups = args[0], args[1], args[6], poly_of(args[8])
    kernel = tuple(int(k) for k in weight.shape[2:])
    if transposed:  # weight: [in, out / groups, ...], each input element meets every tap
        inputs, per_input = poly_of(weight.shape[0]), numel(weight.shape[1:])
        outputs = poly_of(weight.shape[1]) * groups
        rec.count_weighted(
            "conv_transpose", x, weight, out, numel(x.shape) * per_input, inputs, outputs, kernel, groups
        )
    else:
        conv(rec, x, weight, out, groups)


def conv(rec: Recorder, x: Tensor, weight: Tensor, out: Tensor, groups: Poly) -> None:
    """Count a convolution of x [batch, in, *space] with weight [out, in / groups, *kernel] -> out [batch, out, *space].

    Every output element costs in / groups * taps MACs.
    """
    inputs, outputs = poly_of(weight.shape[1]) * groups, poly_of(weight.shape[0])
    kernel = tuple(int(k) for k in weight.shape[2:])
    macs = numel(out.shape) * poly_of(weight.shape[1]) * Poly.const(math.prod(kernel))
    rec.count_weighted("conv", x, weight, out, macs, inputs, outputs, kernel, groups)


def _fused_attention(rec: Recorder, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    q, k, v = args[:3]
    result = out[0] if isinstance(out, (tuple, list)) else out
    causal = bool(kwargs.get("is_causal", any(a is True for a in args[3:])))
    scale = kwargs.get("scale")
    rec.count_attention(q, k, v, result, causal, scale=None if scale is None else scale_of(scale))


def _product(rec: Recorder, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    matmul(rec, args[0], args[1], out)


def _product_and_sum(rec: Recorder, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    matmul(rec, args[1], args[2], out)


def _summed_products(rec: Recorder, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """[m, n] + the sum over the batch of a [batch, m, k] @ b [batch, k, n]"""
    a, b = args[1:3]
    inner, columns = poly_of(b.shape[1]), poly_of(b.shape[2])
    rec.count_weighted("matmul", a, b, out, numel(a.shape) * columns, inner, columns)


def _grouped_products(rec: Recorder, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """Rows of a [S, k] or [groups, m, k] by the matrix of their group in b [groups, k, n] or [k, S]; or columns by rows."""
    a, b = args[:2]
    inner, columns = poly_of(a.shape[-1]), poly_of(b.shape[-1])
    macs = numel(a.shape) * columns if a.dim() == b.dim() == 2 else numel(out.shape) * inner
    rec.count_weighted("matmul" if rec.parameter_of(b) is None else "experts", a, b, out, macs, inner, columns)


def _distances(rec: Recorder, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """Distances of all rows of a [..., m, k] to those of b [..., n, k]: k differences, squared and added, each."""
    a, b = args[:2]
    inner = poly_of(a.shape[-1])
    rec.count_weighted("matmul", a, b, out, numel(out.shape) * inner, inner, poly_of(b.shape[-2]))


def _trilinear(rec: Recorder, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """What F.bilinear runs: x [B, 1, m, 1], weight [1, n, m, k], y [B, 1, 1, k] -> [B, n]"""
    x, weight, y = args[:3]
    bilinear(rec, x, y, weight, out, tuple(weight.shape[-3:]))


def bilinear(rec: Recorder, x: Tensor, y: Tensor, weight: Tensor, out: Tensor, shape: Sequence[Any]) -> None:
    """Count x^T W y for every output: x and y [..., m] and [..., k], weight of `shape` [n, m, k] -> out [..., n].

    First x meets every weight, then y what came of it: a product of two activations, n * k MACs a sample.
    """
    n, m, k = map(poly_of, shape)
    each = numel(out.shape)
    between = set_node(torch.empty_like(out), rec.backward.node_from((x, weight)))
    rec.count_weighted("matmul", between, y, out, each * k, k, n, stored=False)
    rec.count_weighted("bilinear", x, weight, out, each * m * k, m * k, n)


def _conv_tbc(rec: Recorder, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """x [T, B, in], weight [taps, in, out] -> [T', B, out]"""
    x, weight = args[:2]
    inner = poly_of(weight.shape[0]) * poly_of(weight.shape[1])
    rec.count_weighted("matmul", x, weight, out, numel(out.shape) * inner, inner, poly_of(weight.shape[2]))


def _by_names(names: str, count: Any) -> dict[Any, Any]:
    """`count` for the ops of these names that this PyTorch has, whatever their overloads: in place, with out=."""
    return {getattr(aten, name): count for name in names.split() if hasattr(aten, name)}


_COUNTED: dict[Any, Any] = {
    **_by_names("mm bmm mv dot vdot _int_mm _scaled_mm", _product),
    **_by_names("addmm addmm_ baddbmm baddbmm_ addmv addmv_ _addmm_activation", _product_and_sum),
    **_by_names("addbmm addbmm_", _summed_products),
    **_by_names("_grouped_mm _scaled_grouped_mm", _grouped_products),
    **_by_names("_cdist_forward _euclidean_dist", _distances),
    **_by_names("_trilinear", _trilinear),
    **_by_names("conv_tbc", _conv_tbc),
    aten.convolution: _convolution,
    aten._scaled_dot_product_flash_attention: _fused_attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention,
    aten._scaled_dot_product_efficient_attention: _fused_attention,
    aten._scaled_dot_product_cudnn_attention: _fused_attention,
}


def is_product(packet: Any, args: Sequence[Any]) -> bool:
    """Whether an op (`aten.mm`) with these arguments is a product that costs MACs."""
    return _counting(packet, args) is not None


def _counting(packet: Any, args: Sequence[Any]) -> Any:
    """What counts an op; None for one that is no product. Of distances only those in the Euclidean norm are."""
    return None if packet is aten._cdist_forward and args[2] != 2 else _COUNTED.get(packet)
