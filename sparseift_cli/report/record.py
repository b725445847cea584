"""What a report knows of one run: plain data, read once from its directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["finished", "running", "stopped"]


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory (`sparseift_cli.runs.directory`), or a kept one: the same small files without checkpoints.

    `state`: finished has a summary; running is locked by a live process; stopped is neither (it crashed or was interrupted).
    """

    path: Path
    name: str
    """The recipe's name, by which runs are grouped: resnet18_cifar100_wide75_rigl."""
    state: State
    seed: int | None
    recipe: Mapping[str, Any]
    """The resolved recipe."""
    metrics: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl, in the order of their steps."""
    summary: Mapping[str, Any] | None = None
    audit: Mapping[str, Any] | None = None
    """As `sparseift flops --json` prints it."""
    plan: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    warnings: Sequence[str] = field(default=())
    """What was wrong with it, though not so much that it had to be left out."""

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest line of metrics; empty before the first."""
        return self.metrics[-1] if self.metrics else {}
