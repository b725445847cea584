"""The FLOPs of a run as it happened: those of every step, from the non-zeros it had, added up in exact integers.

The audit says beforehand what a run will cost; this adds up what happened, from the non-zeros of every step and the steps
that needed dense weight gradients. Both are equal to the FLOP at the end of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ..plan.layer_plan import LayerPlan
from ..plan.training_cost import costs_by_part, step_cost
from ..sparsity.schedule import StepCost
from ..sparsity.sparsifier import StepRecord
from ..transforms.edits import Masked


class FlopMeter:
    """Adds up a run. `total` counts FLOPs of the whole global batch, forward, backward and mask updates."""

    def __init__(
        self, layers: Sequence[LayerPlan], masked: Sequence[Masked], batch_size: int, *, recompute: bool
    ) -> None:
        self.batch_size = batch_size
        self.macs = Fraction(0)
        self._costs: list[
            tuple[list[str], StepCost, int]
        ] = []  # names of the weights, their cost, and how many they are
        self._fixed = Fraction(0)
        self._known: tuple[Any, bool, Fraction] | None = None  # the last step's: most are like the one before
        names: dict[tuple[str, str], list[str]] = {}
        for m in masked:
            names.setdefault((m.layer, m.part), []).append(m.name)
        for row in layers:
            if row.status != "transformed":
                self._fixed += step_cost(row, recompute=recompute).total
                continue
            fixed, found = costs_by_part(row, recompute=recompute)
            self._fixed += fixed
            weights = {part.name: part.shape.weights for part in row.parts}
            self._costs += [(names[row.layer.name, part], cost, weights[part]) for part, cost in found.items()]

    def add(self, record: StepRecord | None) -> None:
        """One optimiser step; without a record (a dense model) all of it is fixed."""
        nnz, dense_gradients = (record.nnz, record.dense_gradients) if record is not None else (None, False)
        if self._known is None or self._known[0] is not nnz or self._known[1] != dense_gradients:
            self._known = nnz, dense_gradients, self.batch_size * self._of(record)
        self.macs += self._known[2]

    def _of(self, record: StepRecord | None) -> Fraction:
        total = self._fixed
        if record is not None:
            for names, cost, weights in self._costs:
                nnz = sum(record.nnz[name] for name in names)
                total += cost.total * nnz
                if record.dense_gradients:
                    total += cost.grad_weight * (weights - nnz)
        return total

    @property
    def total(self) -> int:
        """FLOPs so far, to the nearest whole one."""
        return round(2 * self.macs)

    def state(self) -> str:
        """For a checkpoint."""
        return str(self.macs)

    def restore(self, state: str) -> None:
        """From a checkpoint."""
        self.macs = Fraction(state)
