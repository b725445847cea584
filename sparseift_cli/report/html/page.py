"""The report as one HTML file that needs nothing else: no network, no script, light and dark, made to print.

The sections answer a reader's questions in turn: what is the verdict, what are the numbers, what do they look like, where do
the FLOPs go, what was published, where do the runs come from, how do I repeat it. `page.html.j2` is the layout; this module
prepares its data: texts, tables of texts, and pictures. None in a table is an empty cell.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...recipe.load import for_others
from ...runs.provenance import kernels_in_words
from ...version import __version__
from ..budgets import BUDGETS
from ..plots.families import Family, Group, is_number
from ..plots.pictures import Picture, pictures
from ..published import evidence
from ..rates import RATES, Rate
from ..read import Run
from ..report import Comparison, Report
from ..spectral.history import by_layer, summed
from .svg import inline

OUTCOMES = {  # a mark beside the word, so that an outcome is not shown by colour alone
    "better": "▲",
    "worse": "▼",
    "no difference shown": "≈",
    "no claim": "○",
    "refused": "✕",
}
_HEADINGS = {
    "verdict": "Verdict",
    "results": "Results",
    "pictures": "Pictures",
    "masks": "How well the masks connect",
    "audit": "Where the FLOPs go",
    "published": "Published results and ours",
    "provenance": "Provenance",
    "left-out": "Left out, and warnings",
    "repeat": "How to repeat it",
}
# How `train --parallel` starts a run; --seat= is what older versions called --slot=.
_INTERNAL_OPTIONS = ("--events", "--at-once=", "--seat=", "--slot=", "--json", "--")

Cells = Sequence[str | None]


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A heading, and what the cells hold: numbers are aligned right, words may break over lines, other cells may not."""

    name: str
    kind: Literal["", "number", "words"] = ""


@dataclass(frozen=True, slots=True)
class Table:
    """The first cell of a row is its name."""

    caption: str
    columns: Sequence[TableColumn]
    rows: Sequence[Cells]


@dataclass(frozen=True, slots=True)
class InlinePicture:
    """A picture as the page holds it."""

    svg: str
    described: str
    caption_id: str


def page(report: Report, title: str = "Iso-FLOP report") -> str:
    """The whole document. Every name in it is escaped; it loads nothing, from no network and no other file.

    The same report gives the same page: nothing in it depends on the time at which it is made.
    """
    folder = Path(__file__).parent
    # None is an empty cell; an unknown name in the template is an error, not an empty text
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: "" if value is None else value,
        keep_trailing_newline=True,
    )
    data = _page_data(report)
    return environment.get_template("page.html.j2").render(
        page=data,
        headings={name: heading for name, heading in _HEADINGS.items() if name not in data or data[name]},
        marks=OUTCOMES,
        parts_of_name=_parts_of_name,
        title=title,
        version=__version__,
        css=(folder / "page.css").read_text(encoding="utf-8"),
    )


def command(run: Run) -> str | None:
    """What started a run, ready for a shell; None where the run does not record it.

    Without options that only sparseift itself gives, the program without its folder on that machine, and recipes by the
    names that they have on others.
    """
    sessions = (run.provenance or {}).get("sessions") or [{}]
    given = sessions[0].get("command")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        return None
    first, *rest = map(str, given)
    name = PurePath(first).name
    if "--events" in rest:
        rest = [word for word in rest if word.rstrip("0123456789") not in _INTERNAL_OPTIONS]
    return shlex.join(["sparseift" if name == "__main__.py" else name, *map(for_others, rest)])


def _page_data(report: Report) -> dict[str, Any]:
    """What the template shows, by section; a section without content is empty or None."""
    drawn = list(pictures(report))
    fair, unequal = _by_fairness(report.comparisons)
    return {
        "scope": _scope(report),
        "headline": _headline(report),
        "verdicts": [(c, _budget_of(c, report)) for c in (*fair, *unequal)],
        "results": [*_results([family for family, _ in drawn], report), *_comparisons(report)],
        "pictures": list(_pictures(drawn)),
        "masks": _masks(report),
        "audit": list(_audits(drawn)),
        "published": _published(report),
        "provenance": _provenance(report),
        "left-out": list(_left_out(report)),
        "commands": list(dict.fromkeys(c for run in report.runs if (c := command(run)))),
        "command": shlex.join(report.command),
    }


def _scope(report: Report) -> str:
    states = Counter(run.state for run in report.runs if run.state != "finished")
    unfinished = "".join(f", {count} {state}" for state, count in sorted(states.items()))
    return (
        f"{_many(len(report.runs), 'run')}{unfinished}, {_many(len(report.groups), 'group')}; sparseift {__version__}"
    )


def _headline(report: Report) -> str:
    """How many comparisons had which outcome: together, those at unequal FLOPs apart, and where it was asked for by budget."""
    if not report.comparisons:
        return "Nothing was compared: it takes finished runs of a dense model and of a transformed one."
    if report.at:
        by_budget = {BUDGETS[name].short: [c for c in report.comparisons if c.at == name] for name in report.at}
        counts = [f"at equal {short}: {_outcome_counts(found)}" for short, found in by_budget.items() if found]
    else:
        fair, unequal = _by_fairness(report.comparisons)
        counts = [_outcome_counts(fair)] if fair else []
        counts += [f"at unequal FLOPs: {_outcome_counts(unequal)}"] if unequal else []
    return f"{_many(len(report.comparisons), 'comparison')} with the baseline: {'; '.join(counts)}."


def _by_fairness(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Those at equal budgets or refused, and those of unequal budgets."""
    unequal = [c for c in comparisons if c.allowed and not c.equal]
    return [c for c in comparisons if c not in unequal], unequal


def _budget_of(c: Comparison, report: Report) -> str:
    """What is written behind the outcome: at which budget, where that needs saying."""
    budget = BUDGETS[c.at].short
    if c.allowed and not c.equal:
        return f" at unequal {budget}"
    return f" at equal {budget}" if report.at else ""


def _outcome_counts(comparisons: Sequence[Comparison]) -> str:
    found = Counter(c.outcome for c in comparisons)
    return ", ".join(f"{found[outcome]} {outcome}" for outcome in OUTCOMES if found[outcome])


def _results(families: Sequence[Family], report: Report) -> Iterator[tuple[str, Table]]:
    """A table a family, a row a group. FLOPs a second are of a report at a budget, and those that any group has."""
    for family in families:
        rates = [r for r in RATES if report.at and any(g.row.get(r.name) is not None for g in family.groups)]
        columns = [
            *_columns("group", "transform", "algorithm"),
            *_columns("n", family.metric_name, "± std", "95 % interval", "training FLOPs", "× dense", kind="number"),
            *_columns("non-zero parameters", "parameters", "seconds", kind="number"),
            *_columns(*(rate.head for rate in rates), kind="number"),
        ]
        caption = f"{family.title}: means of n finished runs, one a seed, at the end of training; audited FLOPs of a whole run"
        yield family.title, Table(caption, columns, [_group_cells(group, rates) for group in family.groups])


def _group_cells(group: Group, rates: Sequence[Rate]) -> Cells:
    row = group.row
    interval = f"{_short(row.get('low'))} to {_short(row.get('high'))}" if is_number(row.get("low")) else None
    sparsity, transform = row.get("sparsity"), row.get("transform")
    if is_number(sparsity) and sparsity:
        transform = f"{transform} {100 * sparsity:g} %"
    return [
        group.short,
        _text(transform),
        _text(row.get("algorithm")),
        str(row.get("n")),
        _short(row.get("mean")),
        _short(row.get("std")),
        interval,
        _count(row.get("flops")),
        _ratio(row.get("flops_ratio")),
        _count(row.get("nonzero_params")),
        _count(row.get("params")),
        _short(row.get("seconds")),
        *(_short(row.get(rate.name)) for rate in rates),
    ]


def _comparisons(report: Report) -> Iterator[tuple[str, Table]]:
    """Every comparison in figures."""
    if not report.comparisons:
        return
    columns = [
        *_columns("candidate", "baseline", "metric"),
        *_columns("candidate mean", "baseline mean", "difference", "interval", "n", "FLOPs ratio", kind="number"),
        *(_columns("time ratio", kind="number") if report.at else ()),
        *(_columns("at equal") if report.at else ()),
        *_columns("outcome"),
    ]
    rows = [
        [
            c.candidate,
            c.baseline,
            c.metric,
            _short(c.candidate_mean),
            _short(c.baseline_mean),
            _signed(c.difference),
            f"{_signed(c.low, 3)} to {_signed(c.high, 3)}" if c.low is not None else None,
            f"{c.n}{' pairs' if c.paired else ''}",
            _ratio(c.flops_ratio),
            *((_ratio(c.seconds_ratio), BUDGETS[c.at].short) if report.at else ()),
            c.outcome,
        ]
        for c in report.comparisons
    ]
    how = {f"{100 * c.confidence:g} %" for c in report.comparisons}
    caption = f"Differences, candidate minus baseline, with {' or '.join(sorted(how))} intervals by Student's t"
    yield "Comparisons", Table(caption, columns, rows)


def _pictures(drawn: Sequence[tuple[Family, Sequence[Picture]]]) -> Iterator[dict[str, Any]]:
    """Of each family those that are not about one group alone."""
    for family, made in drawn:
        if shown := [_inline(picture) for picture in made if picture.group is None]:
            yield {"title": family.title, "pictures": shown}


def _masks(report: Report) -> dict[str, Any] | None:
    """A row a group and checkpoint, and every layer of the newest one on demand; None where no spectra were asked for."""
    if not report.spectra:
        return None
    columns = [
        *_columns("group"),
        *_columns("step", "runs", "layers", "spectral gap", "Ramanujan gap", kind="number"),
        *_columns("layers at 0 or above", "weighted gap", kind="number"),
    ]
    rows = [
        [
            row["group"],
            f"{row['step']:,}",
            str(row["runs"]),
            str(row["layers"]),
            _gap(row["spectral_gap"]),
            _gap(row["ramanujan_gap"]),
            None if row["ramanujan"] is None else f"{100 * row['ramanujan']:.0f} %",
            _gap(row["weighted_spectral_gap"]),
        ]
        for row in summed(report.spectra)
    ]
    caption = (
        "Means over masked layers and runs at every kept checkpoint; a Ramanujan gap of at least 0 is well connected"
    )
    groups = dict.fromkeys(one.group for one in report.spectra)
    return {"summary": Table(caption, columns, rows), "layers": [_mask_layers(report, group) for group in groups]}


def _mask_layers(report: Report, group: str) -> tuple[str, Table]:
    found = by_layer(report.spectra, group)
    newest = max(step for step, _ in found)
    columns = [
        *_columns("layer"),
        *_columns("non-zeros", "density", "s1", "s2", "spectral gap", "Ramanujan gap", "parts", kind="number"),
    ]
    rows = [
        [
            layer,
            f"{v['nnz']:,.0f}",
            *(_gap(v[key]) for key in ("density", "s1", "s2", "spectral_gap", "ramanujan_gap")),
            f"{v['components']:,.0f}",
        ]
        for (step, layer), v in found.items()
        if step == newest
    ]
    caption = f"{group}: every masked layer at step {newest:,}, means over the runs"
    return f"{group}: {len(rows)} masked layers", Table(caption, columns, rows)


def _audits(drawn: Sequence[tuple[Family, Sequence[Picture]]]) -> Iterator[dict[str, Any]]:
    """For each transformed group of a family: its totals, its picture, and a row a layer on demand."""
    for family, made in drawn:
        by_group = {picture.group.name: picture for picture in made if picture.group}
        groups = [_audit(family.plan_name(group), group, by_group.get(group.name)) for group in family.transformed]
        if groups:
            yield {"title": family.title, "groups": groups}


def _audit(name: str, group: Group, picture: Picture | None) -> dict[str, Any]:
    audit = group.audit or {}
    counted = f"1 MAC = {audit.get('flops_per_mac', 2)} FLOPs, causal attention counted {audit.get('causal')}"
    masks = ", trained without masks" if group.unmasked else ""
    layers = _audit_layers(name, audit)
    return {
        "name": name,
        "picture": _inline(picture) if picture else None,
        "totals": Table(
            f"{name}{masks}: totals of one sample; {counted}",
            [*_columns("total"), *_columns("dense", "transformed", "ratio", kind="number")],
            list(_totals(audit.get("totals") or {})),
        ),
        "summary": f"{name}: all {len(layers.rows)} layers",
        "layers": layers,
    }


def _totals(totals: Mapping[str, Any]) -> Iterator[Cells]:
    dense, transformed = totals.get("dense") or {}, totals.get("transformed") or {}
    names = {
        "forward_flops": "forward FLOPs",
        "training_flops": "training FLOPs",
        "params": "parameters",
        "nonzero_params": "non-zero parameters",
        "activation_factor": "activations, × dense",
    }
    for key, name in names.items():
        before, after = dense.get("params" if key == "nonzero_params" else key), transformed.get(key)
        ratio = after / before if is_number(after) and is_number(before) and before else None
        yield [name, _count(before), _short(after) if key == "activation_factor" else _count(after), _ratio(ratio)]


def _audit_layers(name: str, audit: Mapping[str, Any]) -> Table:
    columns = [
        *_columns("layer", "kind", "role", "status"),
        *_columns("dense MACs", "transformed MACs", "ratio", "density", "non-zeros", kind="number"),
        *_columns("why", kind="words"),
    ]
    rows = [
        [
            _text(r["name"]),
            _text(r.get("kind")),
            _text(r.get("role")),
            _text(r["status"]),
            _count(r["dense_macs"]),
            _count(r["transformed_macs"]),
            _ratio(r.get("ratio")),
            _ratio(r.get("density")),
            _count(r.get("nnz")),
            _text(r.get("reason")),
        ]
        for r in audit.get("layers", ())
    ]
    return Table(f"{name}: every layer, untouched ones too", columns, rows)


def _published(report: Report) -> dict[str, Any] | None:
    """The published rows, with ours where we have them."""
    if not report.reference:
        return None
    with_ours = any(row.group for row in report.reference)
    columns = [
        *_columns("published", "metric"),
        *_columns("dense", "with Sparse-IFT", "difference", kind="number"),
        *_columns("evidence"),
    ]
    if with_ours:
        columns += [*_columns("our group"), *_columns("n", "our dense", "ours", "our difference", kind="number")]
    columns += _columns("note", kind="words")
    rows = []
    for row in report.reference:
        p = row.published
        sparsity = "" if p.sparsity is None else f" {100 * p.sparsity:g} %"
        what = f"{p.model} on {p.data}: {p.transform}{sparsity}{f', {p.algorithm}' if p.algorithm else ''}"
        theirs = [_number(p.dense), _number(p.value), _number(p.difference, "+"), f"[{p.evidence}]"]
        ours = [_number(row.dense, ".4g"), _number(row.value, ".4g"), _number(row.difference, "+.3g")]
        rows.append(
            [what, p.metric, *theirs, *([row.group, _text(row.n), *ours] if with_ours else ()), row.note],
        )
    sources = "; ".join(dict.fromkeys(row.published.source for row in report.reference))
    return {
        "numbers": Table(f"Published numbers ({sources}), and ours where we trained the same", columns, rows),
        "evidence": [f"[{letter}] {meaning}" for letter, meaning in evidence().items()],
    }


def _provenance(report: Report) -> dict[str, Any] | None:
    """A row a run, and all facts of each group's newest session on demand."""
    if not report.runs:
        return None
    columns = [
        *_columns("run", "recipe", "state"),
        *_columns("seed", kind="number"),
        *_columns("started", "commit", "device"),
        *_columns("threads", "at once", kind="number"),
        *_columns("torch"),
    ]
    groups = []
    for label in dict.fromkeys(str(g) for g in report.frame["group"]):
        session = next((s for run in reversed(report.runs_of(label)) if (s := _newest_session(run))), None)
        if session:
            groups.append((label, list(_facts(session))))
    return {"runs": Table("Every run, by directory", columns, list(map(_run_cells, report.runs))), "groups": groups}


def _run_cells(run: Run) -> Cells:
    session = _newest_session(run)
    git = session.get("git") or {}
    return [
        run.stamp,
        run.name,
        run.state,
        _text(run.seed),
        _text(session.get("started")),
        (git.get("commit") or "")[:10] + (" + changes" if git.get("dirty") else ""),
        _text(session.get("device_name") or session.get("device")),
        _text(session.get("threads")),
        _text(session.get("at_once")),
        _text((session.get("versions") or {}).get("torch")),
    ]


def _newest_session(run: Run) -> Mapping[str, Any]:
    sessions = (run.provenance or {}).get("sessions") or [{}]
    return sessions[-1]


def _facts(session: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Every fact of a session, nested ones by their dotted name."""
    for key, value in session.items():
        name = f"{above}{key}"
        if name == "kernels":  # thousands of names
            value = kernels_in_words(session)
        if isinstance(value, Mapping) and value:
            yield from _facts(value, f"{name}.")
        elif value not in (None, {}, [], ""):
            yield name, shlex.join(map(str, value)) if isinstance(value, list) else str(value)


def _left_out(report: Report) -> Iterator[tuple[str, list[str]]]:
    """Directories that could not be read, what was wrong with those that could, and the report's notes."""
    if report.skipped:
        yield "Not read", [f"{path}: {reason}" for path, reason in report.skipped]
    warnings = [f"{run.path.parent.name}/{run.stamp}: {text}" for run in report.runs for text in run.warnings]
    if warnings:
        yield "Read, with warnings", warnings
    if report.notes:
        yield "Notes", list(report.notes)


def _inline(picture: Picture) -> InlinePicture:
    caption_id = f"{picture.name}-caption"
    return InlinePicture(inline(picture, caption_id), picture.described, caption_id)


def _parts_of_name(text: str | None) -> list[str]:
    """Parts of a name between which a line may break: after `_`, `/` and `.`."""
    return re.split(r"(?<=[_/])(?=\w)|(?<=\.)(?=[a-z])", text or "")


def _columns(*names: str, kind: Literal["", "number", "words"] = "") -> list[TableColumn]:
    return [TableColumn(name, kind) for name in names]


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _count(value: Any) -> str | None:
    return f"{round(value):,}" if is_number(value) else None


def _short(value: Any) -> str | None:
    """Four digits, zeros at the end too; large numbers whole, up to a million."""
    if not is_number(value) or 1000 <= abs(value) < 1e6:
        return _count(value)
    return f"{value:#.4g}".rstrip(".")


def _signed(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:+#.{digits}g}".rstrip(".").replace("-", "−")


def _gap(value: float | None) -> str | None:
    return None if value is None else f"{value:#.4g}".rstrip(".").replace("-", "−")


def _number(value: float | None, form: str = "") -> str | None:
    return None if value is None else f"{value:{form}}".replace("-", "−")


def _ratio(value: Any) -> str | None:
    return f"{value:.4f}" if is_number(value) else None
