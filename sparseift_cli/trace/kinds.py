"""What each width of a trace counts: channels (`width`), heads, entries of a head (`head_dim`), or anything else (`count`).

Sparse Wide keeps numbers of heads and counts, and grows the rest, so a wrong kind is a wrong network. What the trace saw
decides:

- A dim that an attention sums over in q k^T is a head_dim, and so is what it is joined with to one dim (fused q, k, v);
  what these are multiplied with to a larger dim are heads, and what heads are multiplied with elsewhere (the values' own
  head_dim) is a head_dim too.
- How many outputs a layer has for each of its input channels (a depthwise convolution with a multiplier) is a count.
- A dim of a parameter is a width, and so is an int attribute that is a sum or a multiple of widths.
- Any other int attribute is a count: nothing shows that it is a width.

The name of an attribute decides in one case, where the trace does not: when a dim is a product (view(batch, tokens, heads,
dim)) and no attention sums over either factor, as in a state space model. Then one factor is to grow and one to stay, and
_HEADS and _HEAD_DIM say which.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..table.poly import Poly
from ..table.table import WidthKind
from .symbolise import Origin, SymbolicRun
from .union_find import UnionFind

_HEAD_DIM = (
    "head_dim",
    "head_size",
    "dim_head",
    "d_kv",
    "d_head",
    "per_head",
    "kv_channels",
    "head_channels",
    "value_proj_dim",
)
_HEAD_DIM_ALONE = frozenset({"d_k", "d_q", "d_v", "d_qk", "d_h", "dk", "dv", "dh", "hd"})  # the whole name
_HEADS = ("head", "num_kv")
ROTARY = "inv_freq"  # rotary frequencies: a buffer whose values follow from its size, so it may grow


class Kinds:
    """The kind of every group of equal variables of one run, by its representative in `variables`."""

    def __init__(self, run: SymbolicRun, variables: UnionFind) -> None:
        self.run = run
        self.variables = variables
        self.origins: dict[int, list[Origin]] = {}
        for v, origins in run.origins.items():
            self.origins.setdefault(variables.find(v), []).extend(origins)
        self.products = set(self._products())
        self.channels = self._channels()
        self.heads, self.head_dims = self._of_attention()
        self.widths = self._multiples_of_widths()

    def of(self, root: int) -> WidthKind:
        """The kind of the group with the representative `root`."""
        origins = self.origins.get(root, [])
        if root in self.heads:
            return "heads"
        if root in self.head_dims or any(p.path.endswith(ROTARY) for p in origins):
            return "head_dim"
        factors = [product - {root} for product in self.products if root in product]
        named = _by_name(origins) if factors else None
        if named:
            return named
        if not origins:  # the quotient of a division
            return self._of_quotient({other for rest in factors for other in rest})
        table = all(p.kind in ("buffer", "tensor") for p in origins)
        return "width" if root in self.widths or table or _in_parameter(origins) else "count"

    def _of_quotient(self, divisors: set[int]) -> WidthKind:
        """Of two factors one may grow: the quotient, unless what it was divided by does."""
        names = {_by_name(self.origins.get(d, [])) for d in divisors}
        if "head_dim" in names:
            return "heads"
        return "count" if "heads" not in names and divisors & self.channels else "head_dim"

    def _channels(self) -> set[int]:
        """The groups that are all inputs or all outputs of a layer, and no constant."""
        sides = (side.as_variable for layer in self.run.recorder.layers() for side in (layer.inputs, layer.outputs))
        constants = {v for e in self.variables.equations if len(e.variables) == 1 for v in e.variables}
        return self.variables.roots(v for v in sides if v is not None) - constants

    def _products(self) -> Iterator[frozenset[int]]:
        """The groups that are factors of one dim, in views, in equations, and in weights of more dims than a matrix has."""
        for layouts in self.run.facts.all_layouts.values():
            for kind, parts in layouts:
                variables = [part.as_variable for part in parts]
                if kind == "product":
                    yield frozenset(self.variables.find(v) for v in variables if v is not None)
        sides = (side for layer in self.run.recorder.layers() for side in (layer.inputs, layer.outputs))
        for sum_of_products in (*self.variables.equations, *sides):
            yield from (frozenset(self.variables.roots(m)) for m, _ in sum_of_products.terms if len(m) > 1)

    def _of_attention(self) -> tuple[set[int], set[int]]:
        """The heads and head_dims that the products q k^T show."""
        summed = {v for score in self.run.recorder.scales.scores for v in _linear_variables(score.dim)}
        head_dims = self.variables.roots(summed)
        while parts := self._added_to(head_dims):
            head_dims |= parts
        heads = {v for product in self.products if product & head_dims for v in product} - head_dims
        head_dims |= {v for product in self.products if product & heads and not product <= heads for v in product}
        return heads, head_dims - heads

    def _added_to(self, head_dims: set[int]) -> set[int]:
        """What is joined with head_dims to one dim and is no dim of a parameter: split([key_dim, key_dim, value_dim])."""
        linear = (e for e in self.variables.equations if all(len(m) == 1 for m, _ in e.terms))
        joined = {v for e in linear if e.variables & head_dims for v in e.variables}
        return {v for v in joined - head_dims if not _in_parameter(self.origins.get(v, []))}

    def _multiples_of_widths(self) -> set[int]:
        """Int attributes that are a sum or a multiple of widths: split(self.channels // 2), cat of self.a and self.b."""
        factors = {v for product in self.products if len(product) > 1 for v in product}
        sums = [e for e in self.variables.equations if all(m for m, _ in e.terms)]
        widths = {root for root, origins in self.origins.items() if _in_parameter(origins)} - self.heads
        widths |= self.head_dims
        while True:
            alone = {m[0] for e in sums if e.variables & widths for m, _ in e.terms if len(m) == 1}
            tied = alone - widths - factors - self.heads
            if not tied:
                return widths
            widths |= tied


def _linear_variables(size: Poly) -> Iterator[int]:
    return (m[0] for m, _ in size.terms if len(m) == 1)


def _in_parameter(origins: list[Origin]) -> bool:
    return any(p.kind == "parameter" for p in origins)


def _by_name(origins: list[Origin]) -> WidthKind | None:
    """What the names of the int attributes among `origins` say."""
    names = [p.name.lower() for p in origins if p.kind == "attribute"]
    if any(n in _HEAD_DIM_ALONE or any(part in n for part in _HEAD_DIM) for n in names):
        return "head_dim"
    return "heads" if any(part in n for n in names for part in _HEADS) else None
