"""Where masks are kept: a boolean buffer `weight_mask` beside each sparse `weight`, outside the state dict.

The attribute `weight_mask_pattern` beside it is the mask's pattern, which mask updates keep. A buffer follows its module
through `.to`, `deepcopy` and replication. Being no part of the state dict, it leaves checkpoints as any PyTorch code expects.
Zeros are stored in the weight itself, so a forward pass costs nothing more for the mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

SUFFIX = "_mask"
_PATTERN = "_mask_pattern"
_PARTS = "_mask_parts"
Rows = tuple[tuple[int, int], ...]


def attach(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    pattern: str = "unstructured",
    parts: Mapping[str, Rows] | None = None,
) -> None:
    """Put each mask [*shape of its weight], of that pattern, beside its weight, on the same device; masked weights are zeroed.

    Args:
        masks: bool, by the name of the parameter.
        pattern: of all of these masks; not checked here.
        parts: of weights that consist of several, each with a number of non-zeros of its own: their rows.

    Raises:
        KeyError: `model` has no parameter of that name.
        ValueError: a mask has not the shape of its weight.
    """
    for key, mask in masks.items():
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        weight = module._parameters[name]
        if weight is None or weight.shape != mask.shape:
            raise ValueError(
                f"mask of {key}: {tuple(mask.shape)}, weight {None if weight is None else tuple(weight.shape)}"
            )
        mask = mask.to(weight.device, torch.bool)
        module.register_buffer(name + SUFFIX, mask, persistent=False)
        setattr(module, name + _PATTERN, pattern)
        if parts and parts.get(key):
            setattr(module, name + _PARTS, _with_gaps(parts[key], weight.shape[0]))
        with torch.no_grad():  # inverted and back in place: a copy of a large mask would need as much memory again
            weight.masked_fill_(mask.logical_not_(), 0)
            mask.logical_not_()


def pattern_of(module: nn.Module, name: str) -> str:
    """The pattern of the mask beside the parameter `name` of `module`."""
    return getattr(module, name + _PATTERN, "unstructured")


def parts_of(module: nn.Module, name: str) -> Rows:
    """The rows [start, stop) of each part of the parameter `name` that keeps a number of non-zeros; none where all of it does."""
    return getattr(module, name + _PARTS, ())


def _with_gaps(parts: Rows, rows: int) -> Rows:
    """`parts`, and the rows between and around them, so that each of `rows` is in one."""
    ends = [0, *(end for part in parts for end in part), rows]
    between = zip(ends[::2], ends[1::2], strict=True)
    return tuple(sorted({*parts, *((start, stop) for start, stop in between if start < stop)}))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The boolean mask [*shape] of every weight that has one, by the weight's name; in the order of the modules."""
    found = {}
    for path, module in model.named_modules():
        for name, mask in module._buffers.items():
            weight = module._parameters.get(name.removesuffix(SUFFIX)) if name.endswith(SUFFIX) else None
            if mask is not None and weight is not None and mask.shape == weight.shape and mask.dtype == torch.bool:
                found[f"{path}.{name}".removeprefix(".").removesuffix(SUFFIX)] = mask
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers, whose names masks go by."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is [in, out, ...]: Hugging Face's Conv1D, or a transposed convolution."""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "transposed", False))
