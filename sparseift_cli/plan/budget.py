"""From FLOP budgets to non-zeros: how many each transformed layer gets under --match off, layer, model and train. Pure.

Each layer gets an integer number of non-zeros, floor(budget / positions), so that no budget is exceeded; where the whole
model is matched, what flooring lost goes to the layers with the largest remainders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import floor

from ..errors import CheckFailed, UsageError
from ..table.shape import Shape
from .layer_plan import LayerPlan
from .spec import TrainingSpec, TransformSpec
from .training_cost import dense_training_macs, run_macs, unrounded_macs
from .widening import Widening


def allocate_nonzeros(
    layers: Sequence[LayerPlan], spec: TransformSpec, training: TrainingSpec, widening: Widening | None
) -> tuple[list[LayerPlan], Fraction | None]:
    """Give every transformed layer its non-zeros.

    Args:
        layers: the rows of the plan, transformed ones with all their weights.
        spec: what is matched, in which pattern, by which distribution.
        training: whose cost is matched under `match train`.
        widening: for the s_max of a refusal.

    Returns:
        The rows with their non-zeros, and the factor on the transformed layers' dense cost where a whole model is matched.

    Raises:
        CheckFailed: no density fits the budget.
        UsageError: the pattern leaves nothing to choose.
    """
    layers = list(layers)
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
        return [_n_of_m_layer(p, *spec.n_of_m) if p.status == "transformed" else p for p in layers], None
    scale = None
    if spec.match == "off":
        counts = [_unmatched(plan, spec) for plan in chosen]
    elif spec.match == "layer":
        counts = [clamp_to_room(plan, plan.dense_macs // plan.positions, spec) for plan in chosen]
    else:
        scale = _scale(layers, chosen, spec, training, widening)
        counts = _matched(layers, chosen, scale, spec, training)
    for i, nnz in zip(which, counts, strict=True):
        layers[i] = layers[i].with_nonzeros(nnz, _unit(spec))
        if spec.block:
            _require_room(layers[i], *spec.block)
    if spec.match in ("model", "train"):
        require_within_budget(layers, spec, training, widening)
    return layers, scale


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


def clamp_to_room(plan: LayerPlan, nnz: int, spec: TransformSpec) -> int:
    """The number of non-zeros nearest to `nnz` from below that the layer can hold: in whole blocks, at least one.

    Raises:
        UsageError: it has no room for one block.
    """
    unit, dense = _unit(spec), plan.dense_nnz
    room = _room(plan, spec) - dense
    if room < unit:
        raise UsageError(
            f"layer {plan.layer.name} has no room for one {spec.pattern} block",
            hint="--exclude it, or use smaller blocks",
        )
    return dense + max(unit, min(room, nnz - dense) // unit * unit)


def _unmatched(plan: LayerPlan, spec: TransformSpec) -> int:
    dense = plan.dense_nnz
    return clamp_to_room(plan, dense + floor(spec.density * (plan.weights - dense)), spec)


def _n_of_m_layer(plan: LayerPlan, n: int, m: int) -> LayerPlan:
    """N of every M inputs of every sparse part; a last group shorter than M keeps its share, rounded down."""
    parts = []
    for part in plan.parts:
        whole, rest = divmod(part.shape.taps * part.shape.inputs // part.shape.groups, m)
        parts.append(part if part.dense else replace(part, nnz=part.shape.outputs * (whole * n + rest * n // m)))
    return replace(plan, parts=tuple(parts))


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


# --- the whole model ---


def _scale(
    layers: Sequence[LayerPlan],
    chosen: Sequence[LayerPlan],
    spec: TransformSpec,
    training: TrainingSpec,
    widening: Widening | None,
) -> Fraction:
    """The factor on the transformed layers' dense cost that meets the budget exactly, before rounding to non-zeros.

    For the forward pass: fixed + scale * transformed = budget, where `fixed` is what is left alone.
    """
    dense = sum(p.dense_macs for p in chosen)
    if spec.match == "model":
        fixed = sum(p.macs for p in layers if p.status != "transformed")
        scale = Fraction(sum(p.dense_macs for p in layers) - fixed, dense)
    else:
        most = Fraction(sum(p.full_macs for p in chosen), dense)
        scale = _solve(lambda c: _training_at(layers, c, spec, training), dense_training_macs(layers, training), most)
    if scale <= 0:
        _refuse(layers, spec, training, widening)
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
    Bisection narrows the interval until it has no kink, and a secant is exact then. Should two kinks lie too close, c is
    below the solution by at most 2^-48.
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
        [p.positions * p.weights // p.parts[-1].shape.weights for p in chosen],
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
    dense = [p.dense_nnz for p in chosen]
    caps = [(_room(p, spec) - n) // unit for p, n in zip(chosen, dense, strict=True)]
    budgets = [b - n * p.positions for b, n, p in zip(_budgets(chosen, scale, spec), dense, chosen, strict=True)]
    costs = [p.positions * unit for p in chosen]
    if spec.match == "model":
        counts = round_to_budget(budgets, costs, caps)
    else:

        def of_run(i: int, n: int) -> Fraction:
            return run_macs([chosen[i].with_nonzeros(dense[i] + n * unit, unit)], training, spec.block)

        total = dense_training_macs(layers, training) - _left_alone(layers, training)
        counts = round_to_budget(budgets, costs, caps, total, of_run)
    return [n + c * unit for n, c in zip(dense, counts, strict=True)]


def round_to_budget(
    budgets: Sequence[Fraction],
    unit_costs: Sequence[int],
    caps: Sequence[int],
    total: Fraction | int | None = None,
    cost: Callable[[int, int], Fraction | int] | None = None,
) -> list[int]:
    """Whole counts for fractional budgets: floored, then one more each by largest remainder while it fits.

    Where it does not fit even floored (parts of unlike cost share a layer's), one less each by smallest remainder. No layer
    gets fewer than one.

    Args:
        budgets: MACs of each layer.
        unit_costs: MACs of one non-zero (or block) of each layer.
        caps: the largest count of each layer.
        total: what all counts together may cost; sum(budgets) by default.
        cost: (layer, count) -> what that takes of `total`; count * unit cost by default.

    >>> round_to_budget([Fraction(7, 2), Fraction(7, 2)], [1, 1], [9, 9])
    [4, 3]
    """
    cost_of = cost or (lambda i, n: n * unit_costs[i])
    exact = [b / u for b, u in zip(budgets, unit_costs, strict=True)]
    counts = [max(1, min(cap, floor(x))) for x, cap in zip(exact, caps, strict=True)]
    free = (sum(budgets, Fraction(0)) if total is None else total) - sum(cost_of(i, n) for i, n in enumerate(counts))
    order = sorted(range(len(counts)), key=lambda i: (-(exact[i] - floor(exact[i])), unit_costs[i], i))
    for i in reversed(order):
        if free < 0 and counts[i] > 1:
            counts[i] -= 1
            free += cost_of(i, counts[i] + 1) - cost_of(i, counts[i])
    for i in order:
        if free > 0 and counts[i] < caps[i] and (more := cost_of(i, counts[i] + 1) - cost_of(i, counts[i])) <= free:
            counts[i] += 1
            free -= more
    return counts


def erdos_renyi(
    layers: Sequence[Shape],
    kernels: Sequence[tuple[int, ...]],
    positions: Sequence[int],
    macs: Fraction,
    *,
    kernel: bool,
) -> list[Fraction]:
    """Densities proportional to the Erdos-Renyi score, scaled so that the layers together cost `macs`; capped at 1.

    Score (in + out + sum of kernel sizes) / (in * out * product of kernel sizes) for ERK, without the kernel for ER
    (Evci et al. 2020, "Rigging the Lottery", section 3(1)); layers that would exceed density 1 are dense, and the scale
    is solved again.

    Args:
        layers: their dimensions.
        kernels: their kernel sizes.
        positions: how often each weight is used.
        macs: the MACs that all of them together may cost.
        kernel: ERK, else ER.
    """
    score = []
    for layer, k in zip(layers, kernels, strict=True):
        d_in, d_out = layer.inputs // layer.groups, layer.outputs
        extra, product = (sum(k), layer.taps) if kernel else (0, 1)
        score.append(Fraction(d_in + d_out + extra, d_in * d_out * product))
    cost = [n * layer.weights for n, layer in zip(positions, layers, strict=True)]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(layers)) if i not in dense]
        if not rest:
            return [Fraction(1)] * len(layers)
        scale = (macs - sum(cost[i] for i in dense)) / sum(score[i] * cost[i] for i in rest)
        over = {i for i in rest if scale * score[i] > 1}
        if not over:
            return [Fraction(1) if i in dense else max(Fraction(0), scale * score[i]) for i in range(len(layers))]
        dense |= over


# --- the check afterwards ---


def matched_cost(
    layers: Sequence[LayerPlan], spec: TransformSpec, training: TrainingSpec
) -> tuple[Fraction | int, Fraction | int] | None:
    """(cost, budget) of what is matched as a whole: the forward pass, or a mean training step. None where nothing is."""
    if spec.match == "model":
        return sum(p.macs for p in layers), sum(p.dense_macs for p in layers)
    if spec.match == "train":
        return run_macs(layers, training, spec.block), dense_training_macs(layers, training)
    return None


def require_within_budget(
    layers: Sequence[LayerPlan], spec: TransformSpec, training: TrainingSpec, widening: Widening | None
) -> None:
    """Refuse a plan that exceeds its budget: where one non-zero a layer is already too much.

    Raises:
        CheckFailed: it does.
    """
    cost, budget = matched_cost(layers, spec, training) or (0, 0)
    if cost > budget:
        _refuse(layers, spec, training, widening)


def _refuse(
    layers: Sequence[LayerPlan], spec: TransformSpec, training: TrainingSpec, widening: Widening | None
) -> None:
    hint = "lower --sparsity, use --scope inner, or --match layer and accept the growth"
    if spec.match == "train":
        dense, least = dense_training_macs(layers, training), _training_at(layers, Fraction(0), spec, training)
        raise CheckFailed(
            f"no density matches the model's training FLOPs with {training.algorithm} at sparsity {spec.sparsity}: without a "
            f"single non-zero a step already costs {2 * float(least):,.0f} FLOPs, {float(least / dense):.3f}x the "
            f"dense model's {2 * float(dense):,.0f}",
            hint=hint,
        )
    dense = sum(p.dense_macs for p in layers)
    fixed = sum(p.macs for p in layers if p.status != "transformed")
    limit = f" (s_max {widening.s_max(layers):.3f})" if widening else ""
    raise CheckFailed(
        f"no density matches the model's FLOPs at sparsity {spec.sparsity}: what is left alone already costs "
        f"{2 * fixed:,} FLOPs forward, {fixed / dense:.3f}x the dense model's {2 * dense:,}{limit}",
        hint=hint,
    )
