"""The axes of a sweep, from the section `sweep` of a recipe or from `--sweep` options, and the points between them.

sweep:                                  # or --sweep sparsity=0.5,0.75,0.9 --sweep transform.member=wide,doped
  sparsity: [0.5, 0.75, 0.9]
  transform.member: [wide, doped]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from . import schema
from .parse import find_key
from .strict_yaml import Location, Problems, Value, read_option, scalar

SPARSE_SECTIONS = ("transform", "algorithm", "init")
"""Sections of which nothing but `init.zero_residual` says anything about a dense model."""
Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Axis:
    """One key of a recipe, and the values that it takes."""

    path: str
    """As it was written: `sparsity`."""
    key: str
    """The dotted key that it means: `transform.sparsity`."""
    texts: tuple[str, ...]
    """Each value as `--set` takes it."""
    values: tuple[Scalar, ...]

    @property
    def of_sparse_model(self) -> bool:
        """Whether a dense model has no such setting."""
        return self.key.partition(".")[0] in SPARSE_SECTIONS or self.key == "training.kernels"


@dataclass(frozen=True, slots=True)
class Point:
    """One combination: its name, the options that make it, and its value on each axis by the axis' name."""

    name: str
    sets: tuple[str, ...]
    values: Mapping[str, Scalar]
    dense: bool = False


def take_axes(tree: dict[str, Value], problems: Problems) -> tuple[Axis, ...]:
    """Take the section `sweep` out of the sections of a recipe: its axes. What is wrong with it is added to `problems`."""
    section = tree.pop(schema.SWEEP, None)
    found: dict[str, Axis] = {}
    for path, value, location in section.items() if section is not None and section.data else ():
        if value.data is None:  # an axis of a recipe that this one extends, which it does not have
            continue
        if not isinstance(value.data, list):
            problems.add(value.location, f"sweep: {path} needs a list of values: [{shown(value.plain())}]")
            continue
        texts = [v.data if isinstance(v.data, str) else shown(v.plain()) for v in value.data]
        axis = _axis(path, texts, value.data, tree, location, problems)
        if axis is not None and found.setdefault(axis.key, axis) is not axis:
            problems.add(location, f"sweep: {path} and {found[axis.key].path} are one key")
    return tuple(found.values())


def read_axis(option: str, tree: Mapping[str, Value], problems: Problems) -> Axis | None:
    """The axis of `--sweep KEY=VALUE,VALUE`; each value is one word of YAML, in quotes where it has a comma."""
    location = Location(problems.path, option=f"--sweep {option}")
    path, equals, listed = option.partition("=")
    if not equals:
        problems.add(location, "expected KEY=VALUE,VALUE as in --sweep sparsity=0.5,0.75")
        return None
    try:
        node = yaml.compose(f"[{listed}]", Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    whole = isinstance(node, yaml.SequenceNode) and node.end_mark.index == len(listed) + 2
    items: list[Any] = node.value if node is not None and whole else []
    if not items or listed.rstrip().endswith(","):
        problems.add(location, "expected values with a comma between, as in --sweep sparsity=0.5,0.75")
        return None
    texts = [listed[item.start_mark.index - 1 : item.end_mark.index - 1].strip() for item in items]
    values = [read_option(text, location, problems) for text in texts]
    return _axis(path, texts, values, tree, location, problems)


def _axis(
    path: str,
    texts: Sequence[str],
    values: Sequence[Value],
    tree: Mapping[str, Value],
    location: Location,
    problems: Problems,
) -> Axis | None:
    """An axis, checked; None where its key or a value is wrong."""
    found = find_key(path, tree, location, problems)
    if found is None:
        return None
    key = ".".join(found)
    if key in ("training.seed", "training.seeds"):
        problems.add(location, f"{key} is no axis of a sweep: --seeds 0..2 trains every point with each seed")
        return None
    if any(isinstance(value.data, list | dict) for value in values):
        problems.add(location, f"{path}: an axis has single values, not lists or mappings")
        return None
    if not values:
        problems.add(location, f"{path}: an axis needs a value")
        return None
    known = [(isinstance(value.data, bool), value.data) for value in values]
    for i, value in enumerate(values):
        if known.index(known[i]) < i:
            problems.add(value.location, f"{path}: {shown(value.data)} is there twice")
            return None
    return Axis(path.strip(), key, tuple(texts), tuple(value.data for value in values))


def shown(value: Any) -> str:
    """A value in a name: the text itself, 0.5 for .50."""
    return value if isinstance(value, str) else scalar(value)
