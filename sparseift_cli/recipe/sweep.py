"""A sweep: every combination of the values of some keys of a recipe, each a recipe of its own.

    sweep:                                  # or --sweep sparsity=0.5,0.75,0.9 --sweep transform.member=wide,doped
      sparsity: [0.5, 0.75, 0.9]
      transform.member: [wide, doped]

A point is the recipe with one value of each axis set, as `--set` would; its name says which: `sparsity=0.5,member=wide`. The
dense baselines are points too: the recipe without what only a sparse model has.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .axes import Axis, Point, read_axis, shown, take_axes
from .load import Recipe, load, name_of
from .parse import parse
from .strict_yaml import Location
from .write import resolved_yaml

DENSE = "dense"
"""The name of the dense baseline."""
_DENSE_SETS = ("transform=null", "algorithm=null", "training.kernels=auto")
_MOST_POINTS = 10_000
_NOT_IN_NAMES = re.compile(r"[^\w.+%:-]")
"""What names of folders cannot hold everywhere."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points of a sweep over one recipe, in order: the last axis varies fastest, dense baselines come first."""

    path: Path
    axes: Mapping[str, Axis]
    """By name: the last part of its key, or the whole key where two axes share that part."""
    points: tuple[Point, ...]

    @property
    def folder(self) -> str:
        """The folder of its runs, below that of all runs."""
        return f"{name_of(self.path)}_sweep"

    def recipes(self, sets: Sequence[str] = (), only: str | None = None) -> list[Recipe]:
        """The recipe of every point, or of the one called `only`; a dense baseline that is there twice once.

        Raises:
            UsageError: everything that is wrong with any of them; or two points are one run.
        """
        loaded: list[Recipe] = []
        wrong: dict[str, list[str]] = {}
        """Each problem, and the points that have it."""
        wanted = [point for point in self.points if only in (None, point.name)]
        for point in wanted:
            try:
                loaded.append(load(self.path, sets, point))
            except UsageError as error:
                for line in error.message.splitlines()[1:] or [error.message]:
                    wrong.setdefault(line, []).append(point.name)
        if wrong:
            of_some = {line for line, names in wrong.items() if len(names) < len(wanted) and "--sweep" not in line}
            lines = [f"{line} (at {wrong[line][0]})" if line in of_some else line for line in wrong]
            raise UsageError("\n".join(["the sweep has problems:", *lines]))
        if not loaded:
            raise UsageError(f"the sweep has no point {only!r}")
        return _distinct(loaded)


def _distinct(recipes: Sequence[Recipe]) -> list[Recipe]:
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        same = found.setdefault(resolved_yaml(recipe.spec), recipe)
        assert recipe.point is not None
        assert same.point is not None
        if same is not recipe and not (recipe.point.dense and same.point.dense):
            raise UsageError(
                f"the points {same.name} and {recipe.name} of the sweep are the same run",
                hint="leave one of them out: two of the values mean the same",
            )
    return list(found.values())


def make_sweep(
    path: Path, options: Sequence[str], sets: Sequence[str] = (), *, with_dense: bool = False
) -> Sweep | None:
    """The sweep that a recipe and `--sweep` options ask for; None where neither does.

    An option replaces the axis of the recipe's section `sweep` that has the same key.

    Args:
        path: the recipe.
        options: `KEY=VALUE,...`, each an axis.
        sets: the `--set` options of all points.
        with_dense: add the dense baselines: one for each combination of the values that a dense model has too.

    Raises:
        UsageError: everything that is wrong with the axes.
    """
    tree, _, problems = parse(path, sets)
    axes = {axis.key: axis for axis in take_axes(tree, problems)}
    given: dict[str, Axis] = {}
    for option in options:
        axis = read_axis(option, tree, problems)
        if axis is not None and given.setdefault(axis.key, axis) is not axis:
            problems.add(
                Location(path, option=f"--sweep {option}"), f"{axis.key} is an axis already: list all its values there"
            )
    problems.stop("the sweep has problems:" if options else "the recipe has problems:")
    named = _named(list((axes | given).values()))
    if not named:
        return None
    size = 1
    for axis in named.values():
        size *= len(axis.values)
    if size > _MOST_POINTS:
        raise UsageError(
            f"the sweep has {size:,} points, more than {_MOST_POINTS:,}", hint="leave out values, or an axis"
        )
    dense = [a for a in named if not named[a].of_sparse_model]
    points = [*(_points(named, dense, DENSE) if with_dense else ()), *_points(named, list(named))]
    return Sweep(path, named, tuple(_with_own_names(points)))


def _points(axes: Mapping[str, Axis], names: Sequence[str], prefix: str = "") -> list[Point]:
    """Every combination of the values of some axes; with a prefix, dense ones."""
    found = []
    for chosen in itertools.product(*(range(len(axes[name].values)) for name in names)):
        picked = list(zip(names, chosen, strict=True))
        sets = tuple(f"{axes[name].path}={axes[name].texts[i]}" for name, i in picked)
        said = [f"{name}={_NOT_IN_NAMES.sub('_', shown(axes[name].values[i]))}" for name, i in picked]
        values = {name: axes[name].values[i] for name, i in picked}
        name = ",".join([prefix, *said] if prefix else said)
        found.append(Point(name, (*sets, *_DENSE_SETS) if prefix else sets, values, bool(prefix)))
    return found


def _with_own_names(points: Sequence[Point]) -> list[Point]:
    """The points; of those of one name, as values may differ in what a folder cannot hold, the later ones numbered."""
    seen: dict[str, int] = {}
    found = []
    for point in points:
        seen[point.name] = again = seen.get(point.name, 0) + 1
        name = point.name if again == 1 else f"{point.name}.{again}"
        found.append(Point(name, point.sets, point.values, point.dense))
    return found


def _named(axes: Sequence[Axis]) -> dict[str, Axis]:
    """The axes by name: the last part of the key, its section where that is `name`; the whole key where two would be the same."""
    short = [section if last == "name" else last for section, _, last in (axis.key.partition(".") for axis in axes)]
    return {axis.key if short.count(name) > 1 else name: axis for axis, name in zip(axes, short, strict=True)}
