"""Two runs side by side: what differs in their recipes, in where they ran, and in what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, UsageError
from .collect import collect
from .exact import Exact, exact
from .grouping import flat
from .read import Run, number

_NOT_METRICS = ("masks",)  # a line's statistics of every weight: a thousand numbers
_BY_NATURE = ("started", "command", "from_step")  # of a session; differ in any two runs


@dataclass(frozen=True, slots=True)
class Change:
    """One key and its value in both; None where a run has no such key."""

    key: str
    a: Any
    b: Any

    @property
    def difference(self) -> float | None:
        """b - a of two numbers."""
        a, b = number(self.a), number(self.b)
        return None if a is None or b is None else b - a


@dataclass(frozen=True, slots=True)
class Diff:
    """What differs. Metrics are all there, equal ones too: the last evaluation, and the summary's FLOPs and parameters."""

    a: Run
    b: Run
    recipe: list[Change]
    environment: list[Change]
    metrics: list[Change]
    exact: Exact | None = None


def diff(a: Path, b: Path, *, bit_for_bit: bool = False) -> Diff:
    """Compare the run in `a` with the one in `b`.

    Raises:
        UsageError: a path is not there, or holds several runs.
        ArtifactError: a run is damaged; with `bit_for_bit` also where a checkpoint is.
    """
    one, other = single(a), single(b)
    return Diff(
        one,
        other,
        _changes(flat(one.recipe), flat(other.recipe)),
        _changes(environment(one), environment(other)),
        _changes(results(one), results(other), equal=True),
        exact(one, other) if bit_for_bit else None,
    )


def single(path: Path) -> Run:
    """The one run in `path`: the run directory itself, or a folder that holds no other.

    Raises:
        UsageError: there is none, or there are several.
        ArtifactError: it is damaged.
    """
    found = collect([path])
    if len(found.runs) == 1:
        return found.runs[0]
    if found.runs:
        shown = "".join(f"\n  {run.path}" for run in found.runs[:10])
        raise UsageError(f"{path} holds {len(found.runs)} runs{shown}", hint="diff compares two: give one of them")
    folder, reason = found.skipped[0]
    if found.damaged:
        raise ArtifactError(f"{folder}: {reason}", hint="diff needs two runs that can be read")
    raise UsageError(f"{folder}: {reason}", hint="give a run directory: runs/<recipe>/<date>-<hash>")


def environment(run: Run) -> dict[str, Any]:
    """Dotted keys of the run's last session: versions, commit, device, threads, data."""
    session = ((run.provenance or {}).get("sessions") or [{}])[-1]
    return flat({k: v for k, v in session.items() if k not in (*_BY_NATURE, "seed")}) if session else {}


def results(run: Run) -> dict[str, Any]:
    """Numbers of its last evaluation and of its summary."""
    last = {k: v for k, v in run.last.items() if k not in _NOT_METRICS and number(v) is not None}
    summary: Mapping[str, Any] = run.summary or {}
    more = {k: summary.get(k) for k in ("best", "params", "nonzero_params")}
    flops = {f"flops.{k}": v for k, v in (summary.get("flops") or {}).items()}
    return {**last, **{k: v for k, v in (more | flops).items() if number(v) is not None}}


def _changes(a: Mapping[str, Any], b: Mapping[str, Any], *, equal: bool = False) -> list[Change]:
    keys = [k for k in dict.fromkeys([*a, *b]) if equal or repr(a.get(k, KeyError)) != repr(b.get(k, KeyError))]
    return [Change(k, a.get(k), b.get(k)) for k in keys]
