"""Student's t and the tests over seeds against tables, integrals and formulas written out."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.special import stdtr

from moe_pretrain.analysis.compare.bootstrap import RESAMPLES, resampled_losses
from moe_pretrain.analysis.compare.statistics import (
    Difference,
    Ranked,
    Sample,
    difference,
    estimate,
    holm,
    rank,
    shared_prior,
    student_t_quantile,
)
from moe_pretrain.analysis.compare.variance_prior import NO_PRIOR, VariancePrior
from moe_pretrain.run_folder.probe import Probe


def over_seeds(of: dict[int, float], to: dict[int, float]) -> Difference:
    return difference(Sample(of), Sample(to))


def ranked(losses: dict[str, dict[int, float]]) -> list[Ranked]:
    return rank({name: Sample(values) for name, values in losses.items()}).places


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # The 0.975 column of any printed table.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float):
    assert student_t_quantile(0.95, degrees) == pytest.approx(quantile, abs=5e-4)


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
    found = over_seeds({3: 1.0, 1: 5.0, 9: 7.0}, {1: 4.0, 3: 2.0, 2: 0.0})
    assert found.is_paired and not found.over_texts
    assert found.seeds == [1, 3]
    assert found.difference is not None and found.difference.mean == 0
    assert found.difference.high == pytest.approx(12.7062, abs=1e-4)  # differences 1 and -1, t at one degree
    assert found.verdict == "not distinguishable"


def test_without_common_seeds_means_are_compared():
    """Welch's standard error by hand, with the degrees of freedom of the smaller sample: t at 1 is 12.7062."""
    found = over_seeds({1: 1.0, 2: 2.0, 3: 3.0}, {7: 5.0, 8: 6.0})
    assert not found.is_paired and found.seeds == [1, 2, 3, 7, 8]
    half = 12.7062 * math.sqrt(1 / 3 + 0.5 / 2)
    assert found.difference is not None
    assert (found.difference.low, found.difference.high) == pytest.approx((-3.5 - half, -3.5 + half), abs=1e-3)
    # As many of both: what stands at the same place is still no pair, though the differences are all 4.
    same = over_seeds({1: 1.0, 2: 2.0, 3: 3.0}, {7: 5.0, 8: 6.0, 9: 7.0})
    half = 4.302653 * math.sqrt(1 / 3 + 1 / 3)
    assert same.difference is not None
    assert (same.difference.low, same.difference.high) == pytest.approx((-4 - half, -4 + half), abs=1e-5)
    assert over_seeds({1: 1.0, 2: 2.0}, {7: 5.0}).verdict == "not tested"


def test_pairing_finds_what_the_seeds_hide():
    """Seeds differ by 1, variants by 0.01: unpaired intervals overlap, the paired one does not hold 0."""
    base = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    other = {seed: loss + 0.01 + 0.001 * (-1) ** seed for seed, loss in base.items()}
    a, b = estimate(list(base.values())), estimate(list(other.values()))
    assert a is not None and b is not None and a.high > b.low
    assert over_seeds(other, base).verdict == "worse"
    assert over_seeds(base, other).verdict == "better"


def test_equal_losses_are_not_distinguishable():
    same = {1: 3.0, 2: 3.1}
    assert over_seeds(same, dict(same)).verdict == "not distinguishable"
    assert over_seeds(same, dict(same)).p_value == 1


def test_verdict_and_p_value_agree():
    random = np.random.default_rng(1)
    for _ in range(300):
        a, b = (dict(enumerate(random.normal(shift, 1, 4))) for shift in (0, 1.5))
        found = over_seeds(a, b)
        assert found.p_value is not None
        assert (found.verdict == "not distinguishable") == (found.p_value > 0.05)


def test_holm_is_the_written_out_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


SPREADS = {
    "all alike": lambda random: np.full(6, 0.1),
    "e-fold apart": lambda random: 0.1 * np.exp(random.normal(0, 1, 6)),
    "one noisy": lambda random: np.array([0.1] * 5 + [0.5]),
}


def places_won(spread: str, better_by: float, sweeps: int = 400) -> tuple[float, float]:
    """Shares of sweeps of six schemes and three seeds in which equal schemes get a place, and a better one the first.

    The better one, by ``better_by``, is the first of the six.
    """
    random = np.random.default_rng(2)
    wrong = right = 0
    for _ in range(sweeps):
        seeds, noise = random.normal(0, 1, 3), SPREADS[spread](random)
        losses = {name: dict(enumerate(seeds + random.normal(0, noise[k], 3))) for k, name in enumerate("abcdef")}
        losses["a"] = {seed: loss - better_by for seed, loss in losses["a"].items()}
        places = {each.name: each for each in ranked(losses)}
        wrong += any(set("bcdef") - {name} - set(places[name].equals) for name in "bcdef")
        right += places["a"].last_rank == 1
    return wrong / sweeps, right / sweeps


@pytest.mark.parametrize("spread", SPREADS)
def test_identical_schemes_win_places_rarely(spread: str):
    """The family-wise error of the ranking stays near its 5%, however noisy schemes are."""
    assert places_won(spread, 0.0)[0] <= 0.08


def test_a_scheme_that_is_better_by_ten_standard_deviations_is_the_first():
    """Of three seeds alone none is: 15 pairs take a difference of 17 standard errors."""
    wrong, right = places_won("all alike", 1.0)
    assert right > 0.9 and wrong <= 0.08


SIX = {
    name: Sample(dict(enumerate(np.random.default_rng(place).normal(3, 0.1, 3)))) for place, name in enumerate("abcdef")
}


def test_what_pairs_tell_of_the_variance_between_seeds():
    """Twins, also by rounding, variants of one seed and those without runs add nothing; two seeds tell nothing."""
    prior = shared_prior(SIX)
    assert prior.degrees == 3
    twins = {
        f"{name}, again": Sample({seed: loss + 1e-7 * seed for seed, loss in SIX[name].losses.items()})
        for name in "abc"
    }
    nothing = {"one seed": Sample({1: 2.0}), "no run": Sample({})}
    assert shared_prior(SIX | twins | nothing) == prior
    three = {name: SIX[name] for name in "abc"}
    assert shared_prior(three).degrees <= 2
    assert shared_prior(three | {"one seed": Sample({1: 2.0}), "no run": Sample({})}) == shared_prior(three)
    two = {name: SIX[name] for name in "ab"}
    assert shared_prior(two) == NO_PRIOR == shared_prior(two | {"a, again": SIX["a"]})
    of_two_seeds = {str(rise): Sample({0: 3.0, 1: 3.0 + rise}) for rise in (0.0, 1.0, 2.5, -1.2, 4.0, -3.0)}
    assert shared_prior(of_two_seeds) == NO_PRIOR, "though they vary alike"


def test_a_moderated_difference_is_the_formula_written_out():
    a, b = Sample({1: 3.0, 2: 3.3, 3: 3.1}), Sample({1: 3.1, 2: 3.1, 3: 3.3})
    found = difference(b, a, VariancePrior(4, 1.0))
    variance = (4 * 1.0 + 2 * np.var([0.1, -0.2, 0.2], ddof=1)) / 6
    half = 2.446912 * math.sqrt(variance / 3)  # t of 6 degrees of freedom, any table
    assert found.difference is not None
    assert (found.difference.low, found.difference.high) == pytest.approx((0.1 / 3 - half, 0.1 / 3 + half), abs=1e-6)
    rows = dict.fromkeys(a.losses, "rows")
    resampled = [Sample(own.losses, {k: np.full(50, loss) for k, loss in own.losses.items()}, rows) for own in (b, a)]
    over_texts = difference(*resampled, VariancePrior(4, 1.0))
    assert over_texts.over_texts and over_texts.difference is not None
    assert over_texts.difference.low == pytest.approx(found.difference.low, abs=1e-6), "texts that do not matter"


def test_ranks_count_what_is_better_by_test():
    noise = {1: 0.000, 2: 0.001, 3: -0.001, 4: 0.0005}
    losses = {
        "bad": {seed: 3.0 + value for seed, value in noise.items()},
        "good": {seed: 1.0 - value for seed, value in noise.items()},
        "middle": {seed: 2.0 + value / 2 for seed, value in noise.items()},
        "single": {1: 0.5},
        "none": {},
    }
    assert [(each.name, each.rank, each.equals) for each in ranked(losses)] == [
        ("single", 1, ["good", "middle", "bad"]),
        ("good", 1, ["single"]),
        ("middle", 2, ["single"]),
        ("bad", 3, ["single"]),
    ]


def test_the_difference_that_wins_a_place():
    """Two degrees of freedom: P(|T| > t) = 1 - t / sqrt(2 + t^2). Pairs that are not tested do not count."""
    pair = {"a": {1: 3.0, 2: 3.3, 3: 3.1}, "b": {1: 3.1, 2: 3.1, 3: 3.3}}
    error = math.sqrt(np.var([0.1, -0.2, 0.2], ddof=1) / 3)
    found = rank({name: Sample(losses) for name, losses in pair.items()})
    assert (found.pairs, found.needed) == (1, pytest.approx(4.302653 * error, rel=1e-6))
    alone = rank({name: Sample(losses) for name, losses in (pair | {"c": {1: 2.0}, "d": {}}).items()})
    assert (alone.pairs, alone.needed) == (found.pairs, found.needed)
    assert rank({"a": Sample({1: 3.0}), "b": Sample({1: 3.1})}).needed is None
    many = rank(SIX)
    degrees = 2 + many.prior.degrees
    errors = many.needed / float(np.median([moderated_error(a, b) for a, b in combinations(SIX, 2)]))
    assert many.pairs == 15 and 2 * stdtr(degrees, -errors) == pytest.approx(0.05 / 15, abs=2e-3)


def moderated_error(a: str, b: str) -> float:
    prior = shared_prior(SIX)
    apart = [SIX[a].losses[seed] - SIX[b].losses[seed] for seed in range(3)]
    return math.sqrt((prior.degrees * prior.variance + 2 * np.var(apart, ddof=1)) / (prior.degrees + 2) / 3)


# Over documents too


def probe_of(loss: np.ndarray, tokens: np.ndarray, set_index: np.ndarray | None = None, share=(1.0,)) -> Probe:
    """One piece for each document: mean losses and numbers of tokens, each [documents]."""
    sets = np.zeros(len(loss), dtype=np.int64) if set_index is None else set_index
    layers, routes = np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.int64)
    return Probe(1, "rows", np.array(share), sets, np.arange(len(loss)), tokens, loss * tokens, layers, routes)


def sample(by_seed: dict[int, np.ndarray], tokens: np.ndarray) -> Sample:
    """Of losses by document [documents] for each seed."""
    probes = {seed: probe_of(loss, tokens) for seed, loss in by_seed.items()}
    losses = {seed: probe.mean_loss for seed, probe in probes.items()}
    return Sample(
        losses, {seed: resampled_losses(probe) for seed, probe in probes.items()}, dict.fromkeys(losses, "rows")
    )


def test_resampling_is_the_loop_over_drawn_documents():
    random = np.random.default_rng(3)
    loss, tokens = random.normal(3, 1, 7), random.integers(10, 90, 7)
    found = resampled_losses(probe_of(loss, tokens))
    mean = float((loss * tokens).sum() / tokens.sum())
    draws = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=RESAMPLES)
    for index in (0, 17, RESAMPLES - 1):
        drawn = [document for document, times in enumerate(draws[index]) for _ in range(times)]
        total = sum(loss[document] * tokens[document] for document in drawn)
        of_draw = total / sum(tokens[document] for document in drawn)
        assert found[index] == pytest.approx(mean + math.sqrt(7 / 6) * (of_draw - mean))


def test_pieces_of_a_document_are_drawn_together():
    tokens = np.array([5, 5, 5, 5])
    loss = np.array([1.0, 3.0, 2.0, 2.0])
    whole = probe_of(loss, tokens)
    halves = Probe(**{**vars(whole), "document": np.array([0, 0, 1, 1])})
    assert resampled_losses(halves) == pytest.approx(np.full(RESAMPLES, 2.0)), "both documents have a mean of 2"
    assert resampled_losses(whole).std() > 0.2


def test_sets_of_a_mixture_count_by_share_and_are_drawn_apart():
    loss, tokens = np.array([1.0, 1.0, 3.0, 3.0]), np.array([10, 20, 30, 40])
    probe = probe_of(loss, tokens, np.array([0, 0, 1, 1]), (0.25, 0.75))
    assert probe.mean_loss == pytest.approx(2.5)
    assert resampled_losses(probe) == pytest.approx(np.full(RESAMPLES, 2.5)), "every draw has both sets"


def test_documents_alone_give_the_percentiles_of_the_bootstrap():
    """Seeds that agree to the last bit: what is left is the choice of texts."""
    random = np.random.default_rng(4)
    tokens = np.full(50, 20)
    a, b = random.normal(3, 0.3, (2, 50))
    found = difference(sample({1: a, 2: a}, tokens), sample({1: b, 2: b}, tokens))
    drawn = resampled_losses(probe_of(a - b, tokens))
    assert found.over_texts and found.difference is not None
    expected = np.quantile(drawn, [0.025, 0.975])
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(expected), abs=0.01)
    assert found.difference.mean == pytest.approx(float((a - b).mean()))


def test_documents_that_do_not_matter_leave_the_t_interval():
    """The same difference in every document: the interval over seeds, exactly."""
    text, tokens = np.random.default_rng(5).normal(3, 1, 30), np.full(30, 20)
    shifts = {1: 0.1, 2: 0.2, 3: 0.15}
    found = difference(
        sample({k: text + v for k, v in shifts.items()}, tokens), sample(dict.fromkeys(shifts, text), tokens)
    )
    plain = over_seeds(shifts, dict.fromkeys(shifts, 0.0))
    assert found.over_texts and found.difference is not None and plain.difference is not None
    assert (found.difference.low, found.difference.high) == pytest.approx(
        (plain.difference.low, plain.difference.high), abs=1e-8
    )
    assert found.p_value == pytest.approx(plain.p_value, rel=1e-6)


def test_a_difference_that_rests_on_one_document_is_not_distinguishable():
    """All seeds agree that it is there, and seeds alone call it worse; other texts would not have had it."""
    tokens = np.full(12, 20)
    flat = np.full(12, 3.0)
    one = flat + 0.5 * (np.arange(12) == 4)
    worse, base = {k: one + 1e-3 * k for k in (1, 2, 3)}, dict.fromkeys((1, 2, 3), flat)
    assert difference(sample(worse, tokens), sample(base, tokens)).verdict == "not distinguishable"
    alone = over_seeds(sample(worse, tokens).losses, sample(base, tokens).losses)
    assert alone.verdict == "worse"


def test_resamples_of_the_same_rows_alone_are_paired():
    tokens, text = np.full(40, 20), np.random.default_rng(5).normal(3, 0.5, 40)
    a = sample({1: text, 2: text + 0.1}, tokens)
    same = difference(a, a).difference
    assert same is not None and (same.low, same.high) == (0, 0)
    apart = difference(a, Sample(a.losses, a.resampled, dict.fromkeys(a.losses, "other rows")))
    both = np.quantile(resampled_losses(probe_of(text, tokens)) - np.roll(a.resampled[1], 7), [0.025, 0.975])
    assert apart.over_texts and apart.difference is not None
    assert (apart.difference.low, apart.difference.high) == pytest.approx(tuple(both), abs=0.03)
    mixed = Sample(a.losses, a.resampled, {1: "rows", 2: "other rows"})
    assert difference(mixed, mixed).difference == same, "seed by seed they are the same rows"
    part = Sample(a.losses, {1: a.resampled[1]}, a.rows)
    assert not difference(a, part).over_texts, "a run without losses by document is not passed over"


def test_validation_on_other_rows_makes_no_variant_different():
    """Seeds alone agree on the difference that the texts make."""
    random, tokens = np.random.default_rng(8), np.full(40, 20)
    told, by_seeds = 0, 0
    for _ in range(60):
        sides = []
        for rows in ("rows", "other rows"):
            text = random.normal(3, 0.3, 40)
            own = sample({seed: text + random.normal(0, 0.002) for seed in (1, 2, 3)}, tokens)
            sides.append(Sample(own.losses, own.resampled, dict.fromkeys(own.losses, rows)))
        told += difference(*sides).verdict != "not distinguishable"
        by_seeds += over_seeds(sides[0].losses, sides[1].losses).verdict != "not distinguishable"
    assert told <= 7 and by_seeds > 50, (told, by_seeds)


def test_a_loss_that_knows_later_tokens_is_not_tested_against_one_that_does_not():
    a, b = Sample({1: 3.0, 2: 3.1, 3: 3.2}), Sample({1: 1.0, 2: 1.11, 3: 1.2}, knows_later_tokens=True)
    apart = difference(b, a)
    assert apart.verdict == "not tested" and apart.difference is not None
    assert apart.difference.mean == pytest.approx(-1.9967, abs=1e-4) and math.isnan(apart.difference.low)
    assert [each.rank for each in rank({"a": a, "b": b}).places] == [1, 1]
    worse = Sample({1: 5.0, 2: 5.1, 3: 5.21}, knows_later_tokens=True)
    assert difference(worse, b).verdict == "worse", "of the same kind"


def simulate(random: np.random.Generator, effect: float, noise: float, common_seeds: bool = True) -> Difference:
    """Two variants over three seeds and 25 documents.

    Each pair of variant and document, of variant and seed, and all three together has a random part of its own, and
    what variants share (seed, document) has a larger one.
    """
    tokens = np.full(25, 20)
    seeds = {0: (1, 2, 3), 1: (1, 2, 3) if common_seeds else (4, 5, 6)}
    of_document, of_seed = random.normal(3, 1, 25), dict(enumerate(random.normal(0, 0.2, 7)))
    sides = []
    for variant in (0, 1):
        own = of_document + random.normal(0, noise, 25) + variant * effect
        by_seed = {
            seed: own + of_seed[seed] + random.normal(0, noise / 4) + random.normal(0, noise, 25)
            for seed in seeds[variant]
        }
        sides.append(sample(by_seed, tokens))
    return difference(sides[1], sides[0])


def coverage(common_seeds: bool) -> float:
    random = np.random.default_rng(6)
    found = [simulate(random, 0.1, 0.1, common_seeds).difference for _ in range(250)]
    return sum(each.low <= 0.1 <= each.high for each in found if each is not None) / len(found)


def test_interval_over_seeds_and_documents_covers_the_truth_at_least_as_often_as_it_says():
    assert coverage(common_seeds=True) >= 0.95 - 0.039  # 2.8 standard errors


def test_other_seeds_do_not_make_identical_variants_different():
    """The same setting run with seeds 1 to 3 and with 4 to 6: called different in at most about one of 20."""
    assert coverage(common_seeds=False) >= 0.95 - 0.039


def test_a_bootstrap_of_three_seeds_would_call_equal_variants_different():
    """Why seeds are not resampled: three differences of one sign, one time in four, never give a mean of the other."""
    random = np.random.default_rng(7)
    wrong = right = 0
    for _ in range(400):
        differences = random.normal(0, 1, 3)
        means = differences[np.array(np.unravel_index(np.arange(27), (3, 3, 3)))].mean(axis=0)  # every resample
        wrong += not means.min() <= 0 <= means.max()
        right += over_seeds(dict(enumerate(differences)), dict.fromkeys(range(3), 0.0)).verdict != "not distinguishable"
    assert wrong / 400 > 0.2 and right / 400 < 0.08


def test_a_planted_effect_is_found():
    random = np.random.default_rng(8)
    found = [simulate(random, 1.0, 0.1).verdict for _ in range(50)]
    assert found.count("worse") >= 48
