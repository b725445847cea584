"""Groups against a baseline at equal training FLOPs or equal wall time, and what may be claimed of the difference.

Final values are compared, of groups whose budgets are equal: a run in the middle of its learning-rate schedule is not what a
run planned for that time would be. Where budgets are not equal, a `CurveReading` says where the candidate was when the baseline
ended, and nothing is claimed of that.

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
from . import statistics, timing
from .budgets import BUDGETS, FLOPS, SECONDS, Budget, BudgetName
from .curve import read_curve
from .frame import numbers, records
from .rates import RATES
from .read import Run, number
from .report import Comparison, Costs, CurveReading, Outcome

FEWEST_SEEDS = (
    3  # below, nothing is claimed: with two, t has one degree of freedom and the interval is 12.7 errors wide
)

TableRow = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ComparisonRules:
    """When two budgets count as equal, and the confidence of intervals."""

    tolerance: float = FLOPS.tolerance
    """Largest distance of the FLOPs ratio from 1."""
    allow_unequal: bool = False
    """Compare at unequal FLOPs too."""
    confidence: float = 0.95
    at: Sequence[BudgetName] = ()
    """The budgets that must be equal, a comparison for each; empty where none was asked for, which means FLOPs."""
    time_tolerance: float = SECONDS.tolerance
    """Largest distance of the ratio of wall times from 1."""

    @property
    def budgets(self) -> list[Budget]:
        return [BUDGETS[name] for name in self.at or ("flops",)]

    def equal(self, budget: Budget, ratio: float | None) -> bool:
        """Whether two budgets of this ratio count as equal."""
        tolerance = self.tolerance if budget is FLOPS else self.time_tolerance
        return ratio is not None and abs(ratio - 1) <= tolerance


@dataclass(frozen=True, slots=True)
class _Side:
    """A group, the rows of its counted runs, and these runs."""

    row: TableRow
    rows: Sequence[TableRow]
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        return self.row["group"]


def compare(
    frame: pd.DataFrame, groups: pd.DataFrame, baseline: str, rules: ComparisonRules, runs: Sequence[Run]
) -> tuple[list[Comparison], list[str]]:
    """Every group with finished runs against the baseline of the same model, data and metric; and notes on the others.

    Args:
        frame: a row a run.
        groups: a row a group of them.
        baseline: a group's label, or what `baselines` understands.
        rules: at which budgets, and when these are equal.
        runs: the runs of the rows of `frame`.

    Raises:
        UsageError: no group is called `baseline`.
    """
    rows = records(groups)
    candidates = baselines(rows, baseline)
    counted: dict[str, list[tuple[TableRow, Run]]] = {}
    for row, run in zip(records(frame), runs, strict=True):
        if row["counted"]:
            counted.setdefault(row["group"], []).append((row, run))
    sides = {
        row["group"]: _Side(row, *(tuple(part) for part in zip(*counted.get(row["group"], ()), strict=True)))
        for row in rows
        if row["group"] in counted
    }
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
        for budget in rules.budgets:
            side = sides[row["group"]]
            chosen = min((sides[base["group"]] for base in ready), key=lambda base: _distance(base, side, budget))
            if len(ready) > 1:
                at = " at equal time" if budget is SECONDS else ""
                notes.append(f"{side.name}: compared{at} with {chosen.name}, the nearest of {len(ready)} baselines")
            found.append(_compared(chosen, side, budget, rules))
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


def _compared(base: _Side, side: _Side, budget: Budget, rules: ComparisonRules) -> Comparison:
    """One comparison at one budget."""
    ratios = {name: _ratio(base.row[name], side.row[name]) for name in BUDGETS}
    ratio = ratios[budget.name]
    equal = {name: rules.equal(BUDGETS[name], ratios[name]) for name in BUDGETS}
    conditions = timing.same_conditions(base.runs, side.runs)
    equal["seconds"] &= not conditions
    allowed = equal[budget.name] or (budget is FLOPS and rules.allow_unequal)
    by_seed, interval = _difference(base.rows, side.rows, rules.confidence)
    paired = by_seed is not None
    facts: MetricFacts = side.row["metric_facts"]
    outcome, why = _outcome(interval, facts.lower_is_better) if allowed else ("refused", "")
    reading: CurveReading | None = None
    notes = _notes(base.row, side.row, base.rows, side.rows, by_seed)
    if budget is SECONDS:
        outcome, why = _limit_by_time(base, side, rules.time_tolerance, outcome, why)
        notes += _time_notes(base, side, rules.time_tolerance)
    if allowed:
        tail = _budget_in_words(budget, ratio, equal[budget.name], base, side)
        n = f"n={interval.n}" if paired else f"n={len(base.rows)} and {len(side.rows)}"
        verdict = _verdict(facts.unit, interval, n, tail, outcome, why)
    else:
        verdict = _refusal(base.row, side.row, budget, ratio, rules, conditions)
    if allowed and not equal[budget.name]:
        notes.append("the budgets are not equal, so the difference is not the transform's alone")
    if rules.at and not equal[budget.name] and not (budget is SECONDS and conditions):
        reading = _reading(base, side, budget, rules.confidence)
        notes.append(_reading_in_words(reading, side, budget, facts.unit, base))
    return Comparison(
        baseline=base.name,
        candidate=side.name,
        metric=side.row["metric"],
        lower_is_better=facts.lower_is_better,
        outcome=outcome,
        verdict=verdict,
        baseline_mean=base.row["mean"],
        candidate_mean=side.row["mean"],
        baseline_costs=costs(base.row),
        candidate_costs=costs(side.row),
        flops_ratio=ratios["flops"],
        allowed=allowed,
        paired=paired,
        n=interval.n,
        baseline_n=len(base.rows),
        candidate_n=len(side.rows),
        difference=interval.mean if allowed else None,
        low=interval.low if allowed else None,
        high=interval.high if allowed else None,
        degrees_of_freedom=interval.degrees_of_freedom if allowed else None,
        confidence=rules.confidence,
        equal_flops=equal["flops"],
        notes=tuple(notes),
        seeds=tuple(by_seed or ()),
        at=budget.name,
        seconds_ratio=ratios["seconds"],
        equal_seconds=equal["seconds"],
        conditions=tuple(conditions),
        curve=reading,
    )


def _ratio(before: float | None, after: float | None) -> float | None:
    return after / before if after and before else None


def _difference(
    before: Sequence[TableRow], after: Sequence[TableRow], confidence: float
) -> tuple[dict[int, tuple[float, float]] | None, statistics.Interval]:
    """The pairs by seed, None where the groups are two independent samples; and the interval of the difference."""
    by_seed = _pairs(before, after)
    fewer, more = sorted((len(before), len(after)))
    if len(by_seed) >= FEWEST_SEEDS or len(by_seed) == fewer >= 2 or len(by_seed) == more:
        values = list(by_seed.values())
        return by_seed, statistics.paired([a for a, _ in values], [b for _, b in values], confidence)
    return None, statistics.welch(_values(before), _values(after), confidence)


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
    rates = {rate.name: row[rate.name] for rate in RATES}
    return Costs(row["flops"], row["seconds"], row["peak_bytes"], row["optimizer_bytes"], rates)


def _distance(base: _Side, side: _Side, budget: Budget) -> tuple[bool, float, int]:
    """Sorts baselines by how far the budgets differ (in logarithms), then by the number of runs.

    Before that: by equal steps for FLOPs, by the same device and versions for time.
    """
    ratio = _ratio(base.row[budget.name], side.row[budget.name])
    if budget is FLOPS:
        last = base.row["steps"] != side.row["steps"]
    else:
        last = bool(timing.same_conditions(base.runs, side.runs))
    return last, abs(math.log(ratio)) if ratio else math.inf, -base.row["n"]


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


def _limit_by_time(base: _Side, side: _Side, tolerance: float, outcome: Outcome, why: str) -> tuple[Outcome, str]:
    """No claim at equal time where a run is known to have shared its device, or seeds of one group took unequal times.

    The seconds of a shared device are those of all its runs, and where they differ from seed to seed something else did too.
    """
    if outcome not in ("better", "worse"):
        return outcome, why
    shared = [each.name for each in (side, base) if any(row["alone"] is False for row in each.rows)]
    if shared:
        of = "their" if len(shared) > 1 else "its"
        return "no claim", f"{' and '.join(shared)} shared {of} device, so wall times are not of runs alone"
    varying = [each.name for each in (side, base) if _varies(each, tolerance)]
    if varying:
        return "no claim", f"wall times of the runs of {' and '.join(varying)} vary by more than {100 * tolerance:g} %"
    return outcome, why


def _varies(side: _Side, tolerance: float) -> bool:
    """Whether a run's wall time is not its group's mean within the tolerance."""
    mean = side.row["seconds"]
    return any(abs(row["seconds"] / mean - 1) > tolerance for row in side.rows if row["seconds"] is not None and mean)


def _budget_in_words(budget: Budget, ratio: float | None, equal: bool, base: _Side, side: _Side) -> str:
    known = f"at {'unknown' if ratio is None else f'{ratio:.4f}x'} {budget.title}{'' if equal else ' (unequal)'}"
    unknown = any(row["alone"] is None for row in (*base.rows, *side.rows))
    return f"{known}, not known whether alone on the device" if budget is SECONDS and unknown else known


def _verdict(
    unit: str, interval: statistics.Interval, n: str, budget: str, outcome: Outcome | None, why: str = ""
) -> str:
    """`+1.3 points [0.6, 2.1], n=3, at 1.0000x training FLOPs: better`; without the outcome where that is None."""
    digits = _digits(interval, percent=unit == "points")
    parts = [f"{_signed(interval.mean, digits)} {unit}"]
    if interval.low is not None and interval.high is not None:
        parts[0] += f" [{_number(interval.low, digits)}, {_number(interval.high, digits)}]"
    text = ", ".join(part for part in (*parts, n, budget) if part)
    return f"{text}: {outcome}{f', {why}' if why else ''}" if outcome else text


def _refusal(
    base: TableRow,
    row: TableRow,
    budget: Budget,
    ratio: float | None,
    rules: ComparisonRules,
    conditions: Sequence[str],
) -> str:
    if budget is SECONDS and conditions:
        return f"refused: wall times of different conditions do not compare ({'; '.join(conditions)})"
    tolerance = rules.tolerance if budget is FLOPS else rules.time_tolerance
    budgets = budget.amounts(row[budget.name], base[budget.name])
    if ratio is None:
        return f"refused: {budgets}, so it is unknown whether the budgets are equal"
    return f"refused: {budgets} are {ratio:.4f}x, further from 1 than {100 * tolerance:g} %"


def _reading(base: _Side, side: _Side, budget: Budget, confidence: float) -> CurveReading | None:
    """Where the candidate's curves were when the baseline had ended; None where one of them had not been evaluated by then."""
    ends = [end for run in base.runs if (end := number(run.last.get(budget.name))) is not None]
    if len(ends) < len(base.runs) or not ends:
        return None
    limit = statistics.mean(ends)
    points = [read_curve(run, side.row["metric"], budget.name, limit) for run in side.runs]
    known = [point for point in points if point is not None]
    if len(known) < len(points):
        return None
    rows = [{**row, "value": point.value} for row, point in zip(side.rows, known, strict=True)]
    by_seed, interval = _difference(base.rows, rows, confidence)
    return CurveReading(
        limit=limit,
        taken=statistics.mean([point.used for point in known]),
        progress=statistics.mean([point.progress for point in known]),
        mean=statistics.mean([point.value for point in known]),
        n=interval.n,
        paired=by_seed is not None,
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
    )


def _reading_in_words(reading: CurveReading | None, side: _Side, budget: Budget, unit: str, base: _Side) -> str:
    if reading is None:
        return (
            f"{side.name} has no evaluation by the {budget.title} at which {base.name} ended, so no curve is read there"
        )
    share = 100 * reading.progress
    where = "its end" if share >= 100 else f"{share:.0f} % of the way, its schedule not at the end"
    n = f"n={reading.n}" if reading.paired else f"n={len(base.rows)} and {len(side.rows)}"
    difference = _verdict(
        unit,
        statistics.Interval(reading.n, reading.difference, None, None, None, reading.low, reading.high),
        n,
        "",
        None,
    )
    limit, taken = (budget.reached(amount) for amount in (reading.limit, reading.taken))
    return (
        f"on its curve, no verdict: when {base.name} ended, at {limit}, {side.name} was at {reading.mean:.5g} "
        f"(its last evaluation not later: {taken}, {where}), {difference}"
    )


def _notes(
    base: TableRow,
    row: TableRow,
    before: Sequence[TableRow],
    after: Sequence[TableRow],
    by_seed: Mapping[int, Any] | None,
) -> list[str]:
    notes: list[str] = []
    paired, pairs = by_seed is not None, len(by_seed if by_seed is not None else _pairs(before, after))
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
        if measured and audited and abs(measured / audited - 1) > FLOPS.tolerance:
            notes.append(f"{side['group']} used {measured / audited:.4f}x the FLOPs of its audit")
    return notes


def _time_notes(base: _Side, side: _Side, tolerance: float) -> list[str]:
    """What is known of the wall times: who was alone on the device, who was resumed, how far seeds differ."""
    notes: list[str] = []
    sides = (side, base)
    if all(row["alone"] for each in sides for row in each.rows):
        notes.append("every run was alone on its device, by provenance and the other runs of this report")
    for each in sides:
        others = list(dict.fromkeys(row["alone_why"] for row in each.rows if not row["alone"]))
        if others:
            more = f", and {len(others) - 1} more reasons" if len(others) > 1 else ""
            notes.append(f"{each.name}: not shown to be alone on its device: {others[0]}{more}")
        if count := timing.resumed(each.runs):
            runs = "1 run was" if count == 1 else f"{count} runs were"
            notes.append(f"{each.name}: {runs} resumed; wall time is the sum of the sessions")
        if _varies(each, tolerance):
            used = numbers([row["seconds"] for row in each.rows])
            notes.append(f"{each.name}: wall times of its runs are {min(used):,.1f} to {max(used):,.1f} s")
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
