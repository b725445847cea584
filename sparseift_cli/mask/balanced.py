"""Random masks of blocks that are balanced: rows and columns of a grid differ by at most one in their number of blocks.

Blocks are whole tiles of work for a kernel, and a row of them that has twice as many takes twice as long. With few blocks in a
row, chance alone would leave some rows empty: at four in the mean, one row in fifty.

Every cell of the grid [R, C] gets one of K *classes*: the first mask, the second, ..., none of them. How many cells of each
class a row has is chosen first. Then columns are filled one after the other. With p columns left, row i still has a[i, k]
cells of class k, and a[i, k] / p, rounded down or up, go into this column, so that each row gets one class and each class its
number in all rows over p, rounded down or up. Such a rounding exists, as the unrounded numbers obey the same bounds and the
problem is a flow; what is left for the next columns obeys them again. So no choice ever has to be taken back, and counts are
exact whatever they are (Hilton, "Hamiltonian decompositions of complete graphs", J. Comb. Theory B 36, 1984, has the theorem:
an edge colouring of a graph whose vertices were merged can be undone vertex by vertex, evenly).

Each row rounds at random with the right mean; then rows that a class has too many of are moved to others, along paths of
classes that can take them. Rows and columns are in random order, so all cells are equally likely. Not every mask is: that
would take a Markov chain of exchanges, which costs more than the kernels gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .quotas import best_of_rows, best_with_quotas
from .select import equal_shares, rows_at_once


def balanced_masks(
    grid: tuple[int, int],
    counts: Sequence[int],
    generator: torch.Generator,
    *,
    balance: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> list[Tensor]:
    """Random masks [*grid] with `counts` True, no cell in two of them, each with balanced rows and columns.

    Args:
        counts: in all not more than the grid has.
        balance: number of equal blocks of rows, and of columns, that share each count; one of them is 1.
        groups: of a grouped convolution: equal blocks of rows that are balanced each by itself, as their columns are other
            inputs.
    """
    if groups > 1:
        shares = equal_shares(counts, groups)
        parts = [
            balanced_masks((grid[0] // groups, grid[1]), [share[g] for share in shares], generator)
            for g in range(groups)
        ]
        return [torch.cat(masks) for masks in zip(*parts, strict=True)]
    if grid[0] < grid[1]:  # columns are the loop, and the fewer the faster
        turned = balanced_masks((grid[1], grid[0]), counts, generator, balance=(balance[1], balance[0]))
        return [mask.t().contiguous() for mask in turned]
    rows, columns = grid
    if not rows * columns:
        return [torch.zeros(grid, dtype=torch.bool) for _ in counts]
    classes = [*counts, rows * columns - sum(counts)]
    left = _in_rows(classes, rows, balance[0], generator)
    chosen: list[Tensor] = []
    blocks = _split(left, balance[1], generator)
    blocks.sort(key=lambda block: block.sum(0).tolist(), reverse=True)  # as of rows, the first have one more
    for group in blocks:
        filled = _split(group, columns // balance[1], generator)
        chosen += [filled[i] for i in torch.randperm(len(filled), generator=generator).tolist()]
    cells = torch.stack(chosen, 1)  # [R, C, K]
    return [cells[:, :, k] == 1 for k in range(len(counts))]


def masks_with_even_rows(
    grid: tuple[int, int], counts: Sequence[int], generator: torch.Generator, *, balance: tuple[int, int] = (1, 1)
) -> list[Tensor]:
    """Random masks [*grid] with `counts` True, no cell in two of them; rows alone are balanced.

    Arguments as in `balanced_masks`.
    """
    rows, columns = grid
    left = _in_rows([*counts, rows * columns - sum(counts)], rows, balance[0], generator)
    masks = [torch.zeros(grid, dtype=torch.bool) for _ in counts]
    width = columns // balance[1]
    for b, block in enumerate(_split(left, balance[1], generator)):
        for part in torch.arange(rows).split(rows_at_once(width)):
            # the place that each cell has in a random order of its row
            place = torch.rand(len(part), width, generator=generator, dtype=torch.float64).argsort(1)
            ends = block[part].cumsum(1)
            for k, mask in enumerate(masks):
                begins = ends[:, k - 1 : k] if k else 0
                mask[part, b * width : (b + 1) * width] = (place >= begins) & (place < ends[:, k : k + 1])
    return masks


def best_even_mask(
    scores: Tensor,
    n: int,
    generator: torch.Generator,
    *,
    columns: bool,
    balance: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The mask [R, C] with `n` True and balanced rows of the highest `scores` [R, C]; with `columns` these are balanced too.

    Ties are ranked at random, and so is who has one more. Arguments as in `balanced_masks`.
    """
    grid, key = tuple(scores.shape), int(torch.randint(1 << 62, (1,), generator=generator))
    size, width = grid[0] // groups, grid[1] // balance[1]
    found = list[Tensor]()
    for part, share in zip(scores.split(size), equal_shares([n], groups)[0], strict=True):
        rows = _in_rows([share, size * grid[1] - share], size, balance[0], generator)
        blocks = [block[:, 0] for block in _split(rows, balance[1], generator)]
        allowed = torch.ones(size, width, dtype=torch.bool)
        made = list[Tensor]()
        for own, keys in zip(blocks, part.split(width, 1), strict=True):
            if columns:
                even = torch.tensor(equal_shares([int(own.sum())], width)[0])
                quota = even[torch.randperm(width, generator=generator)]
                made.append(best_with_quotas(keys, allowed, own, quota, key))
            else:
                made.append(best_of_rows(keys, allowed, own, key))
        found.append(torch.cat(made, 1))
    return torch.cat(found)


def _in_rows(counts: Sequence[int], rows: int, blocks: int, generator: torch.Generator) -> Tensor:
    """How many cells of each class every row has, [R, K]: even in a block of rows, and the blocks have equal shares.

    Whole rows of cells add up to `counts`, so the remainders go round the rows a whole number of times.
    """
    size = rows // blocks
    by_block = zip(*equal_shares(counts, blocks), strict=True)
    found: list[Tensor] = []
    for share in by_block:
        evenly = torch.tensor(equal_shares(share, size)).t()
        found.append(evenly[torch.randperm(size, generator=generator)])
    return torch.cat(found)


def _split(left: Tensor, parts: int, generator: torch.Generator) -> list[Tensor]:
    """`left` [R, K] as a sum of `parts` tensors [R, K] with equal sums of rows, entries and sums of columns as even as can be."""
    found: list[Tensor] = []
    for p in range(parts, 1, -1):
        part = _rounded(left, p, generator)
        found.append(part)
        left = left - part
    return [*found, left]


def _rounded(left: Tensor, p: int, generator: torch.Generator) -> Tensor:
    """`left` [R, K] over p, each entry and each sum of a column rounded down or up, sums of rows (multiples of p) exact."""
    least, rest = left // p, left % p
    up_to = rest.cumsum(1) + torch.randint(p, (len(left), 1), generator=generator)
    steps = up_to // p
    more = steps.diff(dim=1, prepend=steps.new_zeros(len(left), 1)).bool()  # one step where p is passed: mean rest / p
    in_all = rest.sum(0)
    _move(more, rest > 0, in_all // p, (in_all + p - 1) // p, generator)
    return least + more


def _move(more: Tensor, open_: Tensor, least: Tensor, most: Tensor, generator: torch.Generator) -> None:
    """Move rows of `more` [R, K] between classes, in place, until every class has from `least` to `most` [K] of them.

    A row moves from a class that it has to one that it may have (`open_` [R, K]) and has not. From a class with too many there
    is a path of such moves to one with fewer than its most: else every row had as few as it can in the classes that are
    reached, in all more than they may have. Too few likewise.
    """
    low, high = least.tolist(), most.tolist()
    while True:
        have = more.sum(0).tolist()
        classes = range(len(have))
        if over := [k for k in classes if have[k] > high[k]]:
            starts, ends = over[:1], {k for k in classes if have[k] < high[k]}
        elif under := [k for k in classes if have[k] < low[k]]:
            starts, ends = [k for k in classes if have[k] > low[k]], set(under[:1])
        else:
            return
        can = (
            more.t().int() @ (open_ & ~more).int()
        ).tolist()  # [K, K]: rows that can move from one class to the other
        path = _path(can, starts, ends)
        first, last = path[0], path[-1]
        wanted = have[first] - high[first] if over else low[last] - have[last]
        spare = high[last] - have[last] if over else have[first] - low[first]
        number = min(wanted, spare, *(can[a][b] for a, b in pairwise(path)))
        moves: list[tuple[Tensor, int, int]] = []
        for a, b in pairwise(path):
            rows = (more[:, a] & open_[:, b] & ~more[:, b]).nonzero()[:, 0]
            moves.append((rows[torch.randperm(len(rows), generator=generator)[:number]], a, b))
        for rows, a, b in moves:
            more[rows, a] = False
            more[rows, b] = True


def _path(can: Sequence[Sequence[int]], starts: Sequence[int], ends: set[int]) -> list[int]:
    """A shortest path of classes from one of `starts` to one of `ends`; can[a][b] is 0 where a does not lead to b."""
    before: dict[int, int | None] = dict.fromkeys(starts)
    queue = list(starts)
    for a in queue:
        if a in ends:
            path = [a]
            while (step := before[path[-1]]) is not None:
                path.append(step)
            return path[::-1]
        for b, rows in enumerate(can[a]):
            if rows and b not in before:
                before[b] = a
                queue.append(b)
    raise AssertionError("a rounding exists, so there is a path")
