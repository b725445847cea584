"""The sparse weights of a model, as the `Sparsifier` holds them: with their zeros, or their blocks alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from ..base.text import some_of
from ..errors import UsageError
from ..kernels.layer import BlockLayer
from ..mask.attached import is_transposed, mask_names, masks_without_weights, pattern_of
from ..mask.saliency import MaskLayout
from .block_weight import BlockWeight
from .sparse_weight import SparseWeight


def find_weights(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    pattern: str | None,
    layouts: Mapping[str, MaskLayout],
    *,
    moves: bool,
    keeps: tuple[bool, bool] = (False, False),
) -> list[SparseWeight]:
    """Every weight with a mask, in the order of the modules.

    Args:
        pattern: of all masks; None for the one kept beside each mask.
        layouts: pattern, groups and transposition of single weights, in place of what their modules have.
        moves: whether any mask will change.
        keeps: whether rows, and columns, keep their numbers of non-zeros then.

    Raises:
        UsageError: a weight that is trained but by none of the optimisers; a mask whose weight is no parameter any more; a
            layout of a name that is no sparse weight; a mask that does not have the pattern, or a pattern that cannot move.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    lost = masks_without_weights(model)
    if lost:
        raise UsageError(
            f"{some_of(lost)} {'has' if len(lost) == 1 else 'have'} a mask and is no parameter any more",
            hint="parametrize or prune the dense model, and transform that",
        )
    found = list[SparseWeight]()
    for name in mask_names(model):
        weight = _find_weight(model, name, pattern, layouts, moves, keeps)
        if weight.parameter.requires_grad and id(weight.parameter) not in held:
            hint = "give all optimisers, Sparsifier(model, [muon, adamw]), or freeze it"
            if not weight.stores_zeros:
                hint = f"call use_kernels before the optimiser is made, as it replaces parameters; or {hint}"
            raise UsageError(f"{name} is trained but not in the optimiser", hint=hint)
        found.append(weight)
    unknown = set(layouts) - {w.name for w in found}
    if unknown:
        raise UsageError(f"layouts of {', '.join(sorted(unknown))}: no sparse weights of these names")
    return found


def _find_weight(
    model: nn.Module,
    name: str,
    pattern: str | None,
    layouts: Mapping[str, MaskLayout],
    moves: bool,
    keeps: tuple[bool, bool],
) -> SparseWeight:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    compact = isinstance(module, BlockLayer)
    if hasattr(module.values if compact else module._parameters[attribute], "device_mesh") and (moves or not compact):
        raise UsageError(
            f"{name} is a DTensor, of which a process has a part: masks are of whole weights",
            hint="DistributedDataParallel keeps them whole; with fully_shard, use_kernels and algorithm static do",
        )
    if isinstance(module, BlockLayer):
        return BlockWeight(name, module, moves=moves)
    form: MaskLayout = {
        "pattern": pattern or pattern_of(module, attribute),
        "groups": getattr(module, "groups", 1),
        "transposed": is_transposed(module),
    }
    form |= layouts.get(name, MaskLayout())
    return SparseWeight(name, module, attribute, form, moves=moves, keeps=keeps)
