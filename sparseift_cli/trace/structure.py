"""Where the widths of a LayerTable stand in the module that was traced: what surgery needs and no table shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..table.poly import Poly


@dataclass(frozen=True, slots=True)
class DimLayout:
    """How a dim is laid out in memory: a `product` of parts (row-major, the last one fastest) or parts one after another."""

    kind: Literal["product", "sum"]
    parts: tuple[Poly, ...]


@dataclass(frozen=True, slots=True)
class AttentionScore:
    """An attention's q . k: the module that computes it, the dim that it sums over, and whether the forward itself scales
    it by that dim's size (SDPA's default, head_dim ** -0.5) rather than by a number that a module keeps.
    """

    module: str
    dim: Poly
    by_size: bool


@dataclass(frozen=True)
class Structure:
    """Every symbolic size of a module as a polynomial over the width ids of its table.

    `shapes`: parameters and buffers by state_dict key. `attributes`: ints by (path of their owner, name, index into a
    tuple or None); an owner is a module or a configuration object, as in `config`. `layouts` say how a width is taken
    apart and put together by views, concatenations and slices. `activations` name what follows a row: a function of
    torch.nn.functional, or `module:` and the path of an activation module; `followers` those alone that read a row, or its
    norm, moved, sliced or pooled at most: of no row that a sum or a list takes too. `contracted` are the dims that attention
    products sum over, by the module that runs them. `queries`: weight key -> index of the query in a fused projection;
    `scores`: the same keys -> the product that the query goes into.

    `orders`: everything that was seen of how a dim lies in memory (`layouts` has one of them). `streams`: what each norm
    over channels reads, by its path, and `reads` what each weight multiplies: the keys of weights whose products add
    up to it, `value:key` of parameters, `norm:path`, and `?` for anything else. `exposed` are those that something else
    than a norm reads directly.
    """

    shapes: Mapping[str, tuple[Poly, ...]]
    attributes: Mapping[tuple[str, str, int | None], Poly]
    layouts: Mapping[Poly, DimLayout] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)
    own_activations: Mapping[str, str] = field(default_factory=dict)
    contracted_dims: Mapping[str, tuple[Poly, ...]] = field(default_factory=dict)
    query_parts: Mapping[str, int | None] = field(default_factory=dict)
    attention_scores: Mapping[str, AttentionScore] = field(default_factory=dict)
    all_layouts: Mapping[Poly, tuple[DimLayout, ...]] = field(default_factory=dict)
    norm_inputs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    weight_inputs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    read_by_others: frozenset[str] = frozenset()
    float_attributes: frozenset[tuple[str, str]] = frozenset()
    """Ints, as (owner, name), that the forward computes with as floats: a scale that it makes of them."""
    output_shapes: Any = None
    """The output of the forward: shapes of its tensors, as plain sizes."""
