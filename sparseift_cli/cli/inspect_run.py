"""`sparseift inspect RUN`: the recipe of a run, how far it got, its newest metrics, and commands to continue with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.sheets import Column, Sheet
from ..errors import ArtifactError
from ..report import frame as frames
from ..report.read import Damaged, Run, RunReader, number
from ..report.spectral.history import kept_checkpoints
from ..runs.directory import MODEL
from ..runs.provenance import kernels_in_words
from .options import Format
from .output import render
from .report_view import clean

SCHEMA = "sparseift.run/1"
_FACTS = (
    "recipe",
    "seed",
    "state",
    "model",
    "data",
    "transform",
    "sparsity",
    "match",
    "algorithm",
    "step",
    "steps",
    "metric",
    "value",
    "best",
    "flops",
    "flops_spent",
    "flops_ratio",
    "flops_executed",
    "params",
    "nonzero_params",
    "started",
    "device",
    "commit",
)
_NAMES = {
    "steps": "of steps",
    "metric": "judged by",
    "value": "last value",
    "best": "best value",
    "flops": "audited FLOPs",
    "flops_spent": "FLOPs used",
    "flops_executed": "FLOPs executed",
    "flops_ratio": "times the dense FLOPs",
    "params": "parameters",
    "nonzero_params": "non-zero parameters",
    "checkpoint": "newest checkpoint",
}


def inspect_run(source: str, fmt: Format, output: Path | None) -> None:
    """Print the facts of the run in the folder or file `source`, and the numbers of its newest line of metrics.

    Raises:
        ArtifactError: its files cannot be read, or are not what a run writes.
    """
    path = Path(source)
    try:
        run = RunReader().read(path)
    except Damaged as damage:
        raise ArtifactError(
            f"{source}: {damage.reason}", hint="the run is damaged; report and inspect cannot read it"
        ) from None
    row = frames.records(frames.runs_frame([run]))[0]
    kept = [checkpoint.step for checkpoint in kept_checkpoints(path)]
    sessions = (run.provenance or {}).get("sessions") or [{}]
    facts = {name: row[name] for name in _FACTS}
    facts |= {"kernels": kernels_in_words(sessions[-1]) or None, "checkpoint": kept[-1] if kept else None}
    last = {k: v for k, v in run.last.items() if number(v) is not None}
    steps = next_steps(run, kept)
    payload = {
        "schema": SCHEMA,
        "path": source,
        **{name: clean(value) for name, value in facts.items()},
        "checkpoints": kept,
        "last": {name: clean(value) for name, value in last.items()},
        "next": [command for command, _ in steps],
        "warnings": list(run.warnings),
    }
    notes = [f"warning: {text}" for text in run.warnings]
    notes += [line for command, why in steps for line in (f"next, {why}:", f"  {command}")]
    sheets = [
        _sheet(f"{source}: a {run.state} run", {_NAMES.get(k, k): v for k, v in facts.items()}),
        _sheet("The newest line of its metrics", last),
    ]
    sheets = [sheet for sheet in sheets if sheet.rows]
    sheets[-1].notes = notes
    render(sheets, payload, fmt, output)


def next_steps(run: Run, checkpoints: list[int]) -> list[tuple[str, str]]:
    """Commands that apply to a run in this state, and what each does."""
    folder = shlex.quote(str(run.path))
    found = [(f"sparseift report {folder}", "its numbers; give several runs to compare them")]
    if checkpoints and run.state == "finished" and (run.path / MODEL).is_file():
        found.append((f"sparseift export {folder} --to safetensors -o model.safetensors", "a model for other programs"))
    if checkpoints and run.recipe.get("transform"):
        found.append((f"sparseift inspect {folder} --spectral", "how well its masks connect the layers"))
    if run.state == "stopped":
        recipe = shlex.quote(str(run.path / "recipe.yaml"))
        found.append((f"sparseift train {recipe} --resume {folder}", "continue where it stopped"))
    return found


def _sheet(title: str, facts: Mapping[str, Any]) -> Sheet:
    rows = [{"name": name, "value": value} for name, value in facts.items() if value is not None]
    return Sheet(title, [Column("name", "name"), Column("value", "value", _shown)], rows)


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
