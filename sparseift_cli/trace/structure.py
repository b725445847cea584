"""The second result of a trace: where the widths of a LayerTable are in the module. `transforms/` resizes it by that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..table.poly import Poly

LayoutKind = Literal["product", "sum"]


@dataclass(frozen=True, slots=True)
class DimLayout:
    """How a dim is made of smaller ones, in the order of its entries in memory.

    `product`: a row-major grid whose last part varies fastest, as in view(batch, heads, head_dim). `sum`: the parts one
    after another, as in a concatenation.
    """

    kind: LayoutKind
    parts: tuple[Poly, ...]


@dataclass(frozen=True, slots=True)
class AttentionScore:
    """The product q k^T of an attention: the module that computes it and the dim that it sums over (head_dim).

    `scale` is what multiplies the product, or the query or the key before it, up to the softmax: (source, power) of each
    number. A source is a size of the model, a float attribute (path of its owner, name), or a number of the code.
    `queries` are the keys of the weights that make the query. `softmaxed`: a softmax is known to read the product.
    """

    module: str
    dim: Poly
    scale: tuple[tuple[Poly | tuple[str, str] | float, float], ...]
    queries: tuple[str, ...]
    softmaxed: bool


@dataclass(frozen=True)
class Structure:
    """Every symbolic size of a module as a polynomial over the width ids of its table; "key" is a key of the state_dict."""

    shapes: Mapping[str, tuple[Poly, ...]]
    """Key of a parameter or buffer -> its shape."""
    attributes: Mapping[tuple[str, str, int | None], Poly]
    """(path of the owner, name, index into a tuple or None) -> the int attribute. The owner is a module, or a
    configuration object that a module holds."""
    equal_attributes: tuple[frozenset[tuple[str, str]], ...] = ()
    """(owner, name) of int attributes that the forward pass found equal and that are no size of a tensor."""
    layouts: Mapping[Poly, DimLayout] = field(default_factory=dict)
    """Dim -> how views, concatenations and slices take it apart: the most telling one that was seen."""
    all_layouts: Mapping[Poly, tuple[DimLayout, ...]] = field(default_factory=dict)
    """Dim -> everything that was seen of how it is made of others."""
    activations: Mapping[str, str] = field(default_factory=dict)
    """Row -> the activation that runs after it: a function of torch.nn.functional by name, or `module:` and the path of an
    activation module."""
    own_activations: Mapping[str, str] = field(default_factory=dict)
    """The same, where the activation reads the row itself (or its norm), and no addition or concatenation reads it too."""
    contracted_dims: Mapping[str, tuple[Poly, ...]] = field(default_factory=dict)
    """Module -> the dims that its attention products sum over (head_dim)."""
    query_parts: Mapping[str, int | None] = field(default_factory=dict)
    """Key of a weight that makes queries -> which part of its output they are (0 in a fused QKV); None: all of it."""
    attention_scores: tuple[AttentionScore, ...] = ()
    """The score products of all attentions."""
    scaled_dims: Mapping[tuple[str, str], tuple[Poly, ...]] = field(default_factory=dict)
    """(owner, name) of a float attribute, or a buffer of one element -> the dims of the tensors that it multiplies."""
    norm_inputs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Path of a norm over channels -> the summands of what it reads (see `flow`)."""
    weight_inputs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Key of a weight -> the summands of what it multiplies."""
    channel_norms: Mapping[str, str] = field(default_factory=dict)
    """Key of a weight -> path of the BatchNorm that reads its output."""
    read_by_others: frozenset[str] = frozenset()
    """Summands that something other than a norm reads."""
    float_attributes: frozenset[tuple[str, str]] = frozenset()
    """(owner, name) of ints that the forward pass computes a float from, as in `self.head_dim ** -0.5`."""
    output_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Result of the forward pass by name (see `outputs`) -> its shape in this run. By-products are left out."""
