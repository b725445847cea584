"""The edits of a module as plain data: written to disk, they can be repeated on a newly built dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ..mask.layout import part_name
from ..mask.patterns import is_chosen
from ..plan.layer_plan import NormKind

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "sparseift.surgery/1"


@dataclass(frozen=True, slots=True)
class Resize:
    """Give a parameter, buffer or plain tensor a new shape.

    Args:
        rotary: it holds frequencies, which are computed for the new number.
        runs: of a buffer or plain tensor: how each dim grows, part by part, as (dense size, new size).
    """

    key: str
    shape: tuple[int, ...]
    rotary: bool = False
    runs: tuple[tuple[tuple[int, int], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class SetAttribute:
    """Set an attribute of the module, or of the configuration object, at the path `owner`.

    `index`: one leaf of a tuple, list or dict.
    """

    owner: str
    name: str
    value: int | float
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Replace:
    """Replace the layer at `path` by a member.

    Args:
        size: the number of branches (Parallel), or the rank per group (Factorized, Doped).
        norm: the kind of norm inside the member, with `eps` and `momentum`; None: no norm.
        activation: inside the member: a function of torch.nn.functional, or `module:` and the path of a module to copy.
        every_branch: each branch has a norm, an activation and a bias of its own; otherwise only the first has a bias.
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
    """A weight that is sparse.

    Args:
        layer, part: the row and the part of the plan that it belongs to.
        key: its state_dict key in the transformed model.
        nnz: its non-zeros.
        transposed: it is [in, out] instead of [out, in].
        rows: it is only rows [start, stop) of the parameter, which uses its parts at different numbers of positions.
        expert: the rows are one matrix of a stack [experts, out, in].
        pattern: where its non-zeros may be; `surgery_for` sets it to that of its layer in the plan.
        heads: number of equal blocks of rows (with `heads_on_inputs`: of columns) with equal shares of the non-zeros,
            one for each head of an attention projection.
    """

    layer: str
    part: str
    key: str
    nnz: int
    groups: int = 1
    transposed: bool = False
    heads: int = 1
    heads_on_inputs: bool = False
    rows: tuple[int, int] | None = None
    expert: bool = False
    pattern: str = "unstructured"

    @property
    def name(self) -> str:
        """The key, and which rows of it."""
        return self.key if self.rows is None else part_name(self.key, *self.rows)

    def of(self, tensor: Tensor) -> Tensor:
        """What of a tensor [*shape of the parameter] belongs to it, as a view."""
        if self.rows is None:
            return tensor
        return tensor[self.rows[0]] if self.expert else tensor[slice(*self.rows)]


def owner_at(root: Any, path: str) -> Any:
    """The module, the configuration object, or the dict in one, at `path` below `root`.

    Raises:
        AttributeError, KeyError: there is none.
    """
    for name in path.split(".") if path else ():
        root = root[name] if isinstance(root, dict) else getattr(root, name)
    return root


def number_at(root: Any, path: str, name: str) -> float | int:
    """The number that the owner at `path` below `root` keeps as an attribute, or as a buffer of one element: nan on meta."""
    owner = owner_at(root, path)
    value = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    if isinstance(value, (int, float)):
        return value
    return math.nan if value.is_meta else float(value)


@dataclass(frozen=True)
class Surgery:
    """All edits that turn the dense module into the planned one. Values of weights and masks are not part of it."""

    resizes: tuple[Resize, ...] = ()
    attributes: tuple[SetAttribute, ...] = ()
    members: tuple[Replace, ...] = ()
    masked: tuple[Masked, ...] = ()

    @property
    def nonzeros(self) -> dict[str, int]:
        """The non-zeros of every sparse parameter, by its key."""
        found: dict[str, int] = {}
        for m in self.masked:
            found[m.key] = found.get(m.key, 0) + m.nnz
        return found

    @property
    def patterns(self) -> dict[str, str]:
        """The pattern of every sparse parameter, by its key."""
        return {m.key: m.pattern for m in self.masked}

    def parts(self, key: str) -> list[Masked]:
        """What a parameter consists of: one entry for all of it, or several in the order of their rows."""
        return sorted((m for m in self.masked if m.key == key), key=lambda m: m.rows or (0, 0))

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | {f.name: [_changed_fields(e) for e in getattr(self, f.name)] for f in fields(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any], pattern: str = "unstructured") -> Surgery:
        """The inverse of `to_json`; `pattern` is that of the plan, which older versions did not write beside each mask."""
        if is_chosen(pattern):  # newer than that: what has none is unstructured
            pattern = "unstructured"
        return Surgery(
            tuple(_resize_from(e) for e in data["resizes"]),
            tuple(SetAttribute(**e) for e in data["attributes"]),
            tuple(Replace(**e) for e in data["members"]),
            tuple(_masked_from({"pattern": pattern, **e}) for e in data["masked"]),
        )


def _resize_from(data: Mapping[str, Any]) -> Resize:
    runs = tuple(tuple((old, new) for old, new in parts) for parts in data.get("runs", ()))
    return Resize(data["key"], tuple(data["shape"]), data.get("rotary", False), runs)


def _masked_from(data: Mapping[str, Any]) -> Masked:
    rows: Any = tuple(data["rows"]) if data.get("rows") else None
    return Masked(**{**data, "rows": rows})


def _changed_fields(edit: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    defaults = {f.name: f.default for f in fields(edit)}
    return {k: v for k, v in asdict(edit).items() if v != defaults[k]}
