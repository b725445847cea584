"""Spends the FLOP budget: how many non-zeros each transformed layer gets under --match off, layer, model and train. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import floor, log

from ..errors import CheckFailed, UsageError
from ..table.table import LayerTable
from .isoflop import erdos_renyi, give_back, greatest_sparsity, match_scale
from .layer_plan import LayerPlan, deal
from .members.wide import Growth
from .spec import TrainingSpec, TransformSpec
from .training_cost import dense_training_macs, run_macs, unrounded_macs


def spend(
    layers: list[LayerPlan], table: LayerTable, spec: TransformSpec, training: TrainingSpec, growth: Growth | None
) -> tuple[list[LayerPlan], Fraction | None]:
    """Give every transformed layer its non-zeros; also the scale on their cost, where a whole model is matched.

    Raises:
        CheckFailed: no density fits the budget.
        UsageError: the pattern leaves nothing to choose.
    """
    which = [i for i, plan in enumerate(layers) if plan.status == "transformed"]
    if not which:
        return layers, None
    chosen = [layers[i] for i in which]
    if spec.n_of_m:
        if spec.match in ("model", "train"):
            raise UsageError(
                f"pattern {spec.pattern} fixes every density, so the model's FLOPs cannot be matched by it",
                hint="use --match layer, or a block or unstructured pattern",
            )
        return _n_of_m(layers, *spec.n_of_m), None
    scale = None
    if spec.match == "off":
        counts = [_unmatched(plan, spec) for plan in chosen]
    elif spec.match == "layer":
        counts = [_at_least_one(plan, floor(Fraction(plan.dense_macs, plan.uses)), spec) for plan in chosen]
    else:
        scale = _scale(layers, chosen, table, spec, training, growth)
        counts = _matched(layers, chosen, scale, spec, training)
    layers = _with(layers, which, counts, spec)
    if spec.match in ("model", "train"):
        _hold(layers, table, spec, training, growth)
    return layers, scale


def ideal_body_density(layers: Sequence[LayerPlan], spec: TransformSpec, growth: Growth) -> float:
    """The density of the transformed layers under --match model at unrounded widths; negative where nothing is left."""
    fixed, transformed = _ideal_macs(layers, growth, float(spec.density))
    return (sum(p.dense_macs for p in layers) - fixed) / transformed


def s_max(layers: Sequence[LayerPlan], growth: Growth) -> float:
    """The sparsity at which what is left alone, at unrounded widths, costs as much as the whole dense model.

    Each row left alone grows as a power of 1/density, read off two points: input and output layers, depthwise and
    attention products as density ** -1/2 under scope all, which gives 1 - (their dense share)^2.
    """
    probe = 0.25
    ideal = growth.ideal_sizes(probe)
    by_power: dict[float, float] = {}
    for plan in layers:
        if plan.status != "transformed" and plan.dense_macs:
            power = round(log(plan.layer.macs.evaluate(ideal) / plan.dense_macs) / log(1 / probe), 9)
            by_power[power] = by_power.get(power, 0.0) + plan.dense_macs
    return greatest_sparsity(lambda d: sum(m * d**-p for p, m in by_power.items()), sum(p.dense_macs for p in layers))


def _ideal_macs(layers: Sequence[LayerPlan], growth: Growth, density: float) -> tuple[float, float]:
    ideal = growth.ideal_sizes(density)
    fixed = sum(p.layer.macs.evaluate(ideal) for p in layers if p.status != "transformed")
    return fixed, sum(p.layer.macs.evaluate(ideal) for p in layers if p.status == "transformed")


# --- one layer ---


def _unit(spec: TransformSpec) -> int:
    """Non-zeros come in whole blocks."""
    rows, columns = spec.block or (1, 1)
    return rows * columns


def _room(plan: LayerPlan, spec: TransformSpec) -> int:
    """The most non-zeros a layer can hold: all its weights, or all its whole blocks beside the dense parts."""
    if not spec.block:
        return plan.weights
    rows, columns = spec.block
    room = 0
    for part in plan.parts:
        room += part.shape.weights if part.dense else part.shape.blocks(rows, columns) * rows * columns
    return room


def _dense_part(plan: LayerPlan) -> int:
    return sum(p.nnz for p in plan.parts if p.dense)


def _at_least_one(plan: LayerPlan, nnz: int, spec: TransformSpec) -> int:
    """Within the layer's room, in whole units, and never without a non-zero."""
    unit, dense = _unit(spec), _dense_part(plan)
    room = _room(plan, spec) - dense
    if room < unit:
        raise UsageError(
            f"layer {plan.layer.name} has no room for one {spec.pattern} block",
            hint="--exclude it, or use smaller blocks",
        )
    return dense + max(unit, min(room, nnz - dense) // unit * unit)


def _unmatched(plan: LayerPlan, spec: TransformSpec) -> int:
    dense = _dense_part(plan)
    return _at_least_one(plan, dense + floor(spec.density * (plan.weights - dense)), spec)


def _n_of_m(layers: Sequence[LayerPlan], n: int, m: int) -> list[LayerPlan]:
    """N of every M inputs of every sparse part; a last group shorter than M keeps its share, rounded down."""
    return [_n_of_m_layer(plan, n, m) if plan.status == "transformed" else plan for plan in layers]


def _n_of_m_layer(plan: LayerPlan, n: int, m: int) -> LayerPlan:
    parts = []
    for part in plan.parts:
        whole, rest = divmod(part.shape.taps * part.shape.inputs // part.shape.groups, m)
        parts.append(part if part.dense else replace(part, nnz=part.shape.outputs * (whole * n + rest * n // m)))
    return replace(plan, macs=plan.uses * sum(p.nnz for p in parts), parts=tuple(parts))


# --- the whole model ---


def _scale(
    layers: Sequence[LayerPlan],
    chosen: Sequence[LayerPlan],
    table: LayerTable,
    spec: TransformSpec,
    training: TrainingSpec,
    growth: Growth | None,
) -> Fraction:
    """The factor on the transformed layers' dense cost that meets the budget exactly, before rounding to non-zeros."""
    if spec.match == "model":
        fixed = sum(p.macs for p in layers if p.status != "transformed")
        scale = match_scale(sum(p.dense_macs for p in layers), fixed, sum(p.dense_macs for p in chosen))
    else:
        most = Fraction(sum(p.full_macs for p in chosen), sum(p.dense_macs for p in chosen))
        scale = _solve(lambda c: _training_at(layers, c, spec, training), dense_training_macs(layers, training), most)
    if scale <= 0:
        _refuse(layers, spec, training, growth)
    return scale


def _training_at(layers: Sequence[LayerPlan], c: Fraction, spec: TransformSpec, training: TrainingSpec) -> Fraction:
    """Training MACs with the transformed layers' forward at `c` times its dense cost, before rounding to non-zeros."""
    chosen = [p for p in layers if p.status == "transformed"]
    budgets = zip(chosen, _budgets(chosen, c, spec), strict=True)
    return sum((unrounded_macs(p, b, training, spec.block) for p, b in budgets), _left_alone(layers, training))


def _left_alone(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction:
    return run_macs([p for p in layers if p.status != "transformed"], training)


def _solve(cost: Callable[[Fraction], Fraction], budget: Fraction | int, most: Fraction) -> Fraction:
    """The c in [0, most] with cost(c) == budget for a cost that never falls; 0 where it is above the budget everywhere.

    It is affine between kinks: a layer that GraNet prunes no more, one that is dense, one of Doped that is U and V alone.
    Bisection leaves the kinks behind, and a secant is exact then. Should two of them lie too close, c is below by 2^-48.
    """
    low, high = Fraction(0), most
    a, b = cost(low), cost(high)
    if a >= budget or b <= budget:
        return low if a >= budget else high
    for _ in range(48):
        secant = low + (budget - a) * (high - low) / (b - a)
        if cost(secant) == budget:
            return secant
        middle = (low + high) / 2
        at = cost(middle)
        if at <= budget:
            low, a = middle, at
        else:
            high, b = middle, at
    return low


def _budgets(chosen: Sequence[LayerPlan], scale: Fraction, spec: TransformSpec) -> list[Fraction]:
    """Forward MACs per layer, in all scale * dense cost: uniform in FLOPs, or by Erdos-Renyi scores."""
    if spec.distribution == "uniform":
        return [p.dense_macs * scale for p in chosen]
    densities = erdos_renyi(
        [p.parts[-1].shape for p in chosen],
        [p.layer.kernel for p in chosen],
        [p.uses * p.weights // p.parts[-1].shape.weights for p in chosen],
        sum(p.dense_macs for p in chosen) * scale,
        kernel=spec.distribution == "erk",
    )
    return [d * p.full_macs for d, p in zip(densities, chosen, strict=True)]


def _matched(
    layers: Sequence[LayerPlan],
    chosen: Sequence[LayerPlan],
    scale: Fraction,
    spec: TransformSpec,
    training: TrainingSpec,
) -> list[int]:
    """Counts within the budget that `scale` was solved for: the forward pass's, or the run's as it is counted afterwards."""
    unit = _unit(spec)
    dense = [_dense_part(p) for p in chosen]
    caps = [(_room(p, spec) - n) // unit for p, n in zip(chosen, dense, strict=True)]
    budgets = [b - n * p.uses for b, n, p in zip(_budgets(chosen, scale, spec), dense, chosen, strict=True)]
    uses = [p.uses * unit for p in chosen]
    if spec.match == "model":
        counts = give_back(budgets, uses, caps)
    else:
        total = dense_training_macs(layers, training) - _left_alone(layers, training)
        counts = give_back(
            budgets,
            uses,
            caps,
            total,
            lambda i, n: run_macs([_holding(chosen[i], dense[i] + n * unit, spec)], training, spec.block),
        )
    return [n + c * unit for n, c in zip(dense, counts, strict=True)]


def _holding(plan: LayerPlan, nnz: int, spec: TransformSpec) -> LayerPlan:
    return replace(plan, macs=plan.uses * nnz, parts=deal(plan.parts, nnz, _unit(spec)))


def _with(layers: list[LayerPlan], which: Sequence[int], counts: Sequence[int], spec: TransformSpec) -> list[LayerPlan]:
    layers = list(layers)
    for i, nnz in zip(which, counts, strict=True):
        layers[i] = _holding(layers[i], nnz, spec)
        if spec.block:
            _require_room(layers[i], *spec.block)
    return layers


def _require_room(plan: LayerPlan, rows: int, columns: int) -> None:
    """A layer's room can be all in one of its parts: V of a depthwise layer has one output a group."""
    for part in plan.parts:
        room = part.shape.blocks(rows, columns) * rows * columns
        if not part.dense and part.nnz > room:
            raise UsageError(
                f"layer {plan.layer.name} gives {part.name} {part.nnz} non-zeros, and {rows}x{columns} blocks have "
                f"room for {room}",
                hint="--exclude it, or use smaller blocks",
            )


def _hold(
    layers: Sequence[LayerPlan], table: LayerTable, spec: TransformSpec, training: TrainingSpec, growth: Growth | None
) -> None:
    """The budget is held, or the plan is refused: one non-zero a layer can already be too much."""
    if spec.match == "model":
        have, budget = Fraction(sum(p.macs for p in layers)), sum(p.dense_macs for p in layers)
    else:
        have, budget = run_macs(layers, training, spec.block), dense_training_macs(layers, training)
    if have > budget:
        _refuse(layers, spec, training, growth)


def _refuse(layers: Sequence[LayerPlan], spec: TransformSpec, training: TrainingSpec, growth: Growth | None) -> None:
    hint = "lower --sparsity, use --scope inner, or --match layer and accept the growth"
    if spec.match == "train":
        dense, floor_macs = dense_training_macs(layers, training), _training_at(layers, Fraction(0), spec, training)
        raise CheckFailed(
            f"no density matches the model's training FLOPs with {training.algorithm} at sparsity {spec.sparsity}: without a "
            f"single non-zero a step already costs {2 * float(floor_macs):,.0f} FLOPs, {float(floor_macs / dense):.3f}x the "
            f"dense model's {2 * float(dense):,.0f}",
            hint=hint,
        )
    dense = sum(p.dense_macs for p in layers)
    fixed = sum(p.macs for p in layers if p.status != "transformed")
    limit = f" (s_max {s_max(layers, growth):.3f})" if growth else ""
    raise CheckFailed(
        f"no density matches the model's FLOPs at sparsity {spec.sparsity}: what is left alone already costs "
        f"{2 * fixed:,} FLOPs forward, {fixed / dense:.3f}x the dense model's {2 * dense:,}{limit}",
        hint=hint,
    )
