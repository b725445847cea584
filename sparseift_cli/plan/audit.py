"""The Audit: what a plan costs, in exact integers, and which layers cause the difference to the dense model. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

from ..base.sheets import ShownAsSheets, ratio
from ..errors import UsageError
from ..kernels.registry import MASKED, LayerChoice
from ..table.table import LayerTable
from .budget import matched_cost
from .execution import Execution, Place, choices_on_gpu, execution, stored_in_blocks
from .layer_plan import LayerPlan
from .plan import Plan, counted_anew, dense_layers, with_causal
from .spec import TrainingSpec
from .training_cost import dense_training_macs, final_nonzeros, run_macs, training_macs_while_updating

SCHEMA = "sparseift.flops/1"
OWNERS: tuple[str, ...] = (
    "stem",
    "head",
    "attention",
    "depthwise",
    "other untouched",
    "rounding",
    "matching",
    "sparsity",
)


@dataclass(frozen=True, slots=True)
class Totals:
    """Of a whole model, at the table's input shape.

    Args:
        forward_macs: MACs of a forward pass.
        training_macs: MACs of the mean training step over a run: forward, backward and mask updates.
        params: parameters, masked ones too.
        activations: output elements of all counted operations, as far as they are in memory: the score matrix of a fused
            attention is not.
        nonzero_params: parameters that are not masked.
        active_params: parameters that one token uses: of experts, those that it is routed to.
        active_nonzero_params: the same of those that are not masked.
        scores: those of `activations` that are score matrices (q k^T computed as a product of its own).
    """

    forward_macs: int
    training_macs: Fraction
    params: int
    activations: int
    nonzero_params: int
    active_params: int
    active_nonzero_params: int
    scores: int = 0

    @property
    def forward_flops(self) -> int:
        """FLOPs of a forward pass: 2 a MAC."""
        return 2 * self.forward_macs

    @property
    def training_flops(self) -> int:
        """FLOPs of the mean training step, to the nearest whole one; only schedules with mask updates have fractions."""
        return round(2 * self.training_macs)


@dataclass(frozen=True, repr=False)
class Audit(ShownAsSheets):
    """The cost of a dense model and, where there is a plan, of the transformed one.

    Args:
        table: the dense model, attention counted as `causal` says.
        causal: how attention under a causal mask is counted: `full`, `half` or `exact`.
        training: how training is counted.
        dense: totals of the dense model.
        plan: the plan that was counted; None for a dense model alone.
        transformed: totals of the transformed model.
        training_while_updating: MACs of the mean step while masks change, where dense gradients make it cost more (RigL);
            else the mean of the whole run.
    """

    sheets_by: ClassVar[str] = "sparseift_cli.plan.sheets:audit_sheets"

    table: LayerTable
    causal: str
    training: TrainingSpec
    dense: Totals
    plan: Plan | None = None
    transformed: Totals | None = None
    training_while_updating: Fraction | None = None

    @property
    def forward_ratio(self) -> Fraction | None:
        """Forward MACs, transformed over dense; None without a plan."""
        return (
            Fraction(self.transformed.forward_macs, self.dense.forward_macs)
            if self.transformed and self.dense.forward_macs
            else None
        )

    @property
    def training_ratio(self) -> Fraction | None:
        """MACs of the mean training step, transformed over dense; None without a plan."""
        return (
            self.transformed.training_macs / self.dense.training_macs
            if self.transformed and self.dense.training_macs
            else None
        )

    @property
    def activation_factor(self) -> float | None:
        """Output elements of all counted layers, transformed over dense: memory, which no FLOP count shows."""
        return (
            self.transformed.activations / self.dense.activations
            if self.transformed and self.dense.activations
            else None
        )

    @property
    def activation_factor_without_scores(self) -> float | None:
        """The same without the score matrices that are stored: tokens by tokens, they do not grow with any width."""
        dense, new = self.dense, self.transformed
        if new is None or dense.activations == dense.scores:
            return None
        return (new.activations - new.scores) / (dense.activations - dense.scores)

    @property
    def nonzero_after_training(self) -> int:
        """Non-zero parameters when training ends: the plan's, and the masked weights where training uses no masks."""
        if self.plan is None or self.transformed is None:
            return self.dense.nonzero_params
        rows = [row for row in self.plan.layers if row.status == "transformed"]
        more = sum(final_nonzeros(row, p, self.training) - p.nnz for row in rows for p in row.parts)
        return self.transformed.nonzero_params + more

    @cached_property
    def choices(self) -> dict[Place, LayerChoice]:
        """Every masked weight, and whether block kernels on a GPU compute it."""
        return choices_on_gpu(self.plan.layers, self.training) if self.plan else {}

    def executed(self, *, kernels: bool) -> Execution:
        """What a device executes: with `kernels` a GPU that has them, otherwise any, which multiplies by the zeros."""
        rows = self.plan.layers if self.plan else dense_layers(self.table)
        return execution(rows, self.training, stored_in_blocks(self.choices) if kernels else ())

    def owners(self) -> dict[str, int]:
        """Forward MACs above (or below) the dense model's, by what causes them; their sum is the whole difference, exactly."""
        difference: dict[str, int] = dict.fromkeys(OWNERS, 0)
        for row in self.plan.layers if self.plan else ():
            difference[_owner(row, self.plan)] += row.macs - row.dense_macs
        return {k: v for k, v in difference.items() if v}

    @property
    def growing(self) -> list[LayerPlan]:
        """Rows of the body that cost more than dense although no member transforms them; what `other untouched` owns.

        Depthwise rows are not among them: they stay dense by an option, and have an owner of their own.
        """
        rows = self.plan.layers if self.plan else ()
        return [row for row in rows if row.macs > row.dense_macs and _owner(row, self.plan) == "other untouched"]

    def growth(self) -> str | None:
        """A sentence that names the rows in `growing`, by how much they grow and why; None where there are none."""
        rows = self.growing
        if not rows:
            return None
        names = [row.layer.name for row in rows]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        factor = ratio(sum(row.macs for row in rows) / sum(row.dense_macs for row in rows))
        reasons = "; ".join(sorted({row.reason for row in rows}))
        what = "layer of the body costs" if len(rows) == 1 else "layers of the body cost"
        return f"{len(rows)} {what} {factor}x dense without being transformed: {shown} ({reasons})"

    def weights_in_no_block(self) -> str | None:
        """A sentence on transformed layers of which blocks leave a part of the weights out, for ever; None without any."""
        rows = [row for row in self.plan.layers if row.status == "transformed"] if self.plan else []
        rows = [row for row in rows if row.mask_pattern.density is None and row.room < row.weights]
        if not rows:
            return None
        worst = min(rows, key=lambda row: row.room / row.weights)
        what = "1 layer has weights" if len(rows) == 1 else f"{len(rows)} layers have weights"
        return (
            f"{what} that fill no whole block of {worst.pattern} and stay zero: up to {1 - worst.room / worst.weights:.0%} of a "
            f"layer's ({worst.layer.name})"
        )

    def kept_widths(self) -> str | None:
        """A sentence on the widths that Sparse Wide left as they are, why, and what to do about it; None without any."""
        return self.plan.widening.kept() if self.plan and self.plan.widening else None

    @property
    def s_max(self) -> float | None:
        """The sparsity above which --match model cannot be met (Sparse Wide that widens)."""
        if self.plan is None or self.plan.widening is None or self.control:
            return None
        return self.plan.widening.s_max(self.plan.layers)

    @property
    def control(self) -> bool:
        """Is the plan a control (scope none): sparse layers of the dense widths, at fewer FLOPs than the dense model?"""
        return self.plan is not None and self.plan.spec.scope == "none"

    @property
    def ideal_body_density(self) -> float | None:
        """The density of the transformed layers under --match model at unrounded widths (Sparse Wide)."""
        if self.plan is None or self.plan.widening is None or not self.plan.widening.widened:
            return None
        return self.plan.widening.ideal_body_density(self.plan.layers)


def audit(counted: Plan | LayerTable, training: TrainingSpec | None = None, *, causal: str | None = None) -> Audit:
    """Count a plan, or a dense model by its table.

    Args:
        counted: a plan, to count the dense and the transformed model; or a table, to count the dense model alone.
        training: how training FLOPs are counted; a plan's own by default.
        causal: how attention under a causal mask is counted: `full` (as a dense kernel computes it), `half`, or `exact`
            (T (T + 1) / 2 query-key pairs). A plan's own by default; a table's default is `full`.

    Raises:
        UsageError: the plan matched the whole model by one count, and this one would have given it other non-zeros; or
            `causal` is not one of the three, or half is not a whole number.
    """
    plan = counted if isinstance(counted, Plan) else None
    source = counted if isinstance(counted, LayerTable) else counted.table
    causal = causal or (plan.causal if plan else "full")
    training = training or (plan.training if plan else TrainingSpec())
    table = with_causal(source, causal)
    params = table.params
    dense = Totals(
        forward_macs=table.macs,
        training_macs=Fraction(dense_training_macs(dense_layers(table), training)),
        params=params,
        activations=sum(row.activations.evaluate(table.sizes) for row in table.layers),
        scores=sum(row.activations.evaluate(table.sizes) for row in table.layers if row.kind == "qk"),
        nonzero_params=params,
        active_params=(active := _active(dense_layers(table), lambda row: row.params)),
        active_nonzero_params=active,
    )
    if plan is None:
        return Audit(table, causal, training, dense)
    plan = replace(plan, layers=tuple(counted_anew(plan, causal)), causal=causal)
    _require_same_budget(counted, plan, training)
    stored = sum(row.params for row in plan.layers)
    transformed = Totals(
        forward_macs=sum(row.macs for row in plan.layers),
        training_macs=run_macs(plan.layers, training),
        params=stored,
        activations=sum(row.activations for row in plan.layers),
        scores=sum(row.activations for row in plan.layers if row.layer.kind == "qk"),
        nonzero_params=stored - sum(row.weights - row.nnz for row in plan.layers),
        active_params=_active(plan.layers, lambda row: row.params),
        active_nonzero_params=_active(plan.layers, lambda row: row.params - row.weights + row.nnz),
    )
    updating = transformed.training_macs
    if training.method.costs_more_while_updating:
        updating = training_macs_while_updating(plan.layers, training)
    return Audit(table, causal, training, dense, plan, transformed, updating)


def _active(rows: Sequence[LayerPlan], count: Callable[[LayerPlan], int]) -> int:
    """What `count` gives of all rows, of experts only the share that one token uses."""
    return int(sum((row.layer.active * count(row) for row in rows), Fraction(0)))


def _require_same_budget(planned: Plan | LayerTable, counted: Plan, training: TrainingSpec) -> None:
    """Refuse to count a plan otherwise than it was matched: its non-zeros would not be those that this count gives."""
    assert isinstance(planned, Plan)
    spec = planned.spec
    if matched_cost(planned.layers, spec, planned.training) != matched_cost(counted.layers, spec, training):
        raise UsageError(
            f"this model was planned with match {spec.match}, and counted so it would have other non-zeros",
            hint="transform its source again, or count it as it was planned",
        )


def _owner(row: LayerPlan, plan: Plan | None) -> str:
    """What causes a row's difference to the dense model: one of OWNERS."""
    if row.status == "transformed" and plan and plan.spec.scope == "none":
        return "sparsity"
    if row.status == "transformed":
        return "matching" if plan and plan.scale is not None else "rounding"
    if row.layer.role in ("input", "output", "attention"):
        return {"input": "stem", "output": "head", "attention": "attention"}[row.layer.role]
    return "depthwise" if row.layer.kind == "depthwise" else "other untouched"


# --- JSON ---


def to_json(result: Audit) -> dict[str, Any]:
    """The `sparseift.flops/1` document. Every row is in `layers`. New versions may add fields and remove none."""
    t = result.transformed
    plan = result.plan
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "model": result.table.model,
        "input": list(result.table.input),
        "unit": "flop",
        "flops_per_mac": 2,
        "causal": result.causal,
        "transform": plan.spec.to_json() if plan else None,
        "training": result.training.to_json(),
        "totals": {
            "dense": _totals(result.dense),
            "transformed": None
            if t is None
            else _totals(t)
            | {
                "nonzero_params": t.nonzero_params,
                "active_nonzero_params": t.active_nonzero_params,
                "activation_factor": result.activation_factor,
                "activation_factor_without_scores": result.activation_factor_without_scores,
            },
            "ratio": None
            if t is None
            else {"forward": _number(result.forward_ratio), "training": _number(result.training_ratio)},
        },
        "layers": [row_fields(row, result.choices) for row in rows(result)],
        "uncounted": list(result.table.uncounted),
        "warnings": [text for text in [result.growth()] if text],
    }
    if plan is not None:
        data["difference"] = result.owners()
        data["executed"] = {
            name: result.executed(kernels=kernels).to_json(result.dense.forward_macs, result.dense.training_macs)
            for name, kernels in (("masked", False), ("kernels", True))
        }
        data["matching"] = {
            "scale": _number(plan.scale),
            "s_max": result.s_max,
            "ideal_body_density": result.ideal_body_density,
            "training_ratio_while_updating": _number(
                (result.training_while_updating or 0) / result.dense.training_macs
            ),
        }
        data["widths"] = plan.to_json()["free_widths"]
        data["kept_widths"] = result.kept_widths()
    return data


def rows(result: Audit) -> list[LayerPlan]:
    """One row per layer: the plan's, or the dense model's own."""
    if result.plan:
        return list(result.plan.layers)
    return dense_layers(result.table)


def row_fields(row: LayerPlan, choices: Mapping[Place, LayerChoice] | None = None) -> dict[str, Any]:
    """The fields of one row: of `layers` in the JSON document, and of tables; `choices` are those of its audit."""
    layer = row.layer
    ways = [choices[row.layer.name, part.name] for part in row.parts if not part.dense] if choices else []
    masked = next((choice for choice in ways if choice.backend == MASKED), None)
    kernel = "masked" if masked else f"blocks of {ways[0].block}" if ways else None
    return {
        "name": layer.name,
        "kind": layer.kind,
        "role": layer.role,
        "status": row.status,
        "reason": row.reason or row.detail,
        "calls": layer.calls,
        "dense_macs": row.dense_macs,
        "transformed_macs": row.macs,
        "ratio": row.macs / row.dense_macs if row.dense_macs else None,
        "density": float(row.density) if row.parts else None,
        "nnz": row.nnz if row.parts else None,
        "weights": row.weights if row.parts else None,
        "pattern": row.pattern if row.status == "transformed" else None,
        "why_pattern": row.why_pattern or None,
        "kernel": kernel,
        "why_masked": masked.reason if masked else None,
        "params": row.params,
        "activations": row.activations,
        "parts": [p.to_json() for p in row.parts],
    }


def _totals(totals: Totals) -> dict[str, int]:
    return {
        "forward_macs": totals.forward_macs,
        "forward_flops": totals.forward_flops,
        "training_flops": totals.training_flops,
        "params": totals.params,
        "active_params": totals.active_params,
        "activations": totals.activations,
        "stored_scores": totals.scores,
    }


def _number(value: Fraction | None) -> float | None:
    return None if value is None else float(value)
