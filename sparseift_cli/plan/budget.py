"""From FLOP budgets to non-zeros: how many each transformed layer gets under --match off, layer, model and train. Pure.

Each layer gets an integer number of non-zeros, floor(budget / positions), so that no budget is exceeded; where the whole
model is matched, what flooring lost goes to the layers with the largest remainders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor

from ..errors import CheckFailed, UsageError
from .distributions import BudgetedLayer
from .layer_plan import LayerPlan
from .selection import require_transformed
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
        The rows with their non-zeros, and the factor on the dense cost of the layers whose density is solved, where a whole
        model is matched.

    Raises:
        CheckFailed: no density fits the budget.
        UsageError: the pattern leaves nothing to choose, or the distribution names layers that are not transformed.
    """
    layers = list(layers)
    which = [i for i, plan in enumerate(layers) if plan.status == "transformed"]
    if not which:
        return layers, None
    distribution = spec.distribution_rule
    require_transformed(distribution.globs, [layers[i].layer.name for i in which])
    given = {i: d for i in which if (d := distribution.given(layers[i].layer.name)) is not None}
    shared = spec.match == "off" and distribution.solved_when_off
    if spec.fixed_density is not None:
        if spec.match in ("model", "train") or given or shared:
            what = "no other can be given" if given or shared else "the model's FLOPs cannot be matched by it"
            raise UsageError(
                f"pattern {spec.pattern} fixes every density, so {what}",
                hint="use --match layer, or a block or unstructured pattern",
            )
        return [_fixed_density(p) if p.status == "transformed" else p for p in layers], None
    for i in which:
        if i in given or (spec.match == "off" and not shared):
            layers[i] = _with_nonzeros(layers[i], _at_density(layers[i], given.get(i, spec.density)))
        elif spec.match == "layer":
            layers[i] = _with_nonzeros(layers[i], clamp_to_room(layers[i], layers[i].dense_macs // layers[i].positions))
    if shared:
        return _share_nonzeros(layers, [i for i in which if i not in given], spec), None
    if spec.match not in ("model", "train"):
        return layers, None
    return _match_model(_ModelBudget(layers, [i for i in which if i not in given], spec, training, widening))


# --- one layer ---


def clamp_to_room(plan: LayerPlan, nnz: int) -> int:
    """The number of non-zeros nearest to `nnz` from below that the layer can hold: in whole blocks, at least one.

    Raises:
        UsageError: it has no room for one block.
    """
    unit, dense = plan.unit, plan.dense_nnz
    room = plan.room - dense
    if room < unit:
        raise UsageError(
            f"layer {plan.layer.name} has no room for one {plan.pattern} block",
            hint="--exclude it, or use smaller blocks",
        )
    return dense + max(unit, min(room, nnz - dense) // unit * unit)


def _at_density(plan: LayerPlan, density: Fraction) -> int:
    """Non-zeros of a layer whose masked parts have a density of their own, whatever that costs."""
    dense = plan.dense_nnz
    return clamp_to_room(plan, dense + floor(density * (plan.weights - dense)))


def _share_nonzeros(layers: list[LayerPlan], shared: Sequence[int], spec: TransformSpec) -> list[LayerPlan]:
    """The rows with the non-zeros that the sparsity leaves of all their masked weights, as the distribution has it.

    RigL's baseline: Erdos-Renyi-Kernel at the dense widths. The total is floor(density * weights), exactly.
    """
    chosen = [layers[i] for i in shared]
    dense = [p.dense_nnz for p in chosen]
    masked = [p.weights - n for p, n in zip(chosen, dense, strict=True)]
    weighed = [
        BudgetedLayer(p.layer.name, p.parts[-1].shape, p.layer.kernel, n, n)
        for p, n in zip(chosen, masked, strict=True)
    ]
    densities = checked_densities(spec, weighed, spec.density * sum(masked))
    budgets = [d * n for d, n in zip(densities, masked, strict=True)]
    units = [p.unit for p in chosen]
    caps = [(p.room - n) // u for p, n, u in zip(chosen, dense, units, strict=True)]
    counts = round_to_budget(budgets, units, caps)
    for i, n, count, unit in zip(shared, dense, counts, units, strict=True):
        layers[i] = _with_nonzeros(layers[i], clamp_to_room(layers[i], n + count * unit))
    return layers


def checked_densities(spec: TransformSpec, layers: Sequence[BudgetedLayer], budget: Fraction) -> list[Fraction]:
    """What the distribution of `spec` makes of a budget, one density a layer.

    Raises:
        UsageError: it gives another number of them, or one below 0.
    """
    found = spec.distribution_rule.densities(layers, budget)
    if len(found) != len(layers) or any(d < 0 for d in found):
        raise UsageError(f"distribution {spec.distribution}: needs one density for each layer, none below 0")
    return [Fraction(d) for d in found]


def _with_nonzeros(plan: LayerPlan, nnz: int) -> LayerPlan:
    """The layer with `nnz` non-zeros over its parts.

    Raises:
        UsageError: one of them has no room for its blocks.
    """
    plan = plan.with_nonzeros(nnz)
    _require_room(plan)
    return plan


def _fixed_density(plan: LayerPlan) -> LayerPlan:
    """The layer with the only number of non-zeros that the pattern lets each masked part have."""
    pattern = plan.mask_pattern
    parts = (part if part.dense else replace(part, nnz=pattern.room(part.shape)) for part in plan.parts)
    return replace(plan, parts=tuple(parts))


def _require_room(plan: LayerPlan) -> None:
    """A layer's room can be all in one of its parts: V of a depthwise layer has one output a group."""
    pattern = plan.mask_pattern
    for part in plan.parts:
        room = part.shape.weights if part.dense else pattern.room(part.shape)
        if part.nnz > room:
            raise UsageError(
                f"layer {plan.layer.name} gives {part.name} {part.nnz} non-zeros, and {pattern.name} blocks have "
                f"room for {room}",
                hint="--exclude it, or use smaller blocks",
            )


# --- the whole model ---


@dataclass(frozen=True)
class _ModelBudget:
    """A model whose FLOPs are matched as a whole.

    Args:
        layers: its rows; those with a density of their own have their non-zeros already.
        solved: the indices of the rows whose densities are solved for.
        spec, training, widening: as in `allocate_nonzeros`.
    """

    layers: list[LayerPlan]
    solved: list[int]
    spec: TransformSpec
    training: TrainingSpec
    widening: Widening | None

    @property
    def chosen(self) -> list[LayerPlan]:
        """The rows whose densities are solved for."""
        return [self.layers[i] for i in self.solved]

    @property
    def others(self) -> list[LayerPlan]:
        """The other rows: what is left alone, and layers whose density the distribution gives."""
        return [plan for i, plan in enumerate(self.layers) if i not in self.solved]

    @property
    def dense_macs(self) -> int:
        """Forward MACs that the rows in `chosen` have in the dense model."""
        return sum(p.dense_macs for p in self.chosen)

    @property
    def total(self) -> Fraction | int:
        """The budget: MACs of the dense model, of its forward pass or its mean training step."""
        if self.spec.match == "model":
            return sum(p.dense_macs for p in self.layers)
        return dense_training_macs(self.layers, self.training)

    def cost_of_others(self) -> Fraction | int:
        """What `others` cost of the budget."""
        if self.spec.match == "model":
            return sum(p.macs for p in self.others)
        return run_macs(self.others, self.training)

    def forward_budgets(self, scale: Fraction) -> list[Fraction]:
        """Forward MACs of each layer in `chosen`, in all scale * dense cost, as the distribution has it."""
        chosen = self.chosen
        layers = [
            BudgetedLayer(p.layer.name, p.parts[-1].shape, p.layer.kernel, p.full_macs, p.dense_macs) for p in chosen
        ]
        densities = checked_densities(self.spec, layers, scale * self.dense_macs)
        return [d * p.full_macs for d, p in zip(densities, chosen, strict=True)]

    def cost_at(self, scale: Fraction) -> Fraction:
        """What the model costs of the budget with `chosen` at `scale` times its dense cost, before rounding to non-zeros."""
        others = Fraction(self.cost_of_others())
        budgets = zip(self.chosen, self.forward_budgets(scale), strict=True)
        if self.spec.match == "model":
            return sum((max(b, Fraction(p.dense_nnz * p.positions)) for p, b in budgets), others)
        return sum((unrounded_macs(p, b, self.training) for p, b in budgets), others)


def _match_model(budget: _ModelBudget) -> tuple[list[LayerPlan], Fraction | None]:
    """The rows with non-zeros within the budget, and the scale that was solved for; None where nothing was to solve.

    Raises:
        CheckFailed: the budget cannot be met.
    """
    if not budget.solved:
        _require_met(budget, budget.cost_of_others())
        return budget.layers, None
    scale, layers = _scale(budget), list(budget.layers)
    for i, nnz in zip(budget.solved, _matched(budget, scale), strict=True):
        layers[i] = _with_nonzeros(layers[i], nnz)
    cost, total = matched_cost(layers, budget.spec, budget.training) or (0, 0)
    if cost > total:  # one non-zero a layer is already too much
        _refuse(budget)
    return layers, scale


def _scale(budget: _ModelBudget) -> Fraction:
    """The factor on the dense cost of the solved layers that meets the budget exactly, before rounding to non-zeros.

    For the forward pass: cost of the others + scale * dense cost = budget.
    """
    most = Fraction(sum(p.full_macs for p in budget.chosen), budget.dense_macs)
    if budget.spec.match == "model":
        scale = Fraction(budget.total - budget.cost_of_others(), budget.dense_macs)
        if scale > 0 and budget.cost_at(scale) > budget.total:  # some layers' dense parts cost more than is theirs
            scale = _solve(budget.cost_at, budget.total, scale)
    else:
        scale = _solve(budget.cost_at, budget.total, most)
    if scale <= 0:
        _refuse(budget)
    if any(p.status == "transformed" for p in budget.others):  # the others may be unable to make up for these
        _require_met(budget, budget.cost_at(min(scale, most)))
    return scale


def _require_met(budget: _ModelBudget, cost: Fraction | int) -> None:
    """Refuse a distribution whose layers leave the model below (or above) its budget with all others dense."""
    if cost == budget.total or (budget.solved and budget.total - cost < 1):
        return
    what = "FLOPs" if budget.spec.match == "model" else "training FLOPs"
    rest = (
        "with every other transformed layer dense the model costs"
        if budget.solved
        else "it fixes every transformed layer, and the model then costs"
    )
    raise CheckFailed(
        f"distribution {budget.spec.distribution} does not match the model's {what}: {rest} "
        f"{2 * float(cost):,.0f} FLOPs, {float(cost / budget.total):.3f}x the dense model's {2 * float(budget.total):,.0f}",
        hint="use other sparsities, give no sparsity to some layers (the budget then decides theirs), or use --match off",
    )


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


def _matched(budget: _ModelBudget, scale: Fraction) -> list[int]:
    """Counts within the budget that `scale` was solved for: the forward pass's, or the run's as it is counted afterwards."""
    spec, training, chosen = budget.spec, budget.training, budget.chosen
    units = [p.unit for p in chosen]
    dense = [p.dense_nnz for p in chosen]
    caps = [(p.room - n) // u for p, n, u in zip(chosen, dense, units, strict=True)]
    budgets = [b - n * p.positions for b, n, p in zip(budget.forward_budgets(scale), dense, chosen, strict=True)]
    costs = [int(p.positions * u) for p, u in zip(chosen, units, strict=True)]
    if spec.match == "model":
        counts = round_to_budget([max(Fraction(0), b) for b in budgets], costs, caps)
    else:

        def of_run(i: int, n: int) -> Fraction:
            return run_macs([chosen[i].with_nonzeros(dense[i] + n * units[i])], training)

        counts = round_to_budget(budgets, costs, caps, budget.total - budget.cost_of_others(), of_run)
    return [n + c * u for n, c, u in zip(dense, counts, units, strict=True)]


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


# --- the check afterwards ---


def matched_cost(
    layers: Sequence[LayerPlan], spec: TransformSpec, training: TrainingSpec
) -> tuple[Fraction | int, Fraction | int] | None:
    """(cost, budget) of what is matched as a whole: the forward pass, or a mean training step. None where nothing is."""
    if spec.match == "model":
        return sum(p.macs for p in layers), sum(p.dense_macs for p in layers)
    if spec.match == "train":
        return run_macs(layers, training), dense_training_macs(layers, training)
    return None


def _refuse(budget: _ModelBudget) -> None:
    """Say that no density is low enough, with the numbers.

    Raises:
        CheckFailed: always.
    """
    spec, widening = budget.spec, budget.widening
    hint = "lower --sparsity, use --scope inner, or --match layer and accept the growth"
    given = any(p.status == "transformed" for p in budget.others)
    if given:
        hint = "give the layers of the distribution a higher sparsity, or use --match off"
    if spec.match == "train":
        dense, least = budget.total, budget.cost_at(Fraction(0))
        besides = " in the other transformed layers" if given else ""
        raise CheckFailed(
            f"no density matches the model's training FLOPs with {budget.training.algorithm} at sparsity {spec.sparsity}: "
            f"without a single non-zero{besides} a step already costs {2 * float(least):,.0f} FLOPs, "
            f"{float(least / dense):.3f}x the dense model's {2 * float(dense):,.0f}",
            hint=hint,
        )
    dense, fixed = budget.total, budget.cost_of_others()
    limit = f" (s_max {widening.s_max(budget.layers):.3f})" if widening and not given else ""
    what = "what is left alone already costs"
    if given:
        what = f"what is left alone and the layers of distribution {spec.distribution} already cost"
    raise CheckFailed(
        f"no density matches the model's FLOPs at sparsity {spec.sparsity}: {what} "
        f"{2 * fixed:,} FLOPs forward, {fixed / dense:.3f}x the dense model's {2 * dense:,}{limit}",
        hint=hint,
    )
