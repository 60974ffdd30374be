"""Student's t and the tests over seeds against tables, integrals and formulas written out."""

import math

import numpy as np
import pytest

from moe_pretrain.study.compare_statistics import (
    estimate,
    holm,
    paired_difference,
    rank,
    student_t_quantile,
    student_t_within,
)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # The 0.975 column of any printed table.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float):
    assert student_t_quantile(0.95, degrees) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("t", [0.3, 1.7, 6.0])
def test_probability_is_the_integral_of_the_density(degrees: int, t: float):
    x = np.linspace(-t, t, 200_001)
    constant = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    density = constant * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert student_t_within(t, degrees) == pytest.approx(float(np.trapezoid(density, x)), abs=1e-9)


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    found = [estimate(random.normal(5, 2, 3).tolist()) for _ in range(4000)]
    covered = sum(each.low <= 5 <= each.high for each in found if each is not None) / 4000
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_one_value_has_no_interval_and_none_has_no_mean():
    one = estimate([2.0])
    assert one is not None and one.mean == 2 and math.isnan(one.low) and math.isnan(one.high)
    assert estimate([]) is None


def test_pairs_are_by_seed_not_by_place():
    found = paired_difference({3: 1.0, 1: 5.0, 9: 7.0}, {1: 4.0, 3: 2.0, 2: 0.0})
    assert found.seeds == [1, 3]
    assert found.difference is not None and found.difference.mean == 0
    assert found.difference.high == pytest.approx(12.7062, abs=1e-4)  # differences 1 and -1, t at one degree
    assert found.verdict == "not distinguishable"


def test_pairing_finds_what_the_seeds_hide():
    """Seeds differ by 1, variants by 0.01: unpaired intervals overlap, the paired one does not hold 0."""
    base = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    other = {seed: loss + 0.01 + 0.001 * (-1) ** seed for seed, loss in base.items()}
    a, b = estimate(list(base.values())), estimate(list(other.values()))
    assert a is not None and b is not None and a.high > b.low
    assert paired_difference(other, base).verdict == "worse"
    assert paired_difference(base, other).verdict == "better"


def test_equal_losses_are_not_distinguishable():
    same = {1: 3.0, 2: 3.1}
    assert paired_difference(same, dict(same)).verdict == "not distinguishable"
    assert paired_difference(same, dict(same)).p_value == 1


def test_verdict_and_p_value_agree():
    random = np.random.default_rng(1)
    for _ in range(300):
        a, b = (dict(enumerate(random.normal(shift, 1, 4))) for shift in (0, 1.5))
        found = paired_difference(a, b)
        assert found.p_value is not None
        assert (found.verdict == "not distinguishable") == (found.p_value > 0.05)


def test_holm_is_the_written_out_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_identical_schemes_win_places_rarely():
    """Five equal schemes, three seeds: the family-wise error of the ranking is at most 5%."""
    random = np.random.default_rng(2)
    won = 0
    for _ in range(600):
        seeds = random.normal(0, 1, 3)
        losses = {name: dict(enumerate(seeds + random.normal(0, 0.1, 3))) for name in "abcde"}
        won += any(each.rank > 1 for each in rank(losses))
    assert won / 600 <= 0.075  # 5% and 2.8 standard errors


def test_ranks_count_what_is_better_by_test():
    noise = {1: 0.000, 2: 0.001, 3: -0.001, 4: 0.0005}
    losses = {
        "bad": {seed: 3.0 + value for seed, value in noise.items()},
        "good": {seed: 1.0 - value for seed, value in noise.items()},
        "middle": {seed: 2.0 + value / 2 for seed, value in noise.items()},
        "single": {1: 0.5},
        "none": {},
    }
    assert [(each.name, each.rank, each.equals) for each in rank(losses)] == [
        ("single", 1, ["good", "middle", "bad"]),
        ("good", 1, ["single"]),
        ("middle", 2, ["single"]),
        ("bad", 3, ["single"]),
    ]
