"""Masks with a number for every row and column: exact rows, columns as near as can be, the best places, whatever the ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseift_cli.mask import quotas
from sparseift_cli.mask.quotas import best_of_rows, best_with_quotas

SEEDS = range(12)


def greedy(scores: Tensor, allowed: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Place after place from the best to the worst, one taken where row and column have room."""
    mask = torch.zeros_like(allowed)
    for i in scores.flatten().argsort(descending=True).tolist():
        r, c = divmod(i, scores.shape[1])
        if allowed[r, c] and rows[r] > mask[r].sum() and columns[c] > mask[:, c].sum():
            mask[r, c] = True
    return mask


def largest_matching(allowed: Tensor, rows: list[int], columns: list[int]) -> int:
    """The most places that no row or column has too many of, by augmenting paths in plain Python."""
    grid, taken = allowed.tolist(), set[tuple[int, int]]()

    def place(r: int, seen: set[int]) -> bool:
        for c in range(len(columns)):
            if not grid[r][c] or (r, c) in taken or c in seen:
                continue
            seen.add(c)
            holders = [a for a, b in taken if b == c]
            if len(holders) < columns[c]:
                taken.add((r, c))
                return True
            for a in holders:
                taken.discard((a, c))
                taken.add((r, c))
                if place(a, seen):
                    return True
                taken.discard((r, c))
                taken.add((a, c))
        return False

    return sum(place(r, set()) for r, n in enumerate(rows) for _ in range(n))


def problem(seed: int, density: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, allowed places and a mask of some of them, whose rows and columns are numbers that fit."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(2, 14, (2,), generator=generator).tolist()
    allowed = torch.rand(shape, generator=generator) < density
    inside = allowed & (torch.rand(shape, generator=generator) < 0.5)
    return torch.rand(shape, generator=generator), allowed, inside


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_and_columns_have_their_numbers_where_that_is_possible(seed: int) -> None:
    scores, allowed, inside = problem(seed)
    rows, columns = inside.sum(1), inside.sum(0)
    found = best_with_quotas(scores, allowed, rows, columns, key=seed)
    assert torch.equal(found.sum(1), rows) and torch.equal(found.sum(0), columns)
    assert not (found & ~allowed).any()
    first = greedy(scores, allowed, rows.tolist(), columns.tolist())
    if torch.equal(first.sum(1), rows):
        assert torch.equal(found, first)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_columns_are_as_near_to_their_numbers_as_they_can_be(
    seed: int, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not short:
        monkeypatch.setattr(quotas, "_short_path", lambda *_: None)
    scores, allowed, inside = problem(seed, 0.35)
    rows = inside.sum(1)
    columns = inside.sum(0).roll(1)  # of other columns: often impossible
    found = best_with_quotas(scores, allowed, rows, columns, key=seed)
    assert torch.equal(found.sum(1), rows) and not (found & ~allowed).any()
    missing = int((columns - found.sum(0)).clamp(min=0).sum())
    assert int(rows.sum()) - missing == largest_matching(allowed, rows.tolist(), columns.tolist())


def test_equal_scores_are_ranked_by_the_key() -> None:
    scores, allowed = torch.zeros(8, 8), torch.ones(8, 8, dtype=torch.bool)
    two = torch.full((8,), 2)
    found = [best_with_quotas(scores, allowed, two, two, key) for key in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    counts = sum(best_with_quotas(scores, allowed, two, two, key).int() for key in range(300))
    assert isinstance(counts, Tensor) and int(counts.min()) > 40 and int(counts.max()) < 120  # 75 in the mean


def test_groups_have_columns_of_their_own() -> None:
    scores, allowed, inside = problem(3)
    twice = [torch.cat((t, t.flip(0))) for t in (scores, allowed, inside)]
    rows, columns = twice[2].sum(1), inside.sum(0).expand(2, -1)
    found = best_with_quotas(twice[0], twice[1], rows, columns, 0, groups=2)
    one = best_with_quotas(scores, allowed, inside.sum(1), inside.sum(0), 0)
    assert torch.equal(found[: len(one)], one)
    assert torch.equal(found.sum(1), rows) and torch.equal(found[len(one) :].sum(0), inside.sum(0))


def test_the_best_of_each_row() -> None:
    scores, allowed, inside = problem(5)
    found = best_of_rows(scores, allowed, inside.sum(1), key=0)
    for r, n in enumerate(inside.sum(1).tolist()):
        best = scores[r].masked_fill(~allowed[r], -1).topk(n).indices
        assert sorted(best.tolist()) == found[r].nonzero()[:, 0].tolist()
