"""Orders, their adjoint and the dropless route through the experts, against loops."""

import pytest
import torch
from torch import Tensor

from moe_pretrain.moe.dispatch import order_by, run_experts, sum_rows
from moe_pretrain.moe.types import ExpertRowLayout, RouterUse, Routing

EXPERTS, HIDDEN = 5, 3

# Experts of each token's routes; expert 3 is in none of them.
FIXED = [[4, 0], [1, 4], [0, 1], [4, 2], [0, 4], [2, 1], [1, 0]]
RAGGED = [[4], [], [0, 1, 4], [4, 2], [], [1], [0, 4]]
LAYOUTS = [
    pytest.param(FIXED, 2, id="fixed"),
    pytest.param(FIXED, None, id="fixed, not told"),
    pytest.param(RAGGED, None, id="ragged"),
    pytest.param([[], [], []], None, id="no routes"),
    pytest.param([], None, id="no tokens"),
]


def flatten(experts_of_token: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token and expert of each route, token-major."""
    pairs = [(token, expert) for token, experts in enumerate(experts_of_token) for expert in experts]
    flat = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return flat[:, 0], flat[:, 1]


def make_order(experts_of_token: list[list[int]], routes_per_token: int | None) -> tuple[Tensor, ExpertRowLayout]:
    token, expert = flatten(experts_of_token)
    counts = torch.bincount(expert, minlength=EXPERTS)
    return order_by(expert, token, len(experts_of_token), routes_per_token, counts)


@pytest.mark.parametrize(("layout", "routes_per_token"), LAYOUTS)
def test_order_by_equals_a_loop(layout: list[list[int]], routes_per_token: int | None) -> None:
    token, expert = flatten(layout)
    route_of_row, order = make_order(layout, routes_per_token)
    # Stable: routes of one expert stay in token order, so every topology sums in the same order.
    expected = [route for e in range(EXPERTS) for route in range(len(expert)) if expert[route] == e]
    assert route_of_row.tolist() == expected
    assert order.source_of_row.tolist() == [int(token[route]) for route in expected]
    slots = max(map(len, layout), default=0)
    for source in range(len(layout)):
        own = [expected.index(route) for route in range(len(token)) if token[route] == source]
        assert order.rows_of_source[source].tolist() == own + [-1] * (slots - len(own))
    assert order.is_full == (routes_per_token is not None)
    assert order.rows_per_expert.tolist() == [int((expert == e).sum()) for e in range(EXPERTS)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("layout", "routes_per_token"), LAYOUTS)
def test_sum_is_the_adjoint_of_the_gather(
    layout: list[list[int]], routes_per_token: int | None, weighted: bool
) -> None:
    """``<weight * gather(x), y> = <x, sum(y, weight)>`` for any x and y."""
    _, order = make_order(layout, routes_per_token)
    rows = len(order.source_of_row)
    x, y = torch.randn(len(layout), HIDDEN), torch.randn(rows, HIDDEN)
    weight = torch.rand(rows) if weighted else None
    gathered = x.index_select(0, order.source_of_row) * (1 if weight is None else weight[:, None])
    summed = sum_rows(y, order, weight)
    assert summed.shape == x.shape
    torch.testing.assert_close((gathered * y).sum(), (x * summed).sum())


def test_sum_ignores_rows_behind_missing_slots() -> None:
    """A source with fewer routes reads some row for its empty slot; whatever is there must not leak."""
    order = ExpertRowLayout(torch.tensor([0, 1, 1]), torch.tensor([[0, -1], [1, 2]]), False, torch.tensor([3]))
    rows = torch.tensor([[torch.inf], [1.0], [2.0]])
    assert sum_rows(rows, order)[1].item() == 3.0
    swapped = ExpertRowLayout(torch.tensor([1, 0, 0]), torch.tensor([[1, 2], [0, -1]]), False, torch.tensor([3]))
    assert sum_rows(rows.flip(0), swapped)[1].item() == 2.0


def test_sum_accumulates_in_float32() -> None:
    order = ExpertRowLayout(torch.zeros(4, dtype=torch.int64), torch.arange(4)[None], True, torch.tensor([4]))
    rows = torch.tensor([[256.0], [1.0], [1.0], [-256.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    assert sum_rows(rows, order).item() == 2.0


class IdentityExperts:
    """Every expert returns its input."""

    def __init__(self) -> None:
        self.rows_per_expert: list[int] = []

    def __call__(
        self, sources: Tensor, weight: Tensor, order: ExpertRowLayout, payload: Tensor | None = None
    ) -> Tensor:
        self.rows_per_expert = order.rows_per_expert.tolist()
        scaled = weight[:, None] * sources[order.source_of_row]
        return torch.zeros_like(sources).index_add(0, order.source_of_row, scaled)


class LoopBack:
    """An exchange among ranks that are all this one, without a process group: block r comes back as block r."""

    size = 1

    def exchange_counts(self, counts: Tensor) -> Tensor:
        return counts.clone()

    def start(self, rows: list[Tensor], send: list[int], receive: list[int]) -> "LoopBack":
        assert send == receive == [len(rows[0])]
        self.rows = rows
        return self

    def wait(self) -> list[Tensor]:
        return self.rows


def make_routing(layout: list[list[int]], routes_per_token: int | None) -> Routing:
    token, expert = flatten(layout)
    zero = torch.zeros((), dtype=torch.float64)
    use = RouterUse(torch.zeros(EXPERTS, dtype=torch.float64), zero, zero, zero)
    return Routing(token, expert, torch.rand(len(token), requires_grad=True), routes_per_token, use)


@pytest.mark.parametrize("exchange", [None, LoopBack()], ids=["local", "exchanged"])
@pytest.mark.parametrize(("layout", "routes_per_token"), LAYOUTS)
def test_identity_experts_give_the_sum_of_weights_times_the_input(
    layout: list[list[int]], routes_per_token: int | None, exchange: LoopBack | None
) -> None:
    routing = make_routing(layout, routes_per_token)
    hidden = torch.randn(len(layout), HIDDEN, requires_grad=True)
    experts = IdentityExperts()
    output, other = run_experts(hidden, routing, EXPERTS, experts, exchange, lambda: torch.tensor(7.0))
    total_weight = torch.zeros(len(layout)).index_add(0, routing.token_index, routing.weight)
    torch.testing.assert_close(output, total_weight[:, None] * hidden)
    assert other is not None and other.item() == 7.0
    assert experts.rows_per_expert == [int((routing.expert_index == e).sum()) for e in range(EXPERTS)]
    upstream = torch.randn(len(layout), HIDDEN)
    grads = torch.autograd.grad(output, [hidden, routing.weight], upstream, allow_unused=True)
    if len(routing.token_index):
        torch.testing.assert_close(grads[0], total_weight.detach()[:, None] * upstream)
        torch.testing.assert_close(grads[1], (hidden.detach() * upstream).sum(1)[routing.token_index])
