"""The check after a transform: the module is traced and counted again, and must cost what was planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from ..base.text import shape_text
from ..errors import CheckFailed
from ..plan.plan import Plan
from ..plan.selection import may_grow
from ..plan.spec import TransformSpec
from ..table.table import Layer
from ..trace.build import TraceResult, trace
from .edits import Masked, Surgery

_MAX_PROBLEMS = 5  # in one message


# --- cost: measured == planned ---


@dataclass(frozen=True, slots=True)
class Measured:
    """Costs counted in the transformed module. Exact numbers."""

    macs: dict[str, Fraction]
    """MACs of every planned row, by its name."""
    forward_macs: int
    params: int
    nonzero_params: int
    rows: int
    """Number of traced rows."""


def measure(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plan: Plan,
    surgery: Surgery,
    masks: Mapping[str, Tensor] | None,
) -> tuple[Measured, TraceResult]:
    """Trace `model` with plain sizes and count it. A masked weight has the share of its MACs that its mask has of its weights.

    Args:
        masks: bool, same shape as the weight, by the weight's key. None (a module on meta): the planned numbers of
            non-zeros are used.
    """
    traced = trace(model, inputs, kwargs, name=plan.table.model, input_shape=plan.table.input, symbolic=False)
    masked: dict[tuple[str, tuple[int, int] | None], list[Masked]] = {}
    for m in surgery.masked:
        masked.setdefault((m.key, None if m.expert else m.rows), []).append(m)
    replaced = {edit.path for edit in surgery.members}
    macs: dict[str, Fraction] = {}
    zeros = 0
    for row in traced.table.layers:
        cost, name = Fraction(row.macs.evaluate(())), _planned_row(row, replaced)
        if parts := masked.get((row.weight or "", _rows_of(row))):
            weights = sum(m.of(model.get_parameter(m.key)).numel() for m in parts)
            nnz = sum(m.nnz if masks is None else int(m.of(masks[m.key]).count_nonzero()) for m in parts)
            cost, name = cost * nnz / weights, parts[0].layer
            zeros += weights - nnz
        macs[name] = macs.get(name, Fraction(0)) + cost
    params = sum(p.numel() for p in model.parameters())
    total = sum(macs.values(), Fraction(0))
    return Measured(macs, round(total), params, params - zeros, len(traced.table.layers)), traced


def _rows_of(row: Layer) -> tuple[int, int] | None:
    """The rows of its weight that a row of plain sizes uses; None for all of them."""
    if row.start is None:
        return None
    start = row.start.evaluate(())
    return start, start + row.outputs.evaluate(())


def _planned_row(row: Layer, replaced: set[str]) -> str:
    """The name of the planned row that a row of the transformed module belongs to: U and V of `fc` belong to `fc`."""
    parts = row.name.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in replaced:
            return ".".join(parts[:n])
    return row.name


def require_as_planned(measured: Measured, plan: Plan, before: TraceResult, after: TraceResult) -> None:
    """Check that the module has exactly the planned MACs in every row, parameters, non-zeros and output shape.

    Args:
        before: the trace of the dense module; its output shape is compared with that of `after`, the transformed one's.

    Raises:
        CheckFailed: a row, a total or the output shape differs; the message names the first ones.
    """
    problems = []
    planned = {p.layer.name: p for p in plan.layers if p.macs}
    for name, row in planned.items():
        found = measured.macs.get(name, Fraction(0))
        if found != row.macs:
            problems.append(f"{name}: planned {row.macs:,} MACs, measured {float(found):,.0f}")
    for name, found in measured.macs.items():
        if found and name not in planned:
            problems.append(f"{name}: {float(found):,.0f} MACs that were not planned")
    params = sum(p.params for p in plan.layers)
    nonzero = params - sum(p.weights - p.nnz for p in plan.layers)
    for what, want, have in (("parameters", params, measured.params), ("non-zero", nonzero, measured.nonzero_params)):
        if want != have:
            problems.append(f"{what}: planned {want:,}, measured {have:,}")
    problems += _changed_outputs(before.structure.output_shapes, after.structure.output_shapes, plan.spec)
    if problems:
        more = f" (and {len(problems) - _MAX_PROBLEMS} more)" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckFailed(
            f"the transformed {plan.table.model} is not what was planned: {'; '.join(problems[:_MAX_PROBLEMS])}{more}"
        )


def _changed_outputs(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]], spec: TransformSpec
) -> Iterator[str]:
    """A sentence on each output of the model, by name, that should have its old shape and has not, or is gone or new."""
    for name in dict.fromkeys([*before, *after]):
        want, have = (shape_text(shapes[name]) if name in shapes else None for shapes in (before, after))
        if want != have and not (want and have and may_grow(name, spec)):
            what = f"output {name}" if name else "the output"
            yield f"{what} has shape {have}, not {want}" if have and want else f"{what} is {'new' if have else 'gone'}"
