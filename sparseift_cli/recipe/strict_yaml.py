"""YAML read strictly: every value keeps its line and column, duplicate keys and aliases are errors, 1e-3 is a number.

Files of other programs (`sparseift recipe import`) may use aliases; the number of values is bounded, so that a few lines
cannot unfold into gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError

_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 30
_MAX_VALUES = 20_000


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a value stands in its file, counted from 1; or the `--set` option that it came from."""

    line: int
    column: int
    option: str = ""

    def within(self, path: Path) -> str:
        """`recipe.yaml:5:3`, or `--set optimizer.lr=1`."""
        return self.option or f"{path}:{self.line}:{self.column}"


@dataclass(slots=True)
class Problems:
    """Everything wrong with one file (and the options that change it), reported at once, in the order of the file."""

    path: Path
    found: list[tuple[Spot, str]]

    def add(self, spot: Spot, message: str) -> None:
        self.found.append((spot, message))

    def stop(self, what: str = "the recipe has problems:") -> None:
        """Raise UsageError if there was any."""
        if self.found:
            ordered = sorted(self.found, key=lambda found: (found[0].option, found[0].line, found[0].column))
            lines = dict.fromkeys(f"{spot.within(self.path)}: {message}" for spot, message in ordered)
            raise UsageError("\n  ".join([what, *lines]))


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar, list or mapping with the spot where it begins; mappings keep the spots of their keys."""

    data: Any
    spot: Spot
    key_spots: dict[str, Spot]

    def items(self) -> Iterator[tuple[str, Value, Spot]]:
        for key, value in self.data.items():
            yield key, value, self.key_spots[key]

    def plain(self) -> Any:
        """The value without spots."""
        if isinstance(self.data, dict):
            return {k: v.plain() for k, v in self.data.items()}
        if isinstance(self.data, list):
            return [v.plain() for v in self.data]
        return self.data


def read(path: Path, *, aliases: bool = False) -> tuple[Value, Problems]:
    """The document in `path` and a place to collect what is wrong with it; `aliases` allows `*name`.

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
    problems = Problems(path, [])
    if node is None:
        raise UsageError(f"{path} is empty", hint="the shortest recipe names a model and a sparsity")
    return _convert(node, problems, set(), 0, aliases, count(1)), problems


def read_option(text: str, spot: Spot, problems: Problems) -> Value:
    """The value of a `--set` option: a scalar, or a list or mapping in brackets."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader) if len(text) < _MAX_BYTES else None
    except (yaml.YAMLError, RecursionError):
        node = None
    if node is None:
        return Value(text or None, spot, {})
    return _at(_convert(node, problems, set(), 0, False, count(1)), spot)


def _at(value: Value, spot: Spot) -> Value:
    """The same value, standing at `spot` altogether."""
    if isinstance(value.data, dict):
        return Value({k: _at(v, spot) for k, v in value.data.items()}, spot, dict.fromkeys(value.data, spot))
    return Value([_at(v, spot) for v in value.data] if isinstance(value.data, list) else value.data, spot, {})


def _convert(node: Any, problems: Problems, seen: set[int], depth: int, aliases: bool, number: Iterator[int]) -> Value:
    spot = Spot(node.start_mark.line + 1, node.start_mark.column + 1)
    if depth > _MAX_DEPTH:
        problems.add(spot, "nested too deeply for a recipe")
        return Value(None, spot, {})
    if next(number) > _MAX_VALUES:
        raise UsageError(f"{problems.path}: more than {_MAX_VALUES:,} values: too many for a recipe")
    if isinstance(node, yaml.ScalarNode):
        return Value(_scalar(node), spot, {})
    if id(node) in seen and not aliases:
        problems.add(spot, "aliases are not allowed: write the value out")
        return Value(None, spot, {})
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, problems, seen, depth + 1, aliases, number) for item in node.value]
        return Value(items, spot, {})
    data: dict[str, Value] = {}
    spots: dict[str, Spot] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
        key_spot = Spot(key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if not key:
            problems.add(key_spot, "a key must be a word")
        elif key in data:
            problems.add(key_spot, f"key '{key}' appears twice, first on line {spots[key].line}")
        else:
            data[key] = _convert(value_node, problems, seen, depth + 1, aliases, number)
            spots[key] = key_spot
    return Value(data, spot, spots)


def _scalar(node: Any) -> Any:
    if node.style in ("'", '"', "|", ">"):
        return node.value
    if _FLOAT.fullmatch(node.value):
        return int(node.value) if re.fullmatch(r"[-+]?\d+", node.value) else float(node.value)
    return {"true": True, "false": False, "null": None, "~": None, "": None}.get(node.value.lower(), node.value)
