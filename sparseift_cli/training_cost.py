"""Training MACs of a planned model, layer by layer: forward, input gradients, weight gradients, mask updates. Pure.

No dX where nothing upstream trains (the first layer), no dW for frozen weights; both come from the table, which learnt them
by following `requires_grad`. Optimiser steps and elementwise work are not counted, as in the forward pass.

With activation checkpointing (`recompute`) every layer inside a repeated block (`Layer.block`) makes a second forward; what
lies outside of blocks, such as stem and head, keeps its activations and makes one. `train.recompute` executes just that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from .isoflop import Algorithm, Schedule, StepCost, mean_step, updating_step
from .layer_plan import LayerPlan
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


def training_macs_while_updating(layers: Sequence[LayerPlan], training: TrainingSpec) -> Fraction:
    """The mean step while masks still change (RigL's first `stop` part of a run)."""
    return training_macs(layers, training, mean=updating_step)
