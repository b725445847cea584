"""Gates for CI: which numbers broke a limit, as lines for people or as annotations for GitHub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import typer

from ..errors import CheckFailed, UsageError
from ..plan.audit import Audit
from ..table.table import LayerTable
from .output import apart, write_whole


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken limit; `layer` is the row that broke it, if it was a row."""

    layer: str | None
    message: str


def check(
    result: Audit,
    max_flops_ratio: float | None,
    max_layer_ratio: float | None,
    *,
    strict: bool = False,
    prefix: str = "",
) -> list[Problem]:
    """Everything the gates object to.

    Raises:
        UsageError: a limit that is no positive number: a NaN would be kept by every model. Or a limit without a transform:
            every ratio is 1, and a forgotten --sparsity would pass.
    """
    for name, limit in (("--max-flops-ratio", max_flops_ratio), ("--max-layer-ratio", max_layer_ratio)):
        if limit is not None and not limit > 0:
            raise UsageError(f"{name} {limit} is no ratio", hint=f"{name} 1.001")
        if limit is not None and result.plan is None:
            raise UsageError(
                f"{name} holds a transformed model to the dense one, and nothing is transformed",
                hint="add --sparsity 0.9",
            )
    problems = []
    ratio = 1 if result.forward_ratio is None else result.forward_ratio
    if max_flops_ratio is not None and ratio > max_flops_ratio:
        owners = ", ".join(f"{who} {macs:+,}" for who, macs in result.owners().items())
        problems.append(
            Problem(
                None,
                f"{prefix}the model costs {apart(ratio, max_flops_ratio)}x its dense FLOPs, "
                f"above {max_flops_ratio} (MACs by owner: {owners})",
            )
        )
    rows = [row for row in result.plan.layers if row.status == "transformed"] if result.plan else []
    for row in rows:
        if max_layer_ratio is not None and row.macs > max_layer_ratio * row.dense_macs:
            problems.append(
                Problem(
                    row.layer.name,
                    f"{prefix}layer {row.layer.name} costs {apart(Fraction(row.macs, row.dense_macs), max_layer_ratio)}x "
                    f"its dense MACs, above {max_layer_ratio}",
                )
            )
    return problems + (uncounted(result.table) if strict else [])


def uncounted(table: LayerTable) -> list[Problem]:
    """What --strict objects to."""
    return [Problem(None, f"uncounted ops: {', '.join(table.uncounted)}")] if table.uncounted else []


def stop_on(problems: list[Problem], *, told: bool = False) -> None:
    """Exit 1 with every problem on stderr, unless annotations have `told` them already.

    Raises:
        CheckFailed: there is one.
    """
    if problems and told:
        raise typer.Exit(CheckFailed.exit_code)
    if problems:
        raise CheckFailed("\n  ".join(["a check said no:", *(p.message for p in problems)]))


def annotate(results: Sequence[Audit], problems: list[Problem], output: Path | None) -> None:
    """GitHub workflow commands: an error per problem, else a notice with the ratio of each result."""
    if problems:
        lines = [f"::error title=sparseift flops::{_escape(p.message)}" for p in problems]
    else:
        lines = [f"::notice title=sparseift flops::{_escape(_told(result))}" for result in results]
    text = "".join(line + "\n" for line in lines)
    if output is None:
        sys.stdout.write(text)
    else:
        write_whole(output, text)


def _told(result: Audit) -> str:
    dense = f"{result.dense.forward_flops:,} FLOPs dense"
    if result.plan is None or result.forward_ratio is None:
        return f"{result.table.model}: {dense}"
    return f"{result.table.model}, sparsity {result.plan.spec.sparsity}: {dense}, {float(result.forward_ratio):.6f}x transformed"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
