"""Recipes as text: short ones as people write them, whole ones as runs keep them, annotated ones to read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import schema
from .strict_yaml import flow

if TYPE_CHECKING:
    from .load import Recipe

EDITOR = "# yaml-language-server: $schema="
WIDTH = 120


def comment(text: str) -> str:
    """Text as comment lines that fit the page."""
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, WIDTH - 2) or [""]]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def short_yaml(sections: Mapping[str, Any], about: str, schema_path: str) -> str:
    """A recipe of a few lines: only what is given, a section that has only its name as one word."""
    lines = [f"{EDITOR}{schema_path}\n", comment(about)]
    for section, content in sections.items():
        word = schema.short(section) if section in schema.SECTIONS else None
        if isinstance(content, Mapping) and set(content) == {word}:
            content = content[word]
        line = f"{section}: {flow(content)}"
        if len(line) > WIDTH and isinstance(content, Mapping):
            line = f"{section}:\n" + "\n".join(f"  {k}: {flow(v)}" for k, v in content.items())
        lines.append(line + "\n")
    return "".join(lines)


def resolved_yaml(spec: schema.Spec) -> str:
    """The whole recipe, every value written out, as a run directory keeps it: the same recipe gives the same bytes."""
    lines: list[str] = []
    for section, content in _sections(spec):
        lines += [f"{section}:", *(f"  {key}: {flow(value)}" for key, value in content.items())]
    return "\n".join(lines) + "\n"


def annotated_yaml(recipe: Recipe) -> str:
    """The whole recipe with the origin and the meaning of each value beside it."""
    rows = entries(recipe)
    left = {row["key"]: f"  {row['key'].partition('.')[2]}: {flow(row['value'])}" for row in rows}
    wide = min(44, max(map(len, left.values())))
    lines: list[str] = []
    for row in rows:
        section, _, _ = row["key"].partition(".")
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        lines.append(f"{left[row['key']]:<{wide}}  # {row['origin']}: {row['about']}")
    return "\n".join(lines) + "\n"


def entries(recipe: Recipe) -> Sequence[Mapping[str, Any]]:
    """Every value of a recipe: its dotted key, value, origin, and what it means."""
    return [
        {
            "key": f"{section}.{key}",
            "value": value,
            "origin": recipe.origins[f"{section}.{key}"],
            "about": schema.fields(section, content)[key].description,
        }
        for section, content in _sections(recipe.spec)
        for key, value in content.items()
    ]


def _sections(spec: schema.Spec) -> list[tuple[str, dict[str, Any]]]:
    """Sections that are there, their name first (a subclass lists its parent's fields before its own)."""
    found: list[tuple[str, dict[str, Any]]] = []
    for section in schema.SECTIONS:
        content = getattr(spec, section)
        if content is not None:
            values = content.model_dump(mode="json")
            first = schema.short(section)
            found.append((section, {k: values[k] for k in sorted(values, key=lambda k: k != first)}))
    return found
