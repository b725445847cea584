"""YAML read strictly: every value keeps its file, line and column, duplicate keys and aliases are errors, 1e-3 is a number.
And values as text that this and other readers take for the same.

Files of other programs (`sparseift recipe import`) may use aliases; the number of values is bounded, so that a few lines
cannot unfold into gigabytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError

_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_PLAIN = re.compile(r"[A-Za-z_./~*][\w./*+%-]*( [\w./]+)*|\d+x\d+(x\d+)*|\d+(\.\d+)?%|\d+ (steps?|epochs?)")
_WORDS = {
    "true",
    "false",
    "null",
    "yes",
    "no",
    "on",
    "off",
    "~",
    "*",
}  # other YAML readers take yes and on for booleans
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 30
_MAX_VALUES = 20_000


@dataclass(frozen=True, slots=True)
class Location:
    """Where a value is written: its file, line and column (counted from 1), or the `--set` option that gave it."""

    path: Path
    line: int = 0
    column: int = 0
    option: str = ""

    def __str__(self) -> str:
        """`recipe.yaml:5:3`, or `--set optimizer.lr=1`."""
        return self.option or f"{self.path}:{self.line}:{self.column}"


@dataclass(slots=True)
class Problems:
    """Everything wrong with a recipe, in its file, those it extends and `--set` options, so that all is reported at once."""

    path: Path
    found: list[tuple[Location, str]]

    def add(self, location: Location, message: str) -> None:
        self.found.append((location, message))

    def stop(self, what: str = "the recipe has problems:") -> None:
        """Raise UsageError if there was any; in the order of the file, the extended files and the options."""
        if self.found:
            lines = [f"{location}: {message}" for location, message in sorted(self.found, key=self._order)]
            raise UsageError("\n  ".join([what, *dict.fromkeys(lines)]))

    def _order(self, found: tuple[Location, str]) -> tuple[object, ...]:
        at = found[0]
        return at.option, at.path != self.path, at.path, at.line, at.column


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar, list or mapping with the location where it begins; mappings keep the locations of their keys."""

    data: Any
    location: Location
    key_locations: dict[str, Location]

    def items(self) -> Iterator[tuple[str, Value, Location]]:
        for key, value in self.data.items():
            yield key, value, self.key_locations[key]

    def plain(self) -> Any:
        """The value without locations."""
        if isinstance(self.data, dict):
            return {k: v.plain() for k, v in self.data.items()}
        if isinstance(self.data, list):
            return [v.plain() for v in self.data]
        return self.data


def read(path: Path, *, aliases: bool = False, problems: Problems | None = None) -> tuple[Value, Problems]:
    """The document in `path`, and where to collect what is wrong with it.

    Args:
        path: the file.
        aliases: allow `*name`, as files of other programs have.
        problems: add to these, of a recipe that extends this one.

    Raises:
        UsageError: the file cannot be read or is not YAML.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is {path.stat().st_size:,} bytes: too large for a recipe")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot read {path}: {reason}") from None
    try:
        # each level of nesting adds an indent or an opening bracket: refuse before the parser recurses
        if max((len(m) for m in re.findall(r"[\[{]+", text.replace(" ", ""))), default=0) > _MAX_DEPTH:
            raise UsageError(f"{path}: nested too deeply for a recipe")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UsageError(f"{where}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path}: not YAML: {type(error).__name__}") from None
    problems = problems or Problems(path, [])
    if node is None:
        raise UsageError(f"{path} is empty", hint="the shortest recipe names a model and a sparsity")
    return _Converter(path, problems, aliases).convert(node), problems


def read_option(text: str, location: Location, problems: Problems) -> Value:
    """The value of a `--set` option: a scalar, or a list or mapping in brackets."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader) if len(text) < _MAX_BYTES else None
    except (yaml.YAMLError, RecursionError):
        node = None
    if node is None:
        return Value(text or None, location, {})
    return _moved(_Converter(location.path, problems, aliases=False).convert(node), location)


def _moved(value: Value, location: Location) -> Value:
    """The same value with `location` in place of its own, also of what is in it."""
    if isinstance(value.data, dict):
        data = {k: _moved(v, location) for k, v in value.data.items()}
        return Value(data, location, dict.fromkeys(data, location))
    return Value(
        [_moved(v, location) for v in value.data] if isinstance(value.data, list) else value.data, location, {}
    )


@dataclass(slots=True)
class _Converter:
    """From the nodes of one YAML document to values with locations."""

    path: Path
    problems: Problems
    aliases: bool
    seen: set[int] = field(default_factory=set[int])
    """Nodes met before: one that comes again is an alias."""
    values: int = 0

    def convert(self, node: Any, depth: int = 0) -> Value:
        location = self._location(node)
        self.values += 1
        if depth > _MAX_DEPTH:
            self.problems.add(location, "nested too deeply for a recipe")
            return Value(None, location, {})
        if self.values > _MAX_VALUES:
            raise UsageError(f"{self.path}: more than {_MAX_VALUES:,} values: too many for a recipe")
        if isinstance(node, yaml.ScalarNode):
            return Value(_scalar(node), location, {})
        if id(node) in self.seen and not self.aliases:
            self.problems.add(location, "aliases are not allowed: write the value out")
            return Value(None, location, {})
        self.seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            return Value([self.convert(item, depth + 1) for item in node.value], location, {})
        data: dict[str, Value] = {}
        locations: dict[str, Location] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            place = self._location(key_node)
            if not key:
                self.problems.add(place, "a key must be a word")
            elif key in data:
                self.problems.add(place, f"key '{key}' appears twice, first on line {locations[key].line}")
            else:
                data[key] = self.convert(value_node, depth + 1)
                locations[key] = place
        return Value(data, location, locations)

    def _location(self, node: Any) -> Location:
        return Location(self.path, node.start_mark.line + 1, node.start_mark.column + 1)


def _scalar(node: Any) -> Any:
    if node.style in ("'", '"', "|", ">"):
        return node.value
    if _FLOAT.fullmatch(node.value):
        return int(node.value) if re.fullmatch(r"[-+]?\d+", node.value) else float(node.value)
    return {"true": True, "false": False, "null": None, "~": None, "": None}.get(node.value.lower(), node.value)


def scalar(value: Any) -> str:
    """A value as one YAML word that every reader takes for the same: 6e-05 becomes 6.0e-05."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        text = repr(int(value) if value.is_integer() and abs(value) < 1e15 else value)
        mantissa, e, power = text.partition("e")
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{int(power)}" if e else text
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not value.startswith("*")
        return value if plain else json.dumps(value, ensure_ascii=False)
    return str(value)


def flow(value: Any) -> str:
    """A value on one line, lists and mappings in brackets."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(v) for v in value) + "]"
    return scalar(value)
