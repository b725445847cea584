"""Whether weights, optimiser state and masks belong together, and what is done where they do not.

Masks are in no state dict, so weights that a program loads by itself may be of other masks: of another seed, of a run whose masks
moved, or of none. Zeros are stored in the weights, so the masks can be read from them where the numbers of non-zeros are those
that were planned. Anything else is refused by name: those weights would cost more than the plan says, without a sign of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..base.randomness import generator_for
from ..base.text import some_of
from ..errors import UsageError
from .guard import require_finite
from .sparse_weight import SparseWeight


@dataclass(frozen=True, slots=True)
class Adopted:
    """What `fit_masks` changed, over all weights that it gave another mask."""

    outside: int
    """Non-zeros outside the masks that the weights had before."""
    nnz: int
    filled: int
    """Places that are in the new masks although the weight is zero there."""

    def __str__(self) -> str:
        filled = f", and {self.filled:,} places that are zero were added at random" if self.filled else ""
        return (
            f"the weights were loaded from a run with other masks ({self.outside:,} of {self.nnz:,} non-zeros were outside): "
            f"their masks are read from their zeros{filled}"
        )


def fit_masks(
    weights: Sequence[SparseWeight],
    most: Mapping[str, int],
    seed: int,
    state_of: Callable[[SparseWeight], list[Tensor]],
) -> Adopted | None:
    """Let the masks follow weights that were loaded: a weight with non-zeros outside its mask gets the mask of its non-zeros.

    Args:
        most: blocks that a part of a weight may have, by its name.
        seed: of the places that are added where a weight has fewer non-zeros than its mask.
        state_of: the optimiser's tensors [*shape of the parameter] of a weight, which go with its blocks where it has no zeros.

    Returns:
        What was changed; None where every weight fits its mask.

    Raises:
        UsageError: a weight with more non-zeros than it may have, or no pattern; no mask has changed then.
    """
    outside = {w: n for w in weights if (n := w.num_outside())}
    if not outside:
        return None
    require_finite({w.name: w.parameter for w in outside}, "the weight", 0)
    found = {
        w: w.mask_of_nonzeros([most[n] for n in w.part_names], generator_for(seed, w.name, "adopt")) for w in outside
    }
    unfit = [_misfit(w, outside[w]) for w, blocks in found.items() if blocks is None]
    if unfit:
        raise UsageError(
            f"weights do not fit their masks: {some_of(unfit, 3)}",
            hint="load weights that were saved with masks of this plan; to drop what is outside instead: "
            "sparseift.copy_masks(model, model). A loop that moves weights by their gradients before step(), as SAM does, "
            "calls sparsifier.mask_gradients() before that",
        )
    filled = 0
    for w, blocks in found.items():
        if blocks is not None:
            w.adopt(blocks, state_of(w))
            filled += w.nnz - int(w.parameter.count_nonzero())
    return Adopted(sum(outside.values()), sum(w.nnz for w in outside), filled)


def _misfit(w: SparseWeight, outside: int) -> str:
    return f"{w.name} has {int(w.parameter.count_nonzero()):,} non-zeros, {outside:,} of them outside its mask of {w.nnz:,}"


def clear_states(weights: Iterable[SparseWeight], state_of: Callable[[SparseWeight], list[Tensor]]) -> list[str]:
    """Zero optimiser state [*shape of its weight] outside the masks; the names of the weights that had such state."""
    return [w.name for w in weights if w.clear_outside(state_of(w))]


def setting_changes(
    mine: Mapping[str, object], theirs: Mapping[str, object], defaults: Mapping[str, object]
) -> dict[str, str]:
    """By name, the settings of a saved run that are others now, as `7 -> 3`; one that did not exist then had its default."""
    once = {"decay": theirs["schedule"]} if "schedule" in theirs else {}  # the name that `decay` had
    then = {**defaults, **once, **theirs}
    return {key: f"{then.get(key)!r} -> {mine[key]!r}" for key in mine if mine[key] != then.get(key)}


def in_words(changes: Mapping[str, str]) -> str:
    """`delta_t 7 -> 3, seed 1 -> 0`."""
    return ", ".join(f"{key} {change}" for key, change in changes.items())
