"""A mask update inside a CUDA graph: RigL and SET at the price of their arithmetic, whatever the number of layers.

An update is a hundred small kernels a layer, each of which Python would launch; recorded once, all of them replay as one.
What differs between updates (how many weights are exchanged, the keys of random choices) lies in a tensor that `feed` fills.
Where `quick_exchange` doubts a mask, the weight keeps its old one until `settle` makes the exact exchange.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..drop_and_grow import exchange
from ..guard import state_of
from ..sparsifier import Sparsifier
from .fast_exchange import NUMBERS, Exchange, exchange_numbers, in_groups, quick_exchange
from .streams import branches
from .words import as_words


class GraphedUpdate:
    """The update of a `Sparsifier` whose numbers of non-zeros stay as they are.

    Recording:  `mask_gradients(whole)`, the optimiser's step, `exchange(found_inf)`.
    Each time:  `feed()`, replay, `settle()`.

    A weight that becomes infinite in the very step of an update is told by the loss of the next one.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self._weights = [w for w in sparsifier.weights if w.moves and w.active < w.places]
        first, schedule = sparsifier.schedule.delta_t, sparsifier.schedule
        updates = sparsifier.algorithm.updates_at(first, schedule)  # the largest update: every decay falls, or stays
        self._most = [sparsifier.drops(w, first) if updates else 0 for w in self._weights]
        device = sparsifier.weights[0].parameter.device
        shape = len(self._weights), NUMBERS + 1  # of each: `exchange_numbers`, and the key of random growth
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._numbers = torch.zeros(shape, dtype=torch.int64, device=device)
        self._gradients: dict[int, Tensor] = {}
        self._moving: list[int] = []
        self._told = torch.zeros(0, dtype=torch.int64, device=device)
        """The optimiser's flag, the doubts of `_moving`, and how many weights became active in each."""
        self._step = 0

    @staticmethod
    def fits(sparsifier: Sparsifier) -> bool:
        """Whether the algorithm drops and grows at constant numbers of non-zeros, and has nothing to do at other steps.

        One that observes every step (SNFS) does so operation by operation: `GraphedStep` replays forward and backward pass and
        leaves the rest of each step to `Sparsifier.step`, as it does where GMP and GraNet thin masks out.
        """
        algorithm = sparsifier.algorithm
        steady = algorithm.start_density is None and not algorithm.state and algorithm.dense_gradient != "every step"
        return algorithm.drops_and_grows and steady

    # --- recorded ---

    @torch.no_grad()
    def mask_gradients(self, *, whole: bool) -> None:
        """Mask what the optimiser will see, and keep the dense gradients that the exchange looks at.

        `whole`: where a mask moves, let the optimiser see the dense gradient. It treats every weight by itself, and the
        exchange puts to zero whatever was moved outside of the old mask or the new one: no copy is needed, and no product.
        Clipping would see it too, in the norm.
        """
        uses = self._sparsifier.algorithm.dense_gradient != "never"
        dense = {i: w.parameter.grad for i, w in enumerate(self._weights) if w.parameter.grad is not None}
        # a layer without a part in this step has no gradient to grow by
        self._moving = [i for i, most in enumerate(self._most) if most and (i in dense or not uses)]
        self._gradients = {i: g if whole else g.clone() for i, g in dense.items()} if uses else {}
        self._sparsifier.mask_gradients(but={self._weights[i] for i in self._moving} if whole else ())

    @torch.no_grad()
    def exchange(self, found_inf: Tensor) -> None:
        """Exchange weights in every mask; none where `found_inf`, the optimiser's flag, is set."""
        if not self._moving:
            return
        told = [
            self._exchange_group(self._moving[group.start : group.stop], found_inf)
            for group in in_groups([self._weights[i].places for i in self._moving])
        ]
        self._told = torch.cat(
            [found_inf.to(torch.int64).view(1), *(doubts for doubts, _ in told), *(c for _, c in told)]
        )

    def _exchange_group(self, group: list[int], found_inf: Tensor) -> tuple[Tensor, Tensor]:
        """The doubts about these weights' new masks, and how many weights became active in each: int64 [len(group)] both."""
        sparsifier, device = self._sparsifier, self._numbers.device
        wanted, churned = list[Exchange](), list[Tensor]()
        with branches(device) as branch:
            for k, i in enumerate(group):
                with branch(k):
                    own = self._numbers[i]
                    wanted.append(
                        sparsifier.quick_exchange_of(
                            self._weights[i], self._gradient(i), own[NUMBERS], own[:NUMBERS], self._most[i]
                        )
                    )
        cells, doubts = quick_exchange(wanted)
        sure = (doubts == 0) & (found_inf == 0)
        with branches(device) as branch:
            for k, i in enumerate(group):
                w = self._weights[i]
                before = w.churned_now
                with branch(k):
                    new, old = as_words(cells[k], wanted[k].mask)
                    torch.where(sure[k], new, old, out=new)
                    w.become(cells[k], state_of(sparsifier.optimizer, w.parameter), nnz=w.nnz)
                churned.append(torch.as_tensor(w.churned_now))
                w.churned_now = before  # a recording computes nothing: `settle` brings the number
        return doubts, torch.stack(churned)

    # --- around a replay ---

    def feed(self) -> None:
        """Put what is particular to the step that comes where the graph reads it; `settle` was called after the step before."""
        sparsifier, self._step = self._sparsifier, self._sparsifier.steps
        for i, w in enumerate(self._weights):
            grows, ties = sparsifier.keys_of(w, self._step)
            numbers = exchange_numbers(w.places, w.active, sparsifier.drops(w, self._step), ties, sparsifier.regrow)
            self._host[i] = torch.tensor([*numbers, grows])
        self._numbers.copy_(self._host, non_blocking=True)

    @torch.no_grad()
    def settle(self) -> bool:
        """Wait for the device once, make the exchanges it doubted, and count the step.

        False where the optimiser's flag was set: then nothing has moved, and the step is not counted.
        """
        sparsifier, count = self._sparsifier, len(self._moving)
        if self._moving:
            flag, *told = self._told.tolist()
            if flag:
                return False
            for i, doubt, churned in zip(self._moving, told[:count], told[count:], strict=True):
                w = self._weights[i]
                if doubt:
                    cells = exchange(*sparsifier.exchange_of(w, self._step, self._gradient(i)))
                    w.become(cells, state_of(sparsifier.optimizer, w.parameter), nnz=w.nnz)
                else:
                    w.churned_now = churned
        sparsifier.count_step(dense_gradients=sparsifier.algorithm.dense_gradient != "never")
        return True

    def _gradient(self, i: int) -> Tensor | None:
        return self._gradients.get(i)
