"""Sparse Factorized: W becomes V a(U x), two sparse factors of a larger rank (Sparse-IFT, section 3.3).

U carries kernel, stride, padding, dilation and groups; V is a grouped 1x1. A norm and an activation are between them
(`inner: activation`), or a norm alone, or nothing.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from ..edits import Replace
from ..layers import bias_of, groups_of, like, pointwise
from ..preserve.factors import factorizations, group_matrices
from .base import Decomposition, DenseWeight, MemberModule, non_linearity


class SparseFactorized(MemberModule):
    """V(inner(U x)) + b: U to groups * rank channels, V back to the outputs of the layer it replaces."""

    def __init__(self, u: nn.Module, inner: nn.Sequential, v: nn.Module) -> None:
        super().__init__()
        self.u = u
        self.inner = inner
        self.v = v

    @classmethod
    def build(cls, root: nn.Module, layer: nn.Module, edit: Replace) -> Self:
        """Factors of rank `edit.size` per group; the bias stays with V."""
        rank = groups_of(layer) * edit.size
        u = like(layer, rank, bias=False)
        inner = nn.Sequential(*non_linearity(root, u, edit))
        return cls(u, inner, pointwise(layer, rank, bias=bias_of(layer) is not None))

    @classmethod
    def part_paths(cls, size: int) -> tuple[str, ...]:
        return "u", "v"

    def forward(self, x: Tensor) -> Tensor:
        return self.v(self.inner(self.u(x)))

    @classmethod
    def linear_option(cls) -> str:
        return "--inner linear"

    @classmethod
    def decompose(cls, dense: DenseWeight) -> Decomposition:
        """The factorization that loses least once both factors have their planned counts."""
        weight, groups, rank = dense.weight, dense.groups, dense.size
        matrix = group_matrices(weight, groups)
        u_shape, v_shape = (groups * rank, *weight.shape[1:]), (weight.shape[0], rank)
        tried = []
        for f in factorizations(matrix, rank):
            u_mask, v_mask = dense.largest(0, f.u_score, u_shape), dense.largest(1, f.v_score, v_shape)
            u, v = f.u * u_mask.reshape(f.u.shape), f.v * v_mask.reshape(f.v.shape)
            lost = dense.share_of(matrix - v @ u)
            tried.append(Decomposition((u, v), (u_mask, v_mask), 1, lost, f.method))
        return min(tried, key=lambda made: made.lost)
