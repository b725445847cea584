"""Where a report comes from: each run's provenance, what was left out, and the commands that make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ...recipe.load import for_others
from ..published import evidence
from ..read import Run
from ..report import Report
from .element import Child, Safe, element, folded, join, listing, numbers, plain, table, words

_INNER = ("--events", "--at-once=", "--seat=", "--json", "--")  # how `train --parallel` starts a run


def provenance(report: Report) -> Safe | None:
    """A row a run, and all that is known of each group's newest session on demand."""
    if not report.runs:
        return None
    columns = [
        *plain("run", "recipe", "state"),
        *numbers("seed"),
        *plain("started", "commit", "device"),
        *numbers("threads", "at once"),
        *plain("torch"),
    ]
    parts = [table("Every run, by directory", columns, [_run(run) for run in report.runs])]
    for label in dict.fromkeys(str(g) for g in report.frame["group"]):
        session = next((s for run in reversed(report.runs_of(label)) if (s := _session(run))), None)
        if session:
            parts.append(folded(label, element("dl", *_facts(session))))
    return join(parts)


def repeat(report: Report) -> Safe:
    """The commands that trained the runs, as they were given, and the one that made this report."""
    trained = dict.fromkeys(c for run in report.runs if (c := command(run)))
    parts = []
    if trained:
        parts += [element("p", "The runs:"), _code("\n".join(trained))]
    return join([*parts, element("p", "This report:"), _code(shlex.join(report.command))])


def left_out(report: Report) -> Safe | None:
    """Directories that could not be read, and what was odd about those that could."""
    parts: list[Child] = []
    if report.skipped:
        parts += [element("h3", "Not read"), listing(f"{path}: {reason}" for path, reason in report.skipped)]
    odd = [f"{run.path.parent.name}/{run.stamp}: {said}" for run in report.runs for said in run.warnings]
    if odd:
        parts += [element("h3", "Read, with warnings"), listing(odd)]
    if report.notes:
        parts += [element("h3", "Notes"), listing(report.notes)]
    return join(parts) if parts else None


def published(report: Report) -> Safe | None:
    """The published rows, ours beside them where there are any."""
    if not report.reference:
        return None
    columns = plain("published", "metric")
    columns += numbers("dense", "with Sparse-IFT", "difference")
    columns += plain("evidence")
    if any(b.group for b in report.reference):
        columns += [
            ("our group", ""),
            ("n", "number"),
            ("our dense", "number"),
            ("ours", "number"),
            ("our difference", "number"),
        ]
    columns += words("note")
    rows = []
    for b in report.reference:
        p = b.published
        sparsity = "" if p.sparsity is None else f" {100 * p.sparsity:g} %"
        what = f"{p.model} on {p.data}: {p.transform}{sparsity}{f', {p.algorithm}' if p.algorithm else ''}"
        ours = [b.group, _text(b.n), _number(b.dense, ".4g"), _number(b.value, ".4g"), _number(b.difference, "+.3g")]
        rows.append(
            [
                what,
                p.metric,
                _number(p.dense),
                _number(p.value),
                _number(p.difference, "+"),
                f"[{p.evidence}]",
                *(ours if len(columns) > 7 else ()),
                b.note,
            ]
        )
    sources = "; ".join(dict.fromkeys(b.published.source for b in report.reference))
    known = [f"[{letter}] {meaning}" for letter, meaning in evidence().items()]
    return join(
        [table(f"Published numbers ({sources}), and ours where we trained the same", columns, rows), listing(known)]
    )


def command(run: Run) -> str | None:
    """What started a run, ready for a shell: no options of our own use, the program without its folder on that machine,
    and recipes as they are called on others.
    """
    sessions = (run.provenance or {}).get("sessions") or [{}]
    given = sessions[0].get("command")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        return None
    first, *rest = map(str, given)
    name = PurePath(first).name
    rest = [word for word in rest if word.rstrip("0123456789") not in _INNER] if "--events" in rest else rest
    return shlex.join(["sparseift" if name == "__main__.py" else name, *map(for_others, rest)])


def _run(run: Run) -> list[Child]:
    session = _session(run)
    commit = ((session.get("git") or {}).get("commit") or "")[:10]
    dirty = " + changes" if (session.get("git") or {}).get("dirty") else ""
    return [
        run.stamp,
        run.name,
        run.state,
        _text(run.seed),
        _text(session.get("started")),
        commit + dirty,
        _text(session.get("device_name") or session.get("device")),
        _text(session.get("threads")),
        _text(session.get("at_once")),
        _text((session.get("versions") or {}).get("torch")),
    ]


def _session(run: Run) -> Mapping[str, Any]:
    """The newest one."""
    sessions = (run.provenance or {}).get("sessions") or [{}]
    return sessions[-1]


def _facts(session: Mapping[str, Any], above: str = "") -> list[Safe]:
    """Every fact of a session, nested ones by their dotted name."""
    facts = []
    for key, value in session.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            facts += _facts(value, f"{name}.")
        elif value not in (None, {}, []):
            said = shlex.join(map(str, value)) if isinstance(value, list) else str(value)
            facts += [element("dt", name), element("dd", said)]
    return facts


def _code(text: str) -> Safe:
    return element("pre", element("code", text), tabindex=0)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: float | None, form: str = "") -> str | None:
    return None if value is None else f"{value:{form}}".replace("-", "−")
