"""Shuffling by formula: any stretch of a permutation of 0..n-1, without making the rest of it.

A Feistel network over pairs: i = L * b + R with 0 <= L < a, 0 <= R < b and a * b slightly above n. Each round adds a
random function of one half to the other (mod a, or mod b), which is invertible whatever the function is; here it is a
table of sqrt(n) random numbers. What falls on n..a*b-1 is sent through the network again until it comes back into range
(cycle walking). a and b are chosen so that this excess is nearly always under 5, and as a walk meets no place twice,
`excess` further passes always suffice: a fixed number of operations, with no question to the device in between.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

from ..base.randomness import below, counters, word, words

ROUNDS = 8


class Permutation:
    """The permutation of 0..n-1 that `key` names. Its tables, about 8 sqrt(n) numbers, lie on `device`."""

    def __init__(self, n: int, key: int, device: torch.device | str = "cpu") -> None:
        self.n = n
        self._sides = sides(n)
        a, b = self._sides
        self._tables = [
            below(words(word(key, r), counters(0, a if r % 2 else b, device)), b if r % 2 else a) for r in range(ROUNDS)
        ]

    def __call__(self, positions: Tensor) -> Tensor:
        """What stands at `positions` (int64 [*], 0..n-1, on the permutation's device): int64 [*]."""
        found = self._pass(positions)
        for _ in range(self._sides[0] * self._sides[1] - self.n):
            found = torch.where(found < self.n, found, self._pass(found))
        return found

    def _pass(self, places: Tensor) -> Tensor:
        a, b = self._sides
        left, right = places // b, places % b
        for r, table in enumerate(self._tables):
            if r % 2:
                right = (right + table[left]) % b
            else:
                left = (left + table[right]) % a
        return left * b + right


@lru_cache(maxsize=64)
def sides(n: int) -> tuple[int, int]:
    """a and b of about sqrt(n), both at least 2, whose product is n or as little above it as can be found nearby."""
    root = max(2, isqrt(n))
    pairs = ((a, max(2, -(-n // a))) for a in range(root, 2 * root + 3))
    return min(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))
