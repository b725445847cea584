"""A mask update inside a CUDA graph: RigL and SET at the price of their arithmetic, whatever the number of layers.

An update is well over a hundred small kernels a layer, each of which Python would launch; recorded once, all of them replay
as one. Most are far too small to fill a GPU, so layers go side by side, each on one of a few streams. What differs between
updates (how many weights are exchanged, the keys of random choices) lies in tensors that `feed` fills. Where
`quick_exchange` doubts a mask, the weight keeps its old one until `settle` makes the exact exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .exchange import exchange
from .guard import state_of
from .quick_exchange import quick_exchange
from .sparsifier import Sparsifier

STREAMS = 8  # layers whose exchanges run side by side; each stream has memory of its own for what they compute


class GraphedUpdate:
    """The update of a `Sparsifier` whose numbers of non-zeros stay as they are.

    Recording:  `keep_gradients()`, mask them, the optimiser's step, `exchange(found_inf)`.
    Each time:  `feed()`, replay, `settle()`.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self._weights = [w for w in sparsifier.weights if w.moves and w.active < w.places]
        settings, schedule = sparsifier.settings, sparsifier.settings.schedule
        updates = [
            t for t in range(schedule.delta_t, schedule.steps or 0, schedule.delta_t) if settings.exchanges_at(t)
        ]
        self._moves = [any(settings.drops(w.active, t) for t in updates) for w in self._weights]
        device = sparsifier.weights[0].parameter.device
        self._host = torch.zeros(3, len(self._weights), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._numbers = torch.zeros(3, len(self._weights), dtype=torch.int64, device=device)
        self._gradients: dict[int, Tensor] = {}
        self._moving: list[int] = []
        self._told = torch.zeros(0, dtype=torch.int64, device=device)  # doubts of `_moving`, then what became active
        self._step = 0

    @staticmethod
    def fits(sparsifier: Sparsifier) -> bool:
        """Does the algorithm move masks and keep their numbers of non-zeros?"""
        return sparsifier.settings.algorithm.exchanges and sparsifier.settings.algorithm.start is None

    # --- recorded ---

    @torch.no_grad()
    def keep_gradients(self) -> None:
        """Copy the dense gradients that the exchange looks at, before they are masked."""
        if self._sparsifier.settings.algorithm.uses_gradient:
            held = ((i, w.parameter.grad) for i, w in enumerate(self._weights))
            self._gradients = {i: grad.clone() for i, grad in held if grad is not None}

    @torch.no_grad()
    def exchange(self, found_inf: Tensor) -> None:
        """Exchange weights in every mask; none where `found_inf`, the optimiser's flag, is set."""
        doubts, churned = list[Tensor](), list[Tensor]()
        self._moving = [i for i, moves in enumerate(self._moves) if moves and not self._blind(i)]
        with branches(self._numbers.device) as branch:
            for k, i in enumerate(self._moving):
                with branch(k):
                    doubt, made = self._exchange_one(i, found_inf)
                doubts.append(doubt)
                churned.append(made)
        if doubts:
            self._told = torch.stack([*doubts, *churned])

    def _exchange_one(self, i: int, found_inf: Tensor) -> tuple[Tensor, Tensor]:
        """The doubt about a weight's new mask, and how many weights became active."""
        w, (n, grows, ties) = self._weights[i], self._numbers[:, i].unbind()
        facts = self._sparsifier.chosen_by(w, self._gradient(i), grows)
        cells, doubt = quick_exchange(*facts, n, ties, self._sparsifier.settings.regrow)
        sure = (doubt == 0) & (found_inf == 0)
        w.become(torch.where(sure, cells, facts[0]), state_of(self._sparsifier.optimizer, w.parameter), nnz=w.nnz)
        return doubt, torch.as_tensor(w.churned_now)

    # --- around a replay ---

    def feed(self) -> None:
        """Put what is particular to the step that comes where the graph reads it."""
        sparsifier, self._step = self._sparsifier, self._sparsifier.steps
        for i, w in enumerate(self._weights):
            self._host[0, i] = sparsifier.settings.drops(w.active, self._step)
            self._host[1, i], self._host[2, i] = sparsifier.keys_of(w, self._step)
        self._numbers.copy_(self._host, non_blocking=True)

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for the device once, make the exchanges it doubted, and count the step."""
        sparsifier, told, count = self._sparsifier, self._told.tolist(), len(self._moving)
        for i, doubt, churned in zip(self._moving, told[:count], told[count:], strict=True):
            w = self._weights[i]
            if doubt:
                cells = exchange(*sparsifier.exchange_of(w, self._step, self._gradient(i)))
                w.become(cells, state_of(sparsifier.optimizer, w.parameter), nnz=w.nnz)
            else:
                w.churned_now = churned
        sparsifier.count_step(dense_gradients=sparsifier.settings.algorithm.uses_gradient)

    def _blind(self, i: int) -> bool:
        """A layer without a part in this step has no gradient to grow by."""
        return self._sparsifier.settings.algorithm.uses_gradient and i not in self._gradients

    def _gradient(self, i: int) -> Tensor | None:
        return self._gradients.get(i)


@contextmanager
def branches(device: torch.device) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
    """Gives `branch`: work under `branch(k)` goes to the k-th of a few streams. Leaving the block waits for all of them."""
    if device.type != "cuda":
        yield lambda _: nullcontext()
        return
    here = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]
    for stream in streams:
        stream.wait_stream(here)
    try:
        yield lambda k: torch.cuda.stream(streams[k % STREAMS])
    finally:  # a recording that fails must end with no stream left open, or its own error would hide the reason
        for stream in streams:
            here.wait_stream(stream)
