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
    token, expert = flatten(layout)
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


@pytest.mark.parametrize(("layout", "routes_per_token"), LAYOUTS[:3])
def test_a_layout_is_those_of_its_halves(layout: list[list[int]], routes_per_token: int | None) -> None:
    """Sorted by half and expert, then split, it is what each half's routes give by themselves; padding is in none."""
    half = len(layout) // 2
    token, expert = flatten(layout)
    key = expert + EXPERTS * (token >= half)
    counts = torch.bincount(key, minlength=2 * EXPERTS)
    rows = [int(counts[:EXPERTS].sum()), int(counts[EXPERTS:].sum())]
    if is_padded := routes_per_token is None:
        key, token = torch.cat([key, key.new_full((3,), 2 * EXPERTS)]), torch.cat([token, token[-1:].expand(3)])
    _, order = order_by(key, token, len(layout), routes_per_token, counts, is_padded=is_padded, in_halves=True)
    for found, own in zip(order.split(rows, [half, len(layout) - half]), (layout[:half], layout[half:]), strict=True):
        _, expected = make_order(own, routes_per_token)
        assert found.source_of_row.tolist() == expected.source_of_row.tolist()
        assert found.rows_per_expert.tolist() == expected.rows_per_expert.tolist()
        assert found.is_full == expected.is_full
        slots = expected.rows_of_source.shape[1]
        assert found.rows_of_source[:, :slots].tolist() == expected.rows_of_source.tolist()
        assert (found.rows_of_source[:, slots:] == -1).all()
