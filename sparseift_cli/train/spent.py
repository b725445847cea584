"""FLOPs that a run has really spent: what each step computed with, added up in exact integers.

The audit says beforehand what a run will cost; this adds up what happened, from the non-zeros of every step and the steps
that needed dense weight gradients. For static, SET and RigL both are equal to the FLOP at the end of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..layer_plan import LayerPlan
from ..sparsity.sparsifier import StepRecord
from ..training_cost import step_cost
from ..transforms.edits import Masked


@dataclass(frozen=True, slots=True)
class _Price:
    """MACs of one step of one sample, per non-zero of a weight, and of its weight gradient alone."""

    weights: int
    step: Fraction
    gradient: Fraction


class Spent:
    """Adds up a run. `total` counts FLOPs of the whole global batch, forward, backward and mask updates."""

    def __init__(
        self, layers: Sequence[LayerPlan], masked: Sequence[Masked], batch_size: int, *, recompute: bool
    ) -> None:
        self.batch_size = batch_size
        self.macs = Fraction(0)
        self._prices: dict[str, _Price] = {}
        self._fixed = Fraction(0)
        self._known: tuple[Any, bool, Fraction] | None = None  # the last step's: most are like the one before
        by_part = {(m.layer, m.part): m.key for m in masked}
        for row in layers:
            cost = step_cost(row, row.macs, recompute=recompute)
            if row.status != "transformed":
                self._fixed += cost.total
                continue
            for part in row.parts:
                share = Fraction(part.nnz, row.nnz)
                key = by_part.get((row.layer.name, part.name))
                grad_input = _grad_input(row, part.name, cost.grad_input, share)
                whole = cost.forward * share + grad_input + cost.grad_weight * share
                if key is None:
                    self._fixed += whole
                else:
                    gradient = cost.grad_weight * share / part.nnz
                    self._prices[key] = _Price(part.shape.weights, Fraction(whole) / part.nnz, Fraction(gradient))

    def add(self, record: StepRecord | None) -> None:
        """One optimiser step; without a record (a dense model) all of it is fixed."""
        nnz, dense_gradients = (record.nnz, record.dense_gradients) if record is not None else (None, False)
        if self._known is None or self._known[0] is not nnz or self._known[1] != dense_gradients:
            self._known = nnz, dense_gradients, self.batch_size * self._of(record)
        self.macs += self._known[2]

    def _of(self, record: StepRecord | None) -> Fraction:
        total = self._fixed
        if record is not None:
            for key, price in self._prices.items():
                nnz = record.nnz[key]
                total += price.step * nnz
                if record.dense_gradients:
                    total += price.gradient * (price.weights - nnz)
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


def _grad_input(row: LayerPlan, part: str, grad_input: Fraction | int, share: Fraction) -> Fraction:
    """A part's share of a layer's input gradients: all of it V's where the layer itself reads a frozen input."""
    if row.layer.grad_inputs or not grad_input:
        return Fraction(grad_input) * share
    return Fraction(grad_input) if part == "V" else Fraction(0)
