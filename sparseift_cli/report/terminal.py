"""Pictures of one line for a terminal: a sparkline of a learning curve, and a bar of a share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from .frame import records
from .read import Run, number
from .report import Report

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_EIGHTHS = "▏▎▍▌▋▊▉█"


def sparkline(values: Sequence[float | None], width: int | None = None, *, ascii_only: bool = False) -> str:
    """A curve in one line: the lowest to the highest value as eight heights, a space for a value that is not finite.

    At most `width` characters: longer curves are averaged over equal intervals. Equal values give a level line.

    >>> sparkline([1, 2, 3, 2, None, 1])
    '▁▅█▅ ▁'
    """
    numbers = [_finite(v) for v in values]
    if width is not None and len(numbers) > max(width, 1):
        numbers = _averaged(numbers, max(width, 1))
    known = [v for v in numbers if v is not None]
    if not known:
        return " " * len(numbers)
    marks = _ASCII if ascii_only else _BLOCKS
    low, high = min(known), max(known)
    top = len(marks) - 1
    # halved before subtracting: the difference of two huge floats may overflow
    share = [
        None if v is None else (v / 2 - low / 2) / (high / 2 - low / 2) if high / 2 > low / 2 else 0.5 for v in numbers
    ]
    return "".join(" " if s is None else marks[min(top, int(s * top + 0.5))] for s in share)


def bar(share: float | None, width: int = 20, *, ascii_only: bool = False) -> str:
    """A bar `width` characters wide, full at a share of 1, to an eighth of a character.

    More than 1 ends in an arrow; 0 and less, or no number, is empty. Always `width` characters.

    >>> bar(0.5, 8), bar(1.2, 4, ascii_only=True)
    ('████    ', '###>')
    """
    width = max(width, 1)
    number = _finite(share)
    if number is None or number <= 0:
        return " " * width
    if number > 1:
        return ("#" if ascii_only else "█") * (width - 1) + (">" if ascii_only else "▶")
    if ascii_only:
        return ("#" * max(1, round(number * width))).ljust(width)
    eighths = max(1, round(number * width * 8))
    whole, part = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[part - 1] if part else "")).ljust(width)


def can_show_blocks(encoding: str | None) -> bool:
    """Whether a stream of this encoding can show the block characters; else use `ascii_only`."""
    try:
        (_BLOCKS + _EIGHTHS + "▶").encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def mean_curve(runs: Sequence[Run], metric: str) -> list[float]:
    """The mean over the runs at every step at which one of them was evaluated, in the order of steps, without NaN."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for line in run.metrics:
            value = number(line.get(metric))
            if value is not None and abs(value) < float("inf"):
                found.setdefault(line["step"], []).append(value)
    return [statistics.fmean(found[step]) for step in sorted(found)]


def curves_by_run(report: Report) -> Mapping[str, list[float]]:
    """Each run's curve of its own metric, by its path."""
    rows = records(report.frame)
    return {row["path"]: mean_curve([run], row["metric"]) for run, row in zip(report.runs, rows, strict=True)}


def curves_by_group(report: Report) -> Mapping[str, list[float]]:
    """Each group's curve, by its label: of the runs in its means, or of all of them where none counts."""
    rows = records(report.frame)
    found: dict[str, list[float]] = {}
    for label in dict.fromkeys(row["group"] for row in rows):
        of = [(run, row) for run, row in zip(report.runs, rows, strict=True) if row["group"] == label]
        counted = [pair for pair in of if pair[1]["counted"]] or of
        found[label] = mean_curve([run for run, _ in counted], counted[0][1]["metric"])
    return found


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _averaged(values: Sequence[float | None], width: int) -> list[float | None]:
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    parts = ([v for v in values[a:b] if v is not None] for a, b in pairwise(edges))
    return [math.fsum(v / len(s) for v in s) if s else None for s in parts]
