"""Selection where float32 scores are equal and logits are not: the router's order decides, not the expert's number."""

from typing import Any

import pytest
import torch
from helpers.routing import make_context

from moe_pretrain.config.load import load
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import best_first

EXPERTS, WIDTH = 8, 8


def routed_by_logits(logits: torch.Tensor, *overrides: str, training: bool = True) -> tuple[Router, list[set[int]]]:
    """A router whose logits are ``logits [tokens, EXPERTS]``, and the experts of each token."""
    config = load([*overrides, f"model.moe.num_experts={EXPERTS}"])
    router = config.router.build(WIDTH, EXPERTS, 0).train(training)
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS, WIDTH))  # type: ignore[operator]  # a linear router's
    routing = router(logits, make_context(len(logits)))
    taken: list[set[int]] = [set() for _ in logits]
    for token, expert in zip(routing.token_index.tolist(), routing.expert_index.tolist(), strict=True):
        taken[token].add(expert)
    return router, taken


LOGITS = torch.tensor([[20.0, 21, 22, 23, 24, 25, 26, 27], [0.0, -200, -150, -400, -300, -140, -160, -170]])
"""The sigmoids of the first row are all 1; the softmax of the second is 0 in all places but one."""


@pytest.mark.parametrize(
    "overrides,best",
    [
        (["router=top_k", "router.score=sigmoid"], [{7, 6}, None]),
        (["router=top_k"], [{7, 6}, {0, 5}]),
        (["router=loss_free"], [{7, 6}, None]),
        (["router=quantile"], [{7, 6}, None]),
        (["router=top_k", "router.score=sigmoid", "router.num_groups=4", "router.groups_per_token=1"], [{7, 6}, None]),
        (["router=sinkhorn"], [{7, 6}, {0, 5}]),
    ],
)
def test_experts_are_chosen_by_logit_where_scores_are_equal(overrides: list[str], best: list[Any]) -> None:
    _, taken = routed_by_logits(LOGITS, *overrides, training=False)
    assert [pair for pair, wanted in zip(taken, best, strict=True) if wanted] == [pair for pair in best if pair]


def test_experts_choose_the_surest_of_saturated_tokens() -> None:
    """Every probability of expert 0 is exactly 1; it has place for 8 of 32 tokens and takes those of widest margin."""
    logits = torch.zeros(32, EXPERTS)
    logits[:, 0] = 40 + torch.arange(32.0)
    assert (logits.softmax(dim=-1)[:, 0] == 1).all()
    _, taken = routed_by_logits(logits, "router=expert_choice", "router.capacity_factor=2")
    assert [token for token, experts in enumerate(taken) if 0 in experts] == list(range(24, 32))


def test_first_by_score_then_by_tie_then_by_index() -> None:
    scores = torch.tensor([[1.0, 2, 2, 1, 2]])
    ties = torch.tensor([[5.0, 1, 3, 9, 3]])
    assert best_first(scores, ties).tolist() == [[2, 4, 1, 3, 0]]
    assert best_first(scores, None).tolist() == [[1, 2, 4, 0, 3]]
    assert best_first(scores.T, ties.T, dim=0).T.tolist() == [[2, 4, 1, 3, 0]]
