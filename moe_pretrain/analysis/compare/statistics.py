"""Means, intervals and tests over seeds and texts.

Two things are left to chance in a difference between variants: the seed, of which there are few, and the text of the
validation set. Texts are resampled (a bootstrap of whole documents, which runs of the same rows share); in each
resample the seeds' differences have a mean ``m`` and a standard error ``e``, and the true difference is ``m + e T``,
``T`` Student's t of the seeds' degrees of freedom. The interval is that of the mixture over resamples. Where two runs
were validated on other rows, the texts of each are drawn by themselves. Without documents it is the paired t-interval
over seeds; without differences between seeds it is the bootstrap's percentile interval over documents. A bootstrap of
three seeds would call one in four pairs of identical variants different.
The ranking, which tests all pairs at once, moderates each one's variance between seeds by that of all
(``variance_prior``); a single difference does not, for the interval of one noisy variant would be too narrow.
Where variants were tuned, ``e`` also holds what choosing their values by few runs may cost (``tuning``).

Axis names:
    resamples  of the documents of the validation set
    seeds      that a comparison rests on
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

from moe_pretrain.analysis.compare.variance_prior import NO_PRIOR, VariancePrior, fit

CONFIDENCE = 0.95

Verdict = Literal["reference", "better", "worse", "not distinguishable", "not tested"]


def student_t_quantile(confidence: float, degrees: int) -> float:
    """The ``t`` with probability ``confidence``, in (0, 1), of lying in ``[-t, t]``."""
    return float(stdtrit(degrees, (1 + confidence) / 2))


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
class Sample:
    """Mean, spread and seeds of one variant's loss.

    Attributes:
        losses: Seed -> final loss.
        resampled: Seed -> the same over resampled documents [resamples]; empty where losses by document are missing.
        rows: Seed -> which rows ``resampled`` is of: of the same rows the same documents are drawn.
        knows_later_tokens: Whether its losses are no language model's: a token's network depends on what comes after.
        choice_variance: Added to the squared standard error of its mean for not knowing that its tuned values are the
            best, see ``tuning``.
    """

    losses: Mapping[int, float]
    resampled: Mapping[int, np.ndarray] = field(default_factory=dict)
    rows: Mapping[int, str] = field(default_factory=dict)
    knows_later_tokens: bool = False
    choice_variance: float = 0.0


@dataclass(frozen=True)
class Difference:
    """A variant minus another.

    Attributes:
        seeds: Seeds that it rests on: those that both have, or all of both where it is not paired.
        is_paired: Whether runs were compared seed by seed.
        over_texts: Whether the interval holds what other documents could have made of it.
        difference: Mean and interval; None where there is nothing to subtract.
        p_value: Two-sided; None with fewer than two seeds, or where one side alone knows later tokens.
    """

    seeds: list[int]
    is_paired: bool
    over_texts: bool
    difference: Estimate | None
    p_value: float | None

    @property
    def verdict(self) -> Verdict:
        """Verdict of an interval on a loss: not distinguishable when it holds 0."""
        if self.difference is None or self.p_value is None:
            return "not tested"
        if self.difference.low <= 0 <= self.difference.high:
            return "not distinguishable"
        return "worse" if self.difference.mean > 0 else "better"


TWINS_DIFFER_BY = 1e-3
"""Variants whose differences spread by less than this share of the median pair's differ by rounding alone."""
FEWEST_SEEDS = 3
"""Two seeds tell too little of how alike pairs vary."""


def shared_prior(samples: Mapping[str, Sample]) -> VariancePrior:
    """Prior for the variance of one pair's differences, from all pairs that have ``FEWEST_SEEDS`` in common.

    Of twins one is taken: the other adds no knowledge, and their own difference is of another kind.
    """
    apart = {
        (a, b): [samples[a].losses[seed] - samples[b].losses[seed] for seed in common]
        for a, b in combinations(samples, 2)
        if len(common := samples[a].losses.keys() & samples[b].losses.keys()) >= FEWEST_SEEDS
    }
    spread = {pair: stdev(values) for pair, values in apart.items()}
    least = TWINS_DIFFER_BY * float(np.median(list(spread.values()))) if spread else 0.0
    taken: list[str] = []
    for name in samples:
        if all(spread.get((other, name), math.inf) > least for other in taken):
            taken.append(name)
    pairs = [pair for pair in apart if set(pair) <= set(taken)]
    degrees = sorted(len(samples[name].losses) - 1 for name in {name for pair in pairs for name in pair})
    return fit([spread[pair] ** 2 for pair in pairs], [len(apart[pair]) - 1 for pair in pairs], sum(degrees[:-2]))


def difference(of: Sample, to: Sample, prior: VariancePrior = NO_PRIOR) -> Difference:
    """``of - to``: seed by seed where both have two seeds or more in common, else of the means over all seeds.

    The unpaired standard error is Welch's, with the degrees of freedom of the smaller sample, which is conservative.

    Args:
        of: A variant.
        to: Another.
        prior: What other pairs tell of the variance between seeds, where variants are compared seed by seed.
    """
    common = sorted(of.losses.keys() & to.losses.keys())
    is_paired = len(common) >= 2 or min(len(of.losses), len(to.losses)) < 2
    seeds = common if is_paired else sorted(of.losses.keys() | to.losses.keys())
    sides = [(sample, common if is_paired else sorted(sample.losses)) for sample in (of, to)]
    if not is_paired:
        prior = NO_PRIOR
    choices = of.choice_variance + to.choice_variance
    point = _mean_and_error(
        [np.array([[sample.losses[s] for s in own]]) for sample, own in sides], is_paired, prior, choices
    )
    over_texts = all(s in sample.resampled for sample, own in sides for s in own)
    if not seeds:
        return Difference([], True, False, None, None)
    mean = float(point[0][0])
    if len(seeds) < 2 or of.knows_later_tokens != to.knows_later_tokens:
        return Difference(seeds, is_paired, False, Estimate(mean, math.nan, math.nan, len(seeds)), None)
    if over_texts:
        # Draws of other rows are moved on against each other, which makes them independent.
        rows = sorted({sample.rows[s] for sample, own in sides for s in own})
        drawn = _mean_and_error(
            [
                np.stack([np.roll(sample.resampled[s], rows.index(sample.rows[s])) for s in own], axis=1)
                for sample, own in sides
            ],
            is_paired,
            prior,
            choices,
        )
    else:
        drawn = point
    degrees = min(len(own) for _, own in sides) - 1 + prior.degrees
    below = _share_below(0.0, *drawn, degrees)
    tail = (1 - CONFIDENCE) / 2
    found = Estimate(mean, _quantile(tail, *drawn, degrees), _quantile(1 - tail, *drawn, degrees), len(seeds))
    return Difference(seeds, is_paired, over_texts, found, min(1.0, 2 * min(below, 1 - below)))


def _mean_and_error(
    losses: Sequence[np.ndarray], is_paired: bool, prior: VariancePrior, choices: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean difference and its standard error over seeds, each [resamples]; of two sides' losses [resamples, seeds].

    ``choices`` is the variance that both sides' choice of tuned values adds.
    """
    of, to = losses
    if of.shape[1] < 2 or to.shape[1] < 2:
        return np.array([of.mean() - to.mean() if of.size and to.size else math.nan]), np.array([math.nan])
    samples = [of - to] if is_paired else [of, to]
    squares = [prior.moderate(each.var(axis=1, ddof=1), each.shape[1] - 1) / each.shape[1] for each in samples]
    return of.mean(axis=1) - to.mean(axis=1), np.sqrt(np.sum(squares, axis=0) + choices)


def _share_below(value: float, mean: np.ndarray, error: np.ndarray, degrees: int) -> float:
    """Probability that ``mean + error T`` is below ``value``, half of it where it is ``value``; mean over resamples."""
    gap = value - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, gap / error, np.where(gap == 0, 0.0, np.sign(gap) * np.inf))
    return float(stdtr(degrees, t).mean())


def _quantile(share: float, mean: np.ndarray, error: np.ndarray, degrees: int) -> float:
    """The value that ``mean + error T`` is below with probability ``share``."""
    if len(mean) == 1:
        return float(mean[0] + stdtrit(degrees, share) * error[0])
    reach = student_t_quantile(1 - 1e-6, degrees) * float(error.max())
    low, high = float(mean.min()) - reach, float(mean.max()) + reach
    close = 1e-12 * (high - low)
    while high - low > close and (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _share_below(middle, mean, error, degrees) < share else (low, middle)
    return (low + high) / 2


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

    @property
    def last_rank(self) -> int:
        """The place it has if all that it cannot be told from are better."""
        return self.rank + len(self.equals)


@dataclass(frozen=True)
class Ranking:
    """Order of the variants, by tests of all pairs at once.

    Attributes:
        places: Of the variants with a loss, best first.
        prior: What moderates the variance between seeds.
        pairs: Pairs that were tested.
        needed: The difference that wins a place in the median pair, before texts widen it; None without tested pairs.
    """

    places: list[Ranked]
    prior: VariancePrior
    pairs: int
    needed: float | None


def rank(samples: Mapping[str, Sample]) -> Ranking:
    """Order variants by mean loss; a place is only won by a test.

    The test of two variants is that of ``difference`` with the ``shared_prior``, at 5%, with Holm's correction for the
    number of pairs. Variants without a loss are left out.
    """
    prior = shared_prior(samples)
    means = {name: found for name, each in samples.items() if (found := estimate(list(each.losses.values())))}
    pairs = {(a, b): difference(samples[a], samples[b], prior) for a, b in combinations(means, 2)}
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
    places = [
        Ranked(name, means[name], 1 + len(better[name]), [other for other in ordered if other in equals[name]])
        for name in ordered
    ]
    needed = [
        _difference_to_win(samples[a], samples[b], prior, len(tested))
        for (a, b), found in tested.items()
        if found.is_paired
    ]
    return Ranking(places, prior, len(tested), float(np.median(needed)) if needed else None)


def _difference_to_win(of: Sample, to: Sample, prior: VariancePrior, pairs: int) -> float:
    """Smallest difference with which the first of ``pairs`` pairs wins a place, if it is this one."""
    apart = np.array([[of.losses[seed] - to.losses[seed] for seed in of.losses.keys() & to.losses.keys()]])
    degrees = apart.shape[1] - 1 + prior.degrees
    error = _mean_and_error([apart, np.zeros_like(apart)], True, prior, of.choice_variance + to.choice_variance)[1]
    return student_t_quantile(1 - (1 - CONFIDENCE) / pairs, degrees) * float(error[0])
