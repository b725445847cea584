"""Published results and ours. published.json has every number with its source and how good the evidence for it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import one_of

_FILE = Path(__file__).with_name("published.json")
_SAME_DATA = {"wikitext-103": "wikitext103", "tokens": "wikitext103"}
"""The published name of what a data set may contain: token files are prepared by the user, so their name does not say it."""


@dataclass(frozen=True, slots=True)
class PublishedResult:
    """One row of published.json. None: not published; a sparsity or algorithm of None matches any."""

    model: str
    data: str
    transform: str
    sparsity: float | None
    algorithm: str | None
    metric: str
    dense: float | None
    value: float | None
    difference: float
    evidence: str
    """a: abstract or the article; r: reviews; n: a secondary reading note, unverified."""
    source: str
    epochs: int | None
    steps: int | None
    note: str | None


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A published result, and a group of ours that trained the same model, transform, sparsity and algorithm on the same data.

    Without such a group, all of our fields but the dense mean are None.
    """

    published: PublishedResult
    group: str | None = None
    n: int | None = None
    dense: float | None = None
    """Our dense mean, of the same model, data and (where there is a group) steps."""
    value: float | None = None
    difference: float | None = None
    epochs: float | None = None
    note: str | None = None
    """What makes the two hard to compare: shorter training, a variant of the model, the note of the published result."""


@cache
def published(reference: str = "paper") -> tuple[PublishedResult, ...]:
    """Every row of a reference.

    Raises:
        UsageError: there is no such reference.
    """
    everything: Mapping[str, Any] = json.loads(_FILE.read_text("utf-8"))
    one_of("reference", reference, list(everything))
    found = everything[reference]
    return tuple(PublishedResult(source=found["source"], **row) for row in found["rows"])


def evidence(reference: str = "paper") -> Mapping[str, str]:
    """The meaning of the letters of `PublishedResult.evidence`."""
    return json.loads(_FILE.read_text("utf-8"))[reference]["evidence"]


def published_rows(groups: Sequence[Mapping[str, Any]], reference: str = "paper") -> list[PublishedRow]:
    """Every published row in the order of the file, once for each group of ours that matches, once alone where none does.

    `groups` are rows of `frame.groups_frame`.
    """
    found: list[PublishedRow] = []
    for row in published(reference):
        ours = [_ours(row, group, groups) for group in groups if _matches(row, group)]
        found += ours or [_without_match(row, groups)]
    return found


def _matches(row: PublishedResult, group: Mapping[str, Any]) -> bool:
    """Whether a group is the published experiment. Another scope, pattern or base width is another transform, and training
    without masks has another budget.
    """
    return (
        group["n"] > 0
        and same_task(row, group)
        and group["transform"] == row.transform
        and (group["scope"], group["pattern"]) == ("all", "unstructured")
        and not str(group["widths"]).startswith("base")
        and row.sparsity in (None, group["sparsity"])
        and group["algorithm"] != "dense"
        and row.algorithm in (None, group["algorithm"])
    )


def _ours(row: PublishedResult, group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> PublishedRow:
    dense = next(
        (
            g
            for g in groups
            if g["transform"] == "dense"
            and g["algorithm"] == "dense"
            and g["n"]
            and g["comparison_key"] == group["comparison_key"]
            and g["steps"] == group["steps"]
        ),
        None,
    )
    value, base = group[row.metric], dense[row.metric] if dense else None
    notes = [row.note] if row.note else []
    if row.epochs and group["epochs"] and round(group["epochs"]) != row.epochs:
        notes.insert(0, f"ours trained {group['epochs']:g} epochs, the published row {row.epochs}")
    elif not row.epochs and row.steps and group["steps"] != row.steps:
        notes.insert(0, f"ours trained {group['steps']:,} steps, the published row {row.steps:,}")
    ours = [f"match {group['match']}"] if group["match"] != "layer" else []
    ours += [f"widths in {group['widths']}"] if group["widths"] else []
    if ours:
        notes.insert(0, f"ours has {' and '.join(ours)}, the published row matches layers with any width")
    difference = None if base is None else value - base
    return PublishedRow(
        row, group["group"], group["n"], base, value, difference, group["epochs"], "; ".join(notes) or None
    )


def _without_match(row: PublishedResult, groups: Sequence[Mapping[str, Any]]) -> PublishedRow:
    """The row of a result that no group of ours matches; our dense mean of the same model and data is shown if there is one."""
    dense = next(
        (g for g in groups if g["transform"] == "dense" and g["algorithm"] == "dense" and g["n"] and same_task(row, g)),
        None,
    )
    return (
        PublishedRow(row, note=row.note, dense=dense[row.metric], epochs=dense["epochs"])
        if dense
        else PublishedRow(row, note=row.note)
    )


def same_task(row: PublishedResult, group: Mapping[str, Any]) -> bool:
    """Whether a group (a row of `frame.groups_frame`) has the model, the data and the metric of a published row."""
    return (
        _model(group["model"]) == row.model
        and _SAME_DATA.get(group["data"], group["data"]) == row.data
        and group.get(row.metric) is not None
    )


def _model(name: str) -> str:
    """A zoo model's plain name: torchvision:resnet18 is resnet18."""
    return name.removeprefix("torchvision:").replace("-", "_")
