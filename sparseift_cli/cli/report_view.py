"""What `sparseift report` shows: groups (or runs), unfinished runs, comparisons, published numbers and spectra."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.sheets import Column, Sheet, integer, stdout
from ..report import frame as frames
from ..report.budgets import BUDGETS, FLOPS
from ..report.make import ReportOptions, sort
from ..report.published import PublishedRow, evidence
from ..report.rates import RATES
from ..report.report import Comparison, Report
from ..report.terminal import bar, can_show_blocks, curves_by_group, curves_by_run, sparkline
from .options import Format
from .output import render
from .report_sweep_view import sweep_json, sweep_sheets

SCHEMA = "sparseift.report/1"
_STATES = {"finished": "green", "running": "cyan", "stopped": "yellow"}
_OUTCOMES = {"better": "green", "worse": "red", "refused": "yellow"}
_GROUP_SHOWN = (
    "group",
    "n",
    "metric",
    "mean",
    "std",
    "low",
    "high",
    "best",
    "steps",
    "flops",
    "flops_ratio",
    "seconds",
    "peak_bytes",
    "optimizer_bytes",
)
_RUN_SHOWN = (
    "path",
    "state",
    "step",
    "steps",
    "seed",
    "metric",
    "value",
    "best",
    "flops_ratio",
    "seconds",
    "peak_bytes",
)


def decimals(value: Any) -> str:
    """Five significant digits: 98.310, 2.5343, 0.067614; every digit before the point up to a million, 3.0888e+27."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:#.5g}" if abs(value) < 1e5 else str(value) if abs(value) < 1e6 else f"{value:.5g}"


def _three(value: float) -> str:
    """Three significant digits, and every digit before the point, where a table has room for them."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def mebibytes(value: float) -> str:
    """Bytes in units of 2^20."""
    return f"{value / 2**20:,.1f}" if value >= 2**20 else f"{value / 2**20:.2g}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _times(value: float) -> str:
    return f"{value:.4f}x"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _flops(value: float) -> str:
    """Training FLOPs to four digits in a table; JSON and CSV hold every one."""
    return f"{value:.4g}"


def _yes_no(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value))


_CURVE, _BAR = 12, 10  # characters of a learning curve, and of a bar
_HEADS: Mapping[str, tuple[str, Callable[[Any], str], bool, int]] = {
    # column: header, how it is shown, right-aligned, priority (the highest is left out first on a narrow terminal)
    "group": ("group", str, False, 0),
    "path": ("run", str, False, 0),
    "recipe": ("recipe", str, False, 1),
    "n": ("n", _count, True, 0),
    "metric": ("metric", str, False, 0),
    "mean": ("mean", decimals, True, 0),
    "std": ("std", _three, True, 4),
    "low": ("95 % low", decimals, True, 1),
    "high": ("high", decimals, True, 1),
    "best": ("best", decimals, True, 5),
    "value": ("last", decimals, True, 0),
    "steps": ("steps", _count, True, 6),
    "flops": ("FLOPs", _flops, True, 3),
    "flops_ratio": ("x dense", _times, True, 2),
    "flops_spent": ("used", _flops, True, 3),
    "flops_executed": ("executed", _flops, True, 4),
    "dense_flops": ("dense FLOPs", _flops, True, 3),
    "seconds": ("seconds", _seconds, True, 7),
    "peak_bytes": ("peak MiB", mebibytes, True, 9),
    "optimizer_bytes": ("optimiser MiB", mebibytes, True, 10),
    "state": ("state", str, False, 0),
    "step": ("step", _count, True, 0),
    "seed": ("seed", str, True, 1),
    "params": ("params", _count, True, 3),
    "nonzero_params": ("non-zero", _count, True, 3),
    **{rate.name: (rate.head, _three, True, 8 if rate.share else 7) for rate in RATES},
    "alone": ("alone", _yes_no, False, 6),
}


@dataclass(frozen=True, slots=True)
class ReportView:
    """A report, the columns to show (None: the usual ones), and the options it was made with.

    Raises:
        UsageError: there is no such column.
    """

    report: Report
    columns: Sequence[str] | None
    options: ReportOptions

    def __post_init__(self) -> None:
        for name in self.columns or ():
            frames.require_column(name, self._known(), "--columns")

    @property
    def by_run(self) -> bool:
        return "path" in self.options.by

    def _known(self) -> Sequence[str]:
        return list((self.report.frame if self.by_run else self.report.groups).columns)

    def show(self, fmt: Format, output: Path | None) -> None:
        """Print it, or write it whole to `output`."""
        plain = output is None and not can_show_blocks(stdout().encoding)
        sheets = [self._main(fmt, plain)]
        if not self.by_run:
            sheets += [s for s in (self._unfinished(fmt, plain), self._comparisons(fmt)) if s.rows]
            sheets += sweep_sheets(self.report)
        if self.report.reference:
            sheets.append(self._reference(fmt))
        if self.report.spectra:
            sheets.append(_spectra_sheet(self.report))
        render(sheets, self.payload(), fmt, output)

    def payload(self) -> dict[str, Any]:
        """The JSON, schema sparseift.report/1."""
        rows = self._rows()
        report = self.report
        hidden = () if report.at else frames.ON_REQUEST
        names = list(self.columns or (name for name in frames.visible(self._known()) if name not in hidden))
        return {
            "schema": SCHEMA,
            "command": list(report.command),
            "group_by": ["run" if name == "path" else name for name in self.options.by],
            "confidence": self.options.rules.confidence,
            **({"at": list(report.at)} if report.at else {}),
            "runs" if self.by_run else "groups": [{name: clean(row[name]) for name in names} for row in rows],
            **(
                {}
                if self.by_run
                else {
                    "unfinished": [
                        {
                            name: clean(row[name])
                            for name in ("path", "group", "seed", "state", "step", "steps", "metric", "value")
                        }
                        for row in self._unfinished_rows()
                    ]
                }
            ),
            **({} if self.by_run else sweep_json(self.report)),
            "comparisons": [comparison_json(c, self.report.at) for c in report.comparisons],
            "reference": [published_row_json(b) for b in report.reference],
            **_spectra_payload(report),
            "skipped": [{"path": str(path), "reason": reason} for path, reason in report.skipped],
            "notes": list(report.notes),
            "warnings": [f"{run.path}: {text}" for run in report.runs for text in run.warnings],
        }

    def _rows(self) -> list[dict[str, Any]]:
        if not self.by_run:
            return frames.records(self.report.groups)
        return frames.records(sort(self.report.frame, self.options.sort))

    def _unfinished_rows(self) -> list[dict[str, Any]]:
        return [row for row in frames.records(self.report.frame) if row["state"] != "finished"]

    def _main(self, fmt: Format, ascii_only: bool) -> Sheet:
        rows = self._rows()
        more = frames.ON_REQUEST if self.report.at else ()
        if fmt is not Format.csv:  # whose columns are always the same
            more = tuple(name for name in more if any(row[name] is not None for row in rows))
        names = self.columns or (*(_RUN_SHOWN if self.by_run else _GROUP_SHOWN), *more)
        finished = sum(run.state == "finished" for run in self.report.runs)
        title = f"{_many(len(self.report.runs), 'run')} ({finished} finished)"
        title += "" if self.by_run else f" in {_many(len(rows), 'group')}"
        notes = list(self.report.notes)
        if not self.by_run and self.columns is None:
            notes.append(
                "mean, std, 95 % interval (Student's t): over n seeds, at the end of training; best: mean of each "
                "run's best. FLOPs: of training, audited."
            )
        if self.report.at and self.columns is None:
            notes += _rate_notes(rows)
        numbers = frames.metrics_of(self.report.frame)
        columns = [_column(n, asked=self.columns is not None, number=n in numbers) for n in names]
        if fmt is Format.table and self.columns is None:  # a picture, so no other format has it
            key, found = (
                ("path", curves_by_run(self.report)) if self.by_run else ("group", curves_by_group(self.report))
            )
            rows = [{**row, "curve": found[row[key]]} for row in rows]
            at = next(i + 1 for i, column in enumerate(columns) if column.key == "best")
            columns.insert(
                at, Column("curve", "curve", lambda v: sparkline(v, _CURVE, ascii_only=ascii_only), priority=8)
            )
        return Sheet(title, columns, _for(fmt, rows), notes)

    def _unfinished(self, fmt: Format, ascii_only: bool) -> Sheet:
        rows = self._unfinished_rows()
        columns = [
            Column("path", "run"),
            _column("state"),
            _column("step"),
            Column("steps", "of", _count, right=True),
            Column("metric", "metric", priority=2),
            Column("value", "last", decimals, right=True, priority=1),
        ]
        if fmt is Format.table:
            rows = [{**row, "progress": row["step"] / row["steps"] if row["steps"] else None} for row in rows]
            columns.append(Column("progress", "progress", lambda v: bar(v, _BAR, ascii_only=ascii_only), priority=3))
        return Sheet("Not finished, so not in any mean", columns, _for(fmt, rows))

    def _comparisons(self, fmt: Format) -> Sheet:
        for_reader = fmt in (Format.table, Format.md)  # sentences are below the table, where they may wrap
        report, at = self.report, self.report.at
        rows = [comparison_row(c, at) for c in report.comparisons]
        columns = [
            Column("candidate", "group"),
            *([Column("at", "at", lambda v: BUDGETS[v].short)] if at else []),
            Column("baseline", "baseline", priority=4),
            Column("metric", "metric", priority=3),
            Column("difference", "diff", _signed, right=True),
            Column("low", "low", _three, right=True, priority=1),
            Column("high", "high", _three, right=True, priority=1),
            Column("n", "n", _count, right=True, priority=2),
            Column("flops_ratio", "FLOPs", _times, right=True, priority=2 if at else 0),
            *([Column("seconds_ratio", "time", _times, right=True, priority=2)] if at else []),
            Column("outcome", "outcome", priority=0 if at else 2, style=lambda v: _OUTCOMES.get(v, "")),
        ]
        if not for_reader:
            shown = {column.key for column in columns}
            columns += [Column(key, key) for key in (rows[0] if rows else ()) if key not in shown]
        notes = []
        for i, c in enumerate(report.comparisons if for_reader else ()):
            same = i > 0 and report.comparisons[i - 1].candidate == c.candidate and len(at) > 1
            notes += sentences(c, at, costs=not same or report.comparisons[i - 1].baseline != c.baseline)
        if at:
            budgets = " and ".join(f"equal {BUDGETS[name].short}" for name in at)
            what = f" at {budgets}{_unequal(report.comparisons)}: difference, 95 % interval, ratios of FLOPs and time"
        else:
            what = f"{_unequal(report.comparisons)}: difference, 95 % interval, FLOPs ratio"
        return Sheet(f"Against {self.options.baseline}{what}", columns, _for(fmt, rows), notes)

    def _reference(self, fmt: Format) -> Sheet:
        rows = [published_row_json(b) for b in self.report.reference]
        for_reader = fmt in (Format.table, Format.md)
        columns = [
            Column("model", "model"),
            Column("data", "data"),
            Column("transform", "transform", priority=3),
            Column("sparsity", "sparsity", lambda v: f"{v:g}", right=True, priority=1),
            Column("algorithm", "algorithm", priority=5),
            Column("metric", "metric", priority=6),
            Column("dense", "dense", _plain, right=True),
            Column("value", "published", _plain, right=True),
            Column("difference", "+-", _signed, right=True),
            Column("evidence", "tag"),
            Column("our_dense", "our dense", decimals, right=True, priority=2),
            Column("our_value", "ours", decimals, right=True, priority=0),
            Column("our_difference", "our +-", _signed, right=True, priority=0),
            Column("n", "n", _count, right=True, priority=4),
            Column("group", "group", priority=7),
        ]
        if not for_reader:
            columns += [Column("source", "source"), Column("note", "note")]
        name = self.options.reference or "paper"
        notes = [f"[{tag}] {meaning}" for tag, meaning in evidence(name).items()]
        notes += list(dict.fromkeys(b.published.source for b in self.report.reference))
        notes += [f"{b.published.model} on {b.published.data}: {b.note}" for b in self.report.reference if b.note]
        return Sheet(f"Published results and ours: {name}", columns, _for(fmt, rows), notes if for_reader else [])


def _unequal(comparisons: Sequence[Comparison]) -> str:
    """For the headline: how many comparisons are of unequal budgets."""
    comparisons = [c for c in comparisons if c.at == FLOPS.name]
    unequal = sum(c.allowed and not c.equal for c in comparisons)
    if not unequal:
        return ""
    return (
        " at unequal FLOPs" if unequal == len(comparisons) else f" ({unequal} of {len(comparisons)} at unequal FLOPs)"
    )


def _rate_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What FLOPs a second are, and why a share of the peak is missing."""
    notes = [
        "useful: FLOPs that the masks leave; executed: those that the device computed, zeros too; both of training, over the "
        "wall time of the whole run with compilation and evaluations. alone: on the device, by provenance; empty: not known."
    ]
    if any(row["useful_tflops"] is not None and row["useful_mfu"] is None for row in rows):
        notes.append("MFU: the peak of a device is not known here; --peak-tflops gives it.")
    return notes


def sentences(c: Comparison, at: Sequence[str], *, costs: bool = True) -> list[str]:
    """The verdict, the costs of both groups, and the notes of the comparison."""
    budget = f" at equal {BUDGETS[c.at].short}" if at else ""
    lines = [f"{c.candidate} against {c.baseline}{budget}: {c.verdict}{c.pairing}"]
    if costs and (known := _costs_in_words(c, bool(at))):
        lines.append(f"  {known}")
    return lines + [f"  {note}" for note in c.notes]


def _costs_in_words(c: Comparison, rates: bool) -> str:
    shown = [
        ("training FLOPs", "flops", integer, ""),
        ("wall time", "seconds", _seconds, " s"),
        ("peak memory", "peak_bytes", mebibytes, " MiB"),
        ("optimiser", "optimizer_bytes", mebibytes, " MiB"),
    ]
    sides = (c.candidate_costs, c.baseline_costs)
    both = [(name, [getattr(side, key) for side in sides], show, unit) for name, key, show, unit in shown]
    if rates:
        both += [(rate.title, [side.rates.get(rate.name) for side in sides], _three, rate.unit) for rate in RATES]
    return "; ".join(
        f"{name} {' against '.join('unknown' if v is None else show(v) for v in values)}{unit}"
        for name, values, show, unit in both
        if any(v is not None for v in values)
    )


def comparison_row(c: Comparison, at: Sequence[str]) -> dict[str, Any]:
    """A comparison as one flat row; the costs of the baseline are baseline_flops, baseline_seconds, ...

    Where a comparison `at` a budget was asked for, also that budget, wall times, FLOPs a second, and the reading of the curve.
    """
    row = {
        "candidate": c.candidate,
        "baseline": c.baseline,
        "metric": c.metric,
        "lower_is_better": c.lower_is_better,
        "outcome": c.outcome,
        "difference": c.difference,
        "low": c.low,
        "high": c.high,
        "confidence": c.confidence,
        "n": c.n,
        "candidate_n": c.candidate_n,
        "baseline_n": c.baseline_n,
        "paired": c.paired,
        "degrees_of_freedom": c.degrees_of_freedom,
        "mean": c.candidate_mean,
        "baseline_mean": c.baseline_mean,
        "flops_ratio": c.flops_ratio,
        "equal_flops": c.equal_flops,
        "allowed": c.allowed,
        **{name: getattr(c.candidate_costs, name) for name in ("flops", "seconds", "peak_bytes", "optimizer_bytes")},
        **{
            f"baseline_{name}": getattr(c.baseline_costs, name)
            for name in ("flops", "seconds", "peak_bytes", "optimizer_bytes")
        },
        "verdict": c.verdict,
        "notes": "; ".join(c.notes),
    }
    return {**row, **_at_budget_row(c)} if at else row


def _at_budget_row(c: Comparison) -> dict[str, Any]:
    read = ("limit", "taken", "progress", "mean", "n", "difference", "low", "high")
    return {
        "at": c.at,
        "seconds_ratio": c.seconds_ratio,
        "equal_seconds": c.equal_seconds,
        **{rate.name: c.candidate_costs.rates.get(rate.name) for rate in RATES},
        **{f"baseline_{rate.name}": c.baseline_costs.rates.get(rate.name) for rate in RATES},
        **{f"curve_{name}": getattr(c.curve, name) if c.curve else None for name in read},
    }


def comparison_json(c: Comparison, at: Sequence[str]) -> dict[str, Any]:
    return {k: clean(v) for k, v in (comparison_row(c, at) | {"notes": list(c.notes)}).items()}


def published_row_json(b: PublishedRow) -> dict[str, Any]:
    """A published result; the numbers of our group begin with `our_`."""
    p = b.published
    return {
        "model": p.model,
        "data": p.data,
        "transform": p.transform,
        "sparsity": p.sparsity,
        "algorithm": p.algorithm,
        "metric": p.metric,
        "dense": p.dense,
        "value": p.value,
        "difference": p.difference,
        "evidence": p.evidence,
        "epochs": p.epochs,
        "steps": p.steps,
        "group": b.group,
        "n": b.n,
        "our_dense": clean(b.dense),
        "our_value": clean(b.value),
        "our_difference": clean(b.difference),
        "our_epochs": clean(b.epochs),
        "source": p.source,
        "note": b.note,
    }


def _spectra_sheet(report: Report) -> Sheet:
    """How well the masks connect: means over masked layers and runs. `sparseift inspect RUN --spectral` shows every layer."""

    def number(key: str, header: str, priority: int = 0) -> Column:
        return Column(key, header, lambda v: f"{v:,.4f}", right=True, priority=priority)

    columns = [
        Column("group", "group"),
        Column("step", "step", integer, right=True),
        Column("runs", "runs", integer, right=True, priority=4),
        Column("layers", "layers", integer, right=True, priority=3),
        number("spectral_gap", "spectral gap"),
        number("ramanujan_gap", "Ramanujan gap"),
        number("weighted_spectral_gap", "weighted gap", 2),
        Column("ramanujan", "at 0 or above", lambda v: f"{100 * v:.0f} %", right=True, priority=1),
    ]
    notes = [
        "Means over masked layers and runs. A layer whose Ramanujan gap is at least 0 is well connected; at 0 or above: "
        "the share of them. sparseift inspect RUN --spectral shows every layer."
    ]
    return Sheet("How well the masks connect, at every kept checkpoint", columns, _summed(report), notes)


def _spectra_payload(report: Report) -> dict[str, Any]:
    """Rows of the sheet for JSON, and every layer of every run. Empty without --spectral."""
    layers = [
        {"path": str(one.path), "group": one.group, **row.to_json()} for one in report.spectra for row in one.rows
    ]
    return {"spectra": _summed(report), "spectra_layers": layers}


def _summed(report: Report) -> list[dict[str, Any]]:
    if not report.spectra:
        return []
    from ..report.spectral.history import summed  # NumPy and SciPy: only where spectra were asked for

    return summed(report.spectra)


def clean(value: Any) -> Any:
    """JSON has no NaN and no infinity: the word instead, as strict readers would otherwise refuse the whole report."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def _column(name: str, *, asked: bool = False, number: bool = False) -> Column:
    head, show, right, priority = _HEADS.get(name, (name, _plain, number, 5))
    style = (lambda v: _STATES.get(v, "")) if name == "state" else None
    return Column(name, head, show, right, 0 if asked else priority, style)


def _for(fmt: Format, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """CSV keeps a list as one cell of JSON."""
    if fmt is not Format.csv:
        return rows
    return [{k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if value == round(value, 4) and abs(value) < 1e6 else decimals(value)
    return str(value)


def _signed(value: float) -> str:
    text = _three(value)
    return text if text.startswith("-") else f"+{text}"
