"""Training MACs of a planned model, layer by layer: forward, input gradients, weight gradients, mask updates. Pure.

What one non-zero costs in a step is found here; how many there are in the mean step, and which steps compute dense weight
gradients, is the mask algorithm's to say (`MaskAlgorithm.mean_step`).

No dX where nothing upstream trains (the first layer), no dW for frozen weights; both come from the table, where tracing
`requires_grad` put them. Optimiser steps and elementwise work are not counted, as in the forward pass.

With activation checkpointing (`recompute`) every layer inside a repeated block (`Layer.block`) is computed a second time; layers
outside of blocks, such as stem and head, keep their activations and are computed once. `train.recompute` does just that.
What the model's own forward checkpoints is computed a second time in any case (`Layer.recomputed`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

from ..sparsity.algorithms import MaskAlgorithm
from ..sparsity.schedule import StepCost
from ..table.table import Layer
from .layer_plan import LayerPlan, Part
from .spec import TrainingSpec


def step_cost(plan: LayerPlan, *, recompute: bool = False) -> StepCost:
    """One training step of a layer that is left as it is."""
    layer, macs = plan.layer, plan.macs
    return StepCost(_forwards(layer, recompute) * macs, layer.grad_inputs * macs, layer.grad_weight * macs)


def cost_per_nonzero(plan: LayerPlan, part: Part, *, recompute: bool = False) -> StepCost:
    """MACs of one training step of a transformed layer for one non-zero of one of its weights.

    A low-rank pair has an inner activation: V needs its input gradient whenever U trains, even behind a frozen input.
    """
    layer, uses = plan.layer, plan.positions
    inner = part.reads_part and not layer.grad_inputs and layer.grad_weight
    return StepCost(
        _forwards(layer, recompute) * uses, uses if inner else uses * layer.grad_inputs, uses * layer.grad_weight
    )


def costs_by_part(plan: LayerPlan, *, recompute: bool = False) -> tuple[Fraction, dict[str, StepCost]]:
    """MACs of a transformed layer's step in its parts without a mask, and `cost_per_nonzero` of the others by name."""
    found = {part.name: cost_per_nonzero(plan, part, recompute=recompute) for part in plan.parts}
    fixed = sum((found.pop(part.name).total * Fraction(part.nnz) for part in plan.parts if part.dense), Fraction(0))
    return fixed, found


def _forwards(layer: Layer, recompute: bool) -> Fraction | int:
    """How often a training step computes a layer's output."""
    return 1 + layer.recomputed + (1 if recompute and layer.block else 0)


def dense_training_macs(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction | int:
    """MACs of one training step of the dense model, at the table's batch size."""
    total: Fraction | int = 0
    for plan in layers:
        operands = plan.layer.grad_inputs + plan.layer.grad_weight
        total += plan.dense_macs * (_forwards(plan.layer, training.recompute) + operands)
    return total


def _training_macs(
    layers: Sequence[LayerPlan], training: TrainingSpec, mean: Callable[[LayerPlan, Part, StepCost], Fraction | int]
) -> Fraction:
    """MACs of a step of the transformed model; `mean` gives those of a weight with a mask, from its cost per non-zero."""
    total = Fraction(0)
    for plan in layers:
        if plan.status != "transformed":
            total += step_cost(plan, recompute=training.recompute).total
            continue
        fixed, found = costs_by_part(plan, recompute=training.recompute)
        total += sum((mean(plan, part, found[part.name]) for part in plan.parts if part.name in found), fixed)
    return total


def run_macs(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction:
    """Mean MACs of a training step over a run, to the non-zero: those of the whole run over its steps.

    Gradual pruning has a whole number of non-zeros (of blocks, where masks consist of them) at every step, so with known
    steps those are added up. Without, it is the limit of long runs, above it by less than a non-zero (a block) a weight.
    """
    return _training_macs(layers, training, lambda plan, part, cost: _mean_step(plan, part, cost, training))


def _mean_step(plan: LayerPlan, part: Part, cost: StepCost, training: TrainingSpec) -> Fraction:
    """MACs of the mean step of a part with a mask."""
    method, schedule = training.method, training.method.schedule(training.steps)
    start = initial_nonzeros(plan, part, method)
    return method.mean_step(cost, start, part.nnz, part.shape.weights, schedule, plan.unit)


def unrounded_macs(plan: LayerPlan, macs: Fraction | int, training: TrainingSpec) -> Fraction:
    """`run_macs` of a transformed layer whose forward costs `macs`, before rounding to whole non-zeros.

    Dense parts keep all their weights, whatever `macs` says; the others share what is left by size.
    """
    sparse = sum(p.shape.weights for p in plan.parts if not p.dense)
    left = Fraction(macs) / plan.positions - (plan.weights - sparse)
    density = min(Fraction(1), max(Fraction(0), left / sparse))
    method, schedule = training.method, training.method.schedule(training.steps)

    def mean(plan: LayerPlan, part: Part, cost: StepCost) -> Fraction:
        nnz = density * part.shape.weights
        start = max(nnz, _start(plan, part, method))
        return method.mean_step(cost, start, nnz, part.shape.weights, schedule)

    return _training_macs([plan], training, mean)


def training_macs_while_updating(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction:
    """The mean step while masks still change, where `MaskAlgorithm.costs_more_while_updating`: the first `stop` of a run."""
    method, schedule = training.method, training.method.schedule(training.steps)
    return _training_macs(
        layers, training, lambda _, part, cost: method.updating_step(cost, part.nnz, part.shape.weights, schedule)
    )


def executed_macs(
    layers: Sequence[LayerPlan], training: TrainingSpec, compact: Collection[tuple[str, str]] = ()
) -> Fraction:
    """MACs of a step where masked weights are multiplied like any others, but for the parts in `compact` (layer, part).

    Those cost what `run_macs` counts.
    """

    def mean(plan: LayerPlan, part: Part, cost: StepCost) -> Fraction | int:
        if (plan.layer.name, part.name) in compact:
            return _mean_step(plan, part, cost, training)
        return cost.total * part.shape.weights

    return _training_macs(layers, training, mean)


def initial_nonzeros(plan: LayerPlan, part: Part, method: MaskAlgorithm) -> int:
    """The non-zeros of a part at step 0: the planned ones, or more where the algorithm starts denser."""
    return max(part.nnz, _start(plan, part, method))


def final_nonzeros(plan: LayerPlan, part: Part, training: TrainingSpec) -> int:
    """The non-zeros of a part when training ends: the planned ones, unless the algorithm uses no masks."""
    schedule = training.method.schedule(training.steps)
    start = initial_nonzeros(plan, part, training.method)
    return training.method.nonzeros(schedule.end, start, part.nnz, schedule)


def _start(plan: LayerPlan, part: Part, method: MaskAlgorithm) -> int:
    """The non-zeros of the algorithm's start density, in whole blocks; 0 for parts that keep theirs: dense or frozen ones."""
    if method.start_density is None or part.dense or not plan.layer.grad_weight:
        return 0
    unit = plan.unit
    count = int(method.start_density * part.shape.weights / unit)
    return min(plan.mask_pattern.places(part.shape) // unit, count) * unit
