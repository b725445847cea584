"""How well a mask connects a layer: the spectrum of its bipartite graph. NumPy and SciPy, no torch.

A mask [R, C] is the biadjacency matrix A of a graph: a row is an output, a column one input of one kernel tap, as
`weight.flatten(1)` unrolls a convolution [out, in, kh, kw] to out x (in * kh * kw); an edge is a weight that is kept. The
eigenvalues of the graph's adjacency matrix [[0, A], [A', 0]] are the singular values of A and their negatives, so by
absolute value s1 is the first and second and s2 the third: the papers' "third largest eigenvalue" is s2.

The definitions, from the papers that Sparse-IFT (Thangarasa et al., ICML 2024, arXiv 2303.11525) takes its analysis from:

    spectral gap           s1 - s2
    Ramanujan gap          sqrt(dl - 1) + sqrt(dr - 1) - s2, with the mean degrees dl and dr of rows and columns that have
                           an edge: Delta_r of [1]. Of a biregular graph the mean degrees are its degrees, and a gap of at
                           least 0 says that it is Ramanujan; of others it is an estimate.
    ... by s1              2 sqrt(s1 - 1) - s2, with s1 in place of a degree: Delta_s of [1]. Of little use where rows and
                           columns differ much in degree: there s1 = sqrt(dl dr), and the bound is far below the one above.
    ... iterative mean     IMDB of [1]: columns of the same degree (and every row) make a subgraph; the mean of the
                           Ramanujan gaps of those with three columns or more and mean degrees of 3 or more
    weighted spectral gap  s1 - s2 of the absolute weights under the mask: lambda of [2]

[1] Hoang, Liu, Marculescu, Wang: Revisiting Pruning at Initialization through the Lens of Ramanujan Graph, ICLR 2023, in
    its authors' code: github.com/VITA-Group/ramanujan-on-pai, lib/graphs/scores.py (delta_r, delta_s, ramanujan_score,
    iterative_mean_spectral_gap). The degree bound goes back to Pal et al., ICML 2022 (the code divides there by s2).
[2] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon, NeurIPS 2023.
Unlike [1], which excludes mean degrees below 3, the Ramanujan gap here is computed for every graph that has an edge.

Weights that are stored inputs first (Hugging Face's Conv1D) have rows and columns exchanged: that changes the iterative
mean alone. Groups of a convolution share their columns, as in [1].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .values import top_two

LEAST_DEGREE = 3  # of a subgraph of the iterative mean: below, [1] calls the layer collapsed
LEAST_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The module's values of one mask [rows, columns]; gaps are in the unit of s1.

    None where a value does not exist: gaps of a mask without edges, the iterative mean where no subgraph is large enough,
    weighted values without weights or where a weight is NaN or infinite.
    """

    rows: int
    columns: int
    nnz: int
    empty_rows: int
    empty_columns: int
    components: int
    """Connected parts that have an edge. More than one means separate nets in one layer."""
    s1: float
    s2: float
    ramanujan_gap: float | None
    ramanujan_gap_s1: float | None
    ramanujan_gap_imdb: float | None
    weighted_s1: float | None
    weighted_s2: float | None

    @property
    def density(self) -> float:
        size = self.rows * self.columns
        return self.nnz / size if size else 0.0

    @property
    def spectral_gap(self) -> float:
        return self.s1 - self.s2

    @property
    def weighted_spectral_gap(self) -> float | None:
        return None if self.weighted_s1 is None or self.weighted_s2 is None else self.weighted_s1 - self.weighted_s2

    def to_json(self) -> dict[str, Any]:
        """Every value by its name, the derived ones too."""
        derived = ("density", "spectral_gap", "weighted_spectral_gap")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def unrolled(array: NDArray[Any]) -> NDArray[Any]:
    """A weight or mask [out, in, *kernel] as [out, in * taps], taps innermost; a vector is one row."""
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)


def spectral(mask: NDArray[Any], weight: NDArray[Any] | None = None) -> Spectrum:
    """The spectrum of a mask's graph, as the module defines it.

    Args:
        mask: [R, C]; every element that is not zero is an edge.
        weight: [R, C], or None for no weighted values. Weights outside the mask do not count.

    Raises:
        ValueError: `mask` is not a matrix, or `weight` has another shape.
        ArithmeticError: the singular values did not converge; no mask with this effect is known.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask [R, C] is needed, not {mask.ndim} dimensions: see unrolled()")
    if weight is not None and weight.shape != mask.shape:
        raise ValueError(f"the weight is {weight.shape}, its mask {mask.shape}")
    graph = csr_array(mask != 0, dtype=np.float64)
    in_row, in_column = np.diff(graph.indptr), np.bincount(graph.indices, minlength=mask.shape[1])
    found = top_two(graph)
    weighted = None if weight is None else _weighted(graph, weight)
    return Spectrum(
        rows=mask.shape[0],
        columns=mask.shape[1],
        nnz=int(graph.nnz),
        empty_rows=int((in_row == 0).sum()),
        empty_columns=int((in_column == 0).sum()),
        components=found.components,
        s1=found.s1,
        s2=found.s2,
        ramanujan_gap=_by_degree(in_row, in_column, found.s2) if graph.nnz else None,
        ramanujan_gap_s1=2 * sqrt(max(found.s1 - 1, 0)) - found.s2 if graph.nnz else None,  # an edge makes s1 >= 1
        ramanujan_gap_imdb=_iterative_mean(graph, in_column),
        weighted_s1=weighted and weighted[0],
        weighted_s2=weighted and weighted[1],
    )


def _weighted(graph: csr_array, weight: NDArray[Any]) -> tuple[float, float] | None:
    """s1 and s2 of |weight| on the edges of `graph`; None where a weight is not finite."""
    values = np.abs(weight[graph.nonzero()].astype(np.float64))
    if not np.isfinite(values).all():
        return None
    scale = float(values.max(initial=0.0))  # squares of the tiniest weights would be 0
    if scale == 0.0:
        return 0.0, 0.0
    scaled = csr_array((values / scale, graph.indices, graph.indptr), shape=graph.shape, copy=True)
    scaled.eliminate_zeros()
    found = top_two(scaled)
    return found.s1 * scale, found.s2 * scale


def _by_degree(in_row: NDArray[Any], in_column: NDArray[Any], s2: float) -> float:
    """sqrt(dl - 1) + sqrt(dr - 1) - s2 of a graph with an edge."""
    return sqrt(in_row[in_row > 0].mean() - 1) + sqrt(in_column[in_column > 0].mean() - 1) - s2


def _iterative_mean(graph: csr_array, in_column: NDArray[Any]) -> float | None:
    gaps: list[float] = []
    for columns in _same_degree(in_column):
        part = graph[:, columns]  # on CSR, whose column indices stay in order
        in_row, degrees = np.diff(part.indptr), in_column[columns]
        if in_row[in_row > 0].mean() >= LEAST_DEGREE:
            gaps.append(_by_degree(in_row, degrees, top_two(part).s2))
    return float(np.mean(gaps)) if gaps else None


def _same_degree(in_column: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The columns of every degree that enough of them share."""
    for degree, count in zip(*np.unique(in_column, return_counts=True), strict=True):
        if degree >= LEAST_DEGREE and count >= LEAST_COLUMNS:
            yield np.flatnonzero(in_column == degree)
