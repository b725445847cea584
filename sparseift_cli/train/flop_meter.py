"""The FLOPs of a run as it happened: those of every step, from the non-zeros it had, added up in exact integers.

The audit says beforehand what a run will cost; this adds up what happened, from the non-zeros of every step and the steps
that needed dense weight gradients. Both are equal to the FLOP at the end of a run. What the device executes is added up beside
it: masked dense layers multiply by their zeros, layers of stored blocks do not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..plan.layer_plan import LayerPlan
from ..plan.training_cost import costs_by_part, step_cost
from ..sparsity.schedule import StepCost
from ..sparsity.sparsifier import StepRecord
from ..transforms.edits import Masked


@dataclass(frozen=True, slots=True)
class _Cost:
    """A part of a layer: names of its weights, their cost in a step for one non-zero, how many they are, and whether stored
    in blocks.
    """

    names: list[str]
    step: StepCost
    weights: int
    compact: bool


class FlopMeter:
    """Adds up a run. `total` counts FLOPs of the whole global batch, forward, backward and mask updates.

    Args:
        layers: rows of the plan, or of the dense model.
        masked: every sparse weight of the model.
        batch_size: samples of a step.
        recompute: whether blocks are computed again in the backward pass.
        compact: names of the parameters of which kernels compute the stored blocks alone.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlan],
        masked: Sequence[Masked],
        batch_size: int,
        *,
        recompute: bool,
        compact: Collection[str] = (),
    ) -> None:
        self.batch_size = batch_size
        self.macs = self.executed_macs = Fraction(0)
        self._costs: list[_Cost] = []
        self._fixed = Fraction(0)
        self._known: tuple[Any, bool, Fraction, Fraction] | None = None  # the last step's: most are like the one before
        names: dict[tuple[str, str], list[str]] = {}
        dense: set[tuple[str, str]] = set()
        for m in masked:
            names.setdefault((m.layer, m.part), []).append(m.name)
            if m.key not in compact:
                dense.add((m.layer, m.part))
        for row in layers:
            if row.status != "transformed":
                self._fixed += step_cost(row, recompute=recompute).total
                continue
            fixed, found = costs_by_part(row, recompute=recompute)
            self._fixed += fixed
            weights = {part.name: part.shape.weights for part in row.parts}
            places = [((row.layer.name, part), cost, weights[part]) for part, cost in found.items()]
            self._costs += [_Cost(names[place], cost, count, place not in dense) for place, cost, count in places]

    def add(self, record: StepRecord | None) -> None:
        """One optimiser step; without a record (a dense model) all of it is fixed."""
        nnz, dense_gradients = (record.nnz, record.dense_gradients) if record is not None else (None, False)
        if self._known is None or self._known[0] is not nnz or self._known[1] != dense_gradients:
            useful, executed = self._of(record)
            self._known = nnz, dense_gradients, self.batch_size * useful, self.batch_size * executed
        self.macs += self._known[2]
        self.executed_macs += self._known[3]

    def _of(self, record: StepRecord | None) -> tuple[Fraction, Fraction]:
        """MACs of a step for one sample: those of its non-zeros, and those that are executed."""
        total = executed = self._fixed
        if record is not None:
            for cost in self._costs:
                nnz = sum(record.nnz[name] for name in cost.names)
                useful = cost.step.total * nnz
                if record.dense_gradients:
                    useful += cost.step.grad_weight * (cost.weights - nnz)
                total += useful
                executed += useful if cost.compact else cost.step.total * cost.weights
        return total, executed

    @property
    def total(self) -> int:
        """FLOPs so far, to the nearest whole one."""
        return round(2 * self.macs)

    @property
    def executed(self) -> int:
        """FLOPs that the device executed so far, to the nearest whole one."""
        return round(2 * self.executed_macs)

    def state(self) -> dict[str, str]:
        """For a checkpoint."""
        return {"spent": str(self.macs), "executed": str(self.executed_macs)}

    def restore(self, state: Mapping[str, Any], steps: int) -> None:
        """From a checkpoint after `steps` steps. Older versions had masked dense layers alone, and wrote no `executed`."""
        self.macs = Fraction(state["spent"])
        masked = sum((cost.step.total * Fraction(cost.weights) for cost in self._costs), self._fixed)
        self.executed_macs = Fraction(state["executed"]) if "executed" in state else self.batch_size * steps * masked
