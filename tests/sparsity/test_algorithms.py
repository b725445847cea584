"""What a mask update does to one mask, and the schedules: jaxpruner's fixture, exact counts, ties that favour no place."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import cos, pi

import pytest
import torch
from torch import Tensor

from sparseift_cli.base.randomness import generator_for, key_of
from sparseift_cli.errors import UsageError
from sparseift_cli.sparsity.algorithms import ALGORITHMS, GMP, MaskAlgorithm, RigL, make_algorithm, name_of
from sparseift_cli.sparsity.drop_and_grow import best, drop_and_grow, extend, prune
from sparseift_cli.sparsity.schedule import StepCost, UpdateSchedule, drop_fraction, drops, nonzeros_at, updates_at


def bits(text: str) -> Tensor:
    return torch.tensor([c == "1" for c in text])


# --- drop and grow ---


@pytest.mark.parametrize(
    ("fraction", "regrow", "expected"),
    [
        (0.0, "allow", "01010110"),
        (0.25, "allow", "11010100"),
        (0.5, "allow", "11001100"),
        (0.75, "allow", "10101100"),
        (1.0, "allow", "10101100"),
        (0.25, "forbid", "11010100"),
        (0.5, "forbid", "11001100"),
        (0.75, "forbid", "10101100"),
        (1.0, "forbid", "10101001"),
    ],
)
def test_jaxpruners_fixture(fraction: float, regrow, expected: str) -> None:
    """Drop scores as they are, signs included; growth by their magnitude (jaxpruner, sparse_trainers_test.py)."""
    mask = bits("01010110")
    scores = torch.tensor([-9.0, 1, 4, -1, 5, 8, -2, 3])
    new = drop_and_grow(mask, 4, scores, scores.abs(), drops(4, fraction), 0, regrow)
    assert "".join(str(int(b)) for b in new) == expected
    assert torch.equal(mask, bits("01010110"))


@pytest.mark.parametrize("regrow", ["allow", "forbid"])
@pytest.mark.parametrize("active", [0, 1, 30, 59, 60])
@pytest.mark.parametrize("ties", [False, True])
def test_counts_are_exact(regrow, active: int, ties: bool) -> None:
    generator = generator_for(active)
    mask = extend(torch.zeros(6, 10, dtype=torch.bool), 0, active, generator)
    assert int(mask.sum()) == active
    scores = torch.zeros(6, 10) if ties else torch.rand(6, 10, generator=generator)
    for n in range(active + 1):
        new = drop_and_grow(mask, active, scores, scores, n, n, regrow)
        assert int(new.sum()) == active
        moved = int((new & ~mask).sum())
        assert moved <= min(n, 60 - active)
        if regrow == "forbid":
            assert moved == min(n, 60 - active)
        kept = prune(mask, active, scores, n, n)
        assert int(kept.sum()) == n and not (kept & ~mask).any()


def test_ties_favour_no_place() -> None:
    """Of six equal places two are chosen; every pair is as likely (chi-squared, 14 degrees of freedom, p about 1e-4)."""
    scores, within = torch.tensor([5.0, 1, 1, 1, 1, 1, 1, 0]), torch.ones(8, dtype=torch.bool)
    rounds = 3000
    pairs = Counter(tuple(best(scores, 3, within, 8, key_of(i)).nonzero().flatten().tolist()) for i in range(rounds))
    assert len(pairs) == 15
    assert all(0 in pair and 7 not in pair for pair in pairs)
    assert sum((n - rounds / 15) ** 2 / (rounds / 15) for n in pairs.values()) < 42


def test_infinite_scores_are_scores() -> None:
    scores = torch.tensor([torch.inf, 1, -torch.inf, 2])
    assert best(scores, 2, bits("1011"), 3, 0).tolist() == [True, False, False, True]
    assert best(scores, 2, bits("1110"), 3, 0).tolist() == [True, True, False, False]


def test_large_masks_take_the_sampled_path() -> None:
    scores = torch.rand(700, 900, generator=generator_for(1)).mul_(1000).floor_()  # 630 ties a value
    mask = extend(torch.zeros(700, 900, dtype=torch.bool), 0, 63_000, generator_for(2))
    new = drop_and_grow(mask, 63_000, scores, scores, 20_000, 3)
    assert int(new.sum()) == 63_000
    kept = mask & new
    assert scores[mask & ~new].max() <= scores[kept].min()
    assert scores[new & ~mask].min() >= scores[~new].max()


# --- schedules ---


def test_updates_are_those_of_isoflop() -> None:
    for steps in (1, 7, 40, 41):
        for delta_t in (1, 3, 10):
            for stop in (Fraction(0), Fraction(1, 3), Fraction(3, 4), Fraction(1)):
                schedule = UpdateSchedule(delta_t, stop, steps)
                found = [t for t in range(steps) if updates_at(schedule, t)]
                assert len(found) == schedule.updates
                assert found == [t for t in range(steps) if 0 < t < stop * steps and t % delta_t == 0]


def test_drop_fractions() -> None:
    schedule = UpdateSchedule(100, Fraction(3, 4), 1000)
    for t in (100, 375, 700):
        x = t / 750
        assert drop_fraction("cosine", 0.3, t, schedule) == pytest.approx(0.15 * (1 + cos(pi * x)))
        assert drop_fraction("linear", 0.3, t, schedule) == pytest.approx(0.3 * (1 - x))
        assert drop_fraction("inverse_power", 0.3, t, schedule) == pytest.approx(0.3 * (1 - x) ** 3)
        assert drop_fraction("constant", 0.3, t, schedule) == 0.3
    assert drop_fraction("cosine", 0.3, 375, schedule) == pytest.approx(0.15)
    assert [drops(100, f) for f in (0.0, 0.29, 0.3, 0.999, 1.0)] == [0, 29, 30, 99, 100]


def test_cubic_schedule() -> None:
    schedule = UpdateSchedule(10, Fraction(3, 4), 100)
    counts = [nonzeros_at(t, 1000, 100, schedule) for t in range(101)]
    for t, n in enumerate(counts):
        progress = Fraction(min(t, 75) // 10 * 10 if t < 75 else 75, 75)
        ideal = 100 + 900 * (1 - progress) ** 3
        assert ideal - 1 < n <= ideal
    assert counts[:10] == [1000] * 10 and counts[75:] == [100] * 26
    assert counts == sorted(counts, reverse=True)
    assert nonzeros_at(0, 50, 100, schedule) == 100
    assert nonzeros_at(0, 1000, 100, UpdateSchedule(10, Fraction(0), 100)) == 100


@pytest.mark.parametrize("steps", [40, 75, 400])
def test_gmp_costs_what_the_cost_model_says(steps: int) -> None:
    """Summed over a run, GMP's non-zeros are those of its mean step, within the one per step that is rounded down."""
    schedule = UpdateSchedule(10, Fraction(3, 4), steps)
    start, final = 10_000, 1_234
    spent = sum(nonzeros_at(t, start, final, schedule) for t in range(steps))
    mean = GMP().mean_step(StepCost(1), start, final, start, schedule)
    assert mean * steps - steps < spent <= mean * steps


def test_names() -> None:
    assert tuple(ALGORITHMS) == ("dense", "static", "set", "snfs", "rigl", "gmp", "granet")
    assert all(name_of(make_algorithm(name)) == name for name in ALGORITHMS)
    with pytest.raises(UsageError, match="rigel") as caught:
        make_algorithm("rigel")
    assert "rigl" in str(caught.value.hint)


def test_an_algorithm_takes_its_own_options_only() -> None:
    assert make_algorithm("rigl", {"delta_t": 7, "stop": 0.5}) == RigL(delta_t=7, stop="0.5")
    with pytest.raises(UsageError, match="static has no option delta_t") as caught:
        make_algorithm("static", {"delta_t": 7})
    assert caught.value.hint == "it takes none"
    with pytest.raises(UsageError, match="rigl has no option momentum") as caught:
        make_algorithm("rigl", {"momentum": 0.5})
    assert caught.value.hint == "it takes delta_t, stop, drop_fraction, decay, regrow, grown_state, growth"
    with pytest.raises(UsageError, match="give them to RigL"):
        make_algorithm(RigL(), {"delta_t": 7})
    # what every algorithm once took, at its default, as files written then have it
    assert make_algorithm("static", {"delta_t": 100, "stop": 0.75, "decay": "cosine"}).options() == {}


def test_what_is_no_algorithm_is_refused() -> None:
    class Halved(MaskAlgorithm):
        def nonzeros(self, step: int, start: int, final: int, schedule: UpdateSchedule) -> int:
            return final // 2

    for found, reason in ((dict, "a subclass of"), (RigL(), "a subclass of"), (Halved, "overridden together")):
        with pytest.raises(UsageError, match=reason):
            ALGORITHMS.register("mine", found)
