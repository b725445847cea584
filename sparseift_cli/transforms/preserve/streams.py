"""What has to hold of everything that a norm reads, and which weights make it hold.

A LayerNorm over more channels gives the dense values if every added channel holds the mean of the live ones, and that holds of
a sum if it holds of each summand. Where the summand's weights are free (an embedding, a position, a bias, a dense layer),
the mean of their outputs is written into the added ones: they are *filled*. A sparse layer has no weights to spare for that,
so its live outputs are *centred*, W <- (I - 11^T / D) W, and the added ones stay zero; that changes the stream by its mean,
which no LayerNorm sees, but anything else that reads the stream would. A root mean square wants zeros in the added channels
and nothing else. Either way no random weight may write there: the layer's added outputs stay *silent*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...table.poly import Poly
from ...trace.flow import NORM, OPAQUE, VALUE
from ...trace.structure import Structure
from .live import Live
from .norms import Norm
from .products import Product


@dataclass
class Streams:
    """What to do with the weights around the norms; `silent` and `quiet` hold keys of `products`."""

    norms: list[Norm]
    centred: dict[str, int] = field(default_factory=dict)
    """Name of a tensor -> the dim along which it is centred."""
    filled: dict[str, int] = field(default_factory=dict)
    """Name of a tensor -> the dim along which the added coordinates hold the mean of the live ones."""
    silent: set[str] = field(default_factory=set)
    quiet: set[str] = field(default_factory=set)
    """Weights whose added inputs are exactly zero, so that any value may stand there."""
    notes: list[str] = field(default_factory=list)


def find_streams(
    dense: nn.Module,
    structure: Structure,
    live: Live,
    norms: list[Norm],
    products: Mapping[str, Product],
    names: Mapping[str, str],
) -> Streams:
    """Look at every norm and at what it reads."""
    streams = Streams(norms)
    values = dict(dense.named_parameters())
    by_path = {n.path: n for n in norms}
    seen_elsewhere = set(structure.exposed)
    for norm in norms:
        if not norm.centres or norm.groups > 1:
            seen_elsewhere |= structure.streams.get(norm.path, frozenset())
    inexact: dict[str, list[str]] = {}
    for norm in norms:
        sources = structure.streams.get(norm.path, frozenset([OPAQUE]))
        streams.silent |= {s for s in sources if s in products}
        if OPAQUE in sources:  # who writes there is not known: nobody who could
            streams.silent |= {k for k, p in products.items() if live.key(p.outputs) == live.key(norm.width)}
        problems = _Reader(norm, live, structure.shapes, products, names, values, by_path, seen_elsewhere).take(
            sources, streams
        )
        for problem in dict.fromkeys(problems):
            inexact.setdefault(problem, []).append(norm.path)
    streams.notes += [f"not exact at {_some(paths)}: {problem}" for problem, paths in inexact.items()]
    exact = {n.path: n for n in norms if not any(n.path in paths for paths in inexact.values())}
    streams.quiet = set(_quiet(structure, live, products, names, exact, streams.filled, values))
    return streams


@dataclass(frozen=True)
class _Reader:
    """One norm, asking of each thing that it reads how it can be made to fit."""

    norm: Norm
    live: Live
    dims: Mapping[str, tuple[Poly, ...]]
    products: Mapping[str, Product]
    names: Mapping[str, str]
    values: Mapping[str, Tensor]
    norms: Mapping[str, Norm]
    seen_elsewhere: set[str]

    def take(self, sources: Iterable[str], streams: Streams) -> Iterable[str]:
        """Sort the sources into centred and filled ones; yields what does not fit either."""
        norm = self.norm
        if norm.groups > 1:
            yield "a GroupNorm whose groups grow is exact only where the means of its groups are zero"
            return
        if norm.eps() is None:
            yield "its eps stands in the code, so it cannot follow"
        for source in sorted(sources) if norm.centres else ():
            if source == OPAQUE:
                yield "what it reads is not a sum of known layers, so its mean is not under control"
            elif source.startswith(VALUE):
                yield from self._table(source.removeprefix(VALUE), streams)
            elif source.startswith(NORM):
                yield from self._norm(source.removeprefix(NORM), streams)
            elif source in self.products:
                yield from self._product(self.products[source], streams)
            else:
                yield "it reads a product that is no plain layer"

    def _table(self, key: str, streams: Streams) -> Iterable[str]:
        if self.live.key(self.dims[key][-1]) != self.live.key(self.norm.width):
            yield "it reads a parameter beside other summands, whose means differ"
        else:
            streams.filled[self.names[key]] = -1

    def _norm(self, path: str, streams: Streams) -> Iterable[str]:
        source = self.norms.get(path)
        if source is None or not source.centres or source.groups > 1:
            yield "it reads the output of a norm that leaves a mean, which changes with the data"
            return
        gain = None if source.gain_key is None else self.values[source.gain_key]
        if gain is not None and float(gain.max() - gain.min()) > 0:
            yield "it reads the output of another LayerNorm with unequal gains, whose mean changes with the data"
        if source.bias_key:
            streams.filled[self.names[source.bias_key]] = -1

    def _product(self, product: Product, streams: Streams) -> Iterable[str]:
        alone = self.live.key(product.outputs) == self.live.key(self.norm.width)
        part = self.live.dense(product.outputs) < self.live.dense(self.norm.width)  # of a concatenation
        bias = self.names.get(product.bias)
        if product.kind not in ("linear", "conv"):
            yield f"it reads a {product.kind} layer, whose outputs share no inputs and so have no common mean to take out"
        elif not (alone or (part and product.masked)):
            yield "it reads a layer's outputs in another grouping than they are written in"
        elif not product.masked:
            streams.filled[self.names[product.key]] = product.axis
            if bias:
                streams.filled[bias] = -1
        elif product.key in self.seen_elsewhere:
            yield "it reads a sparse layer that something else reads too, so its outputs cannot be centred"
        else:
            streams.centred[self.names[product.key]] = product.axis
            if bias:
                streams.centred[bias] = -1


def _quiet(
    structure: Structure,
    live: Live,
    products: Mapping[str, Product],
    names: Mapping[str, str],
    exact: Mapping[str, Norm],
    filled: Mapping[str, int],
    values: Mapping[str, Tensor],
) -> Iterable[str]:
    """Weights that read nothing but norms whose added channels come out as exact zeros."""
    for key, product in products.items():
        sources = structure.reads.get(key, frozenset())
        read = [exact.get(s.removeprefix(NORM)) for s in sources if s.startswith(NORM)]
        if not read or len(read) != len(sources):
            continue
        still = all(
            n is not None
            and live.key(n.width) == live.key(product.inputs)
            and (n.bias_key is None or names[n.bias_key] not in filled or float(values[n.bias_key].mean()) == 0)
            for n in read
        )
        if still:
            yield key


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(p or "the model itself" for p in paths[:3]) + more
