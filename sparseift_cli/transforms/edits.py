"""What surgery does to a module, as plain data: it can be written to disk and done again to a freshly built dense model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..plan.layer_plan import NormKind

SCHEMA = "sparseift.surgery/1"


@dataclass(frozen=True, slots=True)
class Resize:
    """Give a parameter or buffer a new shape. `rotary` frequencies follow from their number and are computed anew."""

    key: str
    shape: tuple[int, ...]
    rotary: bool = False


@dataclass(frozen=True, slots=True)
class SetAttribute:
    """Set a number that a module (or a configuration object at that path) holds; `index`: one item of a tuple."""

    owner: str
    name: str
    value: int | float
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Replace:
    """Put a member of the family in the place of the layer at `path`.

    `size` is the number of branches (Parallel) or the rank per group (Factorized, Doped). `norm` and `activation` stand
    inside the member: a norm's kind with eps and momentum, and a function of torch.nn.functional or `module:` and the path
    of the activation module to copy. `every_branch`: both per branch, else only one bias.
    """

    path: str
    member: str
    size: int
    norm: NormKind | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1
    activation: str | None = None
    every_branch: bool = True


@dataclass(frozen=True, slots=True)
class Masked:
    """A weight that is sparse: `key` in the transformed model, the row and part of the plan it belongs to, its non-zeros.

    `transposed`: [in, out] instead of [out, in]. `heads`: equal blocks of rows (or with `heads_on_inputs` of columns)
    that get equal shares of the non-zeros, one for every head of an attention projection.
    """

    layer: str
    part: str
    key: str
    nnz: int
    groups: int = 1
    transposed: bool = False
    heads: int = 1
    heads_on_inputs: bool = False


@dataclass(frozen=True)
class Surgery:
    """Everything that turns the dense module into the planned one, weights' values and masks apart."""

    resizes: tuple[Resize, ...] = ()
    attributes: tuple[SetAttribute, ...] = ()
    members: tuple[Replace, ...] = ()
    masked: tuple[Masked, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | {f.name: [_brief(e) for e in getattr(self, f.name)] for f in fields(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Surgery:
        return Surgery(
            tuple(Resize(**(e | {"shape": tuple(e["shape"])})) for e in data["resizes"]),
            tuple(SetAttribute(**e) for e in data["attributes"]),
            tuple(Replace(**e) for e in data["members"]),
            tuple(Masked(**e) for e in data["masked"]),
        )


def _brief(edit: Any) -> dict[str, Any]:
    """Only what differs from the defaults."""
    defaults = {f.name: f.default for f in fields(edit)}
    return {k: v for k, v in asdict(edit).items() if v != defaults[k]}
