"""The two largest singular values of a non-negative sparse matrix, also where they are equal.

Lanczos methods start from one vector and can miss that a value occurs twice, as s1 does in two equal parts that share no
edge. So every connected component is computed alone, where s1 is simple (Perron-Frobenius), and the values are combined.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackError, svds

DENSE = 1 << 16  # elements up to which LAPACK is as fast as ARPACK
TOLERANCE = 1e-8  # relative, of squares of singular values


@dataclass(frozen=True, slots=True)
class TopTwo:
    """s1 >= s2 >= 0, and the number of connected components that have an edge."""

    s1: float
    s2: float
    components: int


def top_two(matrix: csr_array) -> TopTwo:
    """s1 and s2 of a CSR matrix [R, C] of float64 whose stored values are all positive.

    The same matrix gives the same values: the start vector is fixed.

    Raises:
        ArithmeticError: they did not converge.
    """
    parts = list(_components(matrix))
    found = [0.0, 0.0]
    # sorted by an upper bound of s1, so that of a thousand small parts only two are computed
    bounds = [_bound(part) for part in parts]
    for i in sorted(range(len(parts)), key=bounds.__getitem__, reverse=True):
        if bounds[i] <= found[1] * (1 + 1e-12):
            break
        found = sorted([*found, *_of_connected(parts[i])], reverse=True)[:2]
    return TopTwo(found[0], found[1], len(parts))


def _components(matrix: csr_array) -> Iterator[csr_array]:
    """Every connected component that has an edge, without empty rows and columns."""
    rows, columns = _shape(matrix)
    adjacency = csr_array(
        (matrix.data, matrix.indices + rows, np.append(matrix.indptr, np.full(columns, matrix.indptr[-1]))),
        shape=(rows + columns, rows + columns),
    )
    count, labels = connected_components(adjacency, directed=False)
    if count == 1:
        yield matrix
        return
    by_row, by_column = labels[:rows], labels[rows:]
    # rows and columns sorted by component: each component is then a slice of the arrays
    order, column_order = np.argsort(by_row, kind="stable"), np.argsort(by_column, kind="stable")
    place = np.empty(columns, dtype=matrix.indices.dtype)
    place[column_order] = np.arange(columns, dtype=place.dtype)
    sorted_rows = matrix[order]
    indices = place[sorted_rows.indices]
    row_ends = np.searchsorted(by_row[order], np.arange(count + 1))
    column_ends = np.searchsorted(by_column[column_order], np.arange(count + 1))
    for i in range(count):
        (top, bottom), (left, right) = row_ends[i : i + 2], column_ends[i : i + 2]
        if top == bottom or left == right:
            continue  # a row or a column without edges
        begin, end = sorted_rows.indptr[top], sorted_rows.indptr[bottom]
        pointers = sorted_rows.indptr[top : bottom + 1] - begin
        values = (sorted_rows.data[begin:end], indices[begin:end] - left, pointers)
        yield csr_array(values, shape=(int(bottom - top), int(right - left)))


def _bound(part: csr_array) -> float:
    """s1 is at most this: the Frobenius norm, and the root of the largest row sum times the largest column sum."""
    frobenius = sqrt(float(part.data @ part.data))
    in_row = np.add.reduceat(part.data, part.indptr[:-1])  # no row of a component is empty
    in_column = np.bincount(part.indices, weights=part.data)
    return min(frobenius, sqrt(float(in_row.max() * in_column.max())))


def _of_connected(part: csr_array) -> tuple[float, float]:
    """s1 and s2 of a connected matrix without empty rows and columns."""
    small, large = sorted(_shape(part))
    if small == 1:
        return sqrt(float(part.data @ part.data)), 0.0
    if small * large <= DENSE or small <= 4:  # ARPACK needs more rows than values
        values, noise = np.linalg.svd(part.toarray(), compute_uv=False), np.finfo(np.float64).eps * large
    else:
        values, noise = _sparse(part), sqrt(np.finfo(np.float64).eps) * 4  # of squares, so half the digits
    s1, s2 = (float(v) for v in np.sort(values)[::-1][:2])
    return s1, s2 if s2 > noise * s1 else 0.0


def _sparse(part: csr_array) -> NDArray[Any]:
    small = min(_shape(part))
    start = np.random.default_rng(0).standard_normal(small)
    for basis in (32, 256):  # the larger one converges where values are close together
        try:
            return np.asarray(
                svds(
                    part,
                    k=2,
                    ncv=min(basis, small),
                    v0=start,
                    solver="arpack",
                    tol=TOLERANCE,  # pyright: ignore[reportArgumentType]  # a float, says SciPy
                    return_singular_vectors=False,
                )
            )
        except ArpackError:
            continue
    raise ArithmeticError("the singular values of a mask {}x{} did not converge".format(*_shape(part)))


def _shape(matrix: csr_array) -> tuple[int, int]:
    shape = matrix.shape
    assert shape is not None  # the type allows None for an array that has no shape yet
    return shape[0], shape[1]
