"""For any layer and any sparsity: within the budget, and within one non-zero of it."""

from __future__ import annotations

from decimal import Decimal, getcontext
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseift_cli.plan.budget import round_to_budget
from sparseift_cli.plan.distributions import DISTRIBUTIONS, BudgetedLayer, PerLayer, density
from sparseift_cli.plan.layer_plan import proportional_split
from sparseift_cli.plan.members.base import factors
from sparseift_cli.plan.members.doped import doped_rank
from sparseift_cli.plan.members.factorized import factorized_rank
from sparseift_cli.plan.members.parallel import branch_count
from sparseift_cli.plan.members.wide import scaled_width
from sparseift_cli.table.shape import Shape

getcontext().prec = 60
SPARSITIES = st.one_of(
    st.sampled_from(["0.1", "0.3", "0.4", "0.5", "0.6", "0.75", "0.9"]),
    st.integers(0, 999).map(lambda n: str(Decimal(n) / 1000)),
)


@st.composite
def layers(draw: st.DrawFn) -> Shape:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 32]))
    per_group = draw(st.tuples(st.integers(1, 96), st.integers(1, 96)))
    return Shape(groups * per_group[0], groups * per_group[1], draw(st.sampled_from([1, 1, 3, 9, 49])), groups)


@st.composite
def depthwise(draw: st.DrawFn) -> Shape:
    channels = draw(st.integers(2, 256))
    return Shape(channels, channels, draw(st.sampled_from([9, 25])), channels)


def check(dense: Shape, positions: int, weights: int, kept: int = 0) -> None:
    """`weights` that may be masked beside `kept` dense ones: at most the dense MACs, and never a whole non-zero below them."""
    budget = positions * dense.weights
    (more,) = round_to_budget([Fraction(budget - kept * positions)], [positions], [weights])
    nnz = kept + more
    assert budget - positions < positions * nnz <= budget


@given(layers() | depthwise(), SPARSITIES, st.integers(1, 10_000))
def test_wide(layer: Shape, sparsity: str, uses: int) -> None:
    square = 1 / density(sparsity)
    groups = scaled_width(layer.groups, square) if layer.depthwise else layer.groups
    ci, co = layer.inputs // layer.groups, layer.outputs // layer.groups
    if not layer.depthwise:
        ci, co = scaled_width(ci, square), scaled_width(co, square)
    wide = Shape(groups * ci, groups * co, layer.taps, groups)
    assert wide.weights >= layer.weights
    check(layer, uses, wide.weights)


@given(layers() | depthwise(), SPARSITIES, st.integers(1, 10_000))
def test_parallel(layer: Shape, sparsity: str, uses: int) -> None:
    count = branch_count(density(sparsity))
    assert count >= 2
    check(layer, uses, count * layer.weights)
    parts = proportional_split(layer.weights, [layer.weights] * count)
    assert sum(parts) == layer.weights and max(parts) - min(parts) <= 1


@given(layers() | depthwise(), SPARSITIES, st.integers(1, 10_000))
def test_factorized(layer: Shape, sparsity: str, uses: int) -> None:
    u, v = factors(layer, factorized_rank(layer, density(sparsity)))
    assert u.weights + v.weights >= layer.weights
    check(layer, uses, u.weights + v.weights)
    n_u, n_v = proportional_split(layer.weights, [u.weights, v.weights])
    assert n_u == layer.weights * u.weights // (u.weights + v.weights) and n_u + n_v == layer.weights
    assert n_u <= u.weights and n_v <= v.weights


@given(layers() | depthwise(), SPARSITIES, st.integers(1, 10_000))
def test_doped(layer: Shape, sparsity: str, uses: int) -> None:
    rank = doped_rank(layer, density(sparsity))
    u, v = factors(layer, rank)
    left = layer.weights - u.weights - v.weights
    assert left >= density(sparsity) * layer.weights  # the sparse copy is never emptier than 1 - s
    check(layer, uses, layer.weights, kept=u.weights + v.weights)


@given(st.integers(1, 20_000), SPARSITIES, st.integers(1, 128))
def test_scaled_width_against_decimals(width: int, sparsity: str, multiple: int) -> None:
    square = 1 / density(sparsity)
    ideal = Decimal(width) * (Decimal(square.numerator) / Decimal(square.denominator)).sqrt() / multiple
    nearest = int((ideal + Decimal("0.5")).to_integral_value(rounding="ROUND_FLOOR"))
    assert scaled_width(width, square, multiple) == max(nearest, ceil(Fraction(width, multiple))) * multiple
    down = int(ideal.to_integral_value(rounding="ROUND_FLOOR"))
    assert scaled_width(width, square, multiple, down=True) == max(down, ceil(Fraction(width, multiple))) * multiple


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 300), st.integers(50, 4000)), min_size=1, max_size=12),
    st.integers(1, 999),
)
def test_round_to_budget_never_exceeds_and_leaves_less_than_the_cheapest(
    rows: list[tuple[int, int, int]], permille: int
) -> None:
    uses = [u for _, u, _ in rows]
    caps = [c for _, _, c in rows]
    budgets = [Fraction(permille, 1000) * u * c + u for u, c in zip(uses, caps, strict=True)]
    nnz = round_to_budget(budgets, uses, caps)
    spent = sum(n * u for n, u in zip(nnz, uses, strict=True))
    assert spent <= sum(budgets)
    assert all(1 <= n <= c for n, c in zip(nnz, caps, strict=True))
    assert all(abs(n - b / u) <= 1 for n, b, u in zip(nnz, budgets, uses, strict=True) if b / u <= caps[nnz.index(n)])


@given(st.lists(layers(), min_size=1, max_size=8), st.integers(1, 999))
def test_distributions_meet_the_budget(shapes: list[Shape], permille: int) -> None:
    rows = [BudgetedLayer(f"{i}", s, (s.taps,), (1 + i) * s.weights, 7 + i) for i, s in enumerate(shapes)]
    total = Fraction(permille, 1000) * sum(row.macs for row in rows)
    for distribution in (*map(DISTRIBUTIONS.get, ("er", "erk")), PerLayer.of({"other": 0.5})):
        found = distribution.densities(rows, total)
        assert all(0 <= d <= 1 for d in found)
        assert sum(d * row.macs for d, row in zip(found, rows, strict=True)) == total


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1"])
def test_a_sparsity_outside_its_range(sparsity: str) -> None:
    with pytest.raises(ValueError, match="not in"):
        density(sparsity)


@pytest.mark.parametrize(
    ("sparsity", "count"),
    [("0.1", 2), ("0.3", 2), ("0.4", 2), ("0.5", 2), ("0.6", 3), ("0.7", 3), ("0.75", 4), ("0.9", 10)],
)
def test_branch_counts(sparsity: str, count: int) -> None:
    assert branch_count(density(sparsity)) == count
