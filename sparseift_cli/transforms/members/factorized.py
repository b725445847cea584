"""Sparse Factorized: W becomes V a(U x), two sparse factors of a larger rank (Sparse-IFT, section 3.3).

U carries kernel, stride, padding, dilation and groups; V is a grouped 1x1. A norm and an activation stand between them
(`inner: activation`), or a norm alone, or nothing.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..edits import Replace
from ..layers import bias_of, groups_of, like, pointwise
from .base import Member, non_linearity


class SparseFactorized(Member):
    """V(inner(U x)) + b: U to groups * rank channels, V back to the outputs of the layer it replaces."""

    def __init__(self, u: nn.Module, inner: nn.Sequential, v: nn.Module) -> None:
        super().__init__()
        self.u = u
        self.inner = inner
        self.v = v

    def parts(self) -> dict[str, nn.Module]:
        """`U` and `V`."""
        return {"U": self.u, "V": self.v}

    def forward(self, x: Tensor) -> Tensor:
        return self.v(self.inner(self.u(x)))


def build(root: nn.Module, layer: nn.Module, edit: Replace) -> SparseFactorized:
    """Factors of rank `edit.size` per group; the bias stays with V."""
    rank = groups_of(layer) * edit.size
    u = like(layer, rank, bias=False)
    inner = nn.Sequential(*non_linearity(root, u, edit))
    return SparseFactorized(u, inner, pointwise(layer, rank, bias=bias_of(layer) is not None))
