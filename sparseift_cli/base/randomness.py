"""Randomness without state: a number is a function of a key and of what it is for, never of what was drawn before.

Integer arithmetic modulo 2^64 only, so every device gives the same bits: int64 tensors wrap around, and the logical
shift that torch lacks is an arithmetic one with the sign's copies masked off. The mixing function is the finaliser of
splitmix64 (Steele, Lea, Flood 2014; constants by David Stafford), a bijection of the 64-bit words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: its multiples visit every word
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST = 31
_LANE = 15  # bits


def signed(word: int) -> int:
    """The int64 with the 64 low bits of `word`."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def key_of(seed: int, *names: str | int) -> int:
    """A 64-bit key for what `names` name: a hash of them and of the seed, the same on every machine."""
    digest = hashlib.blake2b(json.dumps([seed, *names]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def generator_for(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for what `names` name (a layer, a part of it, ...), seeded by `key_of` them.

    The key has 64 bits and is the same on every machine; torch's Mersenne twister uses the lower 32 of them.
    """
    return torch.Generator().manual_seed(key_of(seed, *names) & ((1 << 64) - 1))


def words(key: int | Tensor, counters: Tensor) -> Tensor:
    """int64 words [*], uniform over all 64 bits: one for each of `counters` [*], on their device.

    The key may be an int64 scalar there.
    """
    return mix(seeds(key, counters))


def seeds(key: int | Tensor, counters: Tensor) -> Tensor:
    """int64 [*], of which `mix` makes the words."""
    return counters * signed(_GOLDEN) + key


def mix(z: Tensor) -> Tensor:
    """The bijection of the 64-bit words that makes them random: int64 [*] to [*]."""
    for shift, factor in _STEPS:
        z = (z ^ _shifted(z, shift)) * signed(factor)
    return z ^ _shifted(z, _LAST)


def word(key: int, counter: int) -> int:
    """`words` of one Python integer."""
    z = (counter * _GOLDEN + key) & ((1 << 64) - 1)
    for shift, factor in _STEPS:
        z = (z ^ z >> shift) * factor & ((1 << 64) - 1)
    return signed(z ^ z >> _LAST)


def below(random: Tensor, n: int) -> Tensor:
    """Words as int64 numbers [*] in 0..n-1; the bias is at most n / 2^63."""
    return (random & ((1 << 63) - 1)) % n


def lane(random: Tensor, index: int, n: int) -> Tensor:
    """Numbers [*] in 0..n-1 from 15 of the bits of each word: lanes 0 to 3 are independent. For small n (bias n / 2^15)."""
    return (_shifted(random, index * _LANE) & ((1 << _LANE) - 1)) * n >> _LANE


def coin(random: Tensor) -> Tensor:
    """Booleans [*] from a bit that no lane uses."""
    return random < 0


def fractions(start: int) -> Iterator[float]:
    """Endless uniform numbers in [0, 1) from one word, for code that decides step by step."""
    counter = 1
    while True:
        yield (word(start, counter) & ((1 << 53) - 1)) / 2**53
        counter += 1


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right."""
    return (z >> by) & ((1 << (64 - by)) - 1) if by else z


def counters(first: int, last: int, device: torch.device | str) -> Tensor:
    """first, ..., last - 1 as int64 [last - first], made on `device`: nothing is copied there."""
    return torch.arange(first, last, dtype=torch.int64, device=device)
