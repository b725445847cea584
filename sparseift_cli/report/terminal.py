"""Pictures of one line, for where there is no display: a sparkline of a curve and a bar of a share. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_EIGHTHS = "▏▎▍▌▋▊▉█"


def sparkline(values: Sequence[float | None], width: int | None = None, *, ascii_only: bool = False) -> str:
    """A curve in one line, lowest to highest value over the eight heights; a gap where a value is no finite number.

    At most `width` characters: longer curves are averaged over equal stretches. Level values give a level line.

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
    # halves first: the span of two huge floats may overflow
    share = [
        None if v is None else (v / 2 - low / 2) / (high / 2 - low / 2) if high / 2 > low / 2 else 0.5 for v in numbers
    ]
    return "".join(" " if s is None else marks[min(top, int(s * top + 0.5))] for s in share)


def bar(share: float | None, width: int = 20, *, ascii_only: bool = False) -> str:
    """A bar `width` characters wide, full at a share of 1, to an eighth of a character.

    More than 1 ends in an arrow; what is no number, or 0 and less, is empty. Always `width` characters.

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


def speaks_unicode(encoding: str | None) -> bool:
    """Can a stream of this encoding show the blocks? If not, ask for `ascii_only`."""
    try:
        (_BLOCKS + _EIGHTHS + "▶").encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _averaged(values: Sequence[float | None], width: int) -> list[float | None]:
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    stretches = ([v for v in values[a:b] if v is not None] for a, b in pairwise(edges))
    return [math.fsum(v / len(s) for v in s) if s else None for s in stretches]
