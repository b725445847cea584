"""Sparse Doped: W becomes a dense low-rank V U beside a sparse copy of W (Sparse-IFT, section 3.4)."""

from __future__ import annotations

from fractions import Fraction
from math import floor

from ...table.shape import Shape
from ..layer_plan import LayerPlan, Part
from .base import DenseLayer, LayerwiseMember, factors


def doped_rank(layer: Shape, density: Fraction) -> int:
    """Rank per group of the dense factors: floor((1 - density) * r0).

    r0 = `layer.rank` is the rank at which U and V together have as many weights as the layer. 0: the layer stays as it is.

    >>> doped_rank(Shape(64, 64), Fraction(1, 10))  # r0 = 32
    28
    """
    return floor((1 - density) * layer.rank)


class Doped(LayerwiseMember):
    """A dense low-rank pair that takes s of the budget, and a sparse copy of the layer for the rest."""

    name = "doped"
    title = "Sparse Doped"
    help = "a dense low-rank pair beside a sparse copy of the layer"
    order = 4
    torch_half = "sparseift_cli.transforms.members.doped:SparseDoped"

    def replace(self, dense: DenseLayer) -> LayerPlan:
        rank = doped_rank(dense.shape, dense.density)
        if rank == 0:
            return dense.untouched("rank 0: too small for a low-rank part")
        u, v = factors(dense.shape, rank)
        return dense.replaced(
            parts=(
                Part.full("U", u, dense=True),
                Part.full("V", v, dense=True, reads_part=True),
                Part.full("sparse", dense.shape),
            ),
            detail=f"rank {rank}",
            new_shape=f"rank {u.outputs} + sparse",
            activations=2 * dense.activations + dense.activations_of(u),
            rank=rank,
        )


MEMBER = Doped()
