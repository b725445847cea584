"""The plan of one row: what a transform puts in its place, and the non-zeros of each weight. Pure; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from ..mask.patterns import MaskPattern, parse_pattern
from ..table.shape import Shape
from ..table.table import Layer

EXPERTS = "experts"  # kind of a row whose weight is a stack of matrices, of which every token uses some
Status = Literal["transformed", "boundary", "untouched"]
NormKind = Literal["batch_norm", "layer_norm"]
InnerActivation = Literal["direct", "following"]
"""Which activation of the model a member repeats inside: the one that reads the layer itself (`direct`), or the next one
that its output reaches, through residual sums too (`following`)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One weight of a layer. A dense one keeps all its weights (Sparse Doped's U and V, and every untouched layer).

    Args:
        role: what the weight is in its layer: `weight` (the only one), `branch`, `U`, `V`, `sparse`.
        shape: its dimensions.
        nnz: its non-zeros.
        dense: it has no mask.
        index: which one, where several parts have the same role.
        reads_part: its input is the output of another part of the same layer (V reads what U computes), so that training
            needs an input gradient here whenever the layer's weights train.
    """

    role: str
    shape: Shape
    nnz: int
    dense: bool = False
    index: int | None = None
    reads_part: bool = False

    @staticmethod
    def full(
        role: str, shape: Shape, *, dense: bool = False, index: int | None = None, reads_part: bool = False
    ) -> Part:
        """A part before its non-zeros are chosen: all its weights."""
        return Part(role, shape, shape.weights, dense, index, reads_part)

    @property
    def name(self) -> str:
        """Role and index as tables and JSON print them: `weight`, `branch 3`. Unique in a layer; never read back."""
        return self.role if self.index is None else f"{self.role} {self.index}"

    def to_json(self) -> dict[str, Any]:
        s = self.shape
        shape = {"inputs": s.inputs, "outputs": s.outputs, "taps": s.taps, "groups": s.groups}
        return {"name": self.name, **shape, "dense": self.dense, "nnz": self.nnz}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What happens to one row. MACs, parameters and activations are those of the transformed model, in exact integers.

    Args:
        layer: the row of the dense model.
        status: `transformed`; `boundary` (stays dense, but follows a wider neighbour); `untouched`.
        reason: why it is not transformed; empty where it is.
        dense_macs: MACs of a forward pass of the dense model.
        positions: how often each weight is used in a forward pass: output positions of a convolution, tokens of a linear
            layer, over the batch; of experts the mean, a fraction. 0 for a row without a weight.
        product_macs: MACs of a row without a weight: an attention product.
        params: parameters, biases and norms too.
        activations: output elements.
        parts: its weights.
        pattern: where the non-zeros of its masked parts may be, as `parse_pattern` reads it.
        why_pattern: why its blocks are not larger, where the plan chose them (pattern auto).
        detail: how it was transformed, for tables: "10 branches, realised sparsity 0.9", "rank 320".
        new_shape: its new shape in words, where it is made of several parts: "10 branches", "rank 320 + sparse".
        rank: per group, of a low-rank pair.
        branches: how many copies are summed.
        inner_norm: the norm inside the layer's replacement.
        inner_activation: the activation inside it.
    """

    layer: Layer
    status: Status
    reason: str = ""
    dense_macs: int
    positions: Fraction | int = 0
    product_macs: int = 0
    params: int
    activations: int
    parts: tuple[Part, ...] = ()
    pattern: str = "unstructured"
    why_pattern: str = ""
    detail: str = ""
    new_shape: str = ""
    rank: int | None = None
    branches: int | None = None
    inner_norm: NormKind | None = None
    inner_activation: InnerActivation | None = None

    @property
    def copies(self) -> int:
        """How many stacked matrices have equal numbers of non-zeros, so that MACs are the same for any routing: the experts."""
        return self.parts[0].shape.groups if self.layer.kind == EXPERTS and self.parts else 1

    @property
    def mask_pattern(self) -> MaskPattern:
        """The pattern itself, which `pattern` names."""
        return parse_pattern(self.pattern)

    @property
    def masked_parts(self) -> tuple[Part, ...]:
        """Those that have a mask."""
        return tuple(part for part in self.parts if not part.dense)

    @property
    def unit(self) -> int:
        """Non-zeros of its masks come in multiples of it: the weights of a block, in each of the copies."""
        return self.mask_pattern.unit * self.copies

    @property
    def room(self) -> int:
        """The most non-zeros that it can hold: what the pattern lets its masked parts have, beside the dense parts."""
        pattern = self.mask_pattern
        return sum(part.shape.weights if part.dense else pattern.room(part.shape) for part in self.parts)

    @property
    def macs(self) -> int:
        """MACs of a forward pass: a masked weight counts its non-zeros alone."""
        return int(self.positions * self.nnz) if self.parts else self.product_macs

    @property
    def full_macs(self) -> int:
        """MACs of a forward pass without masks."""
        return int(self.positions * self.weights) if self.parts else self.product_macs

    @property
    def weights(self) -> int:
        """Number of weights, biases apart."""
        return sum(p.shape.weights for p in self.parts)

    @property
    def nnz(self) -> int:
        """Number of non-zero weights."""
        return sum(p.nnz for p in self.parts)

    @property
    def dense_nnz(self) -> int:
        """Weights of the parts that have no mask."""
        return sum(p.nnz for p in self.parts if p.dense)

    @property
    def density(self) -> Fraction:
        """Non-zeros over weights, of the parts that have a mask (Sparse Doped: of the sparse copy)."""
        sparse = self.masked_parts
        return Fraction(sum(p.nnz for p in sparse), sum(p.shape.weights for p in sparse)) if sparse else Fraction(1)

    @property
    def size(self) -> int:
        """The number that its replacement is built with: branches, else the rank per group, else the number of parts."""
        return next((n for n in (self.branches, self.rank) if n is not None), len(self.parts))

    def with_nonzeros(self, nnz: int) -> LayerPlan:
        """The same layer with `nnz` non-zeros in all, split over its parts in whole units (`unit`)."""
        return replace(self, parts=split_over_parts(self.parts, nnz, self.unit))

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "name": self.layer.name,
            "status": self.status,
            "reason": self.reason,
            "macs": self.macs,
        }
        if self.status == "transformed":
            data |= {"detail": self.detail, "pattern": self.pattern, "parts": [p.to_json() for p in self.parts]}
        return data


def positions_of(layer: Layer, sizes: Sequence[int]) -> Fraction | int:
    """How often each weight of a row is used in a forward pass: MACs over weights, a whole number.

    Of experts, tokens * top_k over the number of experts: how often on average, whatever the routing.
    """
    macs, weights = layer.macs.evaluate(sizes), layer.shape(sizes).weights
    positions, rest = divmod(macs, weights)
    assert not rest or layer.kind == EXPERTS, f"{macs} MACs are no multiple of {weights} weights"
    return Fraction(macs, weights) if rest else positions


def left_alone(layer: Layer, dense_sizes: Sequence[int], sizes: Sequence[int], reason: str) -> LayerPlan:
    """A row that stays dense, at the new sizes of its neighbours.

    Args:
        layer: the row.
        dense_sizes: every width of the dense model, by id.
        sizes: every width of the transformed model, by id.
        reason: why it is not transformed.
    """
    dense_macs, macs = layer.macs.evaluate(dense_sizes), layer.macs.evaluate(sizes)
    shape = layer.shape(sizes)
    parts = (Part.full("weight", shape, dense=True),) if layer.weighted else ()
    status: Status = "boundary" if layer.role in ("input", "output") and macs != dense_macs else "untouched"
    if status == "boundary":
        reason = f"{reason}: follows the wider stream, stays dense"
    return LayerPlan(
        layer=layer,
        status=status,
        reason=layer.note or reason,
        dense_macs=dense_macs,
        positions=positions_of(layer, sizes) if parts else 0,
        product_macs=0 if parts else macs,
        params=layer.params.evaluate(sizes),
        activations=layer.activations.evaluate(sizes),
        parts=parts,
    )


def split_over_parts(parts: tuple[Part, ...], nnz: int, unit: int = 1) -> tuple[Part, ...]:
    """`nnz` non-zeros of a layer over its parts: dense parts keep all, the others share the rest in proportion to their size.

    Args:
        parts: the weights of one layer.
        nnz: non-zeros in all, those of dense parts too.
        unit: non-zeros come in multiples of it (the weights of a block).
    """
    sparse = [p for p in parts if not p.dense]
    left = nnz - sum(p.nnz for p in parts if p.dense)
    counts = iter(proportional_split(left // unit, [p.shape.weights for p in sparse]))
    return tuple(p if p.dense else replace(p, nnz=next(counts) * unit) for p in parts)


def proportional_split(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in integers proportional to `weights`: each floored, and the remainder one each to the last ones.

    For Sparse Factorized: floor(total |U| / (|U| + |V|)) to U, the rest to V.

    >>> proportional_split(10, [1, 1, 1])
    [3, 3, 4]
    """
    whole = sum(weights)
    shares = [total * w // whole for w in weights]
    rest = total - sum(shares)
    return [n + (i >= len(shares) - rest) for i, n in enumerate(shares)]
