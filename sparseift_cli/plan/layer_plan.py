"""What a transform does to one row, and its non-zeros over the weights it is made of. Pure; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from ..table.shape import Shape
from ..table.table import Layer
from .isoflop import share

Status = Literal["transformed", "boundary", "untouched"]


@dataclass(frozen=True, slots=True)
class Part:
    """One weight of a layer; a dense one keeps all its weights (Sparse Doped's U and V, and every untouched layer)."""

    name: str  # weight, branch 3, U, V, sparse
    shape: Shape
    dense: bool
    nnz: int

    def to_json(self) -> dict[str, Any]:
        s = self.shape
        shape = {"inputs": s.inputs, "outputs": s.outputs, "taps": s.taps, "groups": s.groups}
        return {"name": self.name, **shape, "dense": self.dense, "nnz": self.nnz}


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What happens to one row. `macs`, `params`, `activations` are those of the transformed model, in exact integers."""

    layer: Layer
    status: Status
    reason: str
    dense_macs: int
    macs: int
    params: int
    activations: int
    parts: tuple[Part, ...] = ()
    detail: str = ""  # "10 branches, realised sparsity 0.9"; "rank 320"

    @property
    def weights(self) -> int:
        return sum(p.shape.weights for p in self.parts)

    @property
    def nnz(self) -> int:
        return sum(p.nnz for p in self.parts)

    @property
    def uses(self) -> int:
        """How often each weight is used in a forward pass."""
        return self.macs // self.nnz if self.nnz else 0

    @property
    def full_macs(self) -> int:
        """MACs of the transformed layer without masks."""
        return self.uses * self.weights if self.parts else self.macs

    @property
    def density(self) -> Fraction:
        """Of the weights that are sparse (Doped: of the sparse copy)."""
        sparse = [p for p in self.parts if not p.dense]
        return Fraction(sum(p.nnz for p in sparse), sum(p.shape.weights for p in sparse)) if sparse else Fraction(1)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "name": self.layer.name,
            "status": self.status,
            "reason": self.reason,
            "macs": self.macs,
        }
        if self.status == "transformed":
            data |= {"detail": self.detail, "parts": [p.to_json() for p in self.parts]}
        return data


def deal(parts: tuple[Part, ...], nnz: int, unit: int = 1) -> tuple[Part, ...]:
    """`nnz` non-zeros of a layer over its parts, in units (whole blocks): dense parts keep all, the others share by size."""
    sparse = [p for p in parts if not p.dense]
    left = nnz - sum(p.nnz for p in parts if p.dense)
    counts = iter(share(left // unit, [p.shape.weights for p in sparse]))
    return tuple(p if p.dense else Part(p.name, p.shape, False, next(counts) * unit) for p in parts)
