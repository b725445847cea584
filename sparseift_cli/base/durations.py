"""How long something lasts or how often it happens: `5`, `500 steps`, `2 epochs` or `10%`.

A plain number counts in the unit in which the recipe gives the run's length: epochs where `training.epochs` is set, steps
where `training.steps` is. A percentage is of the whole run.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import floor
from typing import Annotated, Any

from ..errors import UsageError

PATTERN = r"^\d+(\.\d+)? ?(steps?|epochs?|%)$"
_ROUNDING = 1e-9  # 0.29 * 100 is 28.999... in floats and 29 to everybody else


def check(value: object) -> float | str:
    """`value` if it is a duration.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    if isinstance(value, str) and re.match(PATTERN, value):
        return value
    raise ValueError(f"expected a duration (5, '500 steps', '2 epochs', '10%'), not {value!r}")


class _DurationType:
    """Makes a field of a recipe accept durations alone. Pydantic calls it; nothing of pydantic is imported before."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import PlainValidator

        return PlainValidator(check).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": PATTERN}]}


Duration = Annotated[float | str, _DurationType()]
"""A number in the unit of the run's length, or text: `500 steps`, `2 epochs`, `10%`."""


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Optimiser steps of one pass over `samples` training samples; a last batch that is smaller is left out.

    Raises:
        UsageError: not even one batch.
    """
    steps = samples // batch_size
    if steps < 1:
        raise UsageError(
            f"{samples} training samples do not fill one batch of {batch_size}", hint="make training.batch_size smaller"
        )
    return steps


def held_out_images(samples: int, share: float | None) -> int:
    """How many of `samples` training images `data.validation` keeps aside."""
    return round(samples * (share or 0))


def in_steps(value: float | str, *, run_steps: int, epoch_steps: int, unit: str) -> int:
    """A duration in optimiser steps, rounded down. `unit` is what a plain number counts: `steps` or `epochs`.

    >>> in_steps("10%", run_steps=1000, epoch_steps=40, unit="epochs")
    100
    """
    text = str(value)
    number = float(re.sub(r"[^\d.eE+-].*", "", text) if isinstance(value, str) else value)
    if text.endswith("%"):
        exact = number / 100 * run_steps
    elif "epoch" in (text if isinstance(value, str) else unit):
        exact = number * epoch_steps
    else:
        exact = number
    return floor(exact + _ROUNDING)


def in_words(number: float, unit: str) -> str:
    """A length as a recipe may write it: `1 epoch`, `0.5 epochs`. `unit` in the singular."""
    return f"{number:g} {unit}{'' if number == 1 else 's'}"


def part_of_run(stop: int, steps: int) -> float:
    """The shortest decimal x in [0, 1] with ceil(x * steps) = stop: 17209 of 21511 is 0.8."""
    for digits in range(1, 12):
        x = round(stop / steps, digits)
        if 0 <= x <= 1 and -(-Fraction(str(x)) * steps // 1) == stop:
            return x
    return min(1.0, stop / steps)
