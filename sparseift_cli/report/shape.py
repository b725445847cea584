"""Whether a file beside a run is what a run writes, as far as a report looks into it, and texts that a terminal can show."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from ..runs.directory import AUDIT, PROVENANCE

_STATUS = ("transformed", "boundary", "untouched", "mixed")


def is_whole(name: str, found: Mapping[str, Any]) -> bool:
    """Whether the parts of the file `name` that a report looks into are there in their shape."""
    if name == PROVENANCE:
        sessions = found.get("sessions")
        return isinstance(sessions, list) and bool(sessions) and all(map(_is_session, sessions))
    layers = found.get("layers")
    if not isinstance(found.get("training"), dict | NoneType) or not isinstance(layers, list | NoneType):
        return False
    return name != AUDIT or (_are_totals(found.get("totals")) and all(map(_is_layer, layers or ())))


def printable(value: Any) -> Any:
    """A value of a file with no control character in any of its texts: one could recolour a terminal, or break an SVG.

    >>> printable({"name": "net\\x1b[31m"})
    {'name': 'net\\\\x1b[31m'}
    """
    if isinstance(value, str):
        return value if value.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in value)
    if isinstance(value, Mapping):
        return {printable(key): printable(inner) for key, inner in value.items()}
    return [printable(inner) for inner in value] if isinstance(value, list) else value


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _is_session(session: Any) -> bool:
    if not isinstance(session, dict):
        return False
    if not all(isinstance(session.get(k), dict | NoneType) for k in ("versions", "git", "data", "source")):
        return False
    named = [session.get(k) for k in ("started", "device", "device_name", "recipe")]
    named += [(session.get("git") or {}).get("commit"), (session.get("versions") or {}).get("torch")]
    return (
        all(isinstance(text, str | NoneType) for text in named)
        and isinstance(session.get("threads"), int | NoneType)
        and _counts(session.get("at_once"))
    )


def _counts(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _are_totals(totals: Any) -> bool:
    sides = ("dense", "transformed")
    return totals is None or (
        isinstance(totals, dict) and all(isinstance(totals.get(k), dict | NoneType) for k in sides)
    )


def _is_layer(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and row.get("status") in _STATUS
        and all(_is_number(row.get(k)) for k in ("dense_macs", "transformed_macs"))
        and all(row.get(k) is None or _is_number(row[k]) for k in ("nnz", "weights"))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
