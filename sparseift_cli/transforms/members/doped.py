"""Sparse Doped: W becomes a dense low-rank V U beside a sparse copy of W (Sparse-IFT, section 3.4).

What follows the layer in the model follows their sum; only the copy is masked, never U or V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn

from ..edits import Replace
from ..layers import bias_of, groups_of, like, outputs_of, pointwise, weight_of
from ..preserve.factors import group_matrices, truncated_svd
from .base import Decomposition, DenseWeight, MemberModule


class SparseDoped(MemberModule):
    """V U x + S x + b, with U to groups * rank channels and S of the shape of the layer it replaces."""

    sums_parts = True

    def __init__(self, u: nn.Module, v: nn.Module, sparse: nn.Module) -> None:
        super().__init__()
        self.u = u
        self.v = v
        self.sparse = sparse

    @classmethod
    def build(cls, root: nn.Module, layer: nn.Module, edit: Replace) -> Self:
        """Dense factors of rank `edit.size` per group, and a copy of the layer that keeps its bias."""
        rank = groups_of(layer) * edit.size
        sparse = like(layer, outputs_of(layer), bias=bias_of(layer) is not None)
        return cls(like(layer, rank, bias=False), pointwise(layer, rank, bias=False), sparse)

    @classmethod
    def part_paths(cls, size: int) -> tuple[str, ...]:
        return "u", "v", "sparse"

    def forward(self, x: Tensor) -> Tensor:
        return self.v(self.u(x)) + self.sparse(x)

    def balance(self, nonzeros: Sequence[int]) -> None:
        """Scale U and V so that V U x and the masked copy together have the variance of the dense layer's output.

        A dense layer with n inputs for each output and the deviation sigma multiplies the variance of x by n sigma^2; the
        copy makes the share `density` of that. U keeps the variance of x (deviation n ** -1/2); V of rank r makes the rest,
        (1 - density) n sigma^2 = r deviation(V)^2.
        """
        u, v, sparse = (weight_of(part) for part in self.parts())
        inputs, rank = sparse[0].numel(), v[0].numel()
        rest = inputs * float(sparse.std(correction=0)) ** 2 * (1 - nonzeros[-1] / sparse.numel())
        for weight, deviation in ((u, inputs**-0.5), (v, (rest / rank) ** 0.5)):
            current = float(weight.std(correction=0))
            if current:
                weight.mul_(deviation / current)

    @classmethod
    def decompose(cls, dense: DenseWeight) -> Decomposition:
        """The best product of this rank, and the largest of what it leaves in the sparse copy."""
        weight = dense.weight
        matrix = group_matrices(weight, dense.groups)
        f = truncated_svd(matrix, dense.size)
        rest = (matrix - f.v @ f.u).reshape(weight.shape)
        mask = dense.largest(2, rest.abs(), weight.shape)
        method = f"{f.method}, and the sparse copy holds the largest residuals"
        lost = dense.share_of(rest * ~mask)
        return Decomposition((f.u, f.v, rest * mask), (None, None, mask), 2, lost, method)
