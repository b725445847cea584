"""Sparse Parallel: several sparse copies of a layer, their outputs summed (Sparse-IFT, section 3.2 and figure 2)."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING

from ..layer_plan import LayerPlan, Part
from .base import DenseLayer, LayerwiseMember

if TYPE_CHECKING:
    from ..spec import TransformSpec


def branch_count(density: Fraction) -> int:
    """max(2, 1/d to the nearest integer, ties up); the realised sparsity is 1 - 1/branches.

    >>> [branch_count(Fraction(d)) for d in ("0.5", "0.4", "0.25", "0.1")]
    [2, 3, 4, 10]
    """
    return max(2, floor(1 / density + Fraction(1, 2)))


class Parallel(LayerwiseMember):
    """1/d copies of the layer, each with density d."""

    name = "parallel"
    title = "Sparse Parallel"
    help = "1/d sparse copies of a layer, their outputs summed"
    order = 2
    torch_half = "sparseift_cli.transforms.members.parallel:SparseParallel"

    def replace(self, dense: DenseLayer) -> LayerPlan:
        count = branch_count(dense.density)
        in_each_branch = dense.spec.branch_activation == "each"
        norm = dense.norm_after_convolution() if in_each_branch else None
        activation = None
        if in_each_branch and not dense.layer.projection:
            # Behind a norm a branch needs no activation to differ from its neighbours, so it gets the layer's own or none.
            # Without a norm, branches with nothing behind them would fold into one matrix.
            activation = "direct" if norm else "following"
        norm_params = 2 * dense.shape.outputs if norm else 0
        return dense.replaced(
            parts=tuple(Part.full("branch", dense.shape, index=i) for i in range(count)),
            detail=f"{count} branches, realised sparsity {1 - 1 / count:.4g}",
            new_shape=f"{count} branches",
            extra_params=count * (dense.bias + norm_params) if in_each_branch else dense.bias,
            activations=count * dense.activations,
            branches=count,
            inner_norm=norm,
            inner_activation=activation,
        )

    def sums_before_activation(self, spec: TransformSpec) -> bool:
        return spec.branch_activation == "sum"


MEMBER = Parallel()
