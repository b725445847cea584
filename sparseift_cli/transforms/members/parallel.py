"""Sparse Parallel: several sparse copies of a layer, their outputs summed (Sparse-IFT, section 3.2 and figure 2).

With a non-linearity per branch (`branch_activation: each`, the figure of the article) the branches compute different
functions; without one (`sum`) their masks are disjoint, or they would fold into one matrix. A convolution's branch ends with the
model's kind of norm and with the activation that follows the layer itself, if one does: none in front of a residual sum, nor in a
shortcut. The authors' code has the norm alone on CIFAR (`activation: none`) and a ReLU in every branch on ImageNet.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..edits import Replace
from ..layers import bias_of, like, outputs_of
from .base import Member, non_linearity


class SparseParallel(Member):
    """sum_i a(norm_i(W_i x + b_i)), input and output as the layer it replaces. Branch i is a Sequential whose `0` is W_i."""

    def __init__(self, branches: list[nn.Sequential]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def parts(self) -> dict[str, nn.Module]:
        """`branch 0`, `branch 1`, ..."""
        return {f"branch {i}": b[0] for i, b in enumerate(self.branches) if isinstance(b, nn.Sequential)}

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


def build(root: nn.Module, layer: nn.Module, edit: Replace) -> SparseParallel:
    """`edit.size` branches like `layer`; only the first has a bias where the branches share what follows."""
    branches = []
    for i in range(edit.size):
        has_bias = bias_of(layer) is not None and (edit.every_branch or i == 0)
        weights = like(layer, outputs_of(layer), bias=has_bias)
        inside = non_linearity(root, weights, edit) if edit.every_branch else []
        branches.append(nn.Sequential(weights, *inside))
    return SparseParallel(branches)
