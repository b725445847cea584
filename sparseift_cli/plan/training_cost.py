"""Training MACs of a planned model, layer by layer: forward, input gradients, weight gradients, mask updates. Pure.

No dX where nothing upstream trains (the first layer), no dW for frozen weights; both come from the table, which learnt them
by following `requires_grad`. Optimiser steps and elementwise work are not counted, as in the forward pass.

With activation checkpointing (`recompute`) every layer inside a repeated block (`Layer.block`) makes a second forward; what
lies outside of blocks, such as stem and head, keeps its activations and makes one. `train.recompute` executes just that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from ..sparsity.schedule import START_DENSITY, Algorithm, StepCost, mean_step, nonzeros_over_run, updating_step
from ..table.table import Layer
from .layer_plan import LayerPlan, Part
from .spec import TrainingSpec

Block = tuple[int, int] | None  # rows, columns


def step_cost(plan: LayerPlan, *, recompute: bool = False) -> StepCost:
    """One training step of a layer that is left as it is."""
    layer, macs = plan.layer, plan.macs
    return StepCost(_forwards(layer, recompute) * macs, layer.grad_inputs * macs, layer.grad_weight * macs)


def price(plan: LayerPlan, part: Part, *, recompute: bool = False) -> StepCost:
    """One training step of a transformed layer, per non-zero of one of its weights.

    A low-rank pair has an inner activation: V needs its input gradient whenever U trains, even behind a frozen input.
    """
    layer, uses = plan.layer, plan.uses
    inner = part.name == "V" and not layer.grad_inputs and layer.grad_weight
    return StepCost(
        _forwards(layer, recompute) * uses, uses if inner else uses * layer.grad_inputs, uses * layer.grad_weight
    )


def prices(plan: LayerPlan, *, recompute: bool = False) -> tuple[Fraction, dict[str, StepCost]]:
    """What a transformed layer's step costs with the parts that have no mask, and the prices of the others, by part."""
    found = {part.name: price(plan, part, recompute=recompute) for part in plan.parts}
    fixed = sum((found.pop(part.name).total * Fraction(part.nnz) for part in plan.parts if part.dense), Fraction(0))
    return fixed, found


def _forwards(layer: Layer, recompute: bool) -> int:
    """How often a training step computes a layer's output."""
    return 2 if recompute and layer.block else 1


def dense_training_macs(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction | int:
    """MACs of one training step (one sample batch) of the model one started from."""
    total: Fraction | int = 0
    for plan in layers:
        operands = plan.layer.grad_inputs + plan.layer.grad_weight
        total += plan.dense_macs * (_forwards(plan.layer, training.recompute) + operands)
    return total


def _training_macs(
    layers: Sequence[LayerPlan], training: TrainingSpec, mean: Callable[[LayerPlan, Part, StepCost], Fraction | int]
) -> Fraction:
    """MACs of a step of the transformed model, with `mean` those of a weight that has a mask, by its price."""
    total = Fraction(0)
    for plan in layers:
        if plan.status != "transformed":
            total += step_cost(plan, recompute=training.recompute).total
            continue
        fixed, found = prices(plan, recompute=training.recompute)
        total += sum((mean(plan, part, found[part.name]) for part in plan.parts if part.name in found), fixed)
    return total


def run_macs(layers: Sequence[LayerPlan], training: TrainingSpec, block: Block = None) -> Fraction:
    """Mean MACs of a training step over a run, to the non-zero: what the run will have spent, over its steps.

    Gradual pruning has a whole number of non-zeros (of blocks, where masks consist of them) at every step, so with known
    steps those are added up. Without, it is the limit of long runs, above it by less than a non-zero (a block) a weight.
    """

    def mean(plan: LayerPlan, part: Part, cost: StepCost) -> Fraction:
        first = opened(plan, part, training.algorithm, block)
        if training.algorithm in START_DENSITY and training.schedule.steps:
            return _counted(cost, part, training, first, block)
        return _unrounded(cost, part, training, part.nnz, first)

    return _training_macs(layers, training, mean)


def unrounded_macs(plan: LayerPlan, macs: Fraction | int, training: TrainingSpec, block: Block = None) -> Fraction:
    """`run_macs` of a transformed layer whose forward costs `macs`, before rounding to whole non-zeros.

    Dense parts keep all their weights, whatever `macs` says; the others share what is left by size.
    """
    sparse = sum(p.shape.weights for p in plan.parts if not p.dense)
    left = Fraction(macs) / plan.uses - (plan.weights - sparse)
    density = min(Fraction(1), max(Fraction(0), left / sparse))

    def mean(plan: LayerPlan, part: Part, cost: StepCost) -> Fraction:
        nnz = density * part.shape.weights
        return _unrounded(cost, part, training, nnz, max(nnz, _start(plan, part, training.algorithm, block)))

    return _training_macs([plan], training, mean)


def training_macs_while_updating(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction:
    """RigL's mean step while masks still change: the first `stop` part of a run."""
    schedule = training.schedule
    return _training_macs(
        layers,
        training,
        lambda _, part, cost: updating_step(schedule, cost.times(part.nnz), cost.times(part.shape.weights)),
    )


def executed_macs(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction:
    """MACs of a step where masked weights are multiplied like any others."""
    return _training_macs(layers, training, lambda _, part, cost: cost.total * part.shape.weights)


def opened(plan: LayerPlan, part: Part, algorithm: Algorithm, block: Block) -> int:
    """The non-zeros of a part at step 0: those attached, or more where the algorithm starts denser."""
    return max(part.nnz, _start(plan, part, algorithm, block))


def _start(plan: LayerPlan, part: Part, algorithm: Algorithm, block: Block) -> int:
    """The non-zeros that the algorithm opens a part to, in whole blocks. A dense one, and a frozen one, keeps its."""
    start = Fraction(1) if algorithm == "dense" else START_DENSITY.get(algorithm)
    if start is None or part.dense or not plan.layer.grad_weight:
        return 0
    rows, columns = block or (1, 1)
    cells = min(part.shape.blocks(rows, columns), int(start * part.shape.weights / (rows * columns)))
    return cells * rows * columns


def _unrounded(
    cost: StepCost, part: Part, training: TrainingSpec, final: Fraction | int, first: Fraction | int
) -> Fraction:
    """Mean MACs of a step of a weight with any `final` and `first` non-zeros, by the means of the schedules."""
    sparse, dense = cost.times(final), cost.times(part.shape.weights)
    return mean_step(training.algorithm, training.schedule, sparse, cost.times(first), dense)


def _counted(cost: StepCost, part: Part, training: TrainingSpec, first: int, block: Block) -> Fraction:
    """The same of gradual pruning, step by step. GraNet's updates need a dense weight gradient."""
    schedule, unit = training.schedule, block[0] * block[1] if block else 1
    held, pruned = nonzeros_over_run(first // unit, part.nnz // unit, schedule)
    total = unit * held * cost.total
    if training.algorithm == "granet":
        total += ((schedule.updates or 0) * part.shape.weights - unit * pruned) * cost.grad_weight
    return Fraction(total) / (schedule.steps or 1)
