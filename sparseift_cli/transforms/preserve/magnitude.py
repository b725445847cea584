"""The control of Sparse Wide (scope none) that starts from dense weights: the largest of every sparse layer stay.

There are fewer places than dense weights and no added channels, so the function cannot be the dense one. What is left out
is the least by magnitude, the criterion of one-shot pruning (Han et al. 2015, arXiv 1506.02626).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ...plan.plan import Plan
from ..edits import Surgery
from ..masking import draw_masks


def keep_largest(
    new: nn.Module, dense: nn.Module, plan: Plan, surgery: Surgery, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Put the dense weights back into `new`, a module of the same shapes, and mask each by magnitude.

    Masks follow the plan's pattern, and the heads of an attention projection keep equal numbers. All other tensors of
    `new` are clones of the dense ones already. Returns the masks by key and what is to be said.

    Raises:
        UsageError: the pattern cannot hold the planned counts.
    """
    old = {m.key: dense.get_parameter(m.key).detach() for m in surgery.masked}
    for key, weight in old.items():
        new.get_parameter(key).copy_(weight)
    masks = draw_masks(new, plan, surgery, seed=seed, connect=False, scores={k: w.abs() for k, w in old.items()})
    for key, mask in masks.items():
        new.get_parameter(key).mul_(mask.to(old[key].device))
    return masks, list(_told(old, masks))


def _told(old: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Iterator[str]:
    lost = {key: _share_lost(old[key], mask) for key, mask in masks.items()}
    if lost:
        worst = max(lost, key=lambda key: lost[key])
        kept, total = sum(int(m.count_nonzero()) for m in masks.values()), sum(w.numel() for w in old.values())
        yield (
            f"not exact: scope none has no room for all dense weights, so the largest {kept:,} of {total:,} stay, layer "
            f"by layer; up to {lost[worst]:.2%} of a layer's norm is gone ({worst})"
        )


def _share_lost(weight: Tensor, mask: Tensor) -> float:
    """Norm of what a mask leaves out, over the norm of the weight."""
    norm = float(weight.float().norm())
    return float((weight * ~mask.to(weight.device)).float().norm()) / norm if norm else 0.0
