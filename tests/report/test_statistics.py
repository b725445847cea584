"""Intervals against worked examples and scipy.stats, and what the verdicts make of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseift_cli.report import statistics

# Student (1908), "The probable error of a mean", Biometrika 6: hours of sleep gained by ten patients under two drugs.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_students_sleep_data_paired() -> None:
    found = statistics.paired(DRUG_1, DRUG_2)
    # by hand: differences 1.2 2.4 1.3 1.3 0 1 1.8 .8 4.6 1.4; sum 15.8, sum of squares 38.58, variance (38.58 - 24.964)/9
    deviation = math.sqrt(13.616 / 9)
    half = 2.2621571627 * deviation / math.sqrt(10)  # t(0.975, 9) of any table: 2.262
    assert (found.n, found.degrees_of_freedom) == (10, 9)
    assert found.mean == pytest.approx(1.58)
    assert found.t == pytest.approx(4.0621, abs=5e-5)
    assert (found.low, found.high) == pytest.approx((1.58 - half, 1.58 + half), abs=1e-9)
    assert (round(found.low, 4), round(found.high, 4)) == (0.7001, 2.4599)


def test_students_sleep_data_welch() -> None:
    found = statistics.welch(DRUG_1, DRUG_2)
    assert found.t == pytest.approx(1.8608, abs=5e-5)
    assert found.degrees_of_freedom == pytest.approx(17.776, abs=5e-4)
    assert (found.low, found.high) == pytest.approx((-0.2054832, 3.3654832), abs=5e-8)  # as R's t.test prints them


def test_three_seeds_mean_two_degrees_of_freedom() -> None:
    found = statistics.mean_interval([76.0, 77.0, 78.0])
    assert (found.mean, found.deviation, found.degrees_of_freedom) == (77.0, 1.0, 2)
    assert found.high == pytest.approx(77.0 + 4.302652729 / math.sqrt(3), abs=1e-8)  # t(0.975, 2) = 4.303 of any table


def test_too_few_values_have_no_interval() -> None:
    assert statistics.mean_interval([]).mean is None
    assert statistics.mean_interval([5.0]) == statistics.Interval(1, 5.0, None, None, None, None, None)
    assert statistics.welch([1.0], [2.0, 3.0]).low is None
    assert statistics.welch([], [2.0]).mean is None


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = statistics.welch([1.0, 1.0], [2.0, 2.0, 2.0])
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)


def test_a_value_that_is_no_number_stays_one() -> None:
    found = statistics.mean_interval([1.0, math.nan, 2.0])
    assert math.isnan(found.mean)
    assert math.isnan(found.low)


numbers = st.lists(st.floats(-1e4, 1e4).map(lambda v: round(v, 3)), min_size=2, max_size=8, unique=True)


@given(numbers, numbers)
def test_same_as_scipy(a: list[float], b: list[float]) -> None:
    from scipy import stats

    n = min(len(a), len(b))
    ours = statistics.paired(a[:n], b[:n])
    if ours.deviation and ours.deviation > 1e-6:
        theirs = stats.ttest_rel(b[:n], a[:n]).confidence_interval()
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-8, abs=1e-6)
    ours = statistics.welch(a, b)
    if ours.standard_error and ours.standard_error > 1e-6:
        theirs = stats.ttest_ind(b, a, equal_var=False).confidence_interval()
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-8, abs=1e-6)


def test_values_that_diverged_do_not_overflow() -> None:
    far = [1e308, -1e308, 1e308]
    assert math.isfinite(statistics.mean_interval(far).mean or 0) and statistics.mean_interval(far).high == math.inf
    assert statistics.welch(far, [1.0, 2.0]).low == -math.inf
    assert statistics.mean_interval([1e308] * 3).mean == pytest.approx(1e308)
    tiny = statistics.welch([1e-200, 2e-200], [3e-200, 5e-200])  # squares of these are 0
    assert tiny.degrees_of_freedom == pytest.approx(statistics.welch([1, 2], [3, 5]).degrees_of_freedom)


def test_a_difference_of_rounding_alone_is_none() -> None:
    """Three accuracies each, of one sum: the differences add up to 1e-14 points, which a table would print."""
    a = [100 * k / 355 for k in (340, 340, 350)]
    b = [100 * k / 355 for k in (340, 341, 349)]
    assert math.fsum(y - x for x, y in zip(a, b, strict=True)) != 0
    found = statistics.paired(a, b)
    assert found.mean == 0 and found.low is not None and found.high is not None
    assert found.low == pytest.approx(-found.high)
    assert statistics.paired([1.0, 1.0], [1.0 + 1e-9, 1.0 + 1e-9]).mean != 0
