"""The dropless route through the experts, against loops."""

import pytest
import torch
from helpers.routing import FIXED, LAYOUTS, routes_of
from torch import Tensor

from moe_pretrain.moe.dispatch import run_experts
from moe_pretrain.moe.row_layout import ExpertRowLayout
from moe_pretrain.moe.types import RouterUse, Routing

EXPERTS, HIDDEN = 5, 3


class IdentityExperts:
    """Every expert returns its input."""

    def __init__(self) -> None:
        self.rows_per_expert = [0] * EXPERTS
        self.calls = 0

    def __call__(
        self, sources: Tensor, weight: Tensor, order: ExpertRowLayout, payload: Tensor | None = None
    ) -> Tensor:
        self.calls += 1
        own = order.rows_per_expert.tolist()
        self.rows_per_expert = [before + more for before, more in zip(self.rows_per_expert, own, strict=True)]
        scaled = weight[:, None] * sources[order.source_of_row]
        return torch.zeros_like(sources).index_add(0, order.source_of_row, scaled)


class LoopBack:
    """An exchange among ranks that are all this one, without a process group: block r comes back as block r.

    ``under_way`` is the number of messages that have been started and not waited for, noted at every start and wait.
    """

    size = 1

    def __init__(self) -> None:
        self.under_way: list[int] = [0]

    def exchange_counts(self, counts: Tensor) -> Tensor:
        return counts.clone()

    def start(self, rows: list[Tensor], send: list[int], receive: list[int]) -> "Looped":
        assert send == receive == [len(rows[0])]
        self.under_way.append(self.under_way[-1] + 1)
        return Looped(self, rows)


class Looped:
    """What ``LoopBack`` has under way."""

    def __init__(self, exchange: LoopBack, rows: list[Tensor]) -> None:
        self.exchange, self.rows = exchange, rows

    def wait(self) -> list[Tensor]:
        self.exchange.under_way.append(self.exchange.under_way[-1] - 1)
        return self.rows


def make_routing(layout: list[list[int]], routes_per_token: int | None) -> Routing:
    token, expert = routes_of(layout)
    zero = torch.zeros((), dtype=torch.float64)
    use = RouterUse(torch.zeros(EXPERTS, dtype=torch.float64), zero, zero, zero)
    return Routing(token, expert, torch.rand(len(token), requires_grad=True), routes_per_token, use)


ONE_TOKEN = pytest.param([[2, 0]], None, id="one token")


@pytest.mark.parametrize("way", ["local", "exchanged", "in halves"])
@pytest.mark.parametrize(("layout", "routes_per_token"), [*LAYOUTS, ONE_TOKEN])
def test_identity_experts_give_the_sum_of_weights_times_the_input(
    layout: list[list[int]], routes_per_token: int | None, way: str
) -> None:
    routing = make_routing(layout, routes_per_token)
    hidden = torch.randn(len(layout), HIDDEN, requires_grad=True)
    experts = IdentityExperts()
    exchange = None if way == "local" else LoopBack()
    output, other = run_experts(
        hidden, routing, EXPERTS, experts, exchange, lambda: torch.tensor(7.0), in_halves=way == "in halves"
    )
    total_weight = torch.zeros(len(layout)).index_add(0, routing.token_index, routing.weight)
    torch.testing.assert_close(output, total_weight[:, None] * hidden)
    assert other is not None and other.item() == 7.0
    assert experts.rows_per_expert == [int((routing.expert_index == e).sum()) for e in range(EXPERTS)]
    assert experts.calls == (2 if way == "in halves" else 1)
    upstream = torch.randn(len(layout), HIDDEN)
    grads = torch.autograd.grad(output, [hidden, routing.weight], upstream, allow_unused=True)
    if len(routing.token_index):
        torch.testing.assert_close(grads[0], total_weight.detach()[:, None] * upstream)
        torch.testing.assert_close(grads[1], (hidden.detach() * upstream).sum(1)[routing.token_index])


def test_of_two_halves_one_is_under_way_while_experts_run_the_other() -> None:
    """Both have left before the first is with the experts; the first is on its way back when the second is."""
    exchange, seen = LoopBack(), []

    class Watching(IdentityExperts):
        def __call__(self, *arguments: Tensor) -> Tensor:
            seen.append(exchange.under_way[-1])
            return super().__call__(*arguments)

    routing = make_routing(FIXED, 2)

    def meanwhile() -> Tensor:
        seen.append(exchange.under_way[-1])
        return torch.zeros(())

    run_experts(torch.randn(len(FIXED), HIDDEN), routing, EXPERTS, Watching(), exchange, meanwhile, in_halves=True)
    assert seen == [2, 1, 1]
    assert exchange.under_way == [0, 1, 2, 1, 2, 1, 2, 1, 0]
