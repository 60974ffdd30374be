"""The helper that every test with ranks stands on."""

import time

import pytest
import torch
import torch.distributed as dist
from helpers.processes import RanksFailed, run_on_ranks


def _sum_of_ranks(offset: int) -> int:
    value = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(value)
    return int(value) * 10 + dist.get_rank()


def _all_fail() -> None:
    raise ValueError(f"from rank {dist.get_rank()}")


def _one_fails_and_one_waits() -> None:
    if dist.get_rank() == 1:
        raise ValueError("from rank 1")
    dist.barrier()


def _sleep() -> None:
    time.sleep(600)


def test_results_come_in_rank_order() -> None:
    assert run_on_ranks(_sum_of_ranks, 3, 5) == [180, 181, 182]


def test_every_ranks_error_is_reported() -> None:
    with pytest.raises(RanksFailed, match="from rank 0(.|\n)*from rank 1"):
        run_on_ranks(_all_fail, 2)


def test_a_waiting_rank_does_not_hold_up_the_error_of_another() -> None:
    started = time.monotonic()
    with pytest.raises(RanksFailed, match="ValueError: from rank 1"):
        run_on_ranks(_one_fails_and_one_waits, 2)
    assert time.monotonic() - started < 60


def test_a_hang_ends_at_the_timeout_with_the_stack() -> None:
    with pytest.raises(RanksFailed, match=r"Timeout(.|\n)*in _sleep"):
        run_on_ranks(_sleep, 2, timeout=3)
