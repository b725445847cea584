"""Randomness without state: uniform, one-to-one, and the same however the batches are asked for."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseift_cli.base.randomness import below, coin, counters, fractions, key_of, lane, word, words
from sparseift_cli.data.order import CHUNK, Order, permutation
from sparseift_cli.errors import UsageError


def chi_squared(counts: list[int]) -> float:
    """(chi^2 - its mean) / its standard deviation: about normal where the counts are uniform."""
    mean = sum(counts) / len(counts)
    freedom = len(counts) - 1
    return (sum((c - mean) ** 2 / mean for c in counts) - freedom) / (2 * freedom) ** 0.5


# --- words ---


def test_words_are_splitmix64() -> None:
    """The first outputs of splitmix64 with seed 1234567, as its authors' C code gives them (Rosetta Code)."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = words(1234567, counters(1, 6, "cpu")) & ((1 << 63) - 1)
    assert found.tolist() == [v & ((1 << 63) - 1) for v in known]
    assert [word(1234567, i) & ((1 << 64) - 1) for i in range(1, 6)] == known


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_tensors_and_integers_agree(key: int, counter: int) -> None:
    assert words(key, torch.tensor([counter])).item() == word(key, counter)


def test_keys_are_named() -> None:
    """The hash is part of what a seed means: a change gives every run another order."""
    assert key_of(0) == -7203015550239113044
    assert key_of(0, "order", 1) == -7946999260987507197
    keys = [key_of(seed, *names) for seed in (0, 1, -1) for names in ((), ("a",), ("a", 0), ("a", "0"), ("a0",))]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_every_bit_and_lane_is_fair() -> None:
    random = words(key_of(3, "test"), counters(0, 1 << 17, "cpu"))
    for bit in range(64):
        assert abs(((random >> bit) & 1).float().mean().item() - 0.5) < 0.005
    for index, n in itertools.product(range(4), (2, 9, 32)):
        assert chi_squared(torch.bincount(lane(random, index, n), minlength=n).tolist()) < 5
    pairs = Counter(zip(lane(random, 0, 9).tolist(), lane(random, 1, 9).tolist(), coin(random).tolist(), strict=True))
    assert len(pairs) == 162
    assert chi_squared(list(pairs.values())) < 5
    numbers = below(random, 1000)
    assert 0 <= int(numbers.min()) <= int(numbers.max()) < 1000
    assert chi_squared(torch.bincount(numbers).tolist()) < 5


def test_fractions_are_uniform() -> None:
    found = list(itertools.islice(fractions(word(0, 0)), 20_000))
    assert all(0 <= v < 1 for v in found)
    assert chi_squared(list(Counter(int(v * 50) for v in found).values())) < 5


# --- permutations ---


@pytest.mark.parametrize("n", [1, 2, 97, 4999])
def test_permutations_are_one_to_one(n: int) -> None:
    assert torch.equal(permutation(n, "test").sort().values, torch.arange(n))


EXPECTED = [7, 3, 4, 5, 2, 1, 6, 0]


def test_a_permutation_depends_on_its_seed_and_names_alone() -> None:
    """The values are part of what a seed means: a change gives every run another order."""
    before = torch.random.get_rng_state()
    torch.manual_seed(5)
    assert permutation(8, "order", 0).tolist() == permutation(8, "order", 0).tolist() == EXPECTED
    torch.random.set_rng_state(before)
    others = [permutation(8, "order", 1), permutation(8, "order", 0, seed=1), permutation(8, "held out")]
    assert all(other.tolist() != EXPECTED for other in others)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator was left alone


def test_seeds_give_unrelated_orders() -> None:
    a, b = (permutation(50_000, "order", 0, seed=seed).float() for seed in (0, 1))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 0.02


# --- batches ---


def epoch_of(order: Order, epoch: int) -> list[list[int]]:
    return [order.at(epoch, step)[0].tolist() for step in range(order.steps)]


def test_an_epoch_visits_everything_once() -> None:
    order = Order(1003, 10, 7, train=True)
    ids = [i for batch in epoch_of(order, 3) for i in batch]
    assert order.steps == 100
    assert len(set(ids)) == len(ids) == 1000
    assert set(ids) <= set(range(1003))


def test_orders_differ_by_epoch_and_seed_only() -> None:
    orders = [epoch_of(Order(500, 50, seed, train=True), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(order) for order in orders}) == 4
    assert epoch_of(Order(500, 50, 1, train=True), 1) == orders[3]


def test_every_step_can_be_the_first() -> None:
    """Also across the stretches that are worked out at a time."""
    size, batch = 3 * CHUNK + 17, 4096
    running = Order(size, batch, 2, train=True)
    for step in range(running.steps):
        ids, random = running.at(1, step)
        again = Order(size, batch, 2, train=True).at(1, step)
        assert torch.equal(ids, again[0])
        assert torch.equal(random, again[1])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_same_batch(world: int, train: bool) -> None:
    alone = Order(101, 12, 0, train=train)
    shared = [Order(101, 12, 0, train=train, rank=rank, world=world) for rank in range(world)]
    for step in range(alone.steps):
        for part, want in enumerate(alone.at(0, step)):
            parts = [order.at(0, step)[part] for order in shared]
            assert torch.equal(torch.cat(parts), want)
            assert not train or {len(p) for p in parts} == {12 // world}


def test_words_belong_to_samples() -> None:
    """Not to places in a batch: augmentation does not depend on the batch size."""
    small, large = Order(96, 8, 0, train=True), Order(96, 48, 0, train=True)
    found = [
        {i: w for step in range(o.steps) for i, w in zip(*(t.tolist() for t in o.at(2, step)), strict=True)}
        for o in (small, large)
    ]
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 96


def test_evaluation_goes_through_in_order() -> None:
    assert epoch_of(Order(7, 3, 0, train=False), 5) == [[0, 1, 2], [3, 4, 5], [6]]
    assert Order(7, 3, 0, train=False, rank=0, world=2).at(0, 2)[0].tolist() == []
    assert Order(7, 3, 0, train=False, rank=1, world=2).at(0, 2)[0].tolist() == [6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 5, "batch_size": 6}, "5 samples do not fill"),
        ({"size": 9, "batch_size": 4, "world": 3}, "cannot be shared by 3"),
        ({"size": 9, "batch_size": 4, "rank": 2, "world": 2}, "rank 2 of 2"),
        ({"size": 9, "batch_size": 0}, "batch of 0"),
    ],
)
def test_impossible_orders(arguments, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Order(seed=0, train=True, **arguments)


def test_steps_beyond_an_epoch() -> None:
    with pytest.raises(UsageError, match="no step 2 in epoch 0: an epoch has the steps 0 to 1"):
        Order(8, 4, 0, train=True).at(0, 2)
