"""Read a learning curve at a budget: what a run had reached when so many FLOPs, or seconds, were used."""

from __future__ import annotations

from dataclasses import dataclass

from .budgets import BudgetName
from .read import Run, number


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """An evaluation: the metric, how much of the budget was used, and which share of the run's steps was made."""

    value: float
    used: float
    progress: float


def read_curve(run: Run, metric: str, budget: BudgetName, limit: float) -> CurvePoint | None:
    """The last evaluation of `metric` at which the run had used no more than `limit`; nothing is interpolated.

    None where it had not been evaluated by then, or its lines do not say what it had used.
    """
    found: CurvePoint | None = None
    last = run.last.get("step") or 0
    for line in run.metrics:
        value, used = number(line.get(metric)), number(line.get(budget))
        if value is not None and used is not None and used <= limit:
            found = CurvePoint(value, used, line["step"] / last if last else 1.0)
    return found
