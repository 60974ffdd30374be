"""Lists of routes with padding, as a GPU has them: what is in them, and what padding must not reach."""

import torch
from helpers.cuda_branches import Waits, says_cuda
from torch import Tensor

from moe_pretrain.moe.route_list import list_routes
from moe_pretrain.moe.routers.expert_choice import most_taken
from moe_pretrain.moe.row_layout import order_by, sum_rows

TOKENS, EXPERTS, MOST = 7, 3, 15


def mask() -> Tensor:
    taken = torch.rand(TOKENS, EXPERTS) > 0.5
    taken[3] = False
    taken[-1] = torch.tensor([False, True, False])  # the token that padding names has room for more
    return taken


def test_a_list_begins_with_all_routes_and_ends_in_padding():
    taken = mask()
    with says_cuda(), Waits() as waits:
        routes = list_routes(taken, MOST)
    assert not waits.found and routes.num_routes is not None
    number, (token, expert) = int(routes.num_routes), taken.nonzero(as_tuple=True)
    assert number == len(token) < MOST == len(routes.token)
    assert torch.equal(routes.token[:number], token) and torch.equal(routes.slot[:number], expert)
    assert set(routes.token[number:].tolist()) == {TOKENS - 1} and set(routes.slot[number:].tolist()) == {EXPERTS}


def test_gradients_of_padding_reach_nothing():
    taken, values = mask(), torch.randn(TOKENS, EXPERTS, 2, requires_grad=True)
    with says_cuda():
        routes = list_routes(taken, MOST)
        rows = routes.take(values)
        assert routes.num_routes is not None
        number = int(routes.num_routes)
        given = torch.randn_like(rows)
        given[number:] = torch.nan  # what experts leave there
        (grad,) = torch.autograd.grad(rows, values, given)
    assert torch.equal(rows[:number], values[taken])
    (expected,) = torch.autograd.grad(values[taken], values, given[:number])
    assert torch.equal(grad, expected)


def test_padding_is_behind_the_rows_of_all_experts_and_no_ones():
    taken = mask()
    counts = taken.sum(dim=0)
    exact = list_routes(taken, MOST)
    _, expected = order_by(exact.slot, exact.token, TOKENS, None, counts)
    with says_cuda():
        padded = list_routes(taken, MOST)
        _, found = order_by(padded.slot, padded.token, TOKENS, None, counts, is_padded=True)
    number = len(exact.token)
    assert len(found.source_of_row) == MOST
    assert torch.equal(found.first(number).source_of_row, expected.source_of_row)
    most = expected.rows_of_source.shape[1]
    assert torch.equal(found.rows_of_source[:, :most], expected.rows_of_source)
    assert (found.rows_of_source[:, most:] == -1).all()


def test_tokens_without_experts_are_zero_whatever_lies_in_the_rows_of_padding():
    """No token of the micro-batch may have a route, as with ``relu``; then the first row is padding as well."""
    none = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    with says_cuda():
        routes = list_routes(none, MOST)
        _, order = order_by(routes.slot, routes.token, TOKENS, None, none.sum(dim=0), is_padded=True)
        rows = torch.full((MOST, 2), torch.nan)
        for weight in (None, torch.ones(MOST)):
            assert torch.equal(sum_rows(rows, order, weight), torch.zeros(TOKENS, 2))


def test_experts_that_choose_never_take_more_than_the_bound():
    for tokens, factor in ((1, 2.0), (5, 0.1), (7, 1.5), (9, 3.0), (12, 2.5)):
        for text in range(tokens + 1):
            wanted = torch.tensor(factor * text / EXPERTS, dtype=torch.float64).round().clamp(min=1)
            assert EXPERTS * min(int(wanted), text) <= most_taken(
                torch.zeros(tokens, EXPERTS, dtype=torch.bool), factor
            )
