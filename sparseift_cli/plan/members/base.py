"""What a member of the Sparse-IFT family is to the plan: the contract of this folder's files, and of members from outside.

A member makes a layer larger and sparse so that it costs what the dense layer costs. Its half without torch is an object
of a subclass of `Member` (most often of `LayerwiseMember`): how large, which weights, which parameters beside them, and
why a layer is left as it is. Its half with torch is a class under `transforms/members`, or of one's own, that
`torch_half` names. Nothing else in the package asks which member it has.

A dense layer has `groups` groups of D_in x D_out weights, D_in = taps * inputs / groups and D_out = outputs / groups.
Each weight is used at `positions` of a forward pass, so MACs = positions * weights, and no member changes `positions`.
What costs the same is therefore a matter of counting non-zeros.

Source: Thangarasa, Saxena, Gupta, Lie, "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
ICML 2024, arXiv 2303.11525, section 3 (the four members) and appendix (their FLOPs). The integer rounding is ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError
from ...table.shape import Shape
from ...table.table import Layer, LayerTable
from ..layer_plan import InnerActivation, LayerPlan, NormKind, Part, left_alone, positions_of
from ..widening import Widening

if TYPE_CHECKING:
    from ..spec import TransformSpec


@dataclass(frozen=True)
class DenseLayer:
    """One layer that may be transformed, the model around it, and the options.

    Args:
        layer: its row of the table.
        table: the dense model.
        spec: the options of the transform.
        widening: the new widths of the whole model, where the member changes widths.
    """

    layer: Layer
    table: LayerTable
    spec: TransformSpec
    widening: Widening | None = None

    @cached_property
    def shape(self) -> Shape:
        """Its dense dimensions."""
        return self.layer.shape(self.table.sizes)

    @property
    def density(self) -> Fraction:
        """d = 1 - s, exactly."""
        return self.spec.density

    @property
    def bias(self) -> int:
        """Its parameters beside the weight."""
        return max(0, self.layer.params.evaluate(self.table.sizes) - self.shape.weights)

    @property
    def activations(self) -> int:
        """Its output elements."""
        return self.layer.activations.evaluate(self.table.sizes)

    def activations_of(self, part: Shape) -> int:
        """Output elements of a part that is computed at the same positions."""
        return self.activations * part.outputs // self.shape.outputs

    @property
    def convolution(self) -> bool:
        """Does it have a kernel?"""
        return bool(self.layer.kernel)

    def norm_after_convolution(self) -> NormKind | None:
        """The norm that may stand inside a member: behind convolutions, a batch norm where the model has one (or `norm` asks)."""
        if not self.convolution or self.layer.projection or self.spec.norm == "none":
            return None
        follows = self.spec.norm == "batch_norm" or any(row.kind == "batch_norm" for row in self.table.layers)
        return "batch_norm" if follows else None

    def untouched(self, reason: str) -> LayerPlan:
        """The layer as it is (at the new sizes of its neighbours), and why."""
        sizes = self.widening.sizes if self.widening else self.table.sizes
        return left_alone(self.layer, self.table.sizes, sizes, reason)

    def replaced(
        self,
        *,
        parts: tuple[Part, ...],
        detail: str,
        new_shape: str = "",
        extra_params: int | None = None,
        activations: int | None = None,
        rank: int | None = None,
        branches: int | None = None,
        inner_norm: NormKind | None = None,
        inner_activation: InnerActivation | None = None,
    ) -> LayerPlan:
        """The layer made of `parts`, before their non-zeros are chosen.

        Args:
            parts: its weights, each used as often as the dense weight was.
            detail: how, in a few words for tables: "rank 320".
            new_shape: the new shape in words, for tables; `detail` by default.
            extra_params: biases and parameters of norms inside; the dense bias by default.
            activations: output elements of all parts; those of the dense layer by default.
            rank, branches: the size that its module is built with.
            inner_norm, inner_activation: what is computed between or behind the parts.
        """
        macs = self.layer.macs.evaluate(self.table.sizes)
        return LayerPlan(
            layer=self.layer,
            status="transformed",
            dense_macs=macs,
            positions=positions_of(self.layer, self.table.sizes),
            params=sum(p.shape.weights for p in parts) + (self.bias if extra_params is None else extra_params),
            activations=self.activations if activations is None else activations,
            parts=parts,
            detail=detail,
            new_shape=new_shape or detail,
            rank=rank,
            branches=branches,
            inner_norm=inner_norm,
            inner_activation=inner_activation,
        )


class Member(ABC):
    """A way to enlarge a model at equal FLOPs."""

    name: ClassVar[str]
    """What options and recipes call it: `wide`."""
    title: ClassVar[str]
    """What messages and tables call it: `Sparse Wide`."""
    help: ClassVar[str]
    """What it does, in one line."""
    order: ClassVar[int] = 100
    """Its place in lists; those of the paper come first."""
    torch_half: ClassVar[str | type]
    """How the plan is carried out: a class, or `package.module:Class`, which is imported when a module is transformed."""

    def check(self, spec: TransformSpec) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: they do.
        """
        if spec.scope == "none":
            raise UsageError(
                "scope none widens nothing: the same layers get sparse at their dense size, which is a control of wide, "
                f"not {self.name}",
                hint="use member wide, or leave scope out",
            )

    def widen(self, table: LayerTable, spec: TransformSpec) -> Widening | None:
        """New widths of the whole model; None for a member that changes single layers."""
        return None

    @abstractmethod
    def plan_layer(self, dense: DenseLayer) -> LayerPlan:
        """What one layer of the body becomes, before its non-zeros are chosen, or why it stays as it is."""

    def sums_before_activation(self, spec: TransformSpec) -> bool:
        """Are equal parts of a layer summed with nothing behind each? Then they share one bias, and their masks are disjoint:
        non-zeros at the same place would fold into one weight.
        """
        return False


class LayerwiseMember(Member):
    """A member that replaces single layers, and leaves every width of the model as it is.

    A complete one, two sparse layers in sequence:

        class TwoInSequence(LayerwiseMember):
            name, title, help = "two_in_sequence", "Two in sequence", "two sparse layers, one behind the other"
            torch_half = "mypackage.modules:TwoInSequence"

            def replace(self, dense):
                if dense.shape.inputs != dense.shape.outputs or dense.convolution:
                    return dense.untouched("only for square linear layers")
                first, second = Part.full("first", dense.shape), Part.full("second", dense.shape, reads_part=True)
                return dense.replaced(parts=(first, second), detail="2 in sequence", activations=2 * dense.activations)
    """

    def plan_layer(self, dense: DenseLayer) -> LayerPlan:
        reason = self.why_untouched(dense)
        return dense.untouched(reason) if reason else self.replace(dense)

    def why_untouched(self, dense: DenseLayer) -> str | None:
        """Why no member of this kind can replace the layer."""
        layer = dense.layer
        if layer.projection and dense.spec.projections == "untouched":
            return "attention projection: without a non-linearity its parts fold into one matrix"
        if layer.kind == "conv_transpose":
            return "transposed convolution: only Sparse Wide can transform it"
        if layer.host:
            return f"its weight is used by {layer.host}: only Sparse Wide can transform it"
        return "sparsity 0 changes nothing" if dense.density == 1 else None

    @abstractmethod
    def replace(self, dense: DenseLayer) -> LayerPlan:
        """`dense.replaced(parts=..., ...)`, or `dense.untouched("why")`."""


def factors(layer: Shape, rank: int) -> tuple[Shape, Shape]:
    """(U, V) of a low-rank layer of this rank per group: U carries kernel, stride and groups, V is a grouped 1x1."""
    inner = layer.groups * rank
    return (
        Shape(layer.inputs, inner, layer.taps, layer.groups),
        Shape(inner, layer.outputs, 1, layer.groups),
    )
