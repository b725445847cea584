"""A report's groups sorted for drawing: a family shares a model, a data set and a metric; its dense groups come first."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ...base.metrics import label_of, lower_is_better
from ..read import Run
from ..report import Report
from ..unmasked import as_trained, without_masks
from .style import BASELINE, Look, look


@dataclass(frozen=True, slots=True)
class Group:
    """A row of the report's `groups`, with its runs: the seeds of one recipe."""

    name: str
    """The report's label."""
    short: str
    """`name` without what the whole family shares: `wide75 rigl`."""
    runs: Sequence[Run]
    counted: Sequence[Run]
    """Those of `runs` in the group's means: finished, and the newest of their seed."""
    row: Mapping[str, Any]
    """The report's row."""
    look: Look
    audit: Mapping[str, Any] | None
    """The FLOP audit, the same for all seeds: of the run as it trained, with masks or without."""

    @property
    def label(self) -> str:
        """For legends, with the number of seeds: `wide75 rigl (n = 3)`."""
        return f"{self.short} (n = {len(self.counted)})"

    @property
    def unmasked(self) -> bool:
        """Was it transformed, and trained without masks?"""
        return self.audit is not None and without_masks(self.audit)

    def series(self, key: str) -> list[tuple[float, list[float]]]:
        """(step, the runs' values of `key`) at every step that a run reports; drawn from the counted runs, if there are any."""
        found: dict[float, list[float]] = {}
        for run in self.counted or self.runs:
            for line in run.metrics:
                if is_number(line.get(key)) and is_number(line.get("step")):
                    found.setdefault(line["step"], []).append(float(line[key]))
        return sorted(found.items())

    def finals(self, key: str) -> list[tuple[float, float]]:
        """(FLOPs spent, value of `key`) at the end of every counted run that has both."""
        ends = (run.last for run in self.counted)
        return [(float(e["flops"]), float(e[key])) for e in ends if is_number(e.get("flops")) and is_number(e.get(key))]


@dataclass(frozen=True, slots=True)
class Family:
    """Groups of one model on one data set that are judged by one metric: the dense ones first, then by sparsity."""

    model: str
    data: str
    metric: str
    groups: Sequence[Group]

    @property
    def title(self) -> str:
        return f"{self.model} on {self.data}"

    @property
    def slug(self) -> str:
        """For file names and ids: letters, digits, dashes."""
        return slug(self.title)

    @property
    def metric_name(self) -> str:
        """The metric in words, with its unit and direction."""
        name = label_of(self.metric)
        return f"{name} (lower is better)" if lower_is_better(self.metric) else name

    @property
    def axis(self) -> str:
        """The same, what is in brackets on a second line."""
        return self.metric_name.replace(" (", "\n(", 1)

    @property
    def drawable(self) -> bool:
        """Has any run been evaluated?"""
        return any(group.series(self.metric) for group in self.groups)

    @property
    def transformed(self) -> list[Group]:
        """The groups whose audit has a transform: the first of those that agree in every layer stands for all of them."""
        found: list[Group] = []
        for group in self.groups:
            if group.audit and group.audit.get("transform") and not any(_layers(g) == _layers(group) for g in found):
                found.append(group)
        return found

    def plan_name(self, group: Group) -> str:
        """One of `transformed`, and how many more groups it stands for."""
        more = sum(_layers(g) == _layers(group) for g in self.groups) - 1
        return f"{group.short} and {more} more" if more else group.short


def families(report: Report) -> list[Family]:
    """The report's groups by model, data set, metric and `subject` (what makes them comparable), in the order of names."""
    kin: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in report.groups.to_dict("records"):
        named = {str(key): value for key, value in row.items()}
        key = (_bare(named["model"]), str(named["data"]), str(named["metric"]), str(named.get("subject")))
        kin.setdefault(key, []).append(named)
    return [Family(*key[:3], _groups(report, rows)) for key, rows in sorted(kin.items())]


def slug(text: str) -> str:
    """`text` as part of a file name or an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "runs"


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest, highest: what a curve and its band show."""
    return statistics.fmean(values), min(values), max(values)


def is_number(value: Any) -> TypeGuard[float]:
    """What can be drawn: a diverged run's NaN cannot, nor its 1e308, whose axis would overflow."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def scaled(largest: float) -> tuple[float, str]:
    """By what to divide FLOPs of this size, and the unit's name: (1e12, 'TFLOPs')."""
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if largest >= 10**power:
            return 10.0**power, f"{prefix}FLOPs"
    return 1.0, "FLOPs"


def _layers(group: Group) -> Any:
    return (group.audit or {}).get("layers")


def _groups(report: Report, rows: Sequence[Mapping[str, Any]]) -> list[Group]:
    rows = sorted(rows, key=lambda row: (_sparsity(row) or 0.0, str(row["group"])))
    shared = _shared_prefix([str(row["group"]) for row in rows])
    counted = {id(run) for run, yes in zip(report.runs, report.frame["counted"], strict=True) if yes}
    groups, others = [], 0
    for row in rows:
        name = str(row["group"])
        runs = report.runs_of(name)
        within = [run for run in runs if id(run) in counted]
        is_baseline = not groups and not _sparsity(row)
        short = name[len(shared) :].replace("_", " ").strip() or name
        audit = next((run.audit for run in runs if run.audit), None)
        seen = BASELINE if is_baseline else look(others)
        groups.append(Group(name, short, runs, within, row, seen, audit and as_trained(audit)))
        others += not is_baseline
    return groups


def _shared_prefix(names: Sequence[str]) -> str:
    """Whole words that all names begin with; nothing where there is one name only."""
    if len(names) < 2:
        return ""
    words = [name.split("_") for name in names]
    shared = 0
    while all(len(w) > shared + 1 and w[shared] == words[0][shared] for w in words):
        shared += 1
    return "".join(f"{word}_" for word in words[0][:shared])


def _bare(model: Any) -> str:
    """A model's name without a module's path before it."""
    return str(model).rpartition(":")[2]


def _sparsity(row: Mapping[str, Any]) -> float | None:
    try:
        value = float(row["sparsity"])
    except (TypeError, ValueError):
        return None
    return value if is_number(value) else None
