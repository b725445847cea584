"""Sparse Doped: W becomes a dense low-rank V U beside a sparse copy of W (Sparse-IFT, section 3.4).

What follows the layer in the model follows their sum; only the copy is masked, never U or V.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..edits import Replace
from ..layers import bias_of, groups_of, like, outputs_of, pointwise
from .base import Member


class SparseDoped(Member):
    """V U x + S x + b, with U to groups * rank channels and S of the shape of the layer it replaces."""

    def __init__(self, u: nn.Module, v: nn.Module, sparse: nn.Module) -> None:
        super().__init__()
        self.u = u
        self.v = v
        self.sparse = sparse

    def parts(self) -> dict[str, nn.Module]:
        """`U`, `V` and `sparse`."""
        return {"U": self.u, "V": self.v, "sparse": self.sparse}

    def forward(self, x: Tensor) -> Tensor:
        return self.v(self.u(x)) + self.sparse(x)


def build(root: nn.Module, layer: nn.Module, edit: Replace) -> SparseDoped:
    """Dense factors of rank `edit.size` per group, and a copy of the layer that keeps its bias."""
    rank = groups_of(layer) * edit.size
    sparse = like(layer, outputs_of(layer), bias=bias_of(layer) is not None)
    return SparseDoped(like(layer, rank, bias=False), pointwise(layer, rank, bias=False), sparse)
