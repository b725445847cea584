"""What sparsity costs a training step: plain, masked, and with a RigL update, of one and the same wide model, interleaved.

`python -m tests.benchmarks.training_step [--runs N] [--batch B]`. Promises (CPU, fused optimisers): a masked step takes at
most 1.05 times a plain one; a RigL update, spread over 100 steps, at most 1 % of a step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseift_cli import transform
from sparseift_cli.models.zoo.gpt import GPT, GPTConfig
from sparseift_cli.models.zoo.registry import build
from sparseift_cli.sparsity.sparsifier import Sparsifier

DELTA_T = 100
EVERY = 3  # steps between the updates that are timed
Loss = Callable[[nn.Module], Tensor]


@dataclass
class Case:
    """A wide model, a loss on one batch, its optimiser."""

    name: str
    model: nn.Module
    loss: Loss
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


def resnet(batch: int) -> Case:
    """ResNet-18 for CIFAR at width 128: Sparse Wide of width 64 at sparsity .75."""
    model, _ = transform(build("resnet18_cifar"), torch.zeros(1, 3, 32, 32), sparsity=0.75)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))
    return Case(
        f"resnet18_cifar 128, batch {batch}",
        model,
        lambda m: nn.functional.cross_entropy(m(x), y),
        lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True, fused=True),
    )


def block(batch: int) -> Case:
    """One GPT block of width 768, from 384 at sparsity .75, on 256 tokens a sample; a small vocabulary."""
    dense = GPT(GPTConfig(hidden=384, depth=1, num_heads=6, max_seq=256, vocab=256, dropout=0.0))
    model, _ = transform(dense, torch.zeros(1, 256, dtype=torch.long), sparsity=0.75)
    x = torch.randint(256, (batch, 256))
    return Case(
        f"GPT block 768, {batch} x 256 tokens",
        model,
        lambda m: nn.functional.cross_entropy(m(x).flatten(0, 1), x.flatten()),
        lambda m: torch.optim.AdamW(m.parameters(), 6e-4, fused=True),
    )


class Loop:
    """Training steps of a copy of a case's model, with a Sparsifier or without, and their times."""

    def __init__(self, case: Case, *, sparse: bool) -> None:
        self.loss, self.model = case.loss, copy.deepcopy(case.model).train()
        self.optimizer = case.optimizer(self.model)
        self.sparsifier = None
        if sparse:
            self.sparsifier = Sparsifier(self.model, self.optimizer, algorithm="rigl", delta_t=EVERY, total_steps=10**6)
        self.whole: dict[bool, list[float]] = {True: [], False: []}
        """Seconds of a step, by whether masks were updated."""
        self.late: dict[bool, list[float]] = {True: [], False: []}
        """The part of them after the backward pass: masking, the optimiser's step, the update."""

    def step(self) -> float:
        start = time.perf_counter()
        self.loss(self.model).backward()
        middle = time.perf_counter()
        updates = False
        if self.sparsifier is not None:
            self.sparsifier.step()
            updates = self.sparsifier.last is not None and self.sparsifier.last.dense_gradients
        self.optimizer.step()
        end = time.perf_counter()
        self.optimizer.zero_grad()
        self.whole[updates].append(end - start)
        self.late[updates].append(end - middle)
        return end - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"n = {options.runs}, {torch.get_num_threads()} threads; seconds as median [min, max]")
    for case in (resnet(options.batch), block(max(1, options.batch // 4))):
        plain, sparse = Loop(case, sparse=False), Loop(case, sparse=True)
        for loop in (plain, sparse) * 2:
            loop.step()
        for loop in (plain, sparse):
            for times in (*loop.whole.values(), *loop.late.values()):
                times.clear()
        for i in range(options.runs):
            for loop in (plain, sparse) if i % 2 else (sparse, plain):
                loop.step()
        report(case, plain, sparse)


def report(case: Case, plain: Loop, sparse: Loop) -> None:
    """Medians, and the two promises. Both are also given from the part after the backward pass, which noise reaches less."""
    print(f"\n{case.name}, {sum(p.numel() for p in case.model.parameters()):,} weights")
    rows = {
        "plain": plain.whole[False],
        "masked": sparse.whole[False],
        "with an update": sparse.whole[True],
        "optimiser, plain": plain.late[False],
        "optimiser, masked": sparse.late[False],
        "optimiser, update": sparse.late[True],
    }
    for name, times in rows.items():
        print(f"  {name:20}{statistics.median(times):8.3f} [{min(times):.3f}, {max(times):.3f}]")
    step, masked, _, alone, masking, update = (statistics.median(times) for times in rows.values())
    print(
        f"  masked / plain            {masked / step:.3f}, by its parts {1 + (masking - alone) / step:.3f}   promise <= 1.05"
    )
    print(
        f"  update over {DELTA_T} steps    {(update - masking) / step / DELTA_T:.2%} of a step              promise <= 1 %"
    )


if __name__ == "__main__":
    main()
