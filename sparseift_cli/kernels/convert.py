"""Replaces layers whose masks are whole blocks by layers that store and compute these blocks alone, and back.

    print(use_kernels(model))    # in place; says what runs how, and why not better
    to_masked(model)             # ordinary layers with masks and zeros again

A layer is replaced only where nothing can tell the difference: its class is one whose forward pass is known, nothing is hooked
onto it, and no other layer shares its weight. Code that reads `layer.weight` gets the dense weight from the new layer too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..mask.attached import (
    SUFFIX,
    Rows,
    attach,
    is_transposed,
    keep_form,
    mask_beside,
    mask_names,
    parts_of,
    pattern_of,
    unwrapped,
    with_gaps,
)
from ..mask.layout import Layout
from ..mask.patterns import Block, has_pattern, parse_pattern
from .conv import BlockConv2d
from .copies import forget_copies
from .layer import BlockLayer
from .linear import BlockLinear
from .registry import MASKED, LayerChoice, LayerRequest, LayerSize, in_words, select

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_WEIGHT = "weight"


class Choices(tuple[LayerChoice, ...]):
    """What computes each weight with a mask, in the order of the modules; printed as one line."""

    def __str__(self) -> str:
        return in_words(self)


def use_kernels(
    model: nn.Module,
    kernels: str = "auto",
    *,
    tokens: int | Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    masked_because: str = "",
) -> Choices:
    """Let block-sparse kernels compute every layer of a transformed model that they can, in place.

    Call it before the optimiser and the `Sparsifier` are made, with the model on its device: the parameters of replaced layers
    are new ones, `values` [n, B, B] in place of `weight`.

    Args:
        model: with masks beside its weights; what torch.compile made of it will do. DistributedDataParallel is made afterwards.
        kernels: auto takes for each layer what is fastest on this device; masked leaves dense weights with zeros; or a name
            in `KERNELS`.
        tokens: rows of the input of each linear layer, output positions of each convolution, in one forward pass, over the
            batch; by the weight's name or for all. Where it is given, auto measures; otherwise it takes the first backend that
            takes the layer.
        dtype: in which layers compute where that is not the dtype of their weights: that of autocast.
        masked_because: leave every layer as it is, for this reason.

    Returns:
        A choice for every weight with a mask, in the order of the modules.

    Raises:
        UsageError: no such backend, or a model inside DistributedDataParallel.
    """
    model = _inner(model)
    shared = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    choices = list[LayerChoice]()
    for name in mask_names(model):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, BlockLayer):
            choices.append(_keep_or_undo(module, name, kernels, masked_because))
            continue
        rows = tokens if isinstance(tokens, int) or tokens is None else tokens.get(name)
        reason = masked_because or _why_not(module, attribute, shared)
        choice = LayerChoice(name, MASKED, None, reason) if reason else _choose(module, name, kernels, rows, dtype)
        if choice.backend != MASKED:
            _turn_into(module, _compact(module, choice.backend))
        choices.append(choice)
    return Choices(choices)


def to_masked(model: nn.Module) -> None:
    """Replace every layer of stored blocks by the ordinary layer with the same weight, its mask beside it, in place.

    The parameters are new ones: make optimiser and `Sparsifier` afterwards.

    Raises:
        UsageError: a model inside DistributedDataParallel.
    """
    model = _inner(model)
    for module in [m for m in model.modules() if isinstance(m, BlockLayer)]:
        forget_copies(module)
        _turn_into(module, _ordinary(module))


def _inner(model: nn.Module) -> nn.Module:
    """The module whose layers are replaced: `model`, or what torch.compile wrapped."""
    while (compiled := getattr(model, "_orig_mod", None)) is not None:
        model = compiled
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError(
            "DistributedDataParallel averages the gradients of the parameters that it was made with, not of new ones",
            hint="use_kernels(model) first, then DistributedDataParallel(model)",
        )
    return unwrapped(model)


def _keep_or_undo(module: BlockLayer, name: str, kernels: str, masked_because: str) -> LayerChoice:
    """What a layer that is replaced already becomes."""
    if kernels == MASKED or masked_because:
        forget_copies(module)
        _turn_into(module, _ordinary(module))
        return LayerChoice(name, MASKED, None, masked_because)
    if kernels != "auto":
        module.backend = kernels
    return LayerChoice(name, module.backend, module.block)


def block_masks(model: nn.Module) -> dict[str, Tensor]:
    """Where blocks are stored, bool [R, C], by the name of the weight of every layer of stored blocks."""
    layers = [(path, module) for path, module in unwrapped(model).named_modules() if isinstance(module, BlockLayer)]
    return {f"{path}.{_WEIGHT}".removeprefix("."): layer.block_mask for path, layer in layers}


def store_blocks(
    model: nn.Module, name: str, cells: Tensor, pattern: str, parts: Rows = (), backend: str = "auto"
) -> None:
    """Replace the layer with the weight `name` by one that stores its blocks at `cells`, in place, with its values on meta.

    They are set by `load_state_dict(..., assign=True)`.

    Args:
        model: contains the layer.
        name: of the weight.
        cells: bool [R, C], where blocks are stored.
        pattern: of the mask.
        parts: rows of its parts, each with a number of non-zeros of its own.
        backend: a name in `KERNELS`, or auto.

    Raises:
        UsageError: no layer of stored blocks computes what this layer does, or its weight is cut otherwise.
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if reason := _why_no_class(module, attribute):
        raise UsageError(f"{name} cannot be stored in blocks: {reason}")
    weight = module.get_parameter(attribute)
    keep_form(module, attribute, pattern, with_gaps(parts, weight.shape[0]) if parts else ())
    _turn_into(module, _compact(module, backend, cells))


# --- may a layer be replaced? ---


def _why_not(module: nn.Module, attribute: str, shared: Mapping[int, int]) -> str:
    """The reason for which no kernel can compute the layer, whatever the device; empty where one can."""
    if reason := _why_no_class(module, attribute):
        return reason
    weight = module._parameters[_WEIGHT]
    assert weight is not None
    if shared[id(weight)] > 1:
        return "its weight is shared with another layer"
    if any(getattr(module, hooks, None) for hooks in _HOOKS) or hasattr(module, "parametrizations"):
        return f"this {type(module).__name__} has hooks or parametrizations"
    pattern = pattern_of(module, _WEIGHT)
    if not isinstance(parse_pattern(pattern), Block) or pattern == "1x1":
        return f"{pattern} masks have no kernel"
    return _why_no_blocks(module, weight, pattern)


def _why_no_class(module: nn.Module, attribute: str) -> str:
    """Why no layer of stored blocks computes what a layer of this class and options does; empty where one does."""
    if attribute != _WEIGHT or not (_is_linear(module) or type(module) is nn.Conv2d):
        return f"{type(module).__name__} is no layer that kernels replace"
    return (BlockConv2d.why_not(module) if type(module) is nn.Conv2d else None) or ""


def _why_no_blocks(module: nn.Module, weight: Tensor, pattern: str) -> str:
    """Why the mask of a weight [*shape] does not consist of square blocks that fill it; empty where it does."""
    block = _side(module, pattern)
    if block is None:
        return f"the blocks of {pattern} are not square"
    layout = _layout(module, weight)
    if layout.rows % block or layout.channels % block:
        return f"{layout.channels} inputs and {layout.rows} outputs are not multiples of {block}"
    if any(row % block for rows in parts_of(module, _WEIGHT) for row in rows):
        return f"parts of the weight, with non-zeros of their own, are not multiples of {block}"
    mask = mask_beside(module, _WEIGHT)
    assert mask is not None
    if not mask.any():
        return "it has no non-zeros"
    if not has_pattern(mask, pattern, transposed=layout.transposed):
        return f"its mask does not consist of whole blocks of {pattern}"
    return ""


def _is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies its input by its weight and adds its bias, and does nothing else."""
    if type(module) is nn.Linear:
        return True
    return type(module).__name__ == "Conv1D" and set(module._parameters) == {_WEIGHT, "bias"} and not module._modules


def _layout(module: nn.Module, weight: Tensor) -> Layout:
    """How the weight [*shape] of a module is a matrix."""
    return Layout(tuple(weight.shape), transposed=is_transposed(module))


def _side(module: nn.Module, pattern: str) -> int | None:
    """B where the pattern is blocks of B outputs x B inputs, at all taps of a convolution; otherwise None."""
    rows, columns = parse_pattern(pattern).sides
    weight = module._parameters[_WEIGHT]
    assert weight is not None
    return rows if columns == rows * _layout(module, weight).taps else None


# --- which backend ---


def _choose(module: nn.Module, name: str, kernels: str, tokens: int | None, dtype: torch.dtype | None) -> LayerChoice:
    weight = module._parameters[_WEIGHT]
    assert weight is not None
    block, mask = _side(module, pattern_of(module, _WEIGHT)), mask_beside(module, _WEIGHT)
    assert block is not None
    assert mask is not None
    request = LayerRequest(
        block=block,
        dtype=str(dtype or weight.dtype).removeprefix("torch."),
        device=weight.device.type,
        capability=torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None,
        kind="linear" if _window(module) is None else "conv2d",
    )
    size = None if tokens is None else _size(module, weight, mask, block, tokens)
    selected = select(kernels, request, size)
    return selected.for_weight(name, block)


def _size(module: nn.Module, weight: Tensor, mask: Tensor, block: int, tokens: int) -> LayerSize:
    layout = _layout(module, weight)
    blocks = int(mask.count_nonzero()) // (block * block * layout.taps)
    bias = module._parameters.get("bias") is not None
    return LayerSize(layout.rows // block, layout.channels // block, blocks, tokens, bias, window=_window(module))


def _window(module: nn.Module) -> tuple[int, ...] | None:
    """Size, stride and padding of a kernel; None where the layer is a linear one."""
    if not isinstance(module, nn.Conv2d) or BlockConv2d.is_linear(module):
        return None
    return tuple(BlockConv2d.window_of(module))


# --- replacing ---


def _compact(module: nn.Module, backend: str, cells: Tensor | None = None) -> BlockLayer:
    """The layer of stored blocks that computes what `module` does; `cells`, bool [R, C], are otherwise those of its mask."""
    weight, mask, bias = module._parameters[_WEIGHT], mask_beside(module, _WEIGHT), module._parameters.get("bias")
    pattern, transposed = pattern_of(module, _WEIGHT), is_transposed(module)
    block = _side(module, pattern)
    assert weight is not None
    assert block is not None
    layout = _layout(module, weight)
    if cells is None:
        assert mask is not None
        cells = layout.to_matrix(mask)[::block, :: block * layout.taps].contiguous()
    else:
        weight = weight.to("meta")
    new: BlockLayer
    if isinstance(module, nn.Conv2d):
        how: Any = {"stride": module.stride, "padding": module.padding}
        new = BlockConv2d.from_dense(weight.detach(), cells, bias, backend=backend, **how)
    else:
        new = BlockLinear.from_dense(weight.detach(), cells, bias, transposed=transposed, backend=backend)
    new.values.requires_grad_(weight.requires_grad)
    if bias is not None:
        new.bias = bias  # the parameter itself
    new.dense_form = (_without_tensors(module),)
    for name, value in vars(module).items():  # what the model's code has noted at its layer, and may read there
        if not hasattr(new, name):
            setattr(new, name, value)
    keep_form(new, _WEIGHT, pattern, parts_of(module, _WEIGHT))
    return new.train(module.training)


def _without_tensors(module: nn.Module) -> nn.Module:
    """The layer without weight, bias and mask, to be filled again by `to_masked`."""
    made = copy(module)
    made._parameters = dict.fromkeys(module._parameters)
    made._buffers = {name: buffer for name, buffer in module._buffers.items() if name != _WEIGHT + SUFFIX}
    return made


def _ordinary(layer: BlockLayer) -> nn.Module:
    """The ordinary layer with the weight of a layer of stored blocks, its zeros and its mask."""
    made = copy(layer.dense_form[0]) if layer.dense_form else layer.empty_dense_form()
    made._parameters = dict(made._parameters)
    made._buffers = dict(made._buffers)
    made._parameters[_WEIGHT] = nn.Parameter(layer.dense().contiguous(), requires_grad=layer.values.requires_grad)
    made._parameters["bias"] = layer.bias  # pyright: ignore[reportArgumentType]
    parts = parts_of(layer, _WEIGHT)
    attach(made, {_WEIGHT: layer.weight_mask.contiguous()}, {_WEIGHT: pattern_of(layer, _WEIGHT)}, {_WEIGHT: parts})
    return made.train(layer.training)


def _turn_into(layer: nn.Module, new: nn.Module) -> None:
    """Make a layer what `new` is, wherever it is held: in several modules, in a plain list, in another model.

    As torch's lazy modules do, it changes its class, so the places that hold it need not be found.
    """
    layer.__class__ = type(new)
    object.__setattr__(layer, "__dict__", vars(new))
