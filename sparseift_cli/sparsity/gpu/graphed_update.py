"""A mask update inside a CUDA graph: RigL and SET cost what their arithmetic costs, however many layers there are.

An update is about a hundred small kernels a layer. Launched from Python one by one they take longer than the training step;
recorded once, they replay as one. What differs between updates (how many weights are dropped, the keys of random choices) is
in a tensor that `load_numbers` fills. Where `fast_drop_and_grow` is uncertain of a mask, the weight keeps its old one until
`finish` makes the exact one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparsifier import Sparsifier
from .fast_drop_and_grow import NUMBERS, FastUpdate, fast_drop_and_grow, in_groups, update_numbers
from .primitives import as_words, branches


class GraphedUpdate:
    """The update of a `Sparsifier` whose numbers of non-zeros do not change.

    Recording:   `mask_gradients(whole)`, the optimiser's step, `drop_and_grow(found_inf)`.
    Every time:  `load_numbers()`, replay, `finish()`.

    A weight that becomes infinite in the very step of an update is not noticed here, but by the loss of the next step.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self._weights = [w for w in sparsifier.weights if w.moves and w.num_active < w.num_blocks]
        first, schedule = sparsifier.schedule.delta_t, sparsifier.schedule
        updates = sparsifier.algorithm.updates_at(first, schedule)  # the largest update: every decay falls, or stays
        self._most = [sparsifier.drops(w, first) if updates else 0 for w in self._weights]
        device = sparsifier.weights[0].parameter.device
        shape = len(self._weights), NUMBERS + 1  # of each: `update_numbers`, and the key of random growth
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._numbers = torch.zeros(shape, dtype=torch.int64, device=device)
        self._gradients: dict[int, Tensor] = {}
        self._moving: list[int] = []
        self._results = torch.zeros(0, dtype=torch.int64, device=device)
        """The optimiser's flag, `uncertain` of each of `_moving`, and how many weights grew in each: read in one wait."""
        self._step = 0

    @staticmethod
    def fits(sparsifier: Sparsifier) -> bool:
        """Whether the algorithm drops and grows at constant numbers of non-zeros, and has nothing to do at other steps.

        Weights in parts are updated part by part, outside of a graph, and weights that are stored compactly one by one. Balanced
        growth goes round by round until all is placed.

        One that observes every step (SNFS) does so operation by operation: `GraphedStep` replays forward and backward pass and
        leaves the rest of each step to `Sparsifier.step`, as it does where GMP and GraNet thin masks out.
        """
        algorithm = sparsifier.algorithm
        steady = algorithm.start_density is None and not algorithm.state and algorithm.dense_gradient != "every step"
        fits = algorithm.drops_and_grows and steady and not sparsifier.balanced
        return fits and all(w.one_part and w.stores_zeros for w in sparsifier.weights)

    # --- recorded ---

    @torch.no_grad()
    def mask_gradients(self, *, whole: bool) -> None:
        """Mask the gradients for the optimiser, and keep the dense ones that weights grow by.

        Args:
            whole: give the optimiser the dense gradient where a mask is updated. It treats every weight by itself, and
                `set_mask` zeroes whatever is not active before and after, so neither a copy nor a product is needed. Not for
                steps that clip: the norm would be that of dense gradients.
        """
        by_gradient = self._sparsifier.algorithm.dense_gradient != "never"
        dense = {i: w.parameter.grad for i, w in enumerate(self._weights) if w.parameter.grad is not None}
        # a layer that took no part in this step has no gradient to grow by
        self._moving = [i for i, most in enumerate(self._most) if most and (i in dense or not by_gradient)]
        self._gradients = {i: g if whole else g.clone() for i, g in dense.items()} if by_gradient else {}
        self._sparsifier.mask_gradients(but={self._weights[i] for i in self._moving} if whole else ())

    @torch.no_grad()
    def drop_and_grow(self, found_inf: Tensor) -> None:
        """Update every mask; none if `found_inf`, the optimiser's flag (a scalar), is set."""
        if not self._moving:
            return
        results = [
            self._update_group(self._moving[group.start : group.stop], found_inf)
            for group in in_groups([self._weights[i].num_blocks for i in self._moving])
        ]
        self._results = torch.cat(
            [
                found_inf.to(torch.int64).view(1),
                *(uncertain for uncertain, _ in results),
                *(grown for _, grown in results),
            ]
        )

    def _update_group(self, group: list[int], found_inf: Tensor) -> tuple[Tensor, Tensor]:
        """`uncertain` of these weights' new masks, and how many weights grew in each: int64 [len(group)] both."""
        sparsifier, device = self._sparsifier, self._numbers.device
        updates, grown = list[FastUpdate](), list[Tensor]()
        with branches(device) as branch:
            for k, i in enumerate(group):
                with branch(k):
                    own = self._numbers[i]
                    updates.append(
                        sparsifier.fast_update_of(
                            self._weights[i], self._gradient(i), own[NUMBERS], own[:NUMBERS], self._most[i]
                        )
                    )
        blocks, uncertain = fast_drop_and_grow(updates)
        accepted = (uncertain == 0) & (found_inf == 0)
        with branches(device) as branch:
            for k, i in enumerate(group):
                w = self._weights[i]
                before = w.num_grown
                with branch(k):
                    new, old = as_words(blocks[k], updates[k].mask)
                    torch.where(accepted[k], new, old, out=new)
                    w.set_mask(blocks[k], sparsifier.state_of(w), nnz=w.nnz, grown_state=sparsifier.grown_state)
                grown.append(torch.as_tensor(w.num_grown))
                w.num_grown = before  # a recording computes nothing: `finish` reads the number
        return uncertain, torch.stack(grown)

    # --- around a replay ---

    def load_numbers(self) -> None:
        """Put what is particular to the next step where the graph reads it; `finish` was called after the step before."""
        sparsifier, self._step = self._sparsifier, self._sparsifier.steps
        for i, w in enumerate(self._weights):
            grows, ties = sparsifier.keys_of(w, self._step)
            numbers = update_numbers(
                w.num_blocks, w.num_active, sparsifier.drops(w, self._step), ties, sparsifier.regrow
            )
            self._host[i] = torch.tensor([*numbers, grows])
        self._numbers.copy_(self._host, non_blocking=True)

    @torch.no_grad()
    def finish(self) -> bool:
        """Wait for the device once, make the masks that were uncertain, and count the step.

        False if the optimiser's flag was set: then no mask has changed, and the step is not counted.
        """
        sparsifier, count = self._sparsifier, len(self._moving)
        if self._moving:
            flag, *results = self._results.tolist()
            if flag:
                return False
            for i, uncertain, grown in zip(self._moving, results[:count], results[count:], strict=True):
                w = self._weights[i]
                if uncertain:
                    blocks = sparsifier.updated(w, self._step, self._gradient(i))
                    w.set_mask(blocks, sparsifier.state_of(w), nnz=w.nnz, grown_state=sparsifier.grown_state)
                else:
                    w.num_grown = grown
        sparsifier.count_step(dense_gradients=sparsifier.algorithm.dense_gradient != "never")
        return True

    def _gradient(self, i: int) -> Tensor | None:
        return self._gradients.get(i)
