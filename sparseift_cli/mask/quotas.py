"""Choosing the best places of a matrix where every row, and as far as possible every column, has a number of its own.

First the places are gone through from the best to the worst, and one is taken where its row and its column still have room. That
is a stable matching, so it can be found in rounds (Gale, Shapley, "College admissions and the stability of marriage", 1962):
rows offer their best places, columns keep the best of what they were ever offered, rows offer their next ones. It is the
same matching whatever the order of the offers, as no two places are equal: ties are ranked by random numbers, functions
of a key and the place.

It can leave rows over whose places are all in full columns. For each of these an augmenting path is sought: the row takes a
place in a full column, another row of that column takes one elsewhere, and so on to a column with room. Where there is
none, no other choice fills more columns (a matching without augmenting paths is a largest one), and the row takes its place
where a column has the fewest too many. So rows are exact, and columns as near to their numbers as they can be.

On any device; the paths, of which there are few, are sought on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.randomness import words


def best_with_quotas(
    scores: Tensor, allowed: Tensor, rows: Tensor, columns: Tensor, key: int, groups: int = 1
) -> Tensor:
    """The mask [R, C] of places with high scores: `rows` True in each row, `columns` in each column as far as possible.

    >>> scores, all_of_it = torch.tensor([[4.0, 3.0], [2.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
    >>> best_with_quotas(scores, all_of_it, rows=torch.tensor([1, 1]), columns=torch.tensor([1, 1]), key=0)
    tensor([[ True, False],
            [False,  True]])

    Args:
        scores: float32 [R, C] without NaN.
        allowed: bool [R, C]; every row has as many True as its number or more.
        rows: int64 [R].
        columns: int64 [groups, C] or [C], with the sum of `rows` over each group.
        key: ranks equal scores.
        groups: equal blocks of rows that have columns of their own.
    """
    per_row = rows.to(scores.device)
    quota = columns.to(scores.device).reshape(-1)
    places = _ranked(scores, allowed, key)
    width = scores.shape[1]
    row = places // width
    column = row // (len(scores) // groups) * width + places % width
    chosen = places[_stable_matching(row, column, per_row, quota)]
    mask = torch.zeros_like(allowed)
    mask.view(-1)[chosen] = True
    missing = per_row - mask.sum(1)
    if bool(missing.any()):
        mask = _completed(mask.cpu(), allowed.cpu(), missing.cpu(), quota.cpu().view(groups, -1)).to(mask.device)
    return mask


def best_of_rows(scores: Tensor, allowed: Tensor, rows: Tensor, key: int) -> Tensor:
    """The mask [R, C] of the `rows` [R] best `scores` [R, C] among the places `allowed` [R, C] of each row; ties by `key`."""
    places = _ranked(scores, allowed, key)
    by_row = places[(places // scores.shape[1]).argsort(stable=True)]
    row = by_row // scores.shape[1]
    mask = torch.zeros_like(allowed)
    mask.view(-1)[by_row[_index_in_run(row, len(scores)) < rows.to(row.device)[row]]] = True
    return mask


def _ranked(scores: Tensor, allowed: Tensor, key: int) -> Tensor:
    """The indices [A] of the places `allowed` [R, C], from the highest of `scores` [R, C] to the lowest."""
    places = allowed.reshape(-1).nonzero()[:, 0]
    places = places[words(key, places).argsort()]
    return places[scores.reshape(-1)[places].argsort(descending=True, stable=True)]


def _index_in_run(values: Tensor, bound: int) -> Tensor:
    """For sorted `values` [N] in 0..bound-1, how many equal ones are before each: int64 [N]."""
    count = values.bincount(minlength=bound)
    return torch.arange(len(values), device=values.device) - (count.cumsum(0) - count)[values]


def _stable_matching(row: Tensor, column: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Indices of the places taken, of places from the best to the worst: their `row` [A] and `column` [A].

    Args:
        rows, columns: how many places each row [R] and each column [K] takes at most.
    """
    total = len(row)
    offers = row.argsort(stable=True)  # by row, each from its best place
    held, need = offers[:0], rows
    while True:
        of = row[offers]
        first = _index_in_run(of, len(rows)) < need[of]
        offered = torch.cat((held, offers[first]))
        offers = offers[~first]
        offered = offered[(column[offered] * total + offered).argsort()]
        of = column[offered]
        held = offered[_index_in_run(of, len(columns)) < columns[of]]
        full = column[held].bincount(minlength=len(columns)) >= columns
        worst = torch.where(full, -1, total).scatter_reduce_(0, column[held], held, "amax")
        offers = offers[
            offers < torch.where(full, worst, total)[column[offers]]
        ]  # a full column takes better ones alone
        need = rows - row[held].bincount(minlength=len(rows))
        if not bool((need[row[offers]] > 0).any()):
            return held


def _completed(mask: Tensor, allowed: Tensor, missing: Tensor, columns: Tensor) -> Tensor:
    """`mask` [R, C] with the places that its rows miss [R], in columns with room as far as that is possible; on the CPU.

    Args:
        columns: the numbers [groups, C] that columns shall have.
    """
    size = len(mask) // len(columns)
    for start in missing.nonzero()[:, 0].div(size, rounding_mode="floor").unique().tolist():
        span = slice(start * size, (start + 1) * size)
        own, free = mask[span], allowed[span] & ~mask[span]
        room = columns[start] - own.sum(0)
        for r in missing[span].nonzero()[:, 0].tolist():
            for _ in range(int(missing[span][r])):
                path = _short_path(own, free, r, room) or _path(own, free, r, room)
                if path is None:
                    path = [(r, int(room.masked_fill(~free[r], torch.iinfo(room.dtype).min).argmax()))]
                room[path[-1][1]] -= 1
                for i, (a, c) in enumerate(path):
                    own[a, c], free[a, c] = True, False
                    if i + 1 < len(path):  # the next row gives up its place in this column
                        own[path[i + 1][0], c], free[path[i + 1][0], c] = False, True
    return mask


def _short_path(own: Tensor, free: Tensor, row: int, room: Tensor) -> list[tuple[int, int]] | None:
    """A path of one or two places to the column with most room, found by looking at few rows; None does not mean there is none.

    Arguments as in `_path`.
    """
    column = int(room.argmax())
    if free[row, column]:
        return [(row, column)]
    givers = free[:, column].nonzero()[:, 0]
    for some in givers.roll(-int((givers < row).sum())).split(32):  # not always from the first rows on
        both = own[some] & free[row]
        if both.any():
            i = int(both.any(1).byte().argmax())
            return [(row, int(both[i].byte().argmax())), (int(some[i]), column)]
    return None


def _path(own: Tensor, free: Tensor, row: int, room: Tensor) -> list[tuple[int, int]] | None:
    """A shortest augmenting path from `row` to a column with room: the places that rows take, in turn; None if there is none.

    Row `path[i + 1][0]` has a place in column `path[i][1]`, and gives it to the row before it.

    Args:
        own: the places that are taken [R, C].
        free: those that may be [R, C].
        room: how many more each column may have [C].
    """
    from_row, from_column = torch.full((own.shape[1],), -1), torch.full((len(own),), -1)
    frontier, seen = torch.tensor([row]), torch.zeros(len(own), dtype=torch.bool)
    seen[row] = True
    while len(frontier):
        reach = free[frontier]
        new = (reach.any(0) & (from_row < 0)).nonzero()[:, 0]
        from_row[new] = frontier[reach[:, new].byte().argmax(0)]
        ends = new[room[new] > 0]
        if len(ends):
            column = int(ends[room[ends].argmax()])
            path = [(int(from_row[column]), column)]
            while path[-1][0] != row:
                column = int(from_column[path[-1][0]])
                path.append((int(from_row[column]), column))
            return path[::-1]
        held = own[:, new]
        frontier = (held.any(1) & ~seen).nonzero()[:, 0]
        seen[frontier] = True
        if len(frontier):
            from_column[frontier] = new[held[frontier].byte().argmax(1)]
    return None
