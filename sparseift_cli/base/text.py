"""Short texts for messages and tables: the first of many names, the shape of a tensor."""

from __future__ import annotations

from collections.abc import Iterable


def some_of(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are.

    >>> some_of(["conv1", "bn1", "fc"])
    'conv1, bn1, fc'
    >>> some_of(["conv1", "bn1", "fc"], most=1)
    'conv1 and 2 more'
    """
    found = list(names)
    more = f" and {len(found) - most:,} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def shape_text(shape: Iterable[int]) -> str:
    """The sizes with an x between them.

    >>> shape_text((64, 3, 7, 7)), shape_text(())
    ('64x3x7x7', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"
