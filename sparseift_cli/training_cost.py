"""Training MACs of a planned model, layer by layer: forward, input gradients, weight gradients, mask updates. Pure.

No dX where nothing upstream trains (the first layer), no dW for frozen weights; both come from the table, which learnt them
by following `requires_grad`. Optimiser steps and elementwise work are not counted, as in the forward pass.

With activation checkpointing (`recompute`) every layer inside a repeated block (`Layer.block`) makes a second forward; what
lies outside of blocks, such as stem and head, keeps its activations and makes one. `train.recompute` executes just that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from .isoflop import START_DENSITY, Algorithm, Schedule, StepCost, mean_step, nonzeros_at, updating_step
from .layer_plan import LayerPlan, Part
from .spec import TrainingSpec
from .table import Layer

Mean = Callable[[Algorithm, Schedule, StepCost, StepCost], Fraction]


def step_cost(plan: LayerPlan, macs: Fraction | int, *, recompute: bool = False) -> StepCost:
    """One training step of a layer whose forward costs `macs`.

    A low-rank pair has an inner activation: V needs its input gradient whenever U trains, even behind a frozen input.
    """
    layer = plan.layer
    grad_input = layer.grad_inputs * macs
    if not layer.grad_inputs and layer.grad_weight and plan.nnz:
        grad_input = sum(Fraction(macs) * p.nnz / plan.nnz for p in plan.parts if p.name == "V")
    return StepCost(_forwards(layer, recompute) * macs, grad_input, layer.grad_weight * macs)


def _forwards(layer: Layer, recompute: bool) -> int:
    """How often a training step computes a layer's output."""
    return 2 if recompute and layer.block else 1


@dataclass(frozen=True, slots=True)
class Price:
    """MACs of one training step per non-zero of a weight: of the whole step, and of its weight gradient alone."""

    step: Fraction
    gradient: Fraction


def prices(plan: LayerPlan, *, recompute: bool = False) -> tuple[Fraction, dict[str, Price]]:
    """What a transformed layer's step costs with the parts that have no mask, and the prices of the others, by part."""
    cost = step_cost(plan, plan.macs, recompute=recompute)
    fixed, found = Fraction(0), dict[str, Price]()
    for part in plan.parts:
        share = Fraction(part.nnz, plan.nnz)
        gradient = cost.grad_weight * share
        whole = cost.forward * share + _grad_input(plan, part.name, cost.grad_input, share) + gradient
        if part.dense:
            fixed += whole
        else:
            found[part.name] = Price(Fraction(whole) / part.nnz, Fraction(gradient) / part.nnz)
    return fixed, found


def _grad_input(plan: LayerPlan, part: str, grad_input: Fraction | int, share: Fraction) -> Fraction:
    """A part's share of a layer's input gradients: all of it V's where the layer itself reads a frozen input."""
    if plan.layer.grad_inputs or not grad_input:
        return Fraction(grad_input) * share
    return Fraction(grad_input) if part == "V" else Fraction(0)


def dense_training_macs(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction | int:
    """MACs of one training step (one sample batch) of the model one started from."""
    total: Fraction | int = 0
    for plan in layers:
        operands = plan.layer.grad_inputs + plan.layer.grad_weight
        total += plan.dense_macs * (_forwards(plan.layer, training.recompute) + operands)
    return total


def training_macs(
    layers: Sequence[LayerPlan], training: TrainingSpec, *, scale: Fraction | int = 1, mean: Mean = mean_step
) -> Fraction:
    """Mean MACs of a training step of the transformed model, its transformed layers' cost times `scale`."""
    total = Fraction(0)
    for plan in layers:
        if plan.status == "transformed":
            sparse = step_cost(plan, plan.macs * scale, recompute=training.recompute)
            dense = step_cost(plan, plan.full_macs, recompute=training.recompute)
            total += mean(training.algorithm, training.schedule, sparse, dense)
        else:
            total += step_cost(plan, plan.macs, recompute=training.recompute).total
    return total


def run_macs(layers: Sequence[LayerPlan], training: TrainingSpec, block: tuple[int, int] | None = None) -> Fraction:
    """Mean MACs of a training step over a run, to the non-zero: what the run will have spent, over its steps.

    `training_macs` prices the means of the schedules. Gradual pruning has a whole number of non-zeros at every step, so with
    known steps those are added up; and what `dense` opens are the weights that train and lie in whole blocks (`block`: rows,
    columns).
    """
    gradual = training.algorithm in START_DENSITY and training.schedule.steps
    if not gradual and training.algorithm != "dense":
        return training_macs(layers, training)
    total = training_macs([plan for plan in layers if plan.status != "transformed"], training)
    for plan in layers:
        if plan.status == "transformed":
            fixed, found = prices(plan, recompute=training.recompute)
            total += fixed
            for part in plan.parts:
                if part.name in found:
                    first = opened(plan, part, training.algorithm, block)
                    unit = 1 if block is None else block[0] * block[1]
                    total += _mean(found[part.name], part, training, first // unit, unit)
    return total


def opened(plan: LayerPlan, part: Part, algorithm: Algorithm, block: tuple[int, int] | None) -> int:
    """The non-zeros of a part at step 0: those attached, or more where the algorithm starts denser. A frozen weight keeps its."""
    start = Fraction(1) if algorithm == "dense" else START_DENSITY.get(algorithm)
    if start is None or part.dense or not plan.layer.grad_weight:
        return part.nnz
    rows, columns = block or (1, 1)
    cells = min(part.shape.blocks(rows, columns), int(start * part.shape.weights / (rows * columns)))
    return max(part.nnz, cells * rows * columns)


def _mean(price: Price, part: Part, training: TrainingSpec, first: int, unit: int) -> Fraction:
    """Mean MACs of a step of a weight that starts with `first` units. GraNet's updates need a dense weight gradient."""
    schedule, steps = training.schedule, training.schedule.steps
    if training.algorithm == "dense" or not steps:
        return price.step * first * unit
    total = Fraction(0)
    for t in [*range(0, schedule.end, schedule.delta_t), schedule.end]:
        following = min(t + schedule.delta_t, schedule.end) if t < schedule.end else steps
        nnz = unit * nonzeros_at(t, first, part.nnz // unit, schedule)
        total += (following - t) * nnz * price.step
        if training.algorithm == "granet" and 0 < t < schedule.end:
            total += (part.shape.weights - nnz) * price.gradient
    return total / steps


def training_macs_while_updating(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction:
    """RigL's mean step while masks still change: the first `stop` part of a run."""
    return training_macs(layers, training, mean=updating_step)
