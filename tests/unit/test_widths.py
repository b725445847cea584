"""The solver on equations written by hand."""

from __future__ import annotations

import pytest

from sparseift_cli.errors import UsageError
from sparseift_cli.growth import grow
from sparseift_cli.poly import Poly
from sparseift_cli.source import Request, load_table
from sparseift_cli.spec import TransformSpec
from sparseift_cli.table import Width
from sparseift_cli.widths import Solution, solve

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
    with pytest.raises(ValueError, match="would become"):
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


def test_widths_that_do_not_grow_together_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's halonet26t at 50 %: a difference of two widths came to nothing, and the user got a traceback."""

    def sizes(self: Solution, chosen: dict[int, int]) -> list[int]:
        raise ValueError("width 76 would become 0")

    table = load_table(Request("resnet18"))
    monkeypatch.setattr(Solution, "sizes", sizes)
    with pytest.raises(
        UsageError, match=r"widths of resnet18 do not grow together at sparsity 0\.5: width 76 would become 0"
    ):
        grow(table, TransformSpec(sparsity="0.5"))
