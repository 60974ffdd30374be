"""While tests run, shapes are held to their annotations."""

import pytest
import torch
from helpers import typechecker
from helpers.processes import RanksFailed, run_on_ranks
from jaxtyping import TypeCheckError

from moe_pretrain.moe.losses import router_z_loss


def test_a_wrong_shape_is_refused_in_the_first_calls_of_each_test() -> None:
    right, wrong, mask = torch.zeros(4, 3), torch.zeros(4), torch.ones(4, dtype=torch.bool)
    for _ in range(2):
        typechecker.begin_test()
        for _ in range(typechecker.FIRST_CALLS - 1):
            router_z_loss(right, mask)
        with pytest.raises(TypeCheckError, match="router_z_loss"):
            router_z_loss(wrong, mask)


def _call(rank_to_fail: int) -> None:
    if torch.distributed.get_rank() == rank_to_fail:
        router_z_loss(torch.zeros(4), torch.ones(4, dtype=torch.bool))


def test_the_first_rank_checks_too() -> None:
    with pytest.raises(RanksFailed, match="TypeCheckError"):
        run_on_ranks(_call, 2, 0)
