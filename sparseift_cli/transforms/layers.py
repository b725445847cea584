"""Layers like a given one with other sizes: a subclass with its own forward, a stride or a padding mode stay what they are."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import skip_init

from ..mask.attached import is_transposed

_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_HOOKS = tuple(name for name in nn.Module().__dict__ if "hook" in name)


def groups_of(module: nn.Module) -> int:
    """Groups of a convolution; 1 for any other layer."""
    return module.groups if isinstance(module, _ConvNd) else 1


def outputs_of(module: nn.Module) -> int:
    """Output features or channels of a linear or convolution."""
    return int(weight_of(module).shape[1 if is_transposed(module) else 0])


def weight_of(module: nn.Module) -> Tensor:
    """The parameter `weight`."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The parameter `bias`, if there is one."""
    return module._parameters.get("bias")


def like(module: nn.Module, outputs: int, *, bias: bool) -> nn.Module:
    """A layer that reads what `module` reads and computes what it does, with `outputs` outputs and weights not yet set.

    A Conv1D, whose weight is [in, out] and whose forward insists on a bias, becomes the Linear that it is.
    """
    weight = weight_of(module)
    if type(module).__name__ == "Conv1D":
        return _trained_as(module, _linear(int(weight.shape[0]), outputs, bias, weight))
    twin = bare_copy(module)
    twin._parameters["weight"] = nn.Parameter(weight.new_empty((outputs, *weight.shape[1:])), weight.requires_grad)
    twin._parameters["bias"] = nn.Parameter(weight.new_empty(outputs)) if bias else None
    sync_sizes(twin)
    return _trained_as(module, twin)


def pointwise(module: nn.Module, inputs: int, *, bias: bool) -> nn.Module:
    """A 1x1 layer with the groups of `module`, from `inputs` to its outputs: the V of a low-rank pair, weights not yet set."""
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
    """A norm over the outputs of `layer`, in its dtype and on its device, with weight 1 and bias 0; frozen where its weight is.

    A norm that trained behind frozen weights would need gradients where the dense model has none.
    """
    weight = weight_of(layer)
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if kind == "batch_norm":
        norm = _BATCH_NORMS[weight.dim()](outputs_of(layer), eps, momentum, **place)
    else:
        norm = nn.LayerNorm(outputs_of(layer), eps, **place)
    return norm.requires_grad_(weight.requires_grad)


def bare_copy(module: nn.Module) -> nn.Module:
    """A shallow copy that shares no container with `module` and has none of its hooks."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(twin.__dict__[name])
    for name in _HOOKS:
        twin.__dict__[name] = type(twin.__dict__[name])() if twin.__dict__[name] is not None else None
    return twin


def take_over(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give `new`, which stands in for `old`, its hooks, its own extra buffers and its training flag."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    for key, buffer in old._buffers.items():
        new.register_buffer(key, buffer, persistent=key not in old._non_persistent_buffers_set)
    return new.train(old.training)


def sync_sizes(module: nn.Module) -> None:
    """Make the sizes that a layer only reports (`in_features`, `num_features`, ...) those of its weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.Linear):
        _report(module, out_features=shape[0], in_features=shape[1])
    elif isinstance(module, _ConvNd):
        outputs, inputs = (shape[1], shape[0]) if module.transposed else (shape[0], shape[1])
        if module.transposed:
            outputs *= module.groups
        else:
            inputs *= module.groups
        _report(module, out_channels=outputs, in_channels=inputs)
    elif isinstance(module, _NormBase):
        _report(module, num_features=shape[0])
    elif isinstance(module, nn.GroupNorm):
        _report(module, num_channels=shape[0])
    elif isinstance(module, nn.Embedding):
        _report(module, num_embeddings=shape[0], embedding_dim=shape[1])
    elif type(module).__name__ == "Conv1D":
        for name, size in zip(("nx", "nf"), shape, strict=True):
            if name in module.__dict__:
                module.__dict__[name] = size


def _report(module: nn.Module, **sizes: int) -> None:
    """Set what `module` says of its sizes, but where its class works them out: a property follows by itself."""
    for name, size in sizes.items():
        if not isinstance(getattr(type(module), name, None), property):
            setattr(module, name, size)


def _linear(inputs: int, outputs: int, bias: bool, like_weight: Tensor) -> nn.Module:
    return skip_init(nn.Linear, inputs, outputs, bias=bias, device=like_weight.device, dtype=like_weight.dtype)


def _trained_as(module: nn.Module, new: nn.Module) -> nn.Module:
    """`new`, its weight and its bias each frozen where those of `module` are."""
    for name, parameter in new._parameters.items():
        old = module._parameters.get(name)
        if parameter is not None and old is not None:
            parameter.requires_grad_(old.requires_grad)
    return new
