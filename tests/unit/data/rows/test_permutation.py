"""The order of rows: a permutation per epoch, found anywhere at once, split among ranks without loss."""

import numpy as np
import pytest

from moe_pretrain.data.rows.permutation import RowPermutation, rank_positions

_MASK = 2**64 - 1


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def slow_row(position: int, num_rows: int, seed: int) -> tuple[int, int]:
    """The same permutation in plain Python integers, one position at a time."""
    epoch, value = divmod(position, num_rows)
    half_bits = 1
    while 4**half_bits < num_rows:
        half_bits += 1
    epoch_key = _mix((_mix(seed % 2**64) + epoch) % 2**64)
    while True:
        left, right = value >> half_bits, value % 2**half_bits
        for round_number in range(1, 7):
            key = _mix(epoch_key ^ _mix(round_number))
            left, right = right, left ^ (_mix(right ^ key) % 2**half_bits)
        value = (left << half_bits) | right
        if value < num_rows:
            return epoch, value


def epoch_rows(order: RowPermutation, epoch: int) -> list[int]:
    first = epoch * order.num_rows
    return order.rows(np.arange(first, first + order.num_rows)).tolist()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000, 4099])
def test_each_epoch_is_a_permutation(num_rows):
    order = RowPermutation(num_rows, seed=3, shuffle=True)
    for epoch in (0, 1, 7, 10**6):
        assert sorted(epoch_rows(order, epoch)) == list(range(num_rows))


@pytest.mark.parametrize("num_rows", [1, 3, 37, 4099, 2**40, 2**40 - 3])
def test_rows_equal_the_slow_version_anywhere(num_rows):
    generator = np.random.default_rng(0)
    positions = np.concatenate([[0, 1, num_rows - 1, num_rows, 10**12], generator.integers(0, 10**12, 60)])
    for seed in (0, -1, 2**70 + 5):
        order = RowPermutation(num_rows, seed, shuffle=True)
        expected = [slow_row(int(position), num_rows, seed) for position in positions]
        assert order.rows(positions).tolist() == [row for _, row in expected]
        assert [order.row(int(position)) for position in positions] == expected


def test_order_differs_between_epochs_and_seeds():
    order = RowPermutation(200, seed=0, shuffle=True)
    orders = [epoch_rows(order, epoch) for epoch in range(4)]
    orders += [epoch_rows(RowPermutation(200, seed, True), 0) for seed in (1, 2, -1)]
    orders.append(list(range(200)))
    for one in range(len(orders)):
        for other in range(one):
            same_places = sum(a == b for a, b in zip(orders[one], orders[other], strict=True))
            assert same_places < 10, (one, other)  # 1 expected of a random pair


def test_order_mixes_neighbours():
    rows = np.array(epoch_rows(RowPermutation(10_000, seed=0, shuffle=True), 0))
    assert abs(np.corrcoef(np.arange(10_000), rows)[0, 1]) < 0.05
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.05


def test_without_shuffle_rows_come_in_their_own_order():
    order = RowPermutation(5, seed=9, shuffle=False)
    assert order.rows(np.arange(12)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert order.row(11) == (2, 1)


def test_seek_far_into_a_run_makes_no_table():
    """Position 10**12 of 2**40 rows: anything that held one number per row or position would not fit in memory."""
    order = RowPermutation(2**40, seed=1, shuffle=True)
    rows = order.rows(np.arange(10**12, 10**12 + 64))
    assert len(set(rows.tolist())) == 64 and rows.min() >= 0 and rows.max() < 2**40


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"^num_rows=0 must"):
        RowPermutation(0, 0, True)
    with pytest.raises(ValueError, match=r"^position -1 must"):
        RowPermutation(3, 0, True).rows(np.array([-1]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_split_a_step_in_order(world_size):
    for step in (0, 1, 10**9):
        split = [rank_positions(step, 12, rank, world_size) for rank in range(world_size)]
        joined = [position for part in split for position in part]
        assert joined == list(range(step * 12, step * 12 + 12))


def test_uneven_split_and_unknown_rank_are_refused():
    with pytest.raises(ValueError, match=r"^global_batch_rows=10 must be a positive multiple of world_size=4$"):
        rank_positions(0, 10, 0, 4)
    with pytest.raises(ValueError, match=r"^rank=4 must be"):
        rank_positions(0, 12, 4, 4)
