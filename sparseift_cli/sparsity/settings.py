"""What a sparse training run is asked to do with its masks: checked once, compared on resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, get_args

from ..errors import UsageError, one_of
from .algorithms import MaskAlgorithm, algorithm_named
from .drop_and_grow import Regrow
from .schedule import DECAYS, Decay, Schedule, drop_fraction, drops, updates_at


@dataclass(frozen=True)
class Settings:
    """The arguments of `Sparsifier` that decide masks.

    Raises:
        UsageError: a name that does not exist, or a number out of its range.
    """

    algorithm_name: str
    total_steps: int | None = None
    delta_t: int = 100
    stop: float | str | Fraction = "0.75"
    drop_fraction: float = 0.3
    decay: Decay = "cosine"
    regrow: Regrow = "allow"
    seed: int = 0
    algorithm: MaskAlgorithm = field(init=False)
    schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithm", algorithm_named(self.algorithm_name))
        one_of("drop fraction schedule", self.decay, DECAYS)
        one_of("regrow", self.regrow, get_args(Regrow))
        if not 0 <= self.drop_fraction <= 1:
            raise UsageError(f"drop fraction {self.drop_fraction} is not in [0, 1]")
        if self.algorithm_name not in ("dense", "static") and self.total_steps is None:
            raise UsageError(f"{self.algorithm_name} moves masks on a schedule, which needs total_steps")
        if self.delta_t < 1 or (self.total_steps is not None and self.total_steps < 1):
            raise UsageError("the number of steps and the steps between mask updates must be positive")
        share = Fraction(str(self.stop))
        if not 0 <= share <= 1:
            raise UsageError(
                f"stop {self.stop} is not a fraction of the run", hint="0.75 ends mask updates at 75 % of the steps"
            )
        object.__setattr__(self, "schedule", Schedule(self.delta_t, share, self.total_steps))

    @property
    def moves(self) -> bool:
        """Can any mask differ from the attached one?"""
        return self.algorithm.exchanges or self.algorithm.start is not None

    def exchanges_at(self, step: int) -> bool:
        """Are weights exchanged after step `step`?"""
        return self.algorithm.exchanges and updates_at(self.schedule, step)

    def drops(self, active: int, step: int) -> int:
        """How many of `active` weights (or blocks) step `step` exchanges."""
        return drops(active, drop_fraction(self.decay, self.drop_fraction, step, self.schedule))

    def nonzeros(self, step: int, start: int, final: int) -> int:
        """The non-zeros (or blocks) that step `step` computes with."""
        return self.algorithm.nonzeros(step, start, final, self.schedule)

    def to_json(self) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm_name,
            "delta_t": self.delta_t,
            "stop": str(self.schedule.stop),
            "total_steps": self.total_steps,
            "drop_fraction": self.drop_fraction,
            "schedule": self.decay,
            "regrow": self.regrow,
            "seed": self.seed,
        }
