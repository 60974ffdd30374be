"""Which rank the others wait for."""

import pytest

from moe_pretrain.parallel.signs_of_life import find_awaited


@pytest.mark.parametrize(
    "collectives,stuck",
    [
        ([{"0": 7}, {"0": 7}, {"0": 6}], [2]),
        ([{"0": 7}, {"0": 7}, {"0": 7}], []),
        # Rank 0 waits for rank 1 among all, rank 1 for rank 2 among the owners of the same experts.
        ([{"0": 8}, {"0": 7, "1": 5}, {"0": 7, "1": 4}, {"0": 8}], [2]),
        # Ranks 0 and 1 are past the exchange in which ranks 2 and 3 wait for each other's neighbours.
        ([{"0": 7, "a": 3}, {"0": 7, "a": 4}, {"0": 8, "b": 9}, {"0": 8, "b": 9}], [0]),
        ([{"0": 7, "checkpoint": 2}, {"0": 7, "checkpoint": 1}], [1]),
        ([{"0": 5}, {"0": 5}, {"0": 6}], [0, 1]),
        ([{"0": 8, "1": 4}, {"0": 7, "1": 5}], []),  # they wait for each other
        ([{}, {"0": 1}], []),
    ],
    ids=str,
)
def test_the_rank_that_is_waited_for_is_the_one_that_waits_for_nobody(collectives: list[dict], stuck: list[int]):
    assert find_awaited({rank: {"collectives": begun} for rank, begun in enumerate(collectives)}) == stuck
