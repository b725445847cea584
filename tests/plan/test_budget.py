"""Non-zeros within a budget: none goes beyond a layer's room or below one block, and none that still fits is left out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import sparseift_cli as sparseift
from sparseift_cli.plan.spec import TrainingSpec
from sparseift_cli.plan.training_cost import dense_training_macs, run_macs

BLOCK = 4  # rows and columns of a 4x4 block


def convolutions() -> nn.Sequential:
    body = [m for a, b in pairwise([3, 8, 16, 16, 24]) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))


def bottleneck() -> nn.Sequential:
    """Layers 4 and 6 have 6 outputs and 6 inputs: two of each are in no 4x4 block."""
    body = [m for a, b in pairwise([12, 40, 40, 6, 40]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(40, 5))


def transformed(net: nn.Module, x: torch.Tensor, **options: Any) -> list[Any]:
    plan = sparseift.flops(net, x, **options).plan
    assert plan is not None
    return [row for row in plan.layers if row.status == "transformed"]


@pytest.mark.parametrize(("pattern", "unit"), [("unstructured", 1), ("2x2", 4)])
def test_a_layer_keeps_at_least_one_block(pattern: str, unit: int) -> None:
    """Sparsity 0.9999 of 1,152 to 3,456 weights is less than one weight."""
    options = {"sparsity": "0.9999", "match": "off", "scope": "none", "pattern": pattern}
    rows = transformed(convolutions(), torch.zeros(2, 3, 8, 8), **options)
    assert [row.nnz for row in rows] == [unit] * 3


def test_room_beside_dense_parts_is_for_whole_blocks() -> None:
    """Erdos-Renyi makes layers 4 and 6 dense: their sparse part gets all 10 blocks that fit, beside all of U and V."""
    options = {"sparsity": "0.5", "match": "model", "member": "doped", "pattern": "4x4", "distribution": "er"}
    rows = {row.layer.name: row for row in transformed(bottleneck(), torch.zeros(2, 12), **options)}
    for name in ("4", "6"):
        u, v, sparse = rows[name].parts
        assert (u.nnz, v.nnz, sparse.nnz) == (u.shape.weights, v.shape.weights, 10 * BLOCK * BLOCK)


@pytest.mark.parametrize("algorithm", ["granet", "gmp"])
def test_layers_with_a_sparsity_of_their_own_cost_whole_blocks(algorithm: str) -> None:
    """Pruning computes with whole blocks at every step; the rest of the budget is what they leave, to the block."""
    training = TrainingSpec(algorithm=algorithm, delta_t=3, steps=100)
    options = {"sparsity": "0.5", "match": "train", "pattern": "4x4", "distribution": {"2": "0.8"}}
    audit = sparseift.flops(convolutions(), torch.zeros(2, 3, 8, 8), training=training, **options)
    assert audit.plan is not None
    plan, unit = audit.plan, BLOCK * BLOCK
    budget = dense_training_macs(plan.layers, training)
    assert run_macs(plan.layers, training) <= budget
    for i, row in enumerate(plan.layers):
        if row.status == "transformed" and row.layer.name != "2":
            layers = [*plan.layers[:i], row.with_nonzeros(row.nnz + unit), *plan.layers[i + 1 :]]
            assert run_macs(layers, training) > budget
