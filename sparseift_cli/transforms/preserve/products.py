"""The weights that multiply something, and which of their dims are outputs and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...plan.plan import Plan
from ...table.poly import Poly
from ...trace.structure import Structure
from ..edits import Surgery
from ..layers import is_transposed

_KINDS = ("linear", "conv", "depthwise", "grouped conv", "conv_transpose")


@dataclass(frozen=True, slots=True)
class Product:
    """A layer's weight, `dims` as the tensor has them; outputs lie along `axis`, inputs along the other of the first two."""

    key: str
    kind: str
    dims: tuple[Poly, ...]
    axis: int
    masked: bool

    @property
    def outputs(self) -> Poly:
        """Output features (of a grouped transposed convolution, per group)."""
        return self.dims[self.axis]

    @property
    def inputs(self) -> Poly:
        """Input features, of a grouped convolution per group."""
        return self.dims[1 - self.axis]

    @property
    def bias(self) -> str:
        """The key that its bias has, if it has one."""
        path, _, name = self.key.rpartition(".")
        return f"{path}.{name.replace('weight', 'bias')}".removeprefix(".")


def products(plan: Plan, structure: Structure, surgery: Surgery, dense: nn.Module) -> dict[str, Product]:
    """Every weight that a linear or convolution of the model multiplies with, by its key."""
    masked = {m.key for m in surgery.masked}
    found = {}
    for row in plan.layers:
        key = row.layer.weight
        if key is None or row.layer.kind not in _KINDS or "weight" not in key.rpartition(".")[2]:
            continue
        dims = structure.shapes[key]
        if len(dims) >= 2:
            path, _, name = key.rpartition(".")
            axis = int(name == "weight" and is_transposed(dense.get_submodule(path)))
            found[key] = Product(key, row.layer.kind, dims, axis, key in masked)
    return found


def canonical(dense: nn.Module) -> Mapping[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    named = (*dense.named_parameters(remove_duplicate=False), *dense.named_buffers(remove_duplicate=False))
    return {key: first.setdefault(id(tensor), key) for key, tensor in named}
