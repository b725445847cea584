"""Runs as a pandas table, one row a run, and groups of them, one row a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from ..base.metrics import TEST, MetricFacts, facts_of, metric_names
from ..errors import UsageError, did_you_mean
from . import statistics
from .grouping import comparison_key, contents, labels, primary
from .rates import RATES, peak_of, rates
from .read import Run, number
from .timing import Alone, alone

_ABOUT = (
    "recipe",
    "model",
    "data",
    "transform",
    "match",
    "scope",
    "pattern",
    "widths",
    "sparsity",
    "algorithm",
    "steps",
    "epochs",
    "metric",
)
_COSTS = (
    "flops",
    "dense_flops",
    "flops_ratio",
    "flops_spent",
    "flops_executed",
    "seconds",
    "peak_bytes",
    "optimizer_bytes",
    "params",
    "nonzero_params",
)
ON_REQUEST = (*(rate.name for rate in RATES), "alone")
"""Columns that only a report at a budget shows, or one that is asked for them: what `seconds` were used for, and whether the
device was shared meanwhile (`timing.alone`)."""
_RUN_START = (
    "path",
    "group",
    "state",
    "counted",
    "seed",
    "step",
    *_ABOUT,
    "value",
    "best",
)
_RUN_END = (
    "train_loss",
    *_COSTS,
    "density",
    "itop_rate",
    "started",
    "device",
    "threads",
    "at_once",
    "torch",
    "commit",
    *ON_REQUEST,
)
_GROUP_START = (
    "group",
    *_ABOUT,
    "runs",
    "n",
    "mean",
    "std",
    "low",
    "high",
    "best",
)
"""mean, std, low and high are of `metric` at the end of training, best is the mean of each run's best evaluation. All are
over `n` runs: finished ones, one a seed; `runs` counts every directory. Costs are means too; FLOPs are of a whole run."""
_GROUP_END = (*_COSTS, "device", "at_once", *ON_REQUEST)
_MIXED = "mixed"
HIDDEN = ("comparison_key", "data_content", "metric_facts", "alone_why")
"""Columns for internal use, which no user sees or asks for: a text that is equal where results are comparable, which data a run
read (the start of its SHA-256), the `MetricFacts` of the row's metric, and why a run is not known to have been alone."""


def metric_columns(runs: Sequence[Run]) -> list[str]:
    """The columns of metrics: of every registered one, then of those from outside that a run recorded; then `test_` each.

    One that has the name of another column is left out.
    """
    recorded = dict.fromkeys(facts.name for run in runs for facts in run.measured.values())
    others = [name for name in recorded if name not in metric_names()]
    taken = {*_RUN_START, *_RUN_END, *_GROUP_START, *_GROUP_END, *HIDDEN}
    return [name for name in (*metric_names(), *others, *(TEST + name for name in others)) if name not in taken]


def metrics_of(frame: pd.DataFrame) -> list[str]:
    """The columns of metrics (`metric_columns`) of a frame of runs or of groups."""
    fixed = {*_RUN_START, *_RUN_END, *_GROUP_START, *_GROUP_END, *HIDDEN}
    return [str(name) for name in frame.columns if name not in fixed]


def runs_frame(runs: Sequence[Run], metric: str | None = None, peak_tflops: float | None = None) -> pd.DataFrame:
    """One row a run, in the order of `runs`. Counts stay Python integers: FLOPs may exceed 64 bits.

    `metric` is what they are judged by; None: the metric of each recipe (`grouping.primary`). `peak_tflops` is of one device,
    for MFU; None: of the data sheet, where it is known.
    """
    metrics = metric_columns(runs)
    rows = [
        _with_rates(_row(run, group, metric or primary(run), metrics, content), run, shared, peak_tflops)
        for run, group, content, shared in zip(runs, labels(runs), contents(runs), alone(runs), strict=True)
    ]
    newest: dict[tuple[Any, ...], int] = {}
    for i, row in enumerate(rows):  # a seed that was run twice is one sample: its newest finished run
        if row["state"] == "finished" and row["value"] is not None:
            key = (row["group"], row["seed"] if row["seed"] is not None else i)
            before = newest.get(key)
            if before is None or str(row["started"] or "") >= str(rows[before]["started"] or ""):
                newest[key] = i
    for i in newest.values():
        rows[i]["counted"] = True
    return pd.DataFrame(rows, columns=[*_RUN_START, *metrics, *_RUN_END, *HIDDEN], dtype=object)


def regroup(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The frame with other groups: runs that agree in the columns `by`, in model and data, number of steps, and metric.

    Raises:
        UsageError: the frame has no column of `by`.
    """
    for name in by:
        require_column(name, list(frame.columns), "--group-by")
    rows = records(frame)
    varying = [c for c in ("model", "data", "steps", "metric") if c not in by and len({row[c] for row in rows}) > 1]
    if len({(row["data"], row["data_content"]) for row in rows}) > len({row["data"] for row in rows}):
        varying.append("data_content")  # data of one name and two contents
    label_of: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = tuple(row[c] for c in (*by, "comparison_key", "steps", "metric"))
        label = ", ".join(f"{c}={_plain(row[c])}" for c in (*by, *varying))
        same = sum(other.split(" #")[0] == label for other in label_of.values()) if key not in label_of else 0
        label_of.setdefault(key, f"{label} #{same + 1}" if same else label)
    labelled = [label_of[tuple(row[c] for c in (*by, "comparison_key", "steps", "metric"))] for row in rows]
    return frame.assign(group=pd.Series(labelled, index=frame.index, dtype=object))


def groups_frame(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """One row a group, in the order in which the groups' first runs come."""
    metrics = metrics_of(frame)
    rows = [_grouped(str(label), part, confidence, metrics) for label, part in frame.groupby("group", sort=False)]
    return pd.DataFrame(rows, columns=group_columns(frame), dtype=object)


def group_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of the groups of a frame of runs."""
    return [*_GROUP_START, *metrics_of(frame), *_GROUP_END, *HIDDEN]


def require_column(name: str, known: Sequence[str], where: str) -> None:
    """Raise UsageError unless `name` is one of `known`."""
    shown = visible(known)
    if name not in shown:
        hint = did_you_mean(name, shown) or f"columns: {', '.join(shown)}"
        raise UsageError(f"{where}: there is no column {name!r}", hint=hint)


def visible(columns: Sequence[str]) -> list[str]:
    """Columns that a user may ask for, each once."""
    return [c for c in dict.fromkeys(columns) if c not in HIDDEN]


def keep(table: pd.DataFrame, wanted: Sequence[bool]) -> pd.DataFrame:
    """The rows that are wanted."""
    return cast("pd.DataFrame", table.loc[list(map(bool, wanted)), :])


def column(table: pd.DataFrame, name: str) -> list[Any]:
    """The values of a column."""
    return list(table[name])


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dicts: a missing value is None; a NaN was measured."""
    names = [str(c) for c in frame.columns]
    return [dict(zip(names, values, strict=True)) for values in frame.to_numpy(object).tolist()]


def _row(run: Run, group: str, metric: str, metrics: Sequence[str], content: str) -> dict[str, Any]:
    recipe, summary, last = run.recipe, run.summary or {}, run.last
    transform = recipe.get("transform") or {}
    found = [v for line in run.metrics if (v := number(line.get(metric))) is not None and v == v]  # v != v: NaN
    best, watched = number(summary.get("best")), (recipe.get("checkpoint") or {}).get("best", metric)
    facts = run.facts_of(metric)
    if found and (best is None or metric != run.metric_key(str(watched))):
        best = min(found) if facts.lower_is_better else max(found)
    flops = summary.get("flops") or {}
    audited, dense = _count(flops.get("audited")), _count(flops.get("dense"))
    sessions = (run.provenance or {}).get("sessions") or [{}]
    first, session = sessions[0], sessions[-1]
    epochs = number(last.get("epoch")) if summary else number(recipe["training"].get("epochs"))
    return {
        "path": str(run.path),
        "group": group,
        "state": run.state,
        "counted": False,
        "seed": run.seed,
        "step": _count(last.get("step")) or 0,
        "recipe": run.name,
        "model": str(recipe["model"].get("name")),
        "data": str(recipe["data"].get("name")),
        **transform_columns(transform),
        "sparsity": number(transform.get("sparsity", 0)),
        "algorithm": str((recipe.get("algorithm") or {}).get("name") or "dense"),
        "steps": planned_steps(run),
        "epochs": epochs,
        "metric": metric,
        "value": number(last.get(metric)),
        "best": best,
        **{m: number(last.get(m)) for m in (*metrics, "train_loss", "density", "itop_rate")},
        **{name: _count(last.get(name)) for name in ("peak_bytes", "optimizer_bytes")},
        "flops": audited,
        "dense_flops": dense,
        "flops_ratio": audited / dense if audited and dense else None,
        "flops_spent": _count(flops.get("spent", last.get("flops"))),
        "flops_executed": _count(flops.get("executed", last.get("executed_flops"))),
        "seconds": number(last.get("seconds")),
        "params": _count(summary.get("params")),
        "nonzero_params": _count(summary.get("nonzero_params")),
        "started": first.get("started"),
        "device": session.get("device_name") or session.get("device"),
        "threads": session.get("threads"),
        "at_once": max((s["at_once"] for s in sessions if s.get("at_once")), default=None),
        "torch": (session.get("versions") or {}).get("torch"),
        "commit": ((session.get("git") or {}).get("commit") or "")[:12] or None,
        "comparison_key": comparison_key(run, metric, content),
        "data_content": content[:8],
        "metric_facts": facts,
    }


def _with_rates(row: dict[str, Any], run: Run, shared: Alone, peak_tflops: float | None) -> dict[str, Any]:
    """The row with the columns ON_REQUEST. A run that went on elsewhere has no peak."""
    sessions = (run.provenance or {}).get("sessions") or [{}]
    peaks = {peak_of(session, run.recipe["training"].get("precision"), peak_tflops) for session in sessions}
    peak = peaks.pop() if len(peaks) == 1 else None
    return {**row, **rates(row, peak), "alone": shared.known, "alone_why": shared.why}


def planned_steps(run: Run) -> int | None:
    """Optimiser steps of the whole run, from its summary, recipe or audit; None where none of them has it."""
    audit = (run.audit or {}).get("training") or {}
    known = (run.summary or {}).get("steps"), run.recipe["training"].get("steps"), audit.get("steps")
    return next((s for s in known if isinstance(s, int)), None)


def transform_columns(transform: Mapping[str, Any]) -> dict[str, str | None]:
    """The columns of a recipe's transform: sparse_wide is called wide, and a recipe without a transform dense.

    Sparse Wide with scope none is called sparse: it widens nothing and matches no budget. `widths` is None where every width
    is allowed.
    """
    member = transform.get("member")
    if not member:
        return {"transform": "dense", **dict.fromkeys(("match", "scope", "pattern", "widths"))}
    name = "sparse" if transform.get("scope") == "none" else str(member).removeprefix("sparse_")
    base, multiple = transform.get("base_width"), transform.get("width_multiple")
    widths = f"base {base}" if base else f"multiples of {multiple}" if multiple not in (None, 1) else None
    plain = {"match": "layer", "scope": "all", "pattern": "unstructured"}
    return {"transform": name, **{k: str(transform.get(k) or usual) for k, usual in plain.items()}, "widths": widths}


def _grouped(label: str, part: pd.DataFrame, confidence: float, metrics: Sequence[str]) -> dict[str, Any]:
    counted = keep(part, list(part["counted"]))
    of = counted if len(counted) else part  # a group without finished runs is named by all of them
    interval = statistics.mean_interval(numbers(column(counted, "value")), confidence)
    facts = _common(column(of, "metric_facts"))
    return {
        "group": label,
        **{name: _common(column(of, name)) for name in (*_ABOUT, "device", "at_once", *HIDDEN[:2])},
        "runs": len(part),
        "n": len(counted),
        "mean": interval.mean,
        "std": interval.deviation,
        "low": interval.low,
        "high": interval.high,
        **{name: mean(column(counted, name)) for name in ("best", *metrics, *_COSTS, *(rate.name for rate in RATES))},
        "alone": _all_alone(column(of, "alone")),
        "metric_facts": facts if isinstance(facts, MetricFacts) else facts_of(_common(column(of, "metric"))),
    }


def _plain(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _common(values: Sequence[Any]) -> Any:
    values = list(dict.fromkeys(values))
    return values[0] if len(values) == 1 else _MIXED


def _all_alone(values: Sequence[bool | None]) -> bool | None:
    """Of several runs: False where one was not alone, else None where it is not known of one."""
    return False if False in values else None if None in values else True


def numbers(values: Sequence[Any]) -> list[float]:
    """The values of a column that are not missing, as floats."""
    return [float(v) for v in values if v is not None]


def mean(values: Sequence[Any]) -> Any:
    """Mean of the values that are not None; where all are equal that value, exactly, as FLOPs may exceed a float; else None."""
    values = [v for v in values if v is not None]
    if not values or all(v == values[0] for v in values):
        return values[0] if values else None
    if all(isinstance(v, int) for v in values):
        return round(sum(values) / len(values))
    return statistics.mean([float(v) for v in values])


def _count(value: Any) -> int | None:
    """A number of things; None for a text, a negative number, and one that is too large to divide as a float."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**1000 else None
