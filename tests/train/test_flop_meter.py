"""What a run has spent is what the audit said that it would: to the FLOP, whatever is frozen and however masks are made."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import CheckFailed
from sparseift_cli.plan.audit import audit
from sparseift_cli.plan.execution import execution
from sparseift_cli.plan.spec import TrainingSpec
from sparseift_cli.sparsity.algorithms import ALGORITHMS
from sparseift_cli.train.flop_meter import FlopMeter
from sparseift_cli.transforms.transformation import transformation_of

pytestmark = pytest.mark.filterwarnings("ignore:frozen weights keep")

MEMBERS = ("wide", "parallel", "factorized", "doped")


def mlp() -> nn.Module:
    """Sizes that no block of 4 x 4 or 2 x 3 tiles."""
    sizes = (64, 13, 19, 11, 10)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def frozen() -> nn.Module:
    model = mlp()
    for i in (0, 4):
        model[i].requires_grad_(False)  # type: ignore[index]
    return model


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 18, 3, groups=2), nn.Conv2d(18, 14, 1)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(x.view(-1, 1, 8, 8).expand(-1, 3, -1, -1)))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def both(model: nn.Module, algorithm: Any, training: TrainingSpec, **spec: Any) -> tuple[int, int]:
    """FLOPs of the run: added up step by step, and audited; also the non-zeros at the end, in the model and audited.

    And those that are executed, where kernels compute none, all or half of the layers.
    """
    x = torch.randn(4, 64)
    new, plan = sparseift.transform(model, x, training=training, **spec)
    done, steps = transformation_of(new), training.steps
    assert done is not None and steps is not None
    trained = [p for p in new.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    schedule = {"total_steps": steps, "delta_t": training.delta_t, "stop": str(training.stop)}
    sparsifier = sparseift.Sparsifier(new, plan, optimizer, algorithm=algorithm, **schedule)
    rows = [row.layer.name for row in plan.layers if row.status == "transformed"]
    kept_compact = [set[str](), set(rows), set(rows[::2])]
    spent, *others = [
        FlopMeter(
            plan.layers,
            done.surgery.masked,
            len(x),
            recompute=False,
            compact={m.key for m in done.surgery.masked if m.layer in layers},
        )
        for layers in kept_compact
    ]
    for _ in range(steps):
        optimizer.zero_grad()
        new(x).square().mean().backward()
        sparsifier.step()
        for meter in (spent, *others):
            meter.add(sparsifier.last)
        optimizer.step()
    result = audit(plan, training)
    assert result.transformed is not None
    for meter, layers in zip((spent, *others), kept_compact, strict=True):
        places = {(row.layer.name, part.name) for row in plan.layers if row.layer.name in layers for part in row.parts}
        assert meter.total == spent.total
        assert meter.executed_macs == execution(plan.layers, training, places).training_macs * steps * len(x)
        assert layers != set(rows) or meter.executed == spent.total <= spent.executed
    held = sum(int(m.count_nonzero()) for m in sparseift.masks(new).values())
    kept = sum(
        p.shape.weights - p.nnz for row in plan.layers if row.status == "transformed" for p in row.parts if not p.dense
    )
    masked = sum(m.numel() for m in sparseift.masks(new).values())
    assert result.nonzero_after_training == result.transformed.nonzero_params + held - (masked - kept)
    return spent.total, round(2 * result.transformed.training_macs * steps * len(x))


@pytest.mark.parametrize("make", [mlp, frozen, Grouped])
@pytest.mark.parametrize("algorithm", tuple(ALGORITHMS))
def test_every_algorithm(make: Any, algorithm: str) -> None:
    for member in MEMBERS:
        training = TrainingSpec(algorithm=algorithm, steps=10, delta_t=3)
        spent, audited = both(make(), algorithm, training, member=member, sparsity="0.75")
        assert spent == audited


@pytest.mark.parametrize("pattern", ["4x4", "2x3"])
@pytest.mark.parametrize("algorithm", tuple(ALGORITHMS))
def test_blocks_that_do_not_tile_a_weight(pattern: str, algorithm: str) -> None:
    for make in (mlp, Grouped):
        training = TrainingSpec(algorithm=algorithm, steps=10, delta_t=3)
        spent, audited = both(make(), algorithm, training, sparsity="0.5", pattern=pattern)
        assert spent == audited


@pytest.mark.parametrize(("steps", "delta_t", "stop"), [(1, 100, "0.75"), (7, 1, "1"), (7, 2, "0"), (5, 20, "0.5")])
@pytest.mark.parametrize("algorithm", ["snfs", "rigl", "gmp", "granet"])
@pytest.mark.filterwarnings("ignore:.*moves no mask in this run")
def test_odd_schedules(algorithm: str, steps: int, delta_t: int, stop: str) -> None:
    training = TrainingSpec(algorithm=algorithm, steps=steps, delta_t=delta_t, stop=stop)
    spent, audited = both(frozen(), algorithm, training, sparsity="0.5")
    assert spent == audited


def test_checkpoints_keep_what_was_executed() -> None:
    new, plan = sparseift.transform(mlp(), torch.randn(4, 64), sparsity="0.5")
    done, optimizer = transformation_of(new), torch.optim.SGD(new.parameters(), lr=0.01)
    assert done is not None
    sparsifier = sparseift.Sparsifier(new, plan, optimizer, algorithm="static", total_steps=5)
    sparsifier.step()

    def meter() -> FlopMeter:
        return FlopMeter(plan.layers, done.surgery.masked, 4, recompute=False)

    began, goes_on, older = meter(), meter(), meter()
    for _ in range(3):
        began.add(sparsifier.last)
    goes_on.restore(began.state(), 3)
    older.restore({"spent": began.state()["spent"]}, 3)  # of a version that had masked dense layers alone
    for other in (goes_on, older):
        assert (other.total, other.executed) == (began.total, began.executed)
        assert other.executed > other.total > 0


def test_a_training_budget_with_fractions_is_refused_in_whole_flops() -> None:
    """A layer that is called twice, on the input and behind itself, computes half of its input gradients."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(torch.relu(self.a(x)))))))

    training = TrainingSpec(algorithm="snfs", steps=10)
    with pytest.raises(CheckFailed, match=r"(?m)the dense model's [\d,]+$"):
        sparseift.transform(
            Twice(), torch.randn(2, 16), member="factorized", sparsity="0.9", match="train", training=training
        )
