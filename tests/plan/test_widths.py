"""The solver on equations written by hand."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import UsageError
from sparseift_cli.models.source import Request, load_table
from sparseift_cli.plan.members.wide import scaled_width, widen
from sparseift_cli.plan.plan import Plan, make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.plan.widths import Solution, solve
from sparseift_cli.table.poly import Poly
from sparseift_cli.table.table import LayerTable, Width

a, b, c, d, e = (Poly.var(i) for i in range(5))


def widths(*sizes: int, **kinds: str) -> list[Width]:
    return [Width(f"w{i}", n, kind=kinds.get(f"w{i}", "width"), attention=True) for i, n in enumerate(sizes)]


def test_fused_qkv_follows_the_head_dim() -> None:
    ws = widths(768, 12, 64, 2304, w1="heads", w2="head_dim")
    equations = [a - b * c, d - Poly.const(3) * b * c]
    solution = solve(ws, equations)
    assert [f.id for f in solution.free] == [2]
    assert solution.sizes({2: 91}) == [1092, 12, 91, 3276]
    by_count = solve(ws, equations, "scale_count")
    assert [f.id for f in by_count.free] == [1]
    assert by_count.sizes({1: 17}) == [17 * 64, 17, 64, 3 * 17 * 64]


def test_two_head_counts_on_one_width_move_in_common_steps() -> None:
    ws = widths(96, 8, 12, 12, 8, w1="heads", w3="heads")
    solution = solve(ws, [a - b * c, a - d * e])
    (free,) = solution.free
    chosen = {free.id: free.size + free.step}
    width, _, t1, _, t2 = solution.sizes(chosen)
    assert width == 8 * t1 == 12 * t2 == 120
    with pytest.raises(ValueError, match="would change from"):
        solution.sizes({free.id: free.size + 1})


def test_a_concatenation_is_the_sum_and_constants_are_fixed() -> None:
    solution = solve(widths(14, 8, 6, 3), [a - b - c, d - Poly.const(3)])
    assert solution.sizes({1: 11, 2: 8}) == [19, 11, 8, 3]
    assert solution.reasons[3] == "must equal a constant"


def test_a_product_of_two_free_widths_is_kept() -> None:
    solution = solve(widths(24, 4, 6), [a - b * c])
    assert solution.free == ()
    assert set(solution.reasons.values()) == {"part of a product of two widths"}


def test_rope_keeps_the_head_dim_even() -> None:
    ws = widths(64, 4, 16, 8, w1="heads", w2="head_dim", w3="head_dim")
    solution = solve(ws, [a - b * c, c - Poly.const(2) * d])
    assert [f.id for f in solution.free] == [3]
    assert solution.sizes({3: 11}) == [88, 4, 22, 11]


def test_a_fixed_sum_fixes_its_parts() -> None:
    """cat(b, c) added to a buffer of 16, in either order of the equations; 2 b + 3 c as well."""
    for equations in ([a - b - c, a - Poly.const(16)], [a - Poly.const(16), a - b - c]):
        solution = solve(widths(16, 6, 10, 5), equations)
        assert solution.sizes({3: 7}) == [16, 6, 10, 7]
        assert [f.id for f in solution.free if f.id != 3] == []
        assert {solution.reasons[i] for i in (1, 2)} == {"part of a sum of fixed size"}
    two, three = Poly.const(2), Poly.const(3)
    assert solve(widths(5, 4, 22), [two * a + three * b - c, c - Poly.const(22)]).free == ()


def test_a_part_of_a_fixed_sum_may_be_a_sum_or_a_factor() -> None:
    solution = solve(widths(16, 6, 10, 7, 3), [a - b - c, c - d - e, a - Poly.const(16)])
    assert solution.free == () and solution.reasons.keys() >= {1, 2, 3, 4}
    solution = solve(widths(8, 2, 6, 12, 6), [a - b - c, d - b * e, a - Poly.const(8)])
    assert solution.sizes({4: 9}) == [8, 2, 6, 18, 9]  # the fixed factor leaves the other one free


def test_sums_and_differences_that_can_grow_stay_free() -> None:
    assert solve(widths(14, 8, 6), [a - b - c]).sizes({1: 11, 2: 8}) == [19, 11, 8]
    apart = solve(widths(12, 4), [a - b - Poly.const(8)])
    assert apart.sizes({1: 6}) == [14, 6] and not apart.reasons
    beside = solve(widths(6, 7, 5), [a + b - c - Poly.const(8)])  # cat(a, b) added to cat(c, x), x of 8
    assert beside.sizes({0: 12, 1: 14}) == [12, 14, 18] and not beside.reasons


def test_no_size_is_below_the_dense_one() -> None:
    solution = solve(widths(7, 5, 6, 6), [a + b - c - d])
    with pytest.raises(ValueError, match=r"width w0 would change from 7 to 5"):
        solution.sizes({1: 7})


@pytest.mark.parametrize("seed", range(60))
def test_what_a_sum_fixes_can_not_grow_and_the_rest_can(seed: int) -> None:
    """Against a linear program: the equations fix the growth of each width to sums that are zero, and none is negative."""
    draw = random.Random(seed)
    ws = widths(*(draw.randint(3, 20) for _ in range(6)))
    rows = [[draw.choice((-2, -1, 0, 0, 1, 1)) for _ in ws] for _ in range(draw.randint(1, 2))]
    dense = [w.size for w in ws]
    equations = []
    for row in rows:
        constant = -sum(c * size for c, size in zip(row, dense, strict=True))
        equations.append(Poly([*(((i,), c) for i, c in enumerate(row)), ((), constant)]))
    solution = solve(ws, equations)
    growing = {i for i in range(len(ws)) if solution.free_widths(i)}
    possible = {
        i
        for i in range(len(ws))
        if linprog([-(j == i) for j in range(len(ws))], A_eq=rows, b_eq=[0] * len(rows), bounds=(0, 1)).fun < -1e-9
    }
    assert growing == possible
    assert solution.sizes({}) == dense


def test_widths_that_do_not_grow_together_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's halonet26t at 50 %: a difference of two widths came to nothing, and the user got a traceback."""

    def sizes(self: Solution, chosen: dict[int, int]) -> list[int]:
        raise ValueError("width 76 would change from 80 to 0")

    table = load_table(Request("resnet18"))
    monkeypatch.setattr(Solution, "sizes", sizes)
    with pytest.raises(
        UsageError,
        match=r"widths of resnet18 do not grow together at sparsity 0\.5: width 76 would change from 80 to 0",
    ):
        widen(table, TransformSpec(sparsity="0.5"))


class Residual(nn.Module):
    """A stream of 8 features between an input layer, a head and a branch of linear layers of the given hidden widths."""

    def __init__(self, *hidden: int) -> None:
        super().__init__()
        sizes = (8, *hidden, 8)
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b, bias=False), nn.ReLU())]
        self.stem, self.branch, self.head = nn.Linear(5, 8), nn.Sequential(*layers[:-1]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.branch(x))


def inner_plan(*hidden: int) -> Plan:
    table = sparseift.inspect(Residual(*hidden), torch.zeros(1, 5))
    assert isinstance(table, LayerTable)
    return make_plan(table, TransformSpec(sparsity="0.75", scope="inner"))


def test_a_width_whose_layers_grow_on_one_side_grows_by_the_whole_factor() -> None:
    """Scope inner, m = 1: both layers of 8 x 12 weights have the stream on their other side, so 12 -> 12 / d = 48."""
    plan = inner_plan(12)
    assert plan.widening is not None
    assert [(w.dense, w.size, w.sides) for w in plan.widening.widened] == [(12, 48, 1)]
    rows = [row for row in plan.layers if row.status == "transformed"]
    shapes = [(p.shape.inputs, p.shape.outputs, p.nnz) for row in rows for p in row.parts]
    assert shapes == [(8, 48, 8 * 12), (48, 8, 12 * 8)]
    assert [row.density for row in rows] == [Fraction(1, 4)] * 2


def test_widths_that_a_layer_connects_grow_by_the_root_of_the_factor() -> None:
    """Scope inner, m = 2: the layer of 12 x 20 grows on both sides, so both by 2; its neighbours have density sqrt(d)."""
    plan = inner_plan(12, 20)
    assert plan.widening is not None
    assert sorted((w.dense, w.size, w.sides) for w in plan.widening.widened) == [(12, 24, 2), (20, 40, 2)]
    densities = [row.density for row in plan.layers if row.status == "transformed"]
    assert densities == [Fraction(1, 2), Fraction(1, 4), Fraction(1, 2)]


@pytest.mark.parametrize(
    ("multiple", "offset", "down", "size"),
    [(1, 0, False, 124), (3, 1, False, 124), (3, 1, True, 124), (8, 4, True, 124)],
)
def test_sizes_keep_their_distance_from_whole_steps(multiple: int, offset: int, down: bool, size: int) -> None:
    """88 * sqrt(2) = 124.45: the nearest of 88 + 3 n is 124."""
    assert scaled_width(88, Fraction(2), multiple, offset=offset, down=down) == size


@pytest.mark.parametrize("seed", range(20))
def test_a_scaled_width_is_the_nearest_of_its_grid(seed: int) -> None:
    draw = random.Random(seed)
    width, square, multiple = draw.randint(2, 90), Fraction(draw.randint(4, 40), 4), draw.randint(1, 9)
    offset = draw.randrange(multiple)
    ideal = width * float(square) ** 0.5
    grid = [n for n in range(offset, 1000, multiple) if n >= width]
    assert scaled_width(width, square, multiple, offset=offset) == min(grid, key=lambda n: (abs(n - ideal), -n))
    below = [n for n in grid if n <= ideal] or grid[:1]
    assert scaled_width(width, square, multiple, offset=offset, down=True) == below[-1]


class Chunks(nn.Module):
    """88 units as 4 heads of 22 and as chunks of 30, 30 and 28: both have to stay whole, as in EdgeNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(5, 88), nn.Linear(88, 88), nn.Linear(88, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = (x + self.body(x)).unflatten(-1, (4, -1)).softmax(-1).flatten(1)
        return self.head(torch.cat(h.chunk(3, 1), 1))


def test_a_width_in_steps_from_an_odd_size_grows() -> None:
    """At density 1/4 a head of 22 would be 44; 3 divides 4 * head + 2 at 22, 25, ..., 43 and 46."""
    new, _ = sparseift.transform(Chunks(), torch.zeros(1, 5), sparsity=0.75)
    assert new.body.weight.shape == (4 * 43, 4 * 43)
    with pytest.raises(UsageError, match=r"moves in steps of 3 from 22, so it meets no multiple of 3"):
        sparseift.transform(Chunks(), torch.zeros(1, 5), sparsity=0.75, width_multiple=12)
