"""Where masks are kept: a boolean buffer `weight_mask` beside each sparse `weight`, outside the state dict.

The attribute `weight_mask_pattern` beside it is the mask's pattern, which mask updates keep. A buffer follows its module
through `.to`, `deepcopy` and replication. Being no part of the state dict, it leaves checkpoints as any PyTorch code expects.
Zeros are stored in the weight itself, so a forward pass costs nothing more for the mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor, nn

from ..base.text import shape_text
from ..errors import UsageError

SUFFIX = "_mask"
_PATTERN = "_mask_pattern"
_PARTS = "_mask_parts"
Rows = tuple[tuple[int, int], ...]
_LAST_LOOK = 1024  # backward passes after which a `_Watch` has seen enough


def attach(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    patterns: Mapping[str, str] | None = None,
    parts: Mapping[str, Rows] | None = None,
) -> None:
    """Put each mask [*shape of its weight], beside its weight, on the same device; masked weights are zeroed.

    Args:
        masks: bool, by the name of the parameter.
        patterns: of masks that are not unstructured, by the name of the parameter; not checked here.
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
        keep_form(
            module,
            name,
            (patterns or {}).get(key, "unstructured"),
            with_gaps(parts[key], weight.shape[0]) if parts and parts.get(key) else (),
        )
        with torch.no_grad():  # inverted and back in place: a copy of a large mask would need as much memory again
            weight.masked_fill_(mask.logical_not_(), 0)
            mask.logical_not_()
    found = _Found()
    for key in masks:
        path, _, name = key.rpartition(".")
        _watch(model.get_submodule(path), name, key, found)


def keep_form(module: nn.Module, name: str, pattern: str, parts: Rows = ()) -> None:
    """Note the pattern of the mask of the parameter `name` beside it, and the rows of its parts, which together are all rows."""
    setattr(module, name + _PATTERN, pattern)
    if parts:
        setattr(module, name + _PARTS, parts)


@dataclass(slots=True)
class _Found:
    """What the watches of one model share: whether one has warned."""

    warned: bool = False


@dataclass(slots=True)
class _Watch:
    """Called after a weight has its gradient: warns, once for a model, where weights outside the masks are being trained.

    It looks at backward passes 2, 4, 8, ... alone, and is gone once a Sparsifier has the weight. A copy of the module has none.
    """

    module: ref[nn.Module]
    name: str
    key: str
    found: _Found
    passes: int = 0
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> None:
        self.passes += 1
        if self.passes & (self.passes - 1) or self.passes == 1:
            return
        module = self.module()
        if module is None or self.found.warned or self.passes >= _LAST_LOOK:
            self.handles.pop().remove()
            return
        mask = None if capturing(weight) else module._buffers.get(self.name + SUFFIX)
        if mask is None or mask.shape != weight.shape:
            return
        outside = int(weight.detach().masked_fill(mask.bool(), 0).count_nonzero())
        if outside:
            self.found.warned = True
            warnings.warn(
                f"training fills the masks: {outside:,} weights of {self.key} outside its mask are no zeros any more, and "
                "nothing sets them back. Make a sparseift.Sparsifier(model, optimizer) and call its step() between backward() "
                "and the optimiser's step()",
                stacklevel=2,
            )


def _watch(module: nn.Module, name: str, key: str, found: _Found) -> None:
    weight = module._parameters[name]
    assert weight is not None
    if not weight.requires_grad:
        return
    if not _watches(weight):
        watch = _Watch(ref(module), name, key, found)
        watch.handles.append(weight.register_post_accumulate_grad_hook(watch))


def _watches(weight: Tensor) -> list[_Watch]:
    hooks: Mapping[int, object] = getattr(weight, "_post_accumulate_grad_hooks", None) or {}
    return [hook for hook in hooks.values() if isinstance(hook, _Watch)]


def unwatch(weight: Tensor) -> None:
    """A Sparsifier looks after the weight [*shape] from here on."""
    for watch in _watches(weight):
        watch.handles.pop().remove()


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded on the device of a tensor of any shape; it must not wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def pattern_of(module: nn.Module, name: str) -> str:
    """The pattern of the mask beside the parameter `name` of `module`."""
    return getattr(module, name + _PATTERN, "unstructured")


def parts_of(module: nn.Module, name: str) -> Rows:
    """The rows [start, stop) of each part of the parameter `name` that keeps a number of non-zeros; none where all of it does."""
    return getattr(module, name + _PARTS, ())


def with_gaps(parts: Rows, rows: int) -> Rows:
    """`parts`, and the rows between and around them, so that each of `rows` is in one."""
    ends = [0, *(end for part in parts for end in part), rows]
    between = zip(ends[::2], ends[1::2], strict=True)
    return tuple(sorted({*parts, *((start, stop) for start, stop in between if start < stop)}))


def mask_names(model: nn.Module) -> list[str]:
    """The name of every weight that has a mask, in the order of the modules; of layers that store blocks alone too."""
    return [f"{path}.{name}".removeprefix(".") for path, module in model.named_modules() for name in _masked(module)]


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The boolean mask [*shape] of every weight that has one, by the weight's name; in the order of the modules.

    Of a layer that stores blocks alone (`kernels.layer.BlockLayer`) it is made for this call.
    """
    found = {}
    for path, module in model.named_modules():
        for name in _masked(module):
            mask = module.weight_mask if stores_blocks(module) else mask_beside(module, name)
            found[f"{path}.{name}".removeprefix(".")] = mask
    return found


def stores_blocks(module: nn.Module) -> bool:
    """Whether the module stores the blocks of its weight alone, and makes weight and mask when they are asked for."""
    return isinstance(getattr(type(module), "weight" + SUFFIX, None), property)


def _masked(module: nn.Module) -> Iterator[str]:
    """The weights of one module that have a mask."""
    if stores_blocks(module):
        yield "weight"
        return
    for name in tuple(module._buffers):
        weight = module._parameters.get(name.removesuffix(SUFFIX)) if name.endswith(SUFFIX) else None
        mask = None if weight is None else mask_beside(module, name.removesuffix(SUFFIX))
        if mask is not None and weight is not None and mask.shape == weight.shape and mask.dtype == torch.bool:
            yield name.removesuffix(SUFFIX)


def mask_beside(module: nn.Module, name: str) -> Tensor | None:
    """The mask [*shape] of the parameter `name` of `module`; one that `module.type(...)` made numbers of is boolean again."""
    mask = module._buffers.get(name + SUFFIX)
    if mask is not None and mask.dtype != torch.bool and hasattr(module, name + _PATTERN):
        mask = module._buffers[name + SUFFIX] = mask.bool()
    return mask


def masks_without_weights(model: nn.Module) -> list[str]:
    """Names of weights that have a mask and are no parameters any more: pruned by torch, parametrised, or set to a tensor."""
    return [
        f"{path}.{name}".removeprefix(".").removesuffix(SUFFIX)
        for path, module in model.named_modules()
        for name in module._buffers
        if name.endswith(SUFFIX)
        and hasattr(module, name.removesuffix(SUFFIX) + _PATTERN)
        and module._parameters.get(name.removesuffix(SUFFIX)) is None
    ]


def copy_masks(source: nn.Module, target: nn.Module) -> None:
    """Give `target`, a copy of `source` or a wrapper of one, the masks that `source` has now; what they leave out is zero.

    Raises:
        UsageError: `target` is no copy of `source`: a weight is missing or has another shape.
    """
    source, target = unwrapped(source), unwrapped(target)
    keys, theirs = mask_names(source), _shapes(target)
    inner = getattr(target, "module", None)
    if isinstance(inner, nn.Module) and not set(keys) & theirs.keys():  # an average: its copy of the model
        target, theirs = inner, _shapes(inner)
    ours = _shapes(source)
    for key in keys:  # all of them before one is laid
        if theirs.get(key) != ours[key]:
            raise UsageError(
                f"{type(target).__name__} has no {key} of shape {shape_text(ours[key][1])}",
                hint="give a copy of the model that has the masks, as AveragedModel(model).module",
            )
    for key in keys:
        path, _, name = key.rpartition(".")
        module = source.get_submodule(path)
        if stores_blocks(module):
            target.get_submodule(path).move_(module.block_mask)  # pyright: ignore[reportCallIssue]
            continue
        mask = mask_beside(module, name)
        assert mask is not None
        attach(target, {key: mask.clone()}, {key: pattern_of(module, name)}, {key: parts_of(module, name)})


def _shapes(model: nn.Module) -> dict[str, tuple[bool, tuple[int, ...]]]:
    """Of every weight by its name: is it stored in blocks, and its shape."""
    found = {name: (False, tuple(p.shape)) for name, p in model.named_parameters(remove_duplicate=False)}
    for path, module in model.named_modules():
        if stores_blocks(module):
            found[f"{path}.weight".removeprefix(".")] = True, tuple(module.weight_shape)  # pyright: ignore[reportArgumentType]
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
