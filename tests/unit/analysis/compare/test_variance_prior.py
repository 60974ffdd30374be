"""The prior against chi-squared variables drawn with a known one."""

import numpy as np
import pytest

from moe_pretrain.analysis.compare import variance_prior
from moe_pretrain.analysis.compare.variance_prior import NO_PRIOR, VariancePrior, fit


@pytest.mark.parametrize(("degrees", "variance"), [(1, 0.3), (2, 5.0), (3, 1.0), (9, 2.0)])
def test_the_prior_that_variances_were_drawn_from_is_found(degrees: int, variance: float):
    """Variances whose inverse is a scaled chi-squared variable of a fraction less than one more degree of freedom."""
    random, number = np.random.default_rng(degrees), degrees + 0.9
    true = variance * number / random.chisquare(number, 100_000)
    drawn = true * random.chisquare(2, 100_000) / 2
    found = fit(list(drawn), [2] * len(drawn), 99)
    assert found.degrees == min(degrees, variance_prior.MOST_DEGREES)
    assert found.variance == pytest.approx(variance, rel=0.08)


def test_equal_variances_are_trusted_up_to_the_limits():
    drawn = list(np.random.default_rng(0).chisquare(2, 200))
    found = fit(drawn, [2] * 200, 99)
    assert found.degrees == variance_prior.MOST_DEGREES
    assert found.variance == pytest.approx(2, rel=0.2), "the mean of such a variable"
    assert fit(drawn, [2] * 200, 3).degrees == 3
    assert fit(drawn, [2] * 200, 0) == NO_PRIOR == fit(drawn[:1], [2], 99)


def test_variances_of_other_magnitudes_tell_nothing():
    assert fit([1e-12, 1.0, 1e-6, 1e3], [2] * 4, 99) == NO_PRIOR


def test_moderation_weighs_by_degrees_of_freedom():
    own = np.array([1.0, 4.0])
    assert VariancePrior(4, 10.0).moderate(own, 2) == pytest.approx((40 + 2 * own) / 6)
    assert NO_PRIOR.moderate(own, 2) == pytest.approx(own)
