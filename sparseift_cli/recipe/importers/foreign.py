"""A configuration file of another program: its values by dotted path, and an account of which were carried over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..strict_yaml import Value, read


@dataclass(frozen=True, slots=True)
class Note:
    """A key that was not carried over, or not unchanged, and why. Several values of one branch share a note."""

    where: str
    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = "" if isinstance(self.value, dict | list) else f" {self.value!r}"
        return f"{self.where}: {self.key}{value}: {self.reason}"


@dataclass(slots=True)
class Foreign:
    """The file, whose leaves are crossed out as they are read; what is left at the end has no counterpart here."""

    path: Path
    document: Value
    notes: list[Note] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    @staticmethod
    def open(path: Path) -> Foreign:
        """Read a file; aliases are allowed.

        Raises:
            UsageError: it is not YAML, or has a key twice.
        """
        document, problems = read(path, aliases=True)
        problems.stop(f"{path} has problems:")
        return Foreign(path, document)

    def find(self, path: str) -> Value | None:
        """The value at a dotted path; None if there is none."""
        value = self.document
        for part in path.split(".") if path else []:
            if isinstance(value.data, dict) and part in value.data:
                value = value.data[part]
            elif isinstance(value.data, list) and part.isdigit() and int(part) < len(value.data):
                value = value.data[int(part)]
            else:
                return None
        return value

    def take(self, *paths: str) -> Any:
        """The plain value at the first of `paths` that exists, crossed out; None if none does."""
        for path in paths:
            value = self.find(path)
            if value is not None:
                self.used.add(path)
                return value.plain()
        return None

    def number(self, *paths: str, above: float | None = None, least: float | None = None, whole: bool = False) -> Any:
        """The number at the first of `paths` that exists, crossed out; None if none does, or it is null.

        Raises:
            UsageError: it is no number, or none in these bounds; with file and line.
        """
        path = next((p for p in paths if self.find(p) is not None), None)
        value = None if path is None else self.take(path)
        if path is None or value is None:
            return None
        return checked_number(value, f"{self.where(path)}: {path}", above=above, least=least, whole=whole)

    def where(self, path: str) -> str:
        """File and line of the value at `path`."""
        value = self.find(path)
        return str(self.path) if value is None else f"{self.path}:{value.location.line}"

    def expect(self, path: str, wanted: Any, reason: str) -> None:
        """Cross out a value that means what happens here anyway; note it where it is another."""
        value = self.take(path)
        if value is not None and value != wanted:
            self.note(path, reason)

    def note(self, path: str, reason: str) -> None:
        """Say that the value at `path` (crossed out with all below it) is not carried over unchanged."""
        value = self.find(path)
        if value is not None:
            self.used.add(path)
            self.notes.append(Note(self.where(path), path, value.plain(), reason))

    def note_rest(self, reasons: Mapping[str, str], otherwise: str) -> None:
        """A note for every branch that nothing was read from; `reasons` knows some of them by their last name."""
        for path, value in self._unused("", self.document):
            reason = next((r for name, r in reasons.items() if name in path.split(".")), otherwise)
            self.notes.append(Note(f"{self.path}:{value.location.line}", path, value.plain(), reason))

    def _unused(self, path: str, value: Value) -> Iterator[tuple[str, Value]]:
        """The highest branches without a used leaf."""
        if path in self.used:
            return
        if not any(u.startswith(f"{path}." if path else "") for u in self.used):
            yield path, value
        elif isinstance(value.data, dict):
            for key, child in value.data.items():
                yield from self._unused(f"{path}.{key}".lstrip("."), child)
        elif isinstance(value.data, list):
            for index, child in enumerate(value.data):
                yield from self._unused(f"{path}.{index}".lstrip("."), child)


def checked_number(
    value: Any,
    where: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> Any:
    """`value` if it is a number in these bounds.

    Raises:
        UsageError: it is not; `where` says whose value it is.
    """
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and math.isfinite(value)
    bounds = {"above": above, "of at least": least, "below": below}
    fits = {"above": lambda v, b: v > b, "of at least": lambda v, b: v >= b, "below": lambda v, b: v < b}
    if not number or not all(bound is None or fits[word](value, bound) for word, bound in bounds.items()):
        limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        raise UsageError(f"{where} is {value!r}, not a {'whole ' if whole else ''}number {limits}".rstrip())
    return value


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe made from a file of another program: its sections, a name for it, what to say about it, and what was left."""

    name: str
    sections: Mapping[str, Any]
    about: str
    notes: tuple[Note, ...]
