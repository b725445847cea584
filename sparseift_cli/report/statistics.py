"""Means, spreads and Student's t intervals: of one sample, of pairs, and of two samples with unequal variances (Welch).

Student, "The probable error of a mean", Biometrika 6 (1908) 1-25; B. L. Welch, "The generalization of 'Student's' problem
when several different population variances are involved", Biometrika 34 (1947) 28-35.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, or a difference of means, and the interval that holds the true one in `confidence` of all repetitions.

    `low` and `high` are None where nothing can be said: fewer than two values have no spread.
    """

    n: int
    mean: float | None
    deviation: float | None
    """Sample standard deviation (n - 1): of the values, or of the pairs' differences; None for two samples."""
    standard_error: float | None
    degrees_of_freedom: float | None
    low: float | None
    high: float | None

    @property
    def t(self) -> float | None:
        """The mean over its standard error; None without a spread."""
        return self.mean / self.standard_error if self.mean is not None and self.standard_error else None


def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """The value that Student's t with so many degrees of freedom stays below with `probability`: (0.975, 2) -> 4.3027."""
    from scipy import special  # the quantile alone: scipy.stats takes a second to import

    return float(special.stdtrit(degrees_of_freedom, probability))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, correctly rounded; NaN where a value is one."""
    if not all(map(math.isfinite, values)):
        return float(sum(values) / len(values))
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # a run that diverged to 1e308
        return math.fsum(v / len(values) for v in values)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Of one sample: mean +- t(n - 1) s / sqrt(n)."""
    n = len(values)
    if not n:
        return Interval(0, None, None, None, None, None, None)
    centre = mean(values)
    if n == 1:
        return Interval(1, centre, None, None, None, None, None)
    deviation = _distance(values, centre) / math.sqrt(n - 1)
    return _interval(n, centre, deviation, deviation / math.sqrt(n), n - 1, confidence)


def paired(baseline: Sequence[float], candidate: Sequence[float], confidence: float = 0.95) -> Interval:
    """Of candidate minus baseline, value by value: the spread that both share (the seed's) cancels."""
    return _settled(mean_interval([b - a for a, b in zip(baseline, candidate, strict=True)], confidence), baseline)


def welch(baseline: Sequence[float], candidate: Sequence[float], confidence: float = 0.95) -> Interval:
    """Of mean(candidate) - mean(baseline), with the degrees of freedom of Welch and Satterthwaite. n is the smaller one."""
    n, m = len(baseline), len(candidate)
    if not n or not m:
        return Interval(min(n, m), None, None, None, None, None, None)
    difference = mean(candidate) - mean(baseline)
    if n < 2 or m < 2:
        return Interval(min(n, m), difference, None, None, None, None, None)
    a = _distance(baseline, mean(baseline)) / math.sqrt((n - 1) * n)
    b = _distance(candidate, mean(candidate)) / math.sqrt((m - 1) * m)
    error = math.hypot(a, b)
    if not error:
        return _interval(min(n, m), difference, None, error, n + m - 2, confidence)
    freedom = 1 / ((a / error) ** 4 / (n - 1) + (b / error) ** 4 / (m - 1))
    return _interval(min(n, m), difference, None, error, freedom, confidence)


def _interval(
    n: int, centre: float, deviation: float | None, error: float, freedom: float, confidence: float
) -> Interval:
    half = t_quantile((1 + confidence) / 2, freedom) * error
    return Interval(n, centre, deviation, error, freedom, centre - half, centre + half)


def _settled(interval: Interval, baseline: Sequence[float]) -> Interval:
    """A difference of means that is rounding alone is none: accuracies of one sum are not 5e-15 points apart."""
    largest = max(map(abs, baseline), default=0.0)
    if interval.mean is None or not abs(interval.mean) <= 1e-14 * largest:
        return interval
    return replace(interval, mean=0.0)


def _distance(values: Sequence[float], centre: float) -> float:
    """Square root of the sum of squared deviations from the mean; no square is so large that it overflows."""
    return math.hypot(*(v - centre for v in values)) if math.isfinite(centre) else math.nan
