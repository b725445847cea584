"""Match train is at the budget that autograd and Sparsifier really take; without steps, all counts are the limit of long runs.

What a run costs is counted here by hooks on its linear layers and convolutions, and never by the audit's own prices.
"""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import CheckFailed
from sparseift_cli.plan.audit import Audit, audit
from sparseift_cli.plan.budget import round_to_budget
from sparseift_cli.plan.plan import Plan, make_plan
from sparseift_cli.plan.spec import TrainingSpec, TransformSpec
from sparseift_cli.plan.training_cost import executed_macs
from sparseift_cli.table.table import LayerTable

pytestmark = pytest.mark.filterwarnings("ignore:frozen weights keep")

MEMBERS = ("wide", "parallel", "factorized", "doped")
STARTS = {"gmp": 1, "granet": 2}  # a mask that moves starts with all weights, or with half of them


def mlp(freeze: tuple[int, ...] = ()) -> nn.Sequential:
    sizes = (24, 40, 40, 40, 40, 10)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    for i in freeze:
        layers[2 * i].requires_grad_(False)
    return nn.Sequential(*layers[:-1])


def small() -> nn.Sequential:
    """A layer of 4 weights: under Sparse Parallel at .9 it has 10 branches."""
    return nn.Sequential(nn.Linear(24, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


class Depthwise(nn.Module):
    """A depthwise convolution of 1 x 3: 24 weights, and under Sparse Parallel at .97 it has 33 branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=8)
        self.point, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x.view(-1, 1, 4, 6)))))
        return self.head(torch.relu(self.point(x)).mean((2, 3)))


@cache
def table(freeze: tuple[int, ...] = ()) -> LayerTable:
    found = sparseift.inspect(mlp(freeze), torch.randn(1, 24))
    assert isinstance(found, LayerTable)
    return found


def planned(training: TrainingSpec, freeze: tuple[int, ...] = (), **spec: Any) -> Audit:
    return audit(make_plan(table(freeze), TransformSpec(**spec), training))


class Counter:
    """MACs of forward and backward passes, by what autograd computes for each layer and the non-zeros of its mask."""

    def __init__(self, model: nn.Module, x: Tensor | None = None) -> None:
        self.macs = self.dense_gradients = self.executed = 0
        masks = sparseift.masks(model)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(self._hook(masks.get(f"{name}.weight")))
        if x is not None:
            model(x)

    def _hook(self, mask: Tensor | None) -> Any:
        def count(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            uses = output.numel() // module.weight.shape[0]
            weights, trains = module.weight.numel(), module.weight.requires_grad
            nnz = weights if mask is None else int(mask.count_nonzero())
            ways = 1 + inputs[0].requires_grad + trains
            self.macs += uses * nnz * ways
            self.executed += uses * weights * ways
            self.dense_gradients += uses * (weights - nnz) * trains

        return count


def counted_run(model: nn.Module, training: TrainingSpec, **spec: Any) -> tuple[Fraction, int, Audit]:
    """MACs of the mean step, of a run of the transformed model and of the dense one; with the audit."""
    x = torch.randn(2, 24)
    dense = Counter(copy.deepcopy(model), x)
    new, plan = sparseift.transform(model, x, training=training, **spec)
    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=0.0)
    assert training.steps is not None
    sparsifier = sparseift.Sparsifier(
        new,
        plan,
        optimizer,
        algorithm=training.algorithm,
        total_steps=training.steps,
        delta_t=training.delta_t,
        stop=training.stop,
    )
    spent = Counter(new)
    end = training.schedule.end
    for t in range(training.steps):
        optimizer.zero_grad()
        spent.dense_gradients = spent.executed = 0
        new(x).square().mean().backward()
        if training.algorithm in ("rigl", "granet") and 0 < t < end and t % training.delta_t == 0:
            spent.macs += spent.dense_gradients
        sparsifier.step()
        optimizer.step()
    assert executed_macs(plan.layers, training) == spent.executed
    return Fraction(spent.macs, training.steps), dense.macs, audit(plan)


@pytest.mark.parametrize("freeze", [(), (0, 1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("algorithm", ["gmp", "granet", "rigl"])
def test_a_run_takes_the_dense_budget(algorithm: Any, member: str, freeze: tuple[int, ...]) -> None:
    training = TrainingSpec(algorithm=algorithm, steps=24, delta_t=5)
    spent, budget, result = counted_run(mlp(freeze), training, member=member, sparsity="0.5", match="train")
    assert result.dense.training_macs == budget
    assert result.transformed is not None and result.transformed.training_macs == spent
    assert Fraction(99, 100) < spent / budget <= 1


def by_steps(plan: Plan, training: TrainingSpec, steps: int, frozen: set[str]) -> float:
    """The mean step of a run of `steps`, interval by interval, without rounding to whole non-zeros."""
    end, total, trained_above = steps * 3 // 4, 0.0, False
    for row in plan.layers:
        trains = row.layer.name not in frozen
        for part in row.parts:
            reads = trained_above or (part.reads_part and trains)
            ways, moves = 1 + reads + trains, trains and not part.dense
            first = max(part.nnz, part.shape.weights // STARTS[training.algorithm]) if moves else part.nnz
            macs = (steps - end) * part.nnz * ways
            for t in range(0, end, training.delta_t):
                nnz = part.nnz + (first - part.nnz) * (1 - t / end) ** 3
                macs += min(training.delta_t, end - t) * nnz * ways
                macs += (part.shape.weights - nnz) * (training.algorithm == "granet" and moves and t > 0)
            total += macs / steps
        trained_above = trained_above or trains
    return total


@pytest.mark.parametrize("match", ["layer", "train"])
@pytest.mark.parametrize("freeze", [(), (0, 1, 2), (2,)], ids=str)
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("algorithm", ["gmp", "granet"])
def test_without_steps_it_is_the_limit(algorithm: Any, member: str, freeze: tuple[int, ...], match: str) -> None:
    """Doped's U and V never open, and frozen weights do not."""
    training = TrainingSpec(algorithm=algorithm, delta_t=10)
    result = planned(training, freeze, member=f"sparse_{member}", sparsity="0.5", match=match)
    assert result.plan is not None and result.transformed is not None and result.training_ratio is not None
    limit = by_steps(result.plan, training, 40_000, {str(2 * i) for i in freeze})
    assert float(result.transformed.training_macs) == pytest.approx(limit, rel=1e-3)
    if match == "train":
        assert Fraction(999, 1000) < result.training_ratio <= 1
    long = TrainingSpec(algorithm=algorithm, delta_t=10, steps=10**5)
    known = planned(long, freeze, member=f"sparse_{member}", sparsity="0.5", match=match)
    assert float(known.training_ratio or 0) == pytest.approx(float(result.training_ratio), rel=1e-3)


@pytest.mark.parametrize("steps", [None, 10_000])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("freeze", [(), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("member", MEMBERS)
def test_layers_that_are_pruned_beside_layers_that_are_not(
    member: str, freeze: tuple[int, ...], distribution: str, steps: int | None
) -> None:
    """GraNet prunes some layers, and not others, which Erdos-Renyi made denser than a half."""
    training = TrainingSpec(algorithm="granet", steps=steps)
    result = planned(
        training, freeze, member=f"sparse_{member}", sparsity="0.5", match="train", distribution=distribution
    )
    ratio = result.training_ratio
    assert ratio is not None and Fraction(998, 1000) < ratio <= 1


def test_a_refusal_gives_the_cost_without_a_non_zero() -> None:
    """GMP opens all ten branches of 40 x 40, and over a long run holds 3/4 / 4 of that."""
    with pytest.raises(CheckFailed, match="training FLOPs with gmp") as error:
        planned(TrainingSpec(algorithm="gmp"), member="sparse_parallel", sparsity="0.9", match="train")
    assert f"already costs {2 * (24 * 40 * 2 + 3 * 40 * 10 + 3 * 3 * 1600 * 10 * 3 // 16):,} FLOPs" in str(error.value)


@pytest.mark.parametrize("algorithm", ["dense", "static", "set", "rigl", "gmp", "granet"])
@pytest.mark.parametrize(("make", "sparsity"), [(small, "0.9"), (Depthwise, "0.97")])
def test_fewer_non_zeros_than_branches(make: Any, sparsity: str, algorithm: Any) -> None:
    training = TrainingSpec(algorithm=algorithm, steps=5, delta_t=2)
    spent, _, result = counted_run(make(), training, member="parallel", sparsity=sparsity)
    assert result.plan is not None and any(part.nnz == 0 for row in result.plan.layers for part in row.parts)
    assert result.transformed is not None and result.transformed.training_macs == spent


def test_what_does_not_fit_when_floored_is_taken_back() -> None:
    """Layers whose non-zeros cost more than was thought: one less of the one with the smallest remainder."""
    budgets, uses = [Fraction(10), Fraction(21, 2)], [1, 1]
    assert round_to_budget(budgets, uses, [99, 99]) == [10, 10]
    assert round_to_budget(budgets, uses, [99, 99], total=20, cost=lambda i, n: n + Fraction(i, 10)) == [9, 10]
    assert round_to_budget([Fraction(1)] * 2, uses, [99, 99], total=1) == [1, 1]
