"""A recipe: a model, a transform and an algorithm in YAML. All problems of a file are told at once, each with its place.

model: resnet18                    # or {name: resnet18, num_classes: 100, input: 3x32x32}
transform: wide                    # or {member: wide, match: model, scope: all, ...}
sparsity: 0.9
algorithm: rigl                    # or {name: rigl, delta_t: 100, stop: 0.75, steps: 450000}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError, did_you_mean
from ..locations import recipes_dir
from ..spec import TrainingSpec, TransformSpec, member_named
from .strict_yaml import Problems, Spot, Value, read

MODEL_KEYS = ("name", "num_classes", "input", "seq", "batch")
TRANSFORM_KEYS = tuple(f.name for f in fields(TransformSpec))
ALGORITHM_KEYS = ("name", "delta_t", "stop", "steps", "recompute")
KEYS = ("model", "transform", "sparsity", "algorithm")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a recipe file says; options not given keep their defaults."""

    path: Path
    model: str
    options: dict[str, Any]  # num_classes, input, seq, batch
    transform: dict[str, Any]  # fields of TransformSpec; empty for a dense run
    training: dict[str, Any]  # fields of TrainingSpec


def find(source: str) -> Path | None:
    """The recipe file a source names: a path, or the name of a shipped one with or without `.yaml`; None if it is none."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        shipped = recipes_dir() / source
        if shipped.is_file():
            return shipped
        names = [str(p.relative_to(recipes_dir())) for p in sorted(recipes_dir().rglob("*.yaml"))]
        raise UsageError(
            f"no recipe {source}", hint=did_you_mean(source, names) or f"shipped: {', '.join(names) or 'none'}"
        )
    return None


def load(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UsageError: everything wrong with it, as `file:line:column: what`.
    """
    document, problems = read(path)
    if not isinstance(document.data, dict):
        problems.add(document.spot, "a recipe is a mapping of keys to values")
        problems.stop()
    _check_keys(document, KEYS, problems)
    parts = document.data
    if "model" not in parts:
        problems.add(document.spot, "the recipe names no model: add `model: resnet18`")
    model = _section(parts.get("model"), "name", MODEL_KEYS, problems)
    transform = _section(parts.get("transform"), "member", TRANSFORM_KEYS, problems)
    training = _section(parts.get("algorithm"), "name", ALGORITHM_KEYS, problems)
    if "sparsity" in parts:
        if "sparsity" in transform:
            problems.add(parts["sparsity"].spot, "sparsity is given twice: here and under transform")
        transform["sparsity"] = parts["sparsity"].plain()
    if transform:
        transform = _transform(transform, _spot(parts, "transform", "sparsity"), problems)
    if "name" in training:
        training["algorithm"] = training.pop("name")
    if "stop" in training:
        training["stop"] = str(training["stop"])
    if training:
        _attempt(lambda: TrainingSpec(**training), _spot(parts, "algorithm"), problems)
    problems.stop()
    return Recipe(path, str(model.pop("name")), model, transform, training)


def _transform(given: dict[str, Any], spot: Spot, problems: Problems) -> dict[str, Any]:
    for key in ("include", "exclude"):
        if key in given:
            given[key] = tuple(given[key]) if isinstance(given[key], list) else (str(given[key]),)
    if "sparsity" in given:
        given["sparsity"] = str(given["sparsity"])
    if "member" in given:
        _attempt(lambda: given.update(member=member_named(str(given["member"]))), spot, problems)
    if not problems.found:
        _attempt(lambda: TransformSpec(**given), spot, problems)
    return given


def _attempt(check: Callable[[], Any], spot: Spot, problems: Problems) -> None:
    try:
        check()
    except UsageError as error:
        problems.add(spot, error.message + (f" ({error.hint})" if error.hint else ""))
    except TypeError as error:
        problems.add(spot, f"a value of the wrong type: {error}")


def _spot(parts: dict[str, Value], *keys: str) -> Spot:
    return next((parts[k].spot for k in keys if k in parts), Spot(1, 1))


def _section(value: Value | None, short: str, known: tuple[str, ...], problems: Problems) -> dict[str, Any]:
    """A section given as a mapping, or as one word that stands for its `short` key."""
    if value is None:
        return {}
    if isinstance(value.data, dict):
        _check_keys(value, known, problems)
        return {k: v for k, v in value.plain().items() if k in known}
    if not isinstance(value.data, str):
        problems.add(value.spot, f"expected a name or a mapping, not {value.plain()!r}")
        return {}
    return {short: value.data}


def _check_keys(value: Value, known: tuple[str, ...], problems: Problems) -> None:
    for key, _, spot in value.items():
        if key not in known:
            problems.add(spot, f"unknown key '{key}', {did_you_mean(key, known) or 'known: ' + ', '.join(known)}")
