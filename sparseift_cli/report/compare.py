"""Groups against a baseline at equal training FLOPs, and what may be claimed of the difference.

Runs are paired by seed where the groups share at least three seeds, or all of the smaller group; otherwise they are two
independent samples (Welch), and all of them count. A difference is called better or worse where its 95 % interval excludes 0
and it is of at least three seeds (or pairs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..base.metrics import MetricFacts
from ..errors import UsageError, did_you_mean
from . import statistics
from .frame import records
from .report import Comparison, Costs, Outcome

FEWEST_SEEDS = (
    3  # below, nothing is claimed: with two, t has one degree of freedom and the interval is 12.7 errors wide
)
TOLERANCE = 1e-3

TableRow = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ComparisonRules:
    """When two budgets count as equal, and the confidence of intervals."""

    tolerance: float = TOLERANCE
    """Largest distance of the FLOPs ratio from 1."""
    allow_unequal: bool = False
    confidence: float = 0.95


def compare(
    frame: pd.DataFrame, groups: pd.DataFrame, baseline: str, rules: ComparisonRules
) -> tuple[list[Comparison], list[str]]:
    """Every group with finished runs against the baseline of the same model, data and metric; and notes on the others.

    Raises:
        UsageError: no group is called `baseline`.
    """
    rows = records(groups)
    candidates = baselines(rows, baseline)
    runs: dict[str, list[TableRow]] = {}
    for run in records(frame):
        if run["counted"]:
            runs.setdefault(run["group"], []).append(run)
    found: list[Comparison] = []
    notes: list[str] = []
    for row in rows:
        if any(row is base for base in candidates):
            continue
        fitting = [base for base in candidates if base["comparison_key"] == row["comparison_key"]]
        ready = [base for base in fitting if base["n"]]
        if not row["n"] or not ready:
            notes.append(f"{row['group']}: not compared, {_lacking(row, fitting, candidates, baseline)}")
            continue
        chosen = min(ready, key=lambda base: _distance(base, row))
        if len(ready) > 1:
            notes.append(f"{row['group']}: compared with {chosen['group']}, the nearest of {len(ready)} baselines")
        found.append(_compared(chosen, row, runs[chosen["group"]], runs[row["group"]], rules))
    return found, notes


def _lacking(row: TableRow, fitting: Sequence[TableRow], candidates: Sequence[TableRow], baseline: str) -> str:
    """Why a group has nothing to be compared with."""
    if fitting:
        return f"no finished run of {row['group'] if not row['n'] else fitting[0]['group']}"
    about = ("model", "data", "metric")
    found = f"no {baseline} baseline of {row['model']} on {row['data']} by {row['metric']}"
    for base in candidates:
        if all(base[c] == row[c] for c in about) and base["data_content"] != row["data_content"]:
            return f"{found} with the same content: {row['data_content']} against {base['data_content']} of {base['group']}"
    return found


def baselines(rows: Sequence[TableRow], name: str) -> list[TableRow]:
    """The groups that `name` can mean: a label or recipe; else the end of a recipe's name; else a transform or algorithm."""
    wanted = name.removesuffix(".yaml").replace("/", "_")
    by_precedence = (
        [row for row in rows if name == row["group"] or wanted == row["recipe"]],
        [row for row in rows if str(row["recipe"]).endswith(f"_{wanted}")],
        [row for row in rows if row["transform"] == row["algorithm"] == "dense"]
        if wanted == "dense"
        else [row for row in rows if wanted in (row["transform"], row["algorithm"])],
    )
    found = next((rows for rows in by_precedence if rows), None)
    if found is None:
        known = sorted({str(row[k]) for row in rows for k in ("group", "recipe", "transform", "algorithm")})
        raise UsageError(
            f"--baseline {name}: there is no such group",
            hint=did_you_mean(wanted, known) or f"groups: {', '.join(str(r['group']) for r in rows)}",
        )
    return found


def _compared(
    base: TableRow, row: TableRow, before: Sequence[TableRow], after: Sequence[TableRow], rules: ComparisonRules
) -> Comparison:
    """One comparison; `before` and `after` are the counted runs of the baseline and of the candidate."""
    ratio = row["flops"] / base["flops"] if row["flops"] and base["flops"] else None
    equal = ratio is not None and abs(ratio - 1) <= rules.tolerance
    allowed = equal or rules.allow_unequal
    by_seed = _pairs(before, after)
    pairs = list(by_seed.values())
    fewer, more = sorted((len(before), len(after)))
    paired = len(pairs) >= FEWEST_SEEDS or len(pairs) == fewer >= 2 or len(pairs) == more
    notes = _notes(base, row, before, after, len(pairs), paired)
    if paired:
        interval = statistics.paired([a for a, _ in pairs], [b for _, b in pairs], rules.confidence)
    else:
        interval = statistics.welch(_values(before), _values(after), rules.confidence)
    facts: MetricFacts = row["metric_facts"]
    outcome, why = _outcome(interval, facts.lower_is_better) if allowed else ("refused", "")
    if allowed:
        verdict = _verdict(facts.unit, interval, (len(before), len(after)), ratio, equal, paired, outcome, why)
    else:
        verdict = _refusal(base, row, ratio, rules)
    if allowed and not equal:
        notes.append("the budgets are not equal, so the difference is not the transform's alone")
    return Comparison(
        base["group"],
        row["group"],
        row["metric"],
        facts.lower_is_better,
        outcome,
        verdict,
        base["mean"],
        row["mean"],
        costs(base),
        costs(row),
        ratio,
        allowed,
        paired,
        interval.n,
        len(before),
        len(after),
        interval.mean if allowed else None,
        interval.low if allowed else None,
        interval.high if allowed else None,
        interval.degrees_of_freedom if allowed else None,
        rules.confidence,
        equal,
        tuple(notes),
        tuple(by_seed) if paired else (),
    )


def _pairs(before: Sequence[TableRow], after: Sequence[TableRow]) -> dict[int, tuple[float, float]]:
    """Seed -> (baseline's value, candidate's), by seed; empty where a group has a seed twice (runs of several recipes)."""
    by_seed = [
        {run["seed"]: run["value"] for run in runs if run["seed"] is not None and run["value"] is not None}
        for runs in (before, after)
    ]
    if any(len(seeds) != len(_values(runs)) for seeds, runs in zip(by_seed, (before, after), strict=True)):
        return {}
    return {seed: (by_seed[0][seed], by_seed[1][seed]) for seed in sorted(by_seed[0].keys() & by_seed[1].keys())}


def _values(runs: Sequence[TableRow]) -> list[float]:
    return [run["value"] for run in runs if run["value"] is not None]


def costs(row: TableRow) -> Costs:
    """The mean costs of a group's runs."""
    return Costs(row["flops"], row["seconds"], row["peak_bytes"], row["optimizer_bytes"])


def _distance(base: TableRow, row: TableRow) -> tuple[bool, float, int]:
    """Sorts baselines: equal steps first, then by how far FLOPs differ (in logarithms), then by the number of runs."""
    known = base["flops"] and row["flops"]
    return base["steps"] != row["steps"], abs(math.log(row["flops"] / base["flops"])) if known else math.inf, -base["n"]


def _outcome(interval: statistics.Interval, lower: bool) -> tuple[Outcome, str]:
    if interval.mean is None or not math.isfinite(interval.mean):
        return "no claim", "a run ended with a value that is not a number"
    if interval.low is None or interval.high is None:
        return "no claim", "one seed has no interval"
    if interval.n < FEWEST_SEEDS:
        freedom = (
            f"{interval.degrees_of_freedom:.3g} degree{'' if interval.degrees_of_freedom == 1 else 's'} of freedom"
        )
        return "no claim", f"{interval.n} seeds are too few (t with {freedom})"
    if interval.mean and interval.high - interval.low <= 1e-9 * abs(interval.mean):
        return "no claim", "the seeds have no spread to judge it by"
    if interval.low <= 0 <= interval.high:
        return "no difference shown", "the interval contains 0"
    return ("better", "") if (interval.high < 0) is lower else ("worse", "")


def _verdict(
    unit: str,
    interval: statistics.Interval,
    n: tuple[int, int],
    ratio: float | None,
    equal: bool,
    paired: bool,
    outcome: Outcome,
    why: str,
) -> str:
    digits = _digits(interval, percent=unit == "points")
    parts = [f"{_signed(interval.mean, digits)} {unit}"]
    if interval.low is not None and interval.high is not None:
        parts[0] += f" [{_number(interval.low, digits)}, {_number(interval.high, digits)}]"
    parts.append(f"n={interval.n}" if paired else f"n={n[0]} and {n[1]}")
    parts.append(f"at {'unknown' if ratio is None else f'{ratio:.4f}x'} training FLOPs{'' if equal else ' (unequal)'}")
    return f"{', '.join(parts)}: {outcome}{f', {why}' if why else ''}"


def _refusal(base: TableRow, row: TableRow, ratio: float | None, rules: ComparisonRules) -> str:
    budgets = f"{_flops(row['flops'])} against {_flops(base['flops'])} training FLOPs"
    if ratio is None:
        return f"refused: {budgets}, so it is unknown whether the budgets are equal"
    return f"refused: {budgets} are {ratio:.4f}x, further from 1 than {100 * rules.tolerance:g} %"


def _notes(
    base: TableRow, row: TableRow, before: Sequence[TableRow], after: Sequence[TableRow], pairs: int, paired: bool
) -> list[str]:
    notes: list[str] = []
    unpaired = len(before) + len(after) - 2 * pairs
    if paired and unpaired:
        notes.append(
            f"{pairs} seeds are in both groups; the difference leaves out "
            f"{unpaired} {'run' if unpaired == 1 else 'runs'} of other seeds"
        )
    if not paired and min(len(before), len(after)) > 1:
        shared = f"share {pairs} seed{'' if pairs == 1 else 's'} only" if pairs else "have different seeds"
        notes.append(f"the groups {shared}: Welch's interval of two independent samples")
    for what in ("device", "threads", "torch"):
        sides = [sorted({str(run[what]) for run in runs if run[what] is not None}) for runs in (before, after)]
        if sides[0] and sides[1] and sides[0] != sides[1]:
            notes.append(
                f"{what}: {', '.join(sides[1])} against {', '.join(sides[0])}; wall time and bits differ by it"
            )
    at_once = [sorted({int(run["at_once"]) for run in runs if run["at_once"]}) for runs in (before, after)]
    if all(at_once) and at_once[0] != at_once[1]:
        here, there = (" or ".join(map(str, counts)) for counts in reversed(at_once))
        notes.append(f"runs at once (--parallel): {here} against {there}; wall time differs by it")
    for side in (base, row):
        measured, audited = side["flops_spent"], side["flops"]
        if measured and audited and abs(measured / audited - 1) > TOLERANCE:
            notes.append(f"{side['group']} used {measured / audited:.4f}x the FLOPs of its audit")
    return notes


def _digits(interval: statistics.Interval, percent: bool) -> int:
    """Decimals of a difference and its interval.

    The half-width gets two significant digits up to 3.5 times a power of ten and one above, as in the tables of the Particle
    Data Group; and a bound or difference that is not 0 never shows as 0.
    """
    low, high = interval.low, interval.high
    if low is None or high is None or not math.isfinite(high - low):
        return 2 if abs(interval.mean or 1) >= (0.005 if percent else 1) else 4
    half = (high - low) / 2
    power = math.floor(math.log10(half)) if half > 0 else -2
    digits = max(1, -power + (0 < half < 3.55 * 10.0**power))
    while digits < 8 and any(v and float(f"{v:.{digits}f}") == 0 for v in (interval.mean, low, high)):
        digits += 1
    return min(digits, 8)


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3e}"
    if float(text) == 0:  # no -0.00; a tiny value keeps its sign
        return f"{value:.1g}" if value else text.removeprefix("-")
    return text


def _signed(value: float | None, digits: int) -> str:
    if value is None or not math.isfinite(value):
        return "nan"
    text = _number(value, digits)
    return text if text.startswith("-") else f"+{text}"


def _flops(value: int | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"
