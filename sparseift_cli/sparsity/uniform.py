"""A uniformly random mask with an exact count, at the price of one random number a place.

Independent coin flips give a mask that, whatever its count came out to be, is uniform among all masks with that count; adding
places one at a time, uniformly, keeps it so. The coin is a little too low, so that nearly always some are missing and few.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 15  # places drawn at a time, into one buffer: few enough that no thread has to wait for another


def at_random(grid: tuple[int, int], n: int, generator: torch.Generator) -> Tensor:
    """Mask [*grid] with exactly n True, every such mask equally likely."""
    places = grid[0] * grid[1]
    if n > places // 2:
        return at_random(grid, places - n, generator).logical_not_()
    mask = torch.empty(places, dtype=torch.bool)
    coin = max(0.0, (n - 4 * n**0.5) / places) if places else 0.0
    draws = torch.empty(min(places, _CHUNK))
    for part in mask.split(_CHUNK):
        torch.lt(draws[: len(part)].uniform_(generator=generator), coin, out=part)
    missing = n - int(mask.count_nonzero())
    if missing < 0:
        mask[_hits(mask, True, -missing, generator)] = False
    elif missing:
        mask[_hits(mask, False, missing, generator)] = True
    return mask.view(grid)


def _hits(mask: Tensor, value: bool, n: int, generator: torch.Generator) -> Tensor:
    """n different indices at which `mask` is `value`, every choice equally likely."""
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < n:
        darts = torch.randint(len(mask), (4 * n + 64,), generator=generator)
        found = torch.cat((found, darts[mask[darts] == value])).unique()
    return found[torch.randperm(len(found), generator=generator)[:n]]
