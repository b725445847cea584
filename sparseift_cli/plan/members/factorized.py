"""Sparse Factorized: W becomes V a(U x), two sparse factors of a larger rank (Sparse-IFT, section 3.3)."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from ...table.shape import Shape
from ..layer_patterns import blocks_of_widths
from ..layer_plan import LayerPlan, NormKind, Part
from .base import DenseLayer, LayerwiseMember, factors


def factorized_rank(layer: Shape, density: Fraction) -> int:
    """Rank per group, r = ceil(r0 / d), r0 the rank at which dense factors cost what the layer costs.

    >>> factorized_rank(Shape(64, 64), Fraction(1, 10))  # r0 = 32
    320
    """
    return ceil(layer.rank / density)


class Factorized(LayerwiseMember):
    """A low-rank pair of 1/d times the rank, both factors sparse."""

    name = "factorized"
    title = "Sparse Factorized"
    help = "two sparse factors of 1/d times the rank, a non-linearity between them"
    order = 3
    torch_half = "sparseift_cli.transforms.members.factorized:SparseFactorized"

    def replace(self, dense: DenseLayer) -> LayerPlan:
        rank = self._rank(dense)
        u, v = factors(dense.shape, rank)
        norm = self._norm(dense)
        return dense.replaced(
            parts=(Part.full("U", u), Part.full("V", v, reads_part=True)),
            detail=f"rank {rank}",
            new_shape=f"rank {u.outputs}",  # over all groups
            extra_params=dense.bias + (2 * u.outputs if norm else 0),
            activations=dense.activations + dense.activations_of(u),
            rank=rank,
            inner_norm=norm,
            inner_activation="following" if dense.spec.inner == "activation" and not dense.layer.projection else None,
        )

    @staticmethod
    def _rank(dense: DenseLayer) -> int:
        """`factorized_rank`, and with a pattern of blocks up to the next multiple of one, where that is near."""
        rank = factorized_rank(dense.shape, dense.density)
        blocks, near = blocks_of_widths(dense.spec)
        rounded = (-(-rank // block) * block for block in blocks if dense.shape.groups == 1)
        return next((r for r in rounded if r <= (1 + near) * rank), rank)

    @staticmethod
    def _norm(dense: DenseLayer) -> NormKind | None:
        """Between U and V: the model's batch norm behind a convolution, a layer norm behind a linear where that is all."""
        spec = dense.spec
        if spec.inner == "linear" or spec.norm == "none" or dense.layer.projection:
            return None
        if dense.convolution:
            return dense.norm_after_convolution()
        return "layer_norm" if spec.inner == "norm" else None


MEMBER = Factorized()
