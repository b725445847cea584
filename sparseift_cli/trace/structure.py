"""Where the widths of a LayerTable stand in the module that was traced: what surgery needs and no table shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..poly import Poly


@dataclass(frozen=True, slots=True)
class Layout:
    """How a dim is laid out in memory: a `product` of parts (row-major, the last one fastest) or parts one after another."""

    kind: Literal["product", "sum"]
    parts: tuple[Poly, ...]


@dataclass(frozen=True)
class Structure:
    """Every symbolic size of a module as a polynomial over the width ids of its table.

    `shapes`: parameters and buffers by state_dict key. `attributes`: ints by (path of their owner, name, index into a
    tuple or None); an owner is a module or a configuration object, as in `config`. `layouts` say how a width is taken
    apart and put together by views, concatenations and slices. `activations` name what follows a row: a function of
    torch.nn.functional, or `module:` and the path of an activation module. `contracted` are the dims that attention
    products sum over, by the module that runs them. `queries`: weight key -> index of the query in a fused projection.
    """

    shapes: Mapping[str, tuple[Poly, ...]]
    attributes: Mapping[tuple[str, str, int | None], Poly]
    layouts: Mapping[Poly, Layout] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)
    contracted: Mapping[str, tuple[Poly, ...]] = field(default_factory=dict)
    queries: Mapping[str, int | None] = field(default_factory=dict)
    output: Any = None
    """The output of the forward: shapes of its tensors, as plain sizes."""
