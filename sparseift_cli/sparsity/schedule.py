"""When masks change, and by how much: pure functions of the step, and what a step costs. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, cos, floor, pi
from typing import Literal, get_args

Decay = Literal["cosine", "constant", "linear", "inverse_power"]
DECAYS: tuple[Decay, ...] = get_args(Decay)

_POWER = 3  # of the inverse power, as the RigL paper has it beside the cosine
_ROUNDING = 1e-9  # 0.29 * 100 is 28.999... in floats, and should drop 29


@dataclass(frozen=True, slots=True)
class StepCost:
    """MACs of one training step of a set of layers: the forward pass, input gradients (dX) and weight gradients (dW)."""

    forward: Fraction | int = 0
    grad_input: Fraction | int = 0
    grad_weight: Fraction | int = 0

    @property
    def total(self) -> Fraction | int:
        return self.forward + self.grad_input + self.grad_weight

    def times(self, n: Fraction | int) -> StepCost:
        """Of `n` such sets."""
        return StepCost(n * self.forward, n * self.grad_input, n * self.grad_weight)


@dataclass(frozen=True, slots=True)
class UpdateSchedule:
    """When masks change: every `delta_t` steps, 0 < t < stop * steps. Without `steps` the long-run limit is meant."""

    delta_t: int = 100
    stop: Fraction = Fraction(3, 4)
    steps: int | None = None

    @property
    def end(self) -> int:
        """The first step at which masks no longer change."""
        return ceil(self.stop * (self.steps or 0))

    @property
    def updates(self) -> int | None:
        """#{t : 0 < t < stop * steps, delta_t | t}; step 0 never updates. None without `steps`."""
        return None if self.steps is None else max(0, self.end - 1) // self.delta_t

    @property
    def update_rate(self) -> Fraction:
        """Mask updates per training step over the whole run."""
        if self.steps is None or self.updates is None:
            return self.stop / self.delta_t
        return Fraction(self.updates, self.steps)

    def remaining(self) -> Fraction:
        """Mean over the run of (1 - progress)^3, the part of the pruning still to come (Zhu & Gupta 2017, eq. 1).

        Progress moves every `delta_t` steps; its mean over a long run is stop / 4.
        """
        return self.stop / 4 if self.steps is None else _remaining(self.delta_t, self.end) / self.steps

    def remaining_at_updates(self) -> Fraction:
        """Sum over the mask updates, per training step, of (1 - progress)^3 at each: their steps compute with what is left."""
        if self.steps is None:
            return self.update_rate / 4
        return _remaining_at_updates(self.delta_t, self.end) / self.steps


@lru_cache(maxsize=64)  # one schedule serves every layer and density that is tried
def _remaining(delta_t: int, end: int) -> Fraction:
    over_steps = sum((min(t + delta_t, end) - t) * (end - t) ** 3 for t in range(0, end, delta_t))
    return Fraction(over_steps, end**3) if end else Fraction(0)


@lru_cache(maxsize=64)
def _remaining_at_updates(delta_t: int, end: int) -> Fraction:
    return Fraction(sum((end - t) ** 3 for t in range(delta_t, end, delta_t)), end**3) if end else Fraction(0)


def nonzeros_at(step: int, start: int, final: int, schedule: UpdateSchedule) -> int:
    """The non-zeros (or blocks) that step `step` computes with, on the cubic way from `start` down to `final`.

    final + floor((start - final) (1 - progress)^3), Zhu & Gupta 2017 ("To prune, or not to prune", eq. 1). Progress moves
    every `delta_t` steps, from 0 at step 0, and is 1 from `schedule.end` on; steps between have the number of the last
    multiple of `delta_t`. Integers throughout, so the number is exact: never above the formula's, within one of it.
    """
    end = schedule.end
    if step >= end or start <= final:
        return final
    left = end - step // schedule.delta_t * schedule.delta_t
    return final + (start - final) * left**3 // end**3


@lru_cache(maxsize=4096)  # layers and branches of one size have the same
def nonzeros_over_run(start: int, final: int, schedule: UpdateSchedule) -> tuple[int, int]:
    """`nonzeros_at` summed over all steps of a run, and over those with a mask update."""
    end, over_steps, over_updates = schedule.end, 0, 0
    for t in range(0, end, schedule.delta_t):
        n = nonzeros_at(t, start, final, schedule)
        over_steps += (min(t + schedule.delta_t, end) - t) * n
        over_updates += n if t else 0
    return over_steps + ((schedule.steps or 0) - end) * final, over_updates


def updates_at(schedule: UpdateSchedule, step: int) -> bool:
    """Whether masks change at step `step` (from 0): at 0 < t < stop * steps, delta_t | t."""
    return 0 < step < schedule.end and step % schedule.delta_t == 0


def drop_fraction(decay: Decay, initial: float, step: int, schedule: UpdateSchedule) -> float:
    """The part of the active weights that the update of step `step` drops and grows.

    With x = step / (stop * steps): cosine initial/2 (1 + cos(pi x)), constant, linear initial (1 - x), inverse_power
    initial (1 - x)^3. Source: Evci et al. 2020, "Rigging the Lottery", section 3(2) and appendix G.
    """
    progress = min(1.0, step / float(schedule.stop * (schedule.steps or 0)))
    if decay == "cosine":
        return initial / 2 * (1 + cos(pi * progress))
    if decay == "linear":
        return initial * (1 - progress)
    if decay == "inverse_power":
        return initial * (1 - progress) ** _POWER
    return initial


def drops(active: int, fraction: float) -> int:
    """How many of `active` weights (or blocks) are dropped and grown: floor(fraction * active), as in RigL's code."""
    return min(active, floor(fraction * active + _ROUNDING))


def never_moves(algorithm: str, schedule: UpdateSchedule) -> str:
    """What to say of a run without a mask update."""
    return (
        f"{algorithm} moves no mask in this run: the first update would be that of step {schedule.delta_t}, and updates end "
        f"before step {schedule.end} of {schedule.steps}; lower delta_t"
    )
