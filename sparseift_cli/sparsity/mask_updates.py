"""What a mask update is computed from: one algorithm, its schedule, and the weights of one model. No loop, no hook.

`Sparsifier` calls it in a loop; `gpu.graphed_update` records the same in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..base.randomness import key_of
from ..base.text import shape_text
from ..errors import UsageError
from .algorithms import DropAndGrow, GrownState, MaskAlgorithm, Regrow, WeightView
from .block_weight import BlockWeight
from .drop_and_grow import balanced_drop_and_grow, drop_and_grow
from .gpu.fast_drop_and_grow import FastUpdate, fast_drop_and_grow, in_groups, on_device, update_numbers
from .optimizers import state_by_block, state_of
from .sparse_weight import SparseWeight


@dataclass(frozen=True, slots=True)
class Pending:
    """What is to be done after the optimiser's step, if it makes one: observe gradients, update masks."""

    step: int
    updates: bool
    """Whether weights are dropped and grown."""
    gradients: dict[str, Tensor]
    """Dense gradients [*shape] by weight name; empty where the algorithm wants none of this step."""
    scores: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Scores of blocks to grow [block rows, block columns] that were made of gradients which are not kept, by weight name."""

    def has(self, w: SparseWeight) -> bool:
        """Whether the step had a gradient of the weight."""
        return w.name in self.gradients or w.name in self.scores


class MaskUpdates:
    """The numbers and scores of every mask update of a run, as functions of the step.

    Raises:
        UsageError: the algorithm needs the length of the run, or that is no positive number.
    """

    def __init__(
        self,
        algorithm: MaskAlgorithm,
        name: str,
        total_steps: int | None,
        seed: int,
        optimizers: tuple[Optimizer, ...],
    ) -> None:
        if total_steps is None and algorithm.moves and algorithm.masked:
            raise UsageError(f"{name} moves masks on a schedule, which needs total_steps")
        if total_steps is not None and total_steps < 1:
            raise UsageError(f"total_steps {total_steps} is not a positive number of steps")
        self.algorithm, self.algorithm_name = algorithm, name
        self.total_steps, self.seed, self.optimizers = total_steps, seed, optimizers
        self.schedule = algorithm.schedule(total_steps)
        self._from_outside = ":" in name
        drops_and_grows = isinstance(algorithm, DropAndGrow)
        self.regrow: Regrow = algorithm.regrow if drops_and_grows else "allow"
        self.grown_state: GrownState = algorithm.grown_state if drops_and_grows else "zero"
        self.balanced = drops_and_grows and algorithm.balanced
        """Whether rows and columns keep their numbers: then no fast update makes the masks."""

    def _start_with(self, weights: list[SparseWeight]) -> None:
        self.weights = weights
        self._states: dict[str, dict[str, Tensor]] = {
            w.name: {name: w.new_state() for name in self.algorithm.state} for w in weights if w.moves
        }
        self._final = {n: k for w in weights for n, k in zip(w.part_names, w.active_in_parts, strict=True)}
        self._start = {n: k for w in weights for n, k in zip(w.part_names, self._initial_blocks(w), strict=True)}

    def state_of(self, w: SparseWeight) -> list[Tensor]:
        """The optimisers' tensors for a weight: [*shape], or [n, ...] for the blocks that it stores."""
        find = state_of if w.stores_zeros else state_by_block
        return [t for optimizer in self.optimizers for t in find(optimizer, w.parameter)]

    def _initial_blocks(self, w: SparseWeight) -> list[int]:
        """The blocks of each part that are active at step 0: of the start density, rounded down, but all planned ones."""
        density = self.algorithm.start_density
        if density is None or not w.moves:
            return w.active_in_parts
        places = [part.numel() for part in w.in_parts(w.active_blocks())]
        sizes = [w.numel] if w.one_part else [n * w.block_size for n in places]
        starts = (min(most, int(density * size / w.block_size)) for most, size in zip(places, sizes, strict=True))
        return [max(active, start) for active, start in zip(w.active_in_parts, starts, strict=True)]

    def _needs_dense_gradient(self, t: int) -> bool:
        """Whether step `t` computes weight gradients at every place."""
        wants = self.algorithm.dense_gradient
        return wants == "every step" or (wants == "at updates" and self.algorithm.updates_at(t, self.schedule))

    def _down(self, t: int) -> dict[SparseWeight, list[int]]:
        """The weights that step `t` computes with fewer non-zeros of, and how many in each part."""
        if self.algorithm.start_density is None:  # only pruning algorithms have a density to come down from
            return {}
        wanted = {w: self._wanted(w, t) for w in self.weights if w.moves}
        return {w: counts for w, counts in wanted.items() if sum(counts) < w.num_active}

    def _wanted(self, w: SparseWeight, t: int) -> list[int]:
        """The active blocks that step `t` computes with, in each part of a weight."""
        return [self.algorithm.nonzeros(t, self._start[n], self._final[n], self.schedule) for n in w.part_names]

    def updated(self, w: SparseWeight, t: int, gradient: Tensor | None, scores: Tensor | None = None) -> Tensor:
        """The active blocks of a weight after the update of step `t`, part by part.

        Args:
            gradient: the dense one [*shape].
            scores: of growth [block rows, block columns], where they were made before.
        """
        view = self.view_of(w, t, gradient)
        drop = self._scores(w, "drop_scores", view)
        grow = self._scores(w, "grow_scores", view) if scores is None else scores
        return self._exchanged(w, t, w.active_blocks(), drop, grow)

    def _exchanged(self, w: SparseWeight, t: int, active: Tensor, drop: Tensor, grow: Tensor) -> Tensor:
        """The blocks that are active after the update of step `t`, from those before it and their scores, all of one shape."""
        _, ties = self.keys_of(w, t)
        for which, scores in (("drop_scores", drop), ("grow_scores", grow)) if self._from_outside else ():
            if bool(scores.isnan().any()):
                raise UsageError(
                    f"{which} of {self.algorithm_name} has NaN for {w.name}", hint="scores must be numbers"
                )
        made = list[Tensor]()
        for part, down, up, n in zip(*map(w.in_parts, (active, drop, grow)), w.active_in_parts, strict=True):
            count = self.algorithm.drops(n, t, self.schedule)
            if self.balanced:
                matrices = map(w.part_to_matrix, (part, down, up))
                mask, down, up = (m.contiguous() for m in matrices)
                new = balanced_drop_and_grow(mask, n, down, up, count, ties, self.regrow, w.groups_of_parts)
                made.append(w.part_from_matrix(new, part))
            else:
                made.append(drop_and_grow(part, n, down, up, count, ties, self.regrow))
        return w.whole(made)

    def fast_update_of(
        self,
        w: SparseWeight,
        gradient: Tensor | None,
        key: int | Tensor,
        numbers: Tensor,
        most: int,
    ) -> FastUpdate:
        """The same for `fast_drop_and_grow`.

        Args:
            gradient: the dense one [*shape].
            key: of random growth; in a CUDA graph an int64 scalar on the device.
            numbers: int64 [NUMBERS], see `update_numbers`.
            most: an upper bound of the blocks that are dropped.
        """
        algorithm, view = self.algorithm, self._view(w, gradient, key)
        by_magnitude = w.single_weights and type(algorithm).drop_scores is MaskAlgorithm.drop_scores
        # magnitudes of active weights alone are far fewer than those of all
        drop = view.weight if by_magnitude else self._scores(w, "drop_scores", view)
        return FastUpdate(
            w.active_blocks(),
            w.num_active,
            drop,
            self._scores(w, "grow_scores", view),
            numbers,
            most,
            self.regrow,
            drop_by=magnitude if by_magnitude else None,
        )

    def _scores(self, w: SparseWeight, which: str, view: WeightView) -> Tensor:
        """Scores of the blocks of a weight, float32, as `SparseWeight.active_blocks` has them."""
        scores = getattr(self.algorithm, which)(view)
        if not isinstance(scores, Tensor) or scores.shape != view.weight.shape:
            found = (
                f"scores of shape {shape_text(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            )
            raise UsageError(
                f"{which} of {self.algorithm_name} gives {found} for {w.name}, a weight of {shape_text(view.weight.shape)}",
                hint="give one score for each weight",
            )
        return w.block_scores(scores.float())

    def view_of(self, w: SparseWeight, t: int, gradient: Tensor | None) -> WeightView:
        """What the algorithm sees of a weight after the optimiser's step `t`; `gradient` is the dense one [*shape]."""
        return self._view(w, gradient, self.keys_of(w, t)[0])

    def _view(self, w: SparseWeight, gradient: Tensor | None, key: int | Tensor) -> WeightView:
        return WeightView(w.dense_weight(), gradient, self._states.get(w.name, {}), key, w.layout)

    def drops(self, w: SparseWeight, t: int) -> int:
        """How many blocks of a weight the update of step `t` drops and grows."""
        return self.algorithm.drops(w.num_active, t, self.schedule)

    def keys_of(self, w: SparseWeight, t: int) -> tuple[int, int]:
        """The keys of step `t`: of random growth, and of the choice between equal scores."""
        return key_of(self.seed, w.name, "grow", t), key_of(self.seed, w.name, "ties", t)

    def _exchanged_on_host(
        self, weights: Sequence[BlockWeight], pending: Pending
    ) -> dict[SparseWeight, tuple[Tensor, Tensor]]:
        """For weights of stored blocks on one GPU: their active blocks [R, C] before and after the update, on the CPU.

        There are few blocks, so choosing among them takes the CPU less time than a GPU needs to begin; scores come in one copy.
        """
        t, by_magnitude = pending.step, type(self.algorithm).drop_scores is MaskAlgorithm.drop_scores
        found = list[Tensor]()
        for w in weights:
            view, grow = partial(self.view_of, w, t, pending.gradients.get(w.name)), pending.scores.get(w.name)
            grow = self._scores(w, "grow_scores", view()) if grow is None else grow
            drop = w.drop_scores_by_magnitude() if by_magnitude else self._scores(w, "drop_scores", view())
            found += [w.active_blocks().float().flatten(), drop.flatten(), grow.flatten()]
        on_host = iter(torch.cat(found).cpu().split([scores.numel() for scores in found]))
        made = dict[SparseWeight, tuple[Tensor, Tensor]]()
        for w in weights:
            grid = w.ever_active.shape
            active, drop, grow = next(on_host).view(grid) > 0, next(on_host), next(on_host).view(grid)
            if by_magnitude:
                drop = torch.zeros(grid).masked_scatter_(active, drop)
            made[w] = active, self._exchanged(w, t, active, drop.view(grid), grow)
        return made

    def _fast_drop_and_grow(self, weights: list[SparseWeight], pending: Pending) -> dict[SparseWeight, Tensor]:
        """The new active blocks of weights on one device, without those that are uncertain."""
        t, regrow = pending.step, self.regrow
        keys, drops = [self.keys_of(w, t) for w in weights], [self.drops(w, t) for w in weights]
        rows = [
            update_numbers(w.num_blocks, w.num_active, n, ties, regrow)
            for w, n, (_, ties) in zip(weights, drops, keys, strict=True)
        ]
        numbers = on_device(rows, weights[0].parameter.device)
        blocks, uncertain = list[Tensor](), list[Tensor]()
        for group in in_groups([w.num_blocks for w in weights]):
            made, flags = fast_drop_and_grow(
                [
                    self.fast_update_of(w, pending.gradients.get(w.name), key, row, most)
                    for w, key, row, most in ((weights[i], keys[i][0], numbers[i], drops[i]) for i in group)
                ]
            )
            blocks += made
            uncertain.append(flags)
        failed = torch.cat(uncertain).tolist()  # the one wait for the device
        return {w: made for w, made, fails in zip(weights, blocks, failed, strict=True) if not fails}


def magnitude(weight: Tensor) -> Tensor:
    """|w| of any shape, in float32."""
    return weight.float().abs()
