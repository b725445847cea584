"""Sparse Parallel: several sparse copies of a layer, their outputs summed (Sparse-IFT, section 3.2 and figure 2).

With a non-linearity per branch (`branch_activation: each`, the figure of the paper) the branches compute different
functions; without one (`sum`) their masks are disjoint, or they would fold into one matrix. A convolution's branch ends
with the model's kind of norm and with the activation that follows the layer itself, if one does: none in front of a
residual sum, nor in a shortcut. The authors' code has the norm alone on CIFAR (`activation: none`) and a ReLU in every
branch on ImageNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...mask.patterns import parse_pattern
from ..edits import Replace
from ..layers import bias_of, like, outputs_of
from .base import Decomposition, DenseWeight, MemberModule, non_linearity


class SparseParallel(MemberModule):
    """sum_i a(norm_i(W_i x + b_i)), input and output as the layer it replaces. Branch i is a Sequential whose `0` is W_i."""

    sums_parts = True

    def __init__(self, branches: list[nn.Sequential]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    @classmethod
    def build(cls, root: nn.Module, layer: nn.Module, edit: Replace) -> Self:
        """`edit.size` branches like `layer`; only the first has a bias where the branches share what follows."""
        branches = []
        for i in range(edit.size):
            has_bias = bias_of(layer) is not None and (edit.every_branch or i == 0)
            weights = like(layer, outputs_of(layer), bias=has_bias)
            inside = non_linearity(root, weights, edit) if edit.every_branch else []
            branches.append(nn.Sequential(weights, *inside))
        return cls(branches)

    @classmethod
    def part_paths(cls, size: int) -> tuple[str, ...]:
        return tuple(f"branches.{i}.0" for i in range(size))

    @property
    def size(self) -> int:
        """Number of branches."""
        return len(self.branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total

    @classmethod
    def linear_option(cls) -> str:
        return "--branch-activation sum"

    @classmethod
    def decompose(cls, dense: DenseWeight) -> Decomposition:
        """Every weight in one branch; exact where the planned non-zeros are as many as the dense weights."""
        if not parse_pattern(dense.pattern).unrestricted:
            raise UsageError(
                f"weights that are distributed over branches are not in the pattern {dense.pattern}",
                hint="use --init fresh, or leave these layers out with --exclude",
            )
        counts = [m.nnz for m in dense.masked if m is not None]
        shared, masks = distribute(dense.weight, counts, dense.generator)
        weight = dense.weight.cpu()
        values = [weight * mine for mine in shared]
        lost = weight - sum(values, torch.zeros_like(weight))
        method = "every weight is in one branch, the largest first"
        return Decomposition(values, masks, 0, dense.share_of(lost), method)


def distribute(weight: Tensor, counts: Sequence[int], generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Disjoint sets of places that share the weights, and masks with these counts around them.

    Every row's weights go to the branches in turn; where they do not all fit, the largest stay. Where the counts are more
    than the weights, the rest of a mask holds zeros, on places that another branch has.

    Args:
        weight: [out, ...].
        counts: non-zeros of each branch.
        generator: for the random order of places.

    Returns:
        For each branch the places whose weight it gets, and its mask; both boolean, in the shape of `weight`.
    """
    size = weight.abs().flatten().float().cpu()
    keep = min(len(size), sum(counts))
    kept = size.argsort(descending=True, stable=True)[:keep]
    kept = kept[torch.randperm(keep, generator=generator)]
    kept = kept[(kept // weight[0].numel()).argsort(stable=True)]
    turns = torch.cat([(torch.arange(n) + 0.5) / n for n in counts])  # branch i's turns, evenly spaced in (0, 1)
    branch = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])[turns.argsort(stable=True)][:keep]
    shared, masks = [], []
    for i, n in enumerate(counts):
        mine = torch.zeros(len(size), dtype=torch.bool)
        mine[kept[branch == i]] = True
        mask = mine.clone()
        empty = (~mine).nonzero().flatten()
        mask[empty[torch.randperm(len(empty), generator=generator)[: n - int(mine.sum())]]] = True
        shared.append(mine.view(weight.shape))
        masks.append(mask.view(weight.shape))
    return shared, masks
