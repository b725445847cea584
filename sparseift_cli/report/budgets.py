"""The two budgets at which groups are compared: training FLOPs, as audited, and wall time, as measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

BudgetName = Literal["flops", "seconds"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What two groups must have used equally much of, and what it is called.

    `name` is also its column in rows of runs and groups, and its key in a line of metrics.
    """

    name: BudgetName
    title: str
    """In a sentence: `at 1.0000x training FLOPs`."""
    short: str
    """In a heading: `at equal FLOPs`."""
    axis: str
    """In a picture's title: `by FLOPs`."""
    limit: str
    """What the baseline's is called in a picture: `dense budget`."""
    tolerance: float
    """The largest distance of the ratio from 1 at which two budgets count as equal, where no other is given."""
    hint: str
    """How an unequal comparison can be made all the same."""

    def amounts(self, here: Any, there: Any) -> str:
        """Of two groups, for people: every digit of FLOPs, which are exact; seconds to a tenth."""
        if self.name == "flops":
            texts = ["an unknown number of" if v is None else f"{v:,}" for v in (here, there)]
            return f"{texts[0]} against {texts[1]} {self.title}"
        texts = ["unknown" if v is None else f"{v:,.1f}" for v in (here, there)]
        return f"{texts[0]} against {texts[1]} s of {self.title}"

    def reached(self, value: float) -> str:
        """A point on the axis of a learning curve: `331.0 s`, `4.278e+11 FLOPs`."""
        return f"{value:.4g} FLOPs" if self.name == "flops" else f"{value:,.1f} s"


FLOPS = Budget(
    "flops",
    "training FLOPs",
    "FLOPs",
    "FLOPs",
    "budget",
    1e-3,
    "--allow-unequal-flops compares them anyway; --flops-tolerance 2% allows larger differences",
)
SECONDS = Budget(
    "seconds", "wall time", "time", "wall time", "time", 0.02, "--time-tolerance 5% allows larger differences"
)
"""Two per cent: what repetitions of one run differ by on one device."""
BUDGETS: dict[BudgetName, Budget] = {"flops": FLOPS, "seconds": SECONDS}
