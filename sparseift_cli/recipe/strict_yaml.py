"""YAML read strictly: every value keeps its line and column, duplicate keys and aliases are errors, 1e-3 is a number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError

_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 30


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a value stands, counted from 1."""

    line: int
    column: int


@dataclass(slots=True)
class Problems:
    """Everything wrong with one file, reported at once."""

    path: Path
    found: list[str]

    def add(self, spot: Spot, message: str) -> None:
        self.found.append(f"{self.path}:{spot.line}:{spot.column}: {message}")

    def stop(self) -> None:
        """Raise UsageError if there was any."""
        if self.found:
            raise UsageError("\n  ".join(["the recipe has problems:", *self.found]))


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


def read(path: Path) -> tuple[Value, Problems]:
    """The document in `path` and a place to collect what is wrong with it.

    Raises:
        UsageError: the file cannot be read or is not YAML.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is {path.stat().st_size:,} bytes: too large for a recipe")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
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
    return _convert(node, problems, set(), 0), problems


def _convert(node: Any, problems: Problems, seen: set[int], depth: int) -> Value:
    spot = Spot(node.start_mark.line + 1, node.start_mark.column + 1)
    if depth > _MAX_DEPTH:
        problems.add(spot, "nested too deeply for a recipe")
        return Value(None, spot, {})
    if isinstance(node, yaml.ScalarNode):
        return Value(_scalar(node), spot, {})
    if id(node) in seen:
        problems.add(spot, "aliases are not allowed: write the value out")
        return Value(None, spot, {})
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return Value([_convert(item, problems, seen, depth + 1) for item in node.value], spot, {})
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
            data[key] = _convert(value_node, problems, seen, depth + 1)
            spots[key] = key_spot
    return Value(data, spot, spots)


def _scalar(node: Any) -> Any:
    if node.style in ("'", '"', "|", ">"):
        return node.value
    if _FLOAT.fullmatch(node.value):
        return int(node.value) if re.fullmatch(r"[-+]?\d+", node.value) else float(node.value)
    return {"true": True, "false": False, "null": None, "~": None, "": None}.get(node.value.lower(), node.value)
