"""Which source of a mixture serves which position: against a plain loop over all of them, and as arithmetic far out."""

from fractions import Fraction

import numpy as np
import pytest
from helpers.turns import plain_loop

from moe_pretrain.data.rows.interleave import Turns, parts_of


def random_phases(generator, starts=None):
    sources = int(generator.integers(1, 7))
    if starts is None:
        starts = np.cumsum(generator.integers(1, 80, size=generator.integers(0, 4)))
    phases = []
    for start in [0, *starts]:
        parts = generator.integers(0, 9, size=sources)
        parts[generator.integers(0, sources)] = generator.choice([1, 3, 40])
        phases.append((int(start), parts.tolist()))
    return phases


def test_two_thousand_mixtures_are_those_of_the_plain_loop():
    generator = np.random.default_rng(0)
    for _ in range(2000):
        phases = random_phases(generator)
        length = phases[-1][0] + int(generator.integers(1, 120))
        expected = plain_loop(phases, length)
        turns = Turns(phases)
        positions = generator.permutation(length)
        source, index = turns.locate(positions)
        assert np.array_equal(source, expected[positions])
        before = np.array([(expected[:at] == own).sum() for at, own in zip(positions, source, strict=True)])
        assert np.array_equal(index, before)
        at = int(generator.integers(0, length + 1))
        assert turns.counts(at) == [int((expected[:at] == n).sum()) for n in range(turns.num_sources)]


def test_a_source_is_never_a_row_away_from_its_share():
    """Every prefix of a phase by less than one row, every window by less than two: in whole numbers, exactly."""
    generator = np.random.default_rng(1)
    for _ in range(1000):
        parts = random_phases(generator, starts=[])[0][1]
        total = sum(parts)
        source, _ = Turns([(0, parts)]).locate(np.arange(2 * total))
        for number, part in enumerate(parts):
            served = np.concatenate([[0], np.cumsum(source == number)])
            error = served * total - part * np.arange(2 * total + 1)  # in rows / total
            assert np.abs(error).max() < total
            assert error.max() - error.min() < 2 * total  # any window is a difference of two prefixes
            assert served[total] == part and served[2 * total] == 2 * part


def test_extreme_weights_are_exact_too():
    weights = [0.9, 1e-6, *[(0.1 - 1e-6) / 48] * 48]
    weights = [round(weight, 6) for weight in weights]
    parts = parts_of(weights)
    assert [Fraction(part, sum(parts)) for part in parts] == [
        Fraction(str(weight)) / sum(map(Fraction, map(str, weights))) for weight in weights
    ]
    turns = Turns([(0, parts)])
    generator = np.random.default_rng(2)
    for at in [*generator.integers(0, 3 * sum(parts), size=200).tolist(), 10**15 + 7]:
        for part, count in zip(parts, turns.counts(at), strict=True):
            assert abs(count - Fraction(part * at, sum(parts))) < 1
    assert turns.counts(5 * sum(parts)) == [5 * part for part in parts]


def test_far_positions_agree_with_each_other():
    """Source, rank, counts and position are four views of one order, also after 10**12 rows and many phases."""
    generator = np.random.default_rng(3)
    for _ in range(500):
        starts = np.sort(generator.choice(10**6, size=generator.integers(0, 4), replace=False) + 1)
        phases = random_phases(generator, starts=starts)
        turns = Turns(phases)
        for at in (int(generator.integers(0, 10**6)), int(generator.integers(10**12, 10**13))):
            positions = np.arange(at, at + 30)
            source, index = turns.locate(positions)
            for place, own, rank in zip(positions.tolist(), source.tolist(), index.tolist(), strict=True):
                before, after = turns.counts(place), turns.counts(place + 1)
                assert sum(before) == place and before[own] == rank
                assert [b - a for a, b in zip(before, after, strict=True)] == [n == own for n in range(len(before))]
                assert turns.position(own, rank) == place


def test_a_source_that_ends_with_a_phase_is_never_served_again():
    turns = Turns([(0, [1, 1]), (10, [1, 0]), (20, [3, 0])])
    assert turns.position(1, 4) in range(10) and turns.position(1, 5) is None
    assert turns.position(0, 5) == 10 and turns.position(0, 10**9) == 10**9 + 5
    assert turns.counts(10) == [5, 5] and turns.counts(10**12) == [10**12 - 5, 5]


def test_the_prefix_rule_sees_a_coarser_order():
    """What the property is worth: runs of one source after the other, in the same proportion, break it."""
    parts = [3, 2]
    blocks = np.repeat([0, 1], parts)
    assert np.abs(np.cumsum(blocks == 0) * 5 - 3 * np.arange(1, 6)).max() >= 5


def test_parts_are_the_written_decimals():
    assert parts_of([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert parts_of([1, 3]) == parts_of([0.25, 0.75]) == parts_of([1e-6, 3e-6]) == [1, 3]
    assert parts_of([0.0, 5.0]) == [0, 1]
    with pytest.raises(ValueError, match="at most 1,000,000: give fewer digits"):
        parts_of([0.3333333, 0.6666667])
    for weights in ([0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="must be at least 0"):
            parts_of(weights)


@pytest.mark.parametrize("starts", [[1], [0, 0], [0, 5, 3], []])
def test_phases_rise_from_zero(starts):
    with pytest.raises(ValueError, match="must be 0 first, then rise"):
        Turns([(start, [1]) for start in starts])
