"""Own shape functions for the common layers: what a layer requires of its sizes, the shape of its result, and its MACs.

`ShapeRules` is a TorchFunctionMode: PyTorch calls it for each function (F.linear, F.layer_norm) before it splits the
function into primitive ops. The functions in `_RULES` are answered here and never reach PyTorch, for these reasons:

- PyTorch's shape functions for fake and meta tensors do not check the sizes of norm parameters, biases and attention
  masks. They show no equality, and a widened model would run with a norm of the old width.
- F.scaled_dot_product_attention runs as one of several kernels, depending on device, mask and dtype. One rule counts all
  alike, and records the broadcast of the mask and of heads that share keys (grouped-query attention).
- F.pad, F.interpolate, F.unfold and torch.baddbmm read sizes as plain numbers, which freezes them; LSTM and GRU take no symbolic
  sizes at all.
- One rule costs a small part of the time of the ten primitive ops that a LayerNorm or linear layer is split into.

A rule returns NotImplemented for what it does not know (a packed sequence, say); then PyTorch answers. The functions in
`layouts.WATCHED` are only watched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..table.poly import Poly
from .flow import pass_through_norm, set_summands, summands_of
from .gradients import Node, node_of, set_node
from .layouts import WATCHED, IndexTracker, note_index, note_layout, note_sum
from .record import (
    ATTENTION,
    FROM_LAYER,
    Recorder,
    annotate,
    bilinear,
    conv,
    flags_of,
    matmul,
    numel,
    producers_of,
    set_zeros_of,
)
from .scales import mark_number, scale_of
from .symint import Facts, concrete, poly_of

Rule = Callable[..., Any]  # (rules, *arguments of the function) -> its result, or NotImplemented


class ShapeRules(TorchFunctionMode):
    """Answers the functions in `_RULES`; everything else goes on to PyTorch. Active during one forward pass."""

    def __init__(self, facts: Facts, recorder: Recorder) -> None:
        super().__init__()
        self.facts = facts
        self.recorder = recorder
        self.indices = IndexTracker(facts)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # vmap hides the batch: the recorder sees it, one level lower
        if self.recorder.paused or torch._C._are_functorch_transforms_active():
            return func(*args, **(kwargs or {}))
        return self.indices.follow(func, args, kwargs or {}, self._answer(func, args, kwargs))

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        rule = _RULES.get(func)
        if rule is not None and not _wants_pytorch(args, kwargs):
            answer = rule(self, *args, **(kwargs or {}))
            if answer is not NotImplemented:
                return answer
        watch = WATCHED.get(func)
        if watch is not None:
            return watch(self.facts, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def require_equal(self, a: Any, b: Any) -> None:
        """Require two sizes to be equal. Comparing symbolic ones records the equality (see `symint`)."""
        if a != b:
            raise RuntimeError(f"sizes do not match: {a} and {b}")

    def new_output(
        self, like: Tensor, shape: Sequence[Any], *sources: Tensor | None, counted: bool = False, linear: bool = False
    ) -> Tensor:
        """A fake tensor of `shape`, computed from `like` and `sources` (any shapes), with dtype and device of `like`.

        Args:
            counted: it is the result of a layer that costs MACs; `Recorder.count_weighted` sets its producer.
            linear: it has the summands of `like`, moved or padded (see `flow`).
        """
        flags, producers = flags_of(like) | (FROM_LAYER if counted else 0), producers_of(like)
        for source in sources:
            if source is not None:
                flags |= flags_of(source)
                producers |= producers_of(source)
        if not linear:
            self.recorder.flow.note_read((like, *sources))
        out = annotate(like.new_empty(tuple(shape)), flags, frozenset() if counted else producers)
        set_node(out, self.recorder.backward.node_from((like, *sources)))
        if not counted:
            self.recorder.uses.follow((like, *sources), (out,), of_layer=FROM_LAYER, linear=linear)
        return set_summands(out, summands_of(like)) if linear else out


def _wants_pytorch(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a result has to be written into `out`, or the forward pass itself differentiates: own rules keep no graph."""
    if kwargs and kwargs.get("out") is not None:
        return True
    return any(isinstance(value, Tensor) and value.requires_grad for value in args)


# --- layers with a weight ---


def _linear(rules: ShapeRules, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """input [..., in], weight [out, in], bias [out] -> [..., out]"""
    rules.require_equal(input.shape[-1], weight.shape[1])
    if bias is not None:
        rules.require_equal(bias.shape[0], weight.shape[0])
    out = rules.new_output(input, (*input.shape[:-1], weight.shape[0]), weight, bias, counted=True)
    inputs, outputs = poly_of(weight.shape[1]), poly_of(weight.shape[0])
    rules.recorder.count_weighted("linear", input, weight, out, numel(out.shape) * inputs, inputs, outputs)
    return out


def _addmm(rules: ShapeRules, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """input [n] + mat1 [m, k] @ mat2 [k, n] -> [m, n]; in Hugging Face's Conv1D, mat2 is the weight and input the bias."""
    rules.require_equal(mat1.shape[1], mat2.shape[0])
    if input.dim() and not (isinstance(input.shape[-1], int) and input.shape[-1] == 1):
        rules.require_equal(input.shape[-1], mat2.shape[1])
    out = rules.new_output(mat1, (mat1.shape[0], mat2.shape[1]), mat2, input, counted=True)
    matmul(rules.recorder, mat1, mat2, out)
    return out


def _conv(spatial: int) -> Rule:
    """input [B, in, *space], weight [out, in / groups, *kernel], bias [out] -> [B, out, *space]; the batch may be absent."""

    def rule(
        rules: ShapeRules,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> Any:
        def each(value: Any) -> list[Any]:
            values = list(value) if isinstance(value, (tuple, list)) else [value]
            return values * spatial if len(values) == 1 else values

        if input.is_complex():
            return NotImplemented  # PyTorch makes it of three real ones
        kernel, steps, spread = weight.shape[2:], each(stride), each(dilation)
        if isinstance(padding, str):
            pads = [0 if padding == "valid" else spread[i] * (kernel[i] - 1) for i in range(spatial)]
        else:
            pads = [2 * p for p in each(padding)]
        channels = input.dim() - spatial - 1
        rules.require_equal(input.shape[channels], weight.shape[1] * groups)
        if isinstance(groups, torch.SymInt):
            rules.facts.exact_quotient(poly_of(weight.shape[0]), poly_of(groups))
        if not isinstance(groups, int) or groups > 1:
            note_layout(rules.facts, "product", input.shape[channels], [groups, weight.shape[1]])
            note_layout(rules.facts, "product", weight.shape[0], [groups, weight.shape[0] // groups])
        if bias is not None:
            rules.require_equal(bias.shape[0], weight.shape[0])
        extent = [
            (input.shape[channels + 1 + i] + pads[i] - spread[i] * (kernel[i] - 1) - 1) // steps[i] + 1
            for i in range(spatial)
        ]
        out = rules.new_output(input, (*input.shape[:channels], weight.shape[0], *extent), weight, bias, counted=True)
        conv(rules.recorder, input, weight, out, poly_of(groups))
        return out

    return rule


def _conv_transpose(spatial: int) -> Rule:
    """Records the layout of groups, which PyTorch's shape function does not show; the rest is left to PyTorch."""

    def rule(
        rules: ShapeRules,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: Any = 1,
        dilation: Any = 1,
    ) -> Any:
        if not isinstance(groups, int) or groups > 1:  # weight: [in, out / groups, *kernel]
            channels, outputs = input.shape[input.dim() - spatial - 1], weight.shape[1] * groups
            note_layout(rules.facts, "product", channels, [groups, weight.shape[0] // groups])
            note_layout(rules.facts, "product", outputs, [groups, weight.shape[1]])
        return NotImplemented

    return rule


def _weight_norm(rules: ShapeRules, v: Tensor, g: Tensor, dim: Any = 0) -> Any:
    """v [*shape], g of as many elements as v has along `dim` (-1: one) -> v * g / norm(v) [*shape], zero where v is."""
    rules.require_equal(g.numel(), 1 if dim == -1 else v.shape[dim])
    return set_zeros_of(rules.new_output(v, v.shape, g), rules.recorder.zeros_of(v))


# --- norms ---


def _per_channel(rules: ShapeRules, input: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    """input [B, C, *space], each parameter [C] -> the shape of the input"""
    for parameter in parameters:
        if parameter is not None:
            rules.require_equal(parameter.shape[0], input.shape[1])
    rules.recorder.flow.note_channel_norm(rules.recorder.stack[-1], input)
    return pass_through_norm(input, rules.new_output(input, input.shape, *parameters))


def _batch_norm(
    rules: ShapeRules,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *_: Any,
    **__: Any,
) -> Any:
    return _per_channel(rules, input, (running_mean, running_var, weight, bias))


def _instance_norm(
    rules: ShapeRules,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *_: Any,
    **__: Any,
) -> Any:
    return _per_channel(rules, input, (running_mean, running_var, weight, bias))


def _group_norm(
    rules: ShapeRules, input: Tensor, num_groups: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Any:
    if isinstance(input.shape[1], torch.SymInt) and num_groups != 1:
        rules.facts.exact_quotient(poly_of(input.shape[1]), poly_of(num_groups))
    return _per_channel(rules, input, (weight, bias))


def _layer_norm(
    rules: ShapeRules, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Any:
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    for i, size in enumerate(reversed(shape)):
        rules.require_equal(input.shape[-1 - i], size)
        for parameter in (weight, bias):
            if parameter is not None:
                rules.require_equal(parameter.shape[-1 - i], size)
    return pass_through_norm(input, rules.new_output(input, input.shape, weight, bias))


def _rms_norm(rules: ShapeRules, input: Tensor, normalized_shape: Any, weight: Any = None, *_: Any, **__: Any) -> Any:
    return _layer_norm(rules, input, normalized_shape, weight)


def _local_response_norm(rules: ShapeRules, input: Tensor, *_: Any, **__: Any) -> Any:
    """Divides each channel by a sum over its neighbours; PyTorch pools over them, which freezes the number of channels."""
    return rules.new_output(input, input.shape)


# --- attention, experts, embeddings ---


def _attention(
    rules: ShapeRules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Any:
    """query [..., T_q, d], key [..., T_k, d], value [..., T_k, d_v] -> [..., T_q, d_v]; the mask broadcasts to [..., T_q, T_k]"""
    rules.require_equal(query.shape[-1], key.shape[-1])
    rules.require_equal(key.shape[-2], value.shape[-2])
    keys, values = list(key.shape[:-2]), list(value.shape[:-2])
    if enable_gqa:  # each head of keys and values is read by several heads of queries
        heads = query.shape[-3]
        for shared in [key.shape[-3]] if key.shape[-3] == value.shape[-3] else [key.shape[-3], value.shape[-3]]:
            rules.facts.exact_quotient(poly_of(heads), poly_of(shared))
            note_layout(rules.facts, "product", heads, [shared, heads // shared])
        keys[-1] = values[-1] = heads
    scores = _broadcast(rules, query.shape[:-2], keys)
    if attn_mask is not None:
        for have, want in zip(
            reversed(attn_mask.shape), reversed((*scores, query.shape[-2], key.shape[-2])), strict=False
        ):
            if not _is_one(have):
                rules.require_equal(have, want)
    shape = (*_broadcast(rules, scores, values), query.shape[-2], value.shape[-1])
    out = rules.new_output(query, shape, key, value, attn_mask, counted=True)
    factor = None if scale is None else scale_of(scale)
    rules.recorder.count_attention(query, key, value, out, is_causal, scale=factor, batch=scores)
    return out


def _broadcast(rules: ShapeRules, a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """The broadcast of two lists of sizes, matched from the last one: a 1, or a missing size, takes the other's."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    sizes = list(longer)
    for i in range(1, len(shorter) + 1):
        if _is_one(sizes[-i]):
            sizes[-i] = shorter[-i]
        elif not _is_one(shorter[-i]):
            rules.require_equal(sizes[-i], shorter[-i])
    return sizes


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _grouped_mm(rules: ShapeRules, mat_a: Tensor, mat_b: Tensor, *_: Any, **__: Any) -> Any:
    """mat_a [S, in], tokens sorted by expert; mat_b [experts, in, out] -> [S, out]. S * in * out MACs for any routing."""
    if mat_a.dim() != 2 or mat_b.dim() != 3:
        return NotImplemented
    rules.require_equal(mat_a.shape[1], mat_b.shape[1])
    for size in mat_b.shape[1:]:
        _keep_aligned(rules, size, mat_a.dtype)
    out = rules.new_output(mat_a, (mat_a.shape[0], mat_b.shape[2]), mat_b, counted=True)
    inputs, outputs = map(poly_of, mat_b.shape[1:])
    kind = "matmul" if rules.recorder.parameter_of(mat_b) is None else "experts"
    rules.recorder.count_weighted(kind, mat_a, mat_b, out, numel(out.shape) * inputs, inputs, outputs)
    return out


def _keep_aligned(rules: ShapeRules, size: Any, dtype: torch.dtype) -> None:
    """Rows of the operands of grouped_mm begin at multiples of 16 bytes: of bfloat16 too, in which models train, if they do."""
    for step in (8, 16 // dtype.itemsize):
        if isinstance(size, torch.SymInt) and concrete(size) % step == 0:
            rules.facts.multiple_of(poly_of(size), step)
            return


def _multi_head_attention(
    rules: ShapeRules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: Any,
    num_heads: Any,
    in_proj_weight: Tensor | None,
    *_: Any,
    **options: Any,
) -> Any:
    """Records the layout and scale inside nn.MultiheadAttention, where no function call shows them; PyTorch answers."""
    width, head_dim = query.shape[-1], query.shape[-1] // num_heads
    note_layout(rules.facts, "product", width, [num_heads, head_dim])
    fused = in_proj_weight is not None
    weight = in_proj_weight if fused else options.get("q_proj_weight")
    if fused:
        note_layout(rules.facts, "product", in_proj_weight.shape[0], [3, num_heads, head_dim])
    if weight is not None:
        rules.recorder.note_query_weight(weight, poly_of(head_dim), 0 if fused else None)
    return NotImplemented


def _never_left_aligned(rules: ShapeRules, *_: Any, **__: Any) -> bool:
    """nn.TransformerEncoder packs a batch without its padding if the values of the mask allow it, in eval mode alone.

    Training computes every position, and so does the count.
    """
    return False


def _embedding(rules: ShapeRules, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Any:
    """input [...] of ids, weight [rows, features] -> [..., features]"""
    if isinstance(weight.shape[0], torch.SymInt):  # ids are values: no shape shows that they must be below `rows`
        rules.facts.freeze(poly_of(weight.shape[0]), "rows of an embedding")
    out = set_summands(rules.new_output(weight, (*input.shape, weight.shape[1]), counted=True), summands_of(weight))
    rules.recorder.uses.follow((weight,), (out,), of_layer=FROM_LAYER, linear=True)
    return out


# --- activations and what moves values ---


def _activation(name: str) -> Rule:
    """Any shape -> the same shape. What an attention produced and an activation changed no longer counts as its product."""

    def rule(rules: ShapeRules, input: Tensor, *args: Any, **options: Any) -> Any:
        rules.recorder.note_activation(_with_options(name, args, options), input)
        out = rules.new_output(input, input.shape)
        return annotate(out, flags_of(out), producers_of(out) - {ATTENTION})

    return rule


def _activation_in_place(name: str, op: Callable[..., Any]) -> Rule:
    """`y.relu_()` returns y itself, so PyTorch runs it."""

    def rule(rules: ShapeRules, input: Tensor, *args: Any, **options: Any) -> Any:
        rules.recorder.note_activation(_with_options(name, args, options), input)
        return op(input, *args, **options)

    return rule


def _with_options(name: str, args: Sequence[Any], options: Mapping[str, Any]) -> str:
    """ "leaky_relu:negative_slope=0.2": the name of a function of torch.nn.functional, and its arguments after the input."""
    names = list(signature(getattr(F, name)).parameters)[1:] if args else []
    given = {**dict(zip(names, args, strict=False)), **options}
    settings = ",".join(f"{k}={v}" for k, v in given.items() if k != "inplace")
    return f"{name}:{settings}" if settings else name


def _dropout(rules: ShapeRules, input: Tensor, *_: Any, **__: Any) -> Any:
    return input


def _baddbmm(rules: ShapeRules, input: Tensor, batch1: Tensor, batch2: Tensor, **scales: Any) -> Tensor:
    """batch1 [b, n, m] @ batch2 [b, m, p] + input, which broadcasts -> [b, n, p]"""
    out = torch.bmm(batch1, batch2)
    for have, want in zip(reversed(input.shape), reversed(out.shape), strict=False):
        if not (isinstance(have, int) and have == 1):
            rules.require_equal(have, want)
    set_node(out, rules.recorder.backward.node_from((out, input)))
    rules.recorder.scales.multiply(out, out, scales.get("alpha", 1), 1)
    return annotate(out, flags_of(out) | flags_of(input), producers_of(out))


def _with_products(add: Callable[..., Tensor], power: int) -> Rule:
    """input + value * tensor1 * tensor2 ** power, which broadcast: on symbolic sizes PyTorch has no rule for it in one op."""

    def rule(_: ShapeRules, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
        product = tensor1 * tensor2 if power > 0 else tensor1 / tensor2
        return add(input, product, alpha=value)

    return rule


def _addbmm(rules: ShapeRules, input: Tensor, batch1: Tensor, batch2: Tensor, **scales: Any) -> Tensor:
    """input, which broadcasts, + the sum over b of batch1 [b, n, m] @ batch2 [b, m, p] -> [n, p]"""
    return input + torch.bmm(batch1, batch2).sum(0)


def _bilinear(rules: ShapeRules, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """input1 [..., m], input2 [..., k], weight [n, m, k], bias [n] -> [..., n]"""
    for have, want in zip((input1.shape[-1], input2.shape[-1]), weight.shape[1:], strict=True):
        rules.require_equal(have, want)
    if bias is not None:
        rules.require_equal(bias.shape[0], weight.shape[0])
    out = rules.new_output(input1, (*input1.shape[:-1], weight.shape[0]), input2, weight, bias, counted=True)
    bilinear(rules.recorder, input1, input2, weight, out, weight.shape)
    return out


def _scaling(op: Callable[..., Any], power: int) -> Rule:
    """x * number, or x / number: PyTorch runs it, and the scale of the result is noted (see `scales`)."""

    def rule(rules: ShapeRules, input: Any, other: Any = 1, **options: Any) -> Any:
        out = op(input, other, **options)
        swapped = power > 0 and _is_number(input) and isinstance(other, Tensor)
        tensor, number = (other, input) if swapped else (input, other)
        return rules.recorder.scales.multiply(tensor, out, number, power) if _is_number(number) else out

    return rule


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0 or (value.dim() == 1 and _is_one(value.shape[0]))


def _spaced(rules: ShapeRules, start: Any, end: Any, steps: Any, *_: Any, **options: Any) -> Any:
    """torch.linspace: its shape function reads the number of steps as a plain number."""
    if not isinstance(steps, torch.SymInt):
        return NotImplemented
    dtype = options.get("dtype") or torch.get_default_dtype()
    return torch.empty(steps, dtype=dtype, device=options.get("device") or "cpu")


def _number(op: Callable[..., Any], at: int) -> Rule:
    """A tensor made of one number, which is argument `at`: what the number is made of stays known.

    A size may be that number, or one of several: no shape follows from the values of a tensor, so it is not fixed.
    """

    def rule(rules: ShapeRules, *args: Any, **options: Any) -> Any:
        value = args[at] if len(args) > at else options.get("fill_value", options.get("data"))
        args = (*args[:at], *tree_map_only(torch.SymInt, concrete, args[at:]))
        named = {k: tree_map_only(torch.SymInt, concrete, v) for k, v in options.items() if k in ("data", "fill_value")}
        return mark_number(op(*args, **{**options, **named}), value)

    return rule


def _pad(rules: ShapeRules, input: Tensor, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> Any:
    """Pads the last len(pad) / 2 dims; `pad` has (before, after) of each, from the last dim on."""
    if mode != "constant":
        return NotImplemented
    shape = list(input.shape)
    for i in range(len(pad) // 2):
        parts = [pad[2 * i], shape[-1 - i], pad[2 * i + 1]]
        shape[-1 - i] = parts[1] + parts[0] + parts[2]
        note_layout(rules.facts, "sum", shape[-1 - i], parts)
    return rules.new_output(input, shape, linear=True)


def _interpolate(
    rules: ShapeRules, input: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any
) -> Any:
    """input [B, C, *space] -> [B, C, *size]; PyTorch's shape function reads C as a plain number, which freezes it."""
    spatial = input.dim() - 2
    if size is None:
        factors = scale_factor if isinstance(scale_factor, (tuple, list)) else [scale_factor] * spatial
        size = [int(n * f) for n, f in zip(input.shape[2:], factors, strict=True)]
    elif not isinstance(size, (tuple, list)):
        size = [size] * spatial
    return rules.new_output(input, (*input.shape[:2], *size), linear=True)


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value, value]


def _unfold(
    rules: ShapeRules, input: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Any:
    """input [..., C, H, W] -> [..., C * taps, windows]; PyTorch's shape function reads C as a plain number."""
    kernel, spread, pads, steps = map(_pair, (kernel_size, dilation, padding, stride))
    windows = [(input.shape[i - 2] + 2 * pads[i] - spread[i] * (kernel[i] - 1) - 1) // steps[i] + 1 for i in range(2)]
    channels, taps = input.shape[-3], kernel[0] * kernel[1]
    note_layout(rules.facts, "product", channels * taps, [channels, taps])
    return rules.new_output(input, (*input.shape[:-3], channels * taps, windows[0] * windows[1]), linear=True)


def _fold(rules: ShapeRules, input: Tensor, output_size: Any, kernel_size: Any, *_: Any, **__: Any) -> Any:
    """input [..., C * taps, windows] -> [..., C, *output_size], the sums of overlapping windows."""
    kernel, taps_of_all = _pair(kernel_size), input.shape[-2]
    channels = taps_of_all // (kernel[0] * kernel[1])
    note_layout(rules.facts, "product", taps_of_all, [channels, kernel[0] * kernel[1]])
    return rules.new_output(input, (*input.shape[:-2], channels, *_pair(output_size)))


def _getitem(rules: ShapeRules, input: Tensor, index: Any) -> Any:
    """`input[index]`; a dim indexed by a tensor is frozen by the `IndexTracker`."""
    out = input[index]
    if isinstance(out, Tensor):
        note_index(rules.facts, input, index, out)
        owned = rules.recorder.parameter_of(input) if isinstance(index, Tensor) and input.dim() == 3 else None
        if owned and index.dim() == 1 and index.dtype is torch.int64:  # the matrix of its expert for each token
            out._sparseift_gathered_from = owned[0]  # type: ignore[attr-defined]
    return out


def _detach(rules: ShapeRules, input: Tensor) -> Any:
    """The same values without a gradient; DisableTorchFunctionSubclass keeps this call from this mode."""
    with torch._C.DisableTorchFunctionSubclass():
        out = annotate(input.view(input.shape), flags_of(input), producers_of(input))
    return out if rules.recorder.backward.function_depth else set_node(out, None)


def _detach_in_place(rules: ShapeRules, input: Tensor) -> Any:
    return input if rules.recorder.backward.function_depth else set_node(input, None)


def _requires_grad(rules: ShapeRules, input: Tensor, requires_grad: bool = True) -> Tensor:
    """The forward pass differentiates by this tensor: forces are the gradient of an energy."""
    if requires_grad and not rules.recorder.backward.function_depth:
        set_node(input, node_of(input) or Node())
    with torch._C.DisableTorchFunctionSubclass():
        input.requires_grad = requires_grad
    return input


def _set_grad_enabled(rules: ShapeRules, enabled: bool) -> None:
    """What torch.no_grad and torch.enable_grad call."""
    rules.recorder.backward.set_grad_mode(enabled)
    torch._C._set_grad_enabled(enabled)


def _ctc_loss(rules: ShapeRules, log_probs: Tensor, *args: Any, reduction: str = "mean", **__: Any) -> Any:
    """log_probs [T, N, C] -> the loss, one number or [N]; PyTorch's shape function reads the lengths."""
    reduction = args[4] if len(args) > 4 else reduction
    return rules.new_output(log_probs, log_probs.shape[1:-1] if reduction == "none" else ())


# --- LSTM, GRU and plain RNN ---

# PyTorch runs a whole recurrent layer as one op, which takes no symbolic sizes and has no count. Per step and direction
# it is two products: the input [B, I] with W_ih [G H, I], and the state [B, H] with W_hh [G H, H], where G is the
# number of gates: 4, 3 or 1. The first step reads the state that the caller gave (zeros by default), and its gradient
# is needed only if that state needs one.


def _recurrent(gates: int) -> Rule:
    """The rule of torch.lstm, torch.gru, ...: input [B, T, I] (or [T, B, I]) -> output [B, T, directions * H], and states."""

    def rule(
        rules: Any,
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: Any,
        num_layers: Any = None,
        dropout: float = 0,
        train: bool = False,
        bidirectional: Any = False,
        batch_first: Any = False,
    ) -> Any:
        if not isinstance(has_biases, bool) or not isinstance(batch_first, bool):
            return NotImplemented  # a packed sequence
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        directions = 1 + bool(bidirectional)
        per_layer = len(params) // (int(num_layers) * directions)
        steps = input.shape[1 if batch_first else 0]
        x, hidden = input, None
        for layer in range(int(num_layers)):
            outputs = []
            for direction in range(directions):
                at = (layer * directions + direction) * per_layer
                out, hidden = _direction(rules, x, states, params[at : at + per_layer], has_biases, gates, steps)
                rules.require_equal(states[0].shape[-1], out.shape[-1])
                rules.require_equal(states[-1].shape[-1], hidden if len(states) == 2 else out.shape[-1])
                outputs.append(out)
            width = sum(o.shape[-1] for o in outputs)
            note_sum(rules.facts, width, [o.shape[-1] for o in outputs])
            x = rules.new_output(outputs[0], (*x.shape[:-1], width), *outputs, counted=True)
        finals = tuple(annotate(set_node(s.new_empty(s.shape), node_of(x)), flags_of(x)) for s in states)
        return (x, *finals)

    return rule


def _direction(
    rules: Any, x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, gates: int, steps: int
) -> tuple[Tensor, Any]:
    """One layer in one direction: x [..., I] -> (output [..., H], H); with a projection, its output size instead of H."""
    w_ih, w_hh = params[:2]
    biases = params[2:4] if has_biases else ()
    projection = params[-1] if len(params) > 2 + 2 * has_biases else None
    hidden = rules.facts.exact_quotient(poly_of(w_ih.shape[0]), Poly.const(gates))
    rules.facts.equal(hidden * Poly.const(gates), poly_of(w_hh.shape[0]))
    rules.require_equal(x.shape[-1], w_ih.shape[1])
    for bias in biases:
        rules.require_equal(bias.shape[0], w_ih.shape[0])
    cell = size = rules.facts.symint(hidden)
    if gates > 1:
        for weight in (w_ih, w_hh):
            note_layout(rules.facts, "product", weight.shape[0], [gates, cell])
    if projection is not None:
        rules.require_equal(projection.shape[1], size)
        size = projection.shape[0]
    rules.require_equal(w_hh.shape[1], size)
    out = rules.new_output(x, (*x.shape[:-1], size), *states, *params, counted=True)
    tokens = numel(x.shape[:-1])
    first_step = (tokens.divided_by(Poly.const(steps)) if steps else None) or Poly()  # its samples
    cells = [t for t in params if t is not projection]
    rows = [(x, w_ih, None), (None, w_hh, states[:1])]
    if projection is not None:
        rows.append((None, projection, [x, *states, *cells]))
    for source, weight, initial_states in rows:
        product = annotate(out.new_empty((*x.shape[:-1], weight.shape[0])), flags_of(out))
        set_node(product, node_of(out))
        inputs, outputs = poly_of(weight.shape[1]), poly_of(weight.shape[0])
        read = source
        if read is None:
            read = set_node(annotate(out.new_empty(out.shape), flags_of(out) | FROM_LAYER), node_of(out))
        steps_with_gradient = tokens
        if initial_states is not None and all(node_of(state) is None for state in initial_states):
            steps_with_gradient = tokens - first_step
        each = inputs * outputs
        rules.recorder.count_weighted(
            "linear", read, weight, product, tokens * each, inputs, outputs, grad_inputs=steps_with_gradient * each
        )
        annotate(out, flags_of(out) | flags_of(product))
    return out, cell


_RECURRENT = {
    torch.lstm: _recurrent(4),
    torch.gru: _recurrent(3),
    torch.rnn_tanh: _recurrent(1),
    torch.rnn_relu: _recurrent(1),
}


# --- the table of rules ---

_ACTIVATIONS = ("relu", "relu6", "gelu", "silu", "hardswish", "hardtanh", "mish", "elu", "selu", "leaky_relu")
_IN_PLACE = ("relu", "leaky_relu", "elu", "selu", "hardtanh")

_RULES: dict[Any, Rule] = {
    **_RECURRENT,
    F.linear: _linear,
    torch.addmm: _addmm,
    torch._weight_norm: _weight_norm,  # pyright: ignore[reportPrivateImportUsage]
    F.conv1d: _conv(1),
    F.conv2d: _conv(2),
    F.conv3d: _conv(3),
    F.conv_transpose1d: _conv_transpose(1),
    F.conv_transpose2d: _conv_transpose(2),
    F.conv_transpose3d: _conv_transpose(3),
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.local_response_norm: _local_response_norm,
    F.scaled_dot_product_attention: _attention,
    **{
        getattr(holder, name): _grouped_mm
        for holder, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
        if hasattr(holder, name)
    },
    F.multi_head_attention_forward: _multi_head_attention,
    torch._nested_tensor_from_mask_left_aligned: _never_left_aligned,  # pyright: ignore[reportPrivateImportUsage]
    F.embedding: _embedding,
    F.dropout: _dropout,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    **dict.fromkeys((torch.addcmul, Tensor.addcmul), _with_products(torch.add, 1)),
    **dict.fromkeys((torch.addcdiv, Tensor.addcdiv), _with_products(torch.add, -1)),
    Tensor.addcmul_: _with_products(Tensor.add_, 1),
    Tensor.addcdiv_: _with_products(Tensor.add_, -1),
    torch.addbmm: _addbmm,
    Tensor.addbmm: _addbmm,
    F.bilinear: _bilinear,
    **{getattr(F, name): _activation(name) for name in _ACTIVATIONS},
    torch.relu: _activation("relu"),
    Tensor.relu: _activation("relu"),
    Tensor.relu_: _activation_in_place("relu", Tensor.relu_),
    **{getattr(F, f"{n}_"): _activation_in_place(n, getattr(F, f"{n}_")) for n in _IN_PLACE},
    F.ctc_loss: _ctc_loss,
    **{op: _scaling(op, 1) for op in (Tensor.mul, Tensor.mul_, torch.mul, Tensor.multiply, torch.multiply)},
    **{op: _scaling(op, -1) for op in (Tensor.div, Tensor.div_, torch.div, Tensor.true_divide, torch.true_divide)},
    **{op: _number(op, 0) for op in (torch.tensor, torch.as_tensor, torch.scalar_tensor)},
    **{op: _number(op, 1) for op in (torch.full, torch.full_like, Tensor.new_tensor)},
    Tensor.new_full: _number(Tensor.new_full, 2),
    torch.linspace: _spaced,
    torch.logspace: _spaced,
    F.pad: _pad,
    F.interpolate: _interpolate,
    F.unfold: _unfold,
    F.fold: _fold,
    Tensor.__getitem__: _getitem,
    Tensor.detach: _detach,
    torch.detach: _detach,
    Tensor.data.__get__: _detach,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.detach_: _detach_in_place,
    Tensor.requires_grad_: _requires_grad,
    Tensor.requires_grad.__set__: _requires_grad,  # pyright: ignore[reportAttributeAccessIssue]
    torch._C._set_grad_enabled: _set_grad_enabled,
}
