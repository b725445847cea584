"""A report's groups sorted for drawing: a family has one model, data set and metric; its dense groups come first."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ...base.metrics import MetricFacts, facts_of
from ...mask.patterns import UNSTRUCTURED, Block, MaskPattern
from ...table.shape import Shape
from ..budgets import FLOPS, SECONDS, Budget
from ..read import Run
from ..report import Report
from .style import BASELINE, LineStyle, line_style


@dataclass(frozen=True, slots=True)
class Group:
    """A row of the report's `groups`, with its runs: the seeds of one recipe."""

    name: str
    """The report's label."""
    short: str
    """`name` without the words that all names of the family begin with: `wide75 rigl`."""
    runs: Sequence[Run]
    counted: Sequence[Run]
    """The `runs` in the group's means: finished, and the newest of their seed."""
    row: Mapping[str, Any]
    """The report's row."""
    line_style: LineStyle
    audit: Mapping[str, Any] | None
    """The FLOP audit, the same for all seeds: of the run as it trained, with masks or without."""

    @property
    def label(self) -> str:
        """For legends, with the number of seeds: `wide75 rigl (n = 3)`."""
        return f"{self.short} (n = {len(self.counted)})"

    @property
    def unmasked(self) -> bool:
        """Whether the model was transformed and trained without masks."""
        return self.audit is not None and without_masks(self.audit)

    def series(self, key: str) -> list[tuple[float, list[float]]]:
        """(step, the runs' values of `key`) at every step that a run records; of the counted runs, or of all if none counts."""
        found: dict[float, list[float]] = {}
        for run in self.counted or self.runs:
            for line in run.metrics:
                if is_number(line.get(key)) and is_number(line.get("step")):
                    found.setdefault(line["step"], []).append(float(line[key]))
        return sorted(found.items())

    def finals(self, key: str, budget: Budget = FLOPS) -> list[tuple[float, float]]:
        """(how much of the budget was used, value of `key`) at the end of every counted run that has both."""
        ends = ((run.last.get(budget.name), run.last.get(key)) for run in self.counted)
        return [(float(used), float(value)) for used, value in ends if is_number(used) and is_number(value)]


@dataclass(frozen=True, slots=True)
class Family:
    """Groups of one model, data set and metric: the dense ones first, then by sparsity."""

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
        name = self.facts.label
        return f"{name} (lower is better)" if self.facts.lower_is_better else name

    @property
    def facts(self) -> MetricFacts:
        """Label, unit and direction of the metric."""
        return self.groups[0].row["metric_facts"] if self.groups else facts_of(self.metric)

    @property
    def axis(self) -> str:
        """The same with the part in brackets on a second line."""
        return self.metric_name.replace(" (", "\n(", 1)

    @property
    def drawable(self) -> bool:
        """Whether any run has been evaluated."""
        return any(group.series(self.metric) for group in self.groups)

    @property
    def transformed(self) -> list[Group]:
        """The groups whose audit has a transform; of those that agree in every layer only the first."""
        found: list[Group] = []
        for group in self.groups:
            if group.audit and group.audit.get("transform") and not any(_layers(g) == _layers(group) for g in found):
                found.append(group)
        return found

    def plan_name(self, group: Group) -> str:
        """The name of one of `transformed`, with the number of groups that agree with it in every layer."""
        more = sum(_layers(g) == _layers(group) for g in self.groups) - 1
        return f"{group.short} and {more} more" if more else group.short


def families(report: Report) -> list[Family]:
    """The report's groups by model, data set, metric and `comparison_key`, in the order of names."""
    by_key: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    rows = [{str(key): value for key, value in row.items()} for row in report.groups.to_dict("records")]
    several = len({(row["data"], row.get("data_content")) for row in rows}) > len({row["data"] for row in rows})
    for named in rows:
        key = (
            _without_module(named["model"]),
            f"{named['data']} {named['data_content']}" if several else str(named["data"]),
            str(named["metric"]),
            str(named.get("comparison_key")),
        )
        by_key.setdefault(key, []).append(named)
    return [Family(*key[:3], _groups(report, rows)) for key, rows in sorted(by_key.items())]


def slug(text: str) -> str:
    """`text` as part of a file name or an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "runs"


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest, highest: a curve and its band."""
    return statistics.fmean(values), min(values), max(values)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value can be drawn: not NaN, and not so large (as 1e308 of a diverged run) that the axis overflows."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def scaled(largest: float, budget: Budget = FLOPS) -> tuple[float, str]:
    """The divisor for amounts of this size, and the unit's name: (1e12, 'TFLOPs'), (60.0, 'min')."""
    if budget is SECONDS:
        return (3600.0, "h") if largest >= 2 * 3600 else (60.0, "min") if largest >= 600 else (1.0, "s")
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if largest >= 10**power:
            return 10.0**power, f"{prefix}FLOPs"
    return 1.0, "FLOPs"


def without_masks(audit: Mapping[str, Any]) -> bool:
    """Whether the audit is of a transformed model that is trained without masks."""
    trained = audit.get("training")
    return bool(audit.get("transform")) and isinstance(trained, Mapping) and trained.get("algorithm") == "dense"


def as_trained(audit: Mapping[str, Any]) -> Mapping[str, Any]:
    """The audit of the model as it was trained.

    The audit of a transformed model has the plan's non-zeros, whatever trains it. Algorithm `dense` trains without masks: such
    a run has the plan's widths, and neither its sparsity nor its FLOPs. Then `layers` and the forward `totals` are recomputed
    with all weights.
    """
    if not without_masks(audit):
        return audit
    layers = [_with_all_weights(row, _pattern(row, audit)) for row in audit.get("layers", ())]
    totals = dict(audit.get("totals") or {})
    if after := totals.get("transformed"):
        macs, nnz = (
            sum((new.get(key) or 0) - (old.get(key) or 0) for new, old in zip(layers, audit["layers"], strict=True))
            for key in ("transformed_macs", "nnz")
        )
        more = {"forward_macs": macs, "forward_flops": macs * audit.get("flops_per_mac", 2), "nonzero_params": nnz}
        totals["transformed"] = {**after, **{key: after[key] + by for key, by in more.items() if key in after}}
    return {**audit, "layers": layers, "totals": totals}


def _pattern(row: Mapping[str, Any], audit: Mapping[str, Any]) -> MaskPattern:
    """That of a row, which older audits have for all rows together. Never imports what a file names."""
    return Block.parse(str(row.get("pattern") or audit["transform"].get("pattern"))) or UNSTRUCTURED


def _with_all_weights(row: Mapping[str, Any], pattern: MaskPattern) -> Mapping[str, Any]:
    """A transformed row with all its weights that are in cells of the pattern; each weight is used as often as before."""
    if row["status"] != "transformed" or not row.get("nnz") or not row.get("weights"):
        return row
    nnz = row["weights"] if pattern.unrestricted else sum(_places(part, pattern) for part in row["parts"])
    macs = row["transformed_macs"] * nnz // row["nnz"]
    ratio = macs / row["dense_macs"] if row["dense_macs"] else None
    return {**row, "nnz": nnz, "transformed_macs": macs, "ratio": ratio, "density": nnz / row["weights"]}


def _places(part: Mapping[str, Any], pattern: MaskPattern) -> int:
    """The weights of a part that a mask of the pattern can have."""
    shape = Shape(*(part[key] for key in ("inputs", "outputs", "taps", "groups")))
    return part["nnz"] if part["dense"] else pattern.places(shape)


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
        style = BASELINE if is_baseline else line_style(others)
        groups.append(Group(name, short, runs, within, row, style, audit and as_trained(audit)))
        others += not is_baseline
    return groups


def _shared_prefix(names: Sequence[str]) -> str:
    """The words that all names begin with; empty for a single name."""
    if len(names) < 2:
        return ""
    words = [name.split("_") for name in names]
    shared = 0
    while all(len(w) > shared + 1 and w[shared] == words[0][shared] for w in words):
        shared += 1
    return "".join(f"{word}_" for word in words[0][:shared])


def _without_module(model: Any) -> str:
    """A model's name without a module's path before it."""
    return str(model).rpartition(":")[2]


def _sparsity(row: Mapping[str, Any]) -> float | None:
    try:
        value = float(row["sparsity"])
    except (TypeError, ValueError):
        return None
    return value if is_number(value) else None
