"""Layers like a given one with other sizes: subclasses keep their forward, convolutions their stride and padding mode."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import skip_init
from torch.utils._pytree import tree_unflatten

from ..mask.attached import is_transposed
from ..trace.symbolise import flattened
from .edits import SetAttribute, owner_at

_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_HOOKS = tuple(name for name in nn.Module().__dict__ if "hook" in name)


def groups_of(module: nn.Module) -> int:
    """Groups of a convolution; 1 for any other layer."""
    return module.groups if isinstance(module, _ConvNd) else 1


def outputs_of(module: nn.Module) -> int:
    """Output features or channels of a linear layer or convolution."""
    return int(weight_of(module).shape[1 if is_transposed(module) else 0])


def weight_of(module: nn.Module) -> Tensor:
    """The parameter `weight`: [out, in / groups, *kernel], or [in, out, *kernel] where `is_transposed`."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The parameter `bias`, [out], or None."""
    return module._parameters.get("bias")


def like(module: nn.Module, outputs: int, *, bias: bool) -> nn.Module:
    """A layer with the inputs and the operation of `module`, with `outputs` outputs; its weights are not set yet.

    A Hugging Face Conv1D, which has a weight [in, out] and must have a bias, is replaced by the Linear that it is.
    """
    weight = weight_of(module)
    if type(module).__name__ == "Conv1D":
        return _trained_as(module, _linear(int(weight.shape[0]), outputs, bias, weight))
    new = _bare_copy(module)
    new._parameters["weight"] = nn.Parameter(weight.new_empty((outputs, *weight.shape[1:])), weight.requires_grad)
    new._parameters["bias"] = nn.Parameter(weight.new_empty(outputs)) if bias else None
    sync_sizes(new)
    return _trained_as(module, new)


def pointwise(module: nn.Module, inputs: int, *, bias: bool) -> nn.Module:
    """A 1x1 layer with the groups of `module`, from `inputs` channels to its outputs: the V of a low-rank pair V U.

    Its weight is [out, inputs / groups, 1, ...] (of a linear layer [out, inputs]), and not set yet.
    """
    weight = weight_of(module)
    if not isinstance(module, _ConvNd):
        return _trained_as(module, _linear(inputs, outputs_of(module), bias, weight))
    layer = skip_init(
        _CONVS[weight.dim()],
        inputs,
        outputs_of(module),
        1,
        groups=module.groups,
        bias=bias,
        device=weight.device,
        dtype=weight.dtype,
    )
    return _trained_as(module, layer)


def norm_like(kind: str, layer: nn.Module, eps: float, momentum: float | None) -> nn.Module:
    """A norm over the outputs of `layer`, with its dtype and device, weight 1 and bias 0.

    It is frozen where the layer's weight is: a norm that trained behind frozen weights would need gradients where the
    dense model has none.

    Args:
        kind: `batch_norm` or `layer_norm`.
    """
    weight = weight_of(layer)
    factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if kind == "batch_norm":
        norm = _BATCH_NORMS[weight.dim()](outputs_of(layer), eps, momentum, **factory)
    else:
        norm = nn.LayerNorm(outputs_of(layer), eps, **factory)
    return norm.requires_grad_(weight.requires_grad)


def _bare_copy(module: nn.Module) -> nn.Module:
    """A shallow copy with dictionaries of its own for parameters, buffers and children, and without hooks."""
    new = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = dict(new.__dict__[name])
    for name in _HOOKS:
        new.__dict__[name] = type(new.__dict__[name])() if new.__dict__[name] is not None else None
    return new


def take_over(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give `new`, which replaces `old`, the hooks, buffers and training flag of `old`."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    for key, buffer in old._buffers.items():
        new.register_buffer(key, buffer, persistent=key not in old._non_persistent_buffers_set)
    return new.train(old.training)


def sync_sizes(module: nn.Module) -> None:
    """Set the sizes that a layer only displays (`in_features`, `num_features`, ...) from the shape of its weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.Linear):
        _set_sizes(module, out_features=shape[0], in_features=shape[1])
    elif isinstance(module, _ConvNd):
        outputs, inputs = (shape[1], shape[0]) if module.transposed else (shape[0], shape[1])
        if module.transposed:
            outputs *= module.groups
        else:
            inputs *= module.groups
        _set_sizes(module, out_channels=outputs, in_channels=inputs)
    elif isinstance(module, _NormBase):
        _set_sizes(module, num_features=shape[0])
    elif isinstance(module, nn.GroupNorm):
        _set_sizes(module, num_channels=shape[0])
    elif isinstance(module, nn.Embedding):
        _set_sizes(module, num_embeddings=shape[0], embedding_dim=shape[1])
    elif type(module).__name__ == "Conv1D":
        for name, size in zip(("nx", "nf"), shape, strict=True):
            if name in module.__dict__:
                module.__dict__[name] = size


def _set_sizes(module: nn.Module, **sizes: int) -> None:
    """Set integer attributes, except those that the class computes by a property."""
    for name, size in sizes.items():
        if not isinstance(getattr(type(module), name, None), property):
            setattr(module, name, size)


def _linear(inputs: int, outputs: int, bias: bool, like_weight: Tensor) -> nn.Module:
    return skip_init(nn.Linear, inputs, outputs, bias=bias, device=like_weight.device, dtype=like_weight.dtype)


def _trained_as(module: nn.Module, new: nn.Module) -> nn.Module:
    """`new`, with its weight and its bias frozen where those of `module` are."""
    for name, parameter in new._parameters.items():
        old = module._parameters.get(name)
        if parameter is not None and old is not None:
            parameter.requires_grad_(old.requires_grad)
    return new


def set_attribute(root: nn.Module, edit: SetAttribute) -> None:
    """Set a number of a module, of a configuration object, or in a dict of one, somewhere in `root`; a buffer of one element too.

    Raises:
        AttributeError, KeyError, IndexError: `root` has no such thing.
    """
    owner = owner_at(root, edit.owner)
    values: dict[str, Any] = owner if isinstance(owner, dict) else owner.__dict__
    if isinstance(owner, nn.Module) and edit.name in owner._buffers:
        buffer = owner._buffers[edit.name]
        assert buffer is not None
        owner._buffers[edit.name] = torch.full_like(buffer, edit.value)
    elif isinstance(values.get(edit.name), Tensor):
        values[edit.name] = torch.full_like(values[edit.name], edit.value)
    elif edit.index is None:
        values[edit.name] = edit.value
    else:
        leaves, form = flattened(values[edit.name])
        leaves[edit.index] = edit.value
        values[edit.name] = tree_unflatten(leaves, form)
