"""The sparse weights of a model, as a Sparsifier handles them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from ..errors import UsageError
from .attached import masks_of, pattern_of
from .saliency import MaskLayout
from .sparse_weight import SparseWeight


def find_weights(
    model: nn.Module, optimizer: Optimizer, pattern: str | None, layouts: Mapping[str, MaskLayout], *, moves: bool
) -> list[SparseWeight]:
    """Every weight with a mask, in the order of the modules; `layouts` over what the module itself tells.

    `pattern`: of all masks; None for the one that lies beside each.

    Raises:
        UsageError: a weight that is trained but not by this optimiser; a layout of a name that is no sparse weight; a
            mask that does not have the pattern, or a pattern that cannot move.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = list[SparseWeight]()
    for name in masks_of(model):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        form: MaskLayout = {
            "pattern": pattern or pattern_of(module, attribute), "groups": getattr(module, "groups", 1),
            "transposed": is_transposed(module),
        }  # fmt: skip
        form |= layouts.get(name, MaskLayout())
        weight = SparseWeight(name, module, attribute, form, moves=moves)
        if weight.parameter.requires_grad and id(weight.parameter) not in held:
            raise UsageError(
                f"{name} is trained but not in the optimiser", hint="give it to the optimiser, or freeze it"
            )
        found.append(weight)
    unknown = set(layouts) - {w.name for w in found}
    if unknown:
        raise UsageError(f"layouts of {', '.join(sorted(unknown))}: no sparse weights of these names")
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
    """Does the weight lie as [in, out]: Hugging Face's Conv1D, a transposed convolution?"""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "transposed", False))
