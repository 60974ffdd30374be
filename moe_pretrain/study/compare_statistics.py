"""Means, intervals and tests over seeds. Student's t from its closed forms, so nothing beyond the standard library."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Literal

CONFIDENCE = 0.95

Verdict = Literal["reference", "better", "worse", "not distinguishable", "not tested"]


def student_t_within(t: float, degrees: int) -> float:
    """Probability that Student's t with ``degrees`` of freedom lies in ``[-t, t]``.

    Source:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 (odd) and 26.7.4 (even degrees).
    """
    if degrees < 1:
        raise ValueError(f"degrees={degrees} must be at least 1")
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    if degrees % 2:
        total, term = 0.0, cosine
        for k in range(1, degrees - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        return 2 / math.pi * (angle + math.sin(angle) * total)
    total, term = 0.0, 1.0
    for k in range(0, degrees, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return math.sin(angle) * total


@functools.cache
def student_t_quantile(confidence: float, degrees: int) -> float:
    """The ``t`` with probability ``confidence``, in (0, 1), of lying in ``[-t, t]``."""
    low, high = 0.0, 1.0
    while student_t_within(high, degrees) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_within(middle, degrees) < confidence else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% t-interval ``mean +- t * s / sqrt(n)``; NaN ends where there is one seed."""

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and interval of independent values; None without any."""
    count = len(values)
    if not count:
        return None
    mean = fmean(values)
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = student_t_quantile(CONFIDENCE, count - 1) * stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class PairedDifference:
    """A variant minus another, seed by seed.

    Attributes:
        seeds: Seeds that both have.
        difference: Mean and interval of the differences; None without common seeds.
        p_value: Of the two-sided paired t-test; None with fewer than two common seeds.
    """

    seeds: list[int]
    difference: Estimate | None
    p_value: float | None

    @property
    def verdict(self) -> Verdict:
        """What the interval says of a loss: not distinguishable when it holds 0."""
        if self.difference is None or self.p_value is None:
            return "not tested"
        if self.difference.low <= 0 <= self.difference.high:
            return "not distinguishable"
        return "worse" if self.difference.mean > 0 else "better"


def paired_difference(values: Mapping[int, float], others: Mapping[int, float]) -> PairedDifference:
    """``values - others`` over the seeds that both have, which share data order and initial weights."""
    seeds = sorted(values.keys() & others.keys())
    differences = [values[seed] - others[seed] for seed in seeds]
    found = estimate(differences)
    if found is None or found.count < 2:
        return PairedDifference(seeds, found, None)
    spread = stdev(differences) / math.sqrt(len(seeds))
    if spread == 0:
        return PairedDifference(seeds, found, 1.0 if found.mean == 0 else 0.0)
    return PairedDifference(seeds, found, 1 - student_t_within(abs(found.mean) / spread, len(seeds) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being several, in their order.

    Source:
        Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class Ranked:
    """A variant's place.

    Attributes:
        name: Of the variant.
        estimate: Its loss.
        rank: One more than the number of variants that are better by the test.
        equals: Variants that it cannot be told from, those that could not be tested among them.
    """

    name: str
    estimate: Estimate
    rank: int
    equals: list[str]


def rank(losses: Mapping[str, Mapping[int, float]]) -> list[Ranked]:
    """Order variants by mean loss; a place is only won by a test.

    The test of two variants is the two-sided paired t-test over their common seeds at 5%, with Holm's correction for
    the number of pairs. Variants without a loss are left out.
    """
    means = {name: found for name, values in losses.items() if (found := estimate(list(values.values())))}
    pairs = {(a, b): paired_difference(losses[a], losses[b]) for a, b in combinations(means, 2)}
    tested = {pair: found for pair, found in pairs.items() if found.p_value is not None}
    corrected = dict(zip(tested, holm([found.p_value or 0.0 for found in tested.values()]), strict=True))
    better: dict[str, set[str]] = {name: set() for name in means}
    equals: dict[str, set[str]] = {name: set() for name in means}
    for (a, b), pair in pairs.items():
        if corrected.get((a, b), 1.0) >= 1 - CONFIDENCE or pair.difference is None:
            equals[a].add(b)
            equals[b].add(a)
        elif pair.difference.mean < 0:
            better[b].add(a)
        else:
            better[a].add(b)
    ordered = sorted(means, key=lambda name: means[name].mean)
    return [
        Ranked(name, means[name], 1 + len(better[name]), [other for other in ordered if other in equals[name]])
        for name in ordered
    ]
