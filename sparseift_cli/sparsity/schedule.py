"""When masks change, and by how much. Pure functions of the step; no torch.

`isoflop.Schedule` says at which steps: every `delta_t` of them, 0 < t < stop * steps. `end` is the first step at which
nothing changes any more. How many non-zeros a pruned weight has at a step: `isoflop.nonzeros_at`.
"""

from __future__ import annotations

from math import cos, floor, pi
from typing import Literal, get_args

from ..isoflop import Schedule

Decay = Literal["cosine", "constant", "linear", "inverse_power"]
DECAYS: tuple[Decay, ...] = get_args(Decay)

_POWER = 3  # of the inverse power, as the RigL paper has it beside the cosine
_ROUNDING = 1e-9  # 0.29 * 100 is 28.999... in floats and 29 to everybody else


def updates_at(schedule: Schedule, step: int) -> bool:
    """Does step `step` (from 0) exchange weights? Step 0 never does, and `stop` is exclusive."""
    return 0 < step < schedule.end and step % schedule.delta_t == 0


def drop_fraction(decay: Decay, initial: float, step: int, schedule: Schedule) -> float:
    """The share of the active weights that step `step` exchanges.

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
    """How many of `active` weights (or blocks) are exchanged: floor(fraction * active), as in RigL's code."""
    return min(active, floor(fraction * active + _ROUNDING))
