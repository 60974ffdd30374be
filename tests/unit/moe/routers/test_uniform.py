"""Experts dealt out by place: exact balance, and nothing but the place."""

import pytest
import torch
from helpers.routing import by_token, make_context

from moe_pretrain.moe.routers.uniform import UniformConfig, UniformRouter
from moe_pretrain.moe.types import Routing


def routed(experts: int, top_k: int, length: int, rows: int = 3, layer: int = 0) -> Routing:
    router = UniformRouter(UniformConfig(name="uniform", top_k=top_k), experts, layer)
    return router(torch.randn(rows * length, 4), make_context(rows * length, rows))


@pytest.mark.parametrize(("experts", "top_k", "length"), [(4, 1, 8), (8, 2, 64), (6, 6, 12), (5, 3, 40)])
def test_every_expert_has_the_same_number_of_routes(experts: int, top_k: int, length: int):
    routing = routed(experts, top_k, length)
    assert routing.use.tokens_per_expert.tolist() == [3 * length * top_k / experts] * experts
    # Within every block of as many tokens as experts too, so a cut row is even as well.
    blocks = routing.expert_index.view(-1, experts * top_k)
    assert all(torch.bincount(block, minlength=experts).eq(top_k).all() for block in blocks)


@pytest.mark.parametrize("length", [7, 13])
def test_a_shorter_last_block_is_uneven_by_its_own_routes_alone(length: int):
    counts = routed(8, 2, length, rows=1).use.tokens_per_expert
    assert counts.sum() == 2 * length and counts.max() - counts.min() <= 2


def test_a_token_has_distinct_experts_of_equal_weight():
    for experts in by_token(routed(8, 3, 32, rows=1), 32):
        assert len(experts) == 3 and list(experts.values()) == [pytest.approx(1 / 3)] * 3


def test_rows_are_alike_and_blocks_and_layers_are_not():
    routing = routed(8, 2, 32)
    rows = routing.expert_index.view(3, -1)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    blocks = rows[0].view(4, -1)
    assert len(blocks.unique(dim=0)) == 4
    assert not torch.equal(routing.expert_index, routed(8, 2, 32, layer=1).expert_index)


def test_a_place_keeps_its_experts_when_the_row_grows():
    assert torch.equal(routed(8, 2, 20, rows=1).expert_index, routed(8, 2, 32, rows=1).expert_index[:40])
