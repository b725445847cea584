"""Schedules of the learning rate: a dataclass of options with a method `rates` each. No torch.

One from outside is such a class, under a name (`SCHEDULES.register`, an entry point `sparseift.schedules`) or as
`package.module:Name` in a recipe's schedule.name:

    @dataclass(frozen=True)
    class InverseRoot:
        warmup: Annotated[Duration, Option("The learning rate rises linearly from 0 over this time.")] = "1%"

        def rates(self, peak, steps, in_steps):
            first = max(1, in_steps(self.warmup))
            return lambda step: peak * math.sqrt(first / max(first, step))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Protocol

from ..base.durations import Duration
from ..base.options import Option
from ..base.registry import Registry

Rates = Callable[[int], float]
"""The learning rate of a step, counted from 0."""
InSteps = Callable[[float | str], int]
"""A duration (`2 epochs`, `10%`, a number) in optimiser steps of the run."""
_WARMUP = "The learning rate rises linearly from 0 over this time."
_FINAL = "Learning rate at the end."


class ScheduleOptions(Protocol):
    """What a class in `SCHEDULES` is: a dataclass whose fields have an `Option`; a field `warmup` is applied for it."""

    def rates(self, peak: float, steps: int, in_steps: InSteps) -> Rates:
        """The learning rate of every step from the end of the warm-up to the end of a run of `steps`."""
        ...


@dataclass(frozen=True)
class Constant:
    """The peak, from the end of the warm-up on."""

    warmup: Annotated[Duration, Option(_WARMUP)] = 0.0

    def rates(self, peak: float, steps: int, in_steps: InSteps) -> Rates:
        return lambda step: peak


@dataclass(frozen=True)
class MultiStep:
    """The peak times gamma at each milestone."""

    warmup: Annotated[Duration, Option(_WARMUP)] = 0.0
    milestones: Annotated[tuple[Duration, ...], Option("When the learning rate drops.")] = ("30%", "60%", "80%")
    gamma: Annotated[float, Option("What each milestone multiplies it by.", above=0)] = 0.1

    def rates(self, peak: float, steps: int, in_steps: InSteps) -> Rates:
        milestones = [in_steps(milestone) for milestone in self.milestones]
        return lambda step: peak * self.gamma ** sum(step >= milestone for milestone in milestones)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak to `final_lr`, from the end of the warm-up to the end of the run."""

    warmup: Annotated[Duration, Option(_WARMUP)] = 0.0
    final_lr: Annotated[float, Option(_FINAL, minimum=0)] = 0.0

    def rates(self, peak: float, steps: int, in_steps: InSteps) -> Rates:
        warmup, last = in_steps(self.warmup), self.final_lr
        return lambda step: last + (peak - last) * (1 + math.cos(math.pi * _progress(step, warmup, steps))) / 2


@dataclass(frozen=True)
class Linear:
    """A straight line from the peak to `final_lr`, from the end of the warm-up to the end of the run."""

    warmup: Annotated[Duration, Option(_WARMUP)] = 0.0
    final_lr: Annotated[float, Option(_FINAL, minimum=0)] = 0.0

    def rates(self, peak: float, steps: int, in_steps: InSteps) -> Rates:
        warmup, last = in_steps(self.warmup), self.final_lr
        return lambda step: peak + (last - peak) * _progress(step, warmup, steps)


def _progress(step: int, warmup: int, steps: int) -> float:
    """How much of the time after the warm-up has passed at `step`, 0 to 1."""
    return (step - warmup) / max(1, steps - warmup)


def _not_a_schedule(entry: object) -> str | None:
    if isinstance(entry, type) and is_dataclass(entry) and callable(getattr(entry, "rates", None)):
        return None
    return "it is no dataclass with a method rates(peak, steps, in_steps)"


SHIPPED: dict[str, type[ScheduleOptions]] = {
    "constant": Constant,
    "multistep": MultiStep,
    "cosine": Cosine,
    "linear": Linear,
}
SCHEDULES: Registry[type[ScheduleOptions]] = Registry("schedule", "schedules", SHIPPED, check=_not_a_schedule)
"""Every schedule of the learning rate by name."""


def learning_rates(chosen: ScheduleOptions, peak: float, steps: int, in_steps: InSteps) -> Rates:
    """The learning rate of every step of a run: a linear warm-up to `peak`, then the schedule.

    >>> rate = learning_rates(Linear(warmup=2), peak=0.1, steps=6, in_steps=int)
    >>> [round(rate(step), 3) for step in range(6)]
    [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]
    """
    warmup, after = in_steps(getattr(chosen, "warmup", 0)), chosen.rates(peak, steps, in_steps)
    return lambda step: peak * (step + 1) / warmup if step < warmup else after(step)
