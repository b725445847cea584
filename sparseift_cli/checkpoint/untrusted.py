"""Helpers for reading files from strangers: the error, text that is safe to print, and JSON of bounded size."""

from __future__ import annotations

import json
from typing import NoReturn

MAX_JSON_BYTES = 32 << 20  # enough for the header of more than 200,000 tensors
MAX_JSON_PARTS = 2_000_000  # commas and brackets: they decide how much memory the parsed objects take


class Malformed(Exception):
    """What is wrong with a file, without its name: the caller (`open_checkpoint`) puts it in front."""

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def printable(text: str, limit: int = 200) -> str:
    """Text from a file, safe for a terminal: control characters escaped, cut after `limit` characters.

    >>> printable("weight\\x1b[31m")
    'weight\\\\x1b[31m'
    """
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    return clean if len(text) <= limit else clean[:limit] + "…"


def parse_object(raw: bytes, what: str) -> dict[str, object]:
    """The JSON object in `raw`, with limits on size, number of parts and depth; no key twice.

    Args:
        what: its name in messages, as in "the header".

    Raises:
        Malformed: it is too large, not UTF-8 JSON, not an object, nested too deeply, or has a key twice.
    """
    if len(raw) > MAX_JSON_BYTES or raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_JSON_PARTS:
        raise Malformed(f"{what} is too large: {len(raw):,} bytes of JSON, more than any list of tensors needs")
    try:
        parsed = json.loads(raw, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise Malformed(f"{what} is JSON nested too deeply") from None
    except ValueError as error:  # also what is not UTF-8, and integers of thousands of digits
        raise Malformed(f"{what} is not valid JSON ({printable(str(error), 80)})") from None
    if not isinstance(parsed, dict):
        raise Malformed(f"{what} is not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Malformed(f"the key {printable(twice)!r} appears twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
