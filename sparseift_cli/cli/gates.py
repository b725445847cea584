"""Gates for CI: which numbers exceed a limit, as lines for people or as annotations for GitHub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import typer

from ..base.sheets import digits_that_differ
from ..errors import CheckFailed, UsageError
from ..plan.audit import Audit
from ..table.table import LayerTable
from .output import write_result


@dataclass(frozen=True, slots=True)
class Problem:
    """One limit that is exceeded; `layer` is the row that exceeds it, if it is a row."""

    layer: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The gates of a command: the largest ratio of MACs, transformed to dense, of the model and of each layer.

    Args:
        model: `--max-flops-ratio`.
        layer: `--max-layer-ratio`.
        strict: `--strict`: every operation must have been counted, and no row of the body may grow untransformed.

    Raises:
        UsageError: a ratio that is not a positive number; a NaN would pass every model.
    """

    model: float | None = None
    layer: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        for name, limit in self._given():
            if not limit > 0:
                raise UsageError(f"{name} must be above 0, not {limit}", hint=f"{name} 1.001")

    def check(self, result: Audit) -> list[Problem]:
        """All problems of an audit.

        Raises:
            UsageError: as `check_ratios`.
        """
        return self.check_ratios(result) + self.check_counted(result.table)

    def check_ratios(self, result: Audit, prefix: str = "") -> list[Problem]:
        """The ratios above their limits, and what grows untransformed under `strict`; `prefix` begins each message.

        Raises:
            UsageError: a ratio is limited and nothing is transformed: every ratio is 1, and a forgotten --sparsity would pass.
        """
        for name, _ in self._given():
            if result.plan is None:
                raise UsageError(
                    f"{name} holds a transformed model to the dense one, and nothing is transformed",
                    hint="add --sparsity 0.9",
                )
        growth = result.growth() if self.strict else None
        grown = [Problem(result.growing[0].layer.name, prefix + growth)] if growth else []
        return self._check_model(result, prefix) + self._check_layers(result, prefix) + grown

    def check_counted(self, table: LayerTable) -> list[Problem]:
        """The operations that `strict` refuses: those that could not be counted."""
        if not self.strict or not table.uncounted:
            return []
        return [Problem(None, f"uncounted ops: {', '.join(table.uncounted)}")]

    def _given(self) -> list[tuple[str, float]]:
        both = (("--max-flops-ratio", self.model), ("--max-layer-ratio", self.layer))
        return [(name, limit) for name, limit in both if limit is not None]

    def _check_model(self, result: Audit, prefix: str) -> list[Problem]:
        ratio = 1 if result.forward_ratio is None else result.forward_ratio
        if self.model is None or ratio <= self.model:
            return []
        owners = ", ".join(f"{who} {macs:+,}" for who, macs in result.owners().items())
        shown = digits_that_differ(ratio, self.model)
        message = f"{prefix}the model costs {shown}x its dense FLOPs, above {self.model} (MACs by owner: {owners})"
        return [Problem(None, message)]

    def _check_layers(self, result: Audit, prefix: str) -> list[Problem]:
        if self.layer is None or result.plan is None:
            return []
        problems = []
        for row in result.plan.layers:
            if row.status == "transformed" and row.macs > self.layer * row.dense_macs:
                shown = digits_that_differ(Fraction(row.macs, row.dense_macs), self.layer)
                name = row.layer.name
                message = f"{prefix}layer {name} costs {shown}x its dense MACs, above {self.layer}"
                problems.append(Problem(name, message))
        return problems


def stop_on(problems: Sequence[Problem], *, printed: bool = False) -> None:
    """Exit 1 with every problem on stderr, unless annotations have `printed` them.

    Raises:
        CheckFailed: there is one.
    """
    if problems and printed:
        raise typer.Exit(CheckFailed.exit_code)
    if problems:
        raise CheckFailed("\n  ".join(["a check failed:", *(p.message for p in problems)]))


def annotate(results: Sequence[Audit], problems: Sequence[Problem], output: Path | None) -> None:
    """GitHub workflow commands: an error per problem, else a notice with the ratio of each result."""
    if problems:
        lines = [f"::error title=sparseift flops::{_escape(p.message)}" for p in problems]
    else:
        lines = [f"::notice title=sparseift flops::{_escape(_summary(result))}" for result in results]
    text = "".join(line + "\n" for line in lines)
    write_result(text, output)


def _summary(result: Audit) -> str:
    dense = f"{result.dense.forward_flops:,} FLOPs dense"
    if result.plan is None or result.forward_ratio is None:
        return f"{result.table.model}: {dense}"
    return f"{result.table.model}, sparsity {result.plan.spec.sparsity}: {dense}, {float(result.forward_ratio):.6f}x transformed"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
