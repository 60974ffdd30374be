"""Orders of rows by expert and their sums, against loops."""

import pytest
import torch
from helpers.routing import LAYOUTS, routes_of
from torch import Tensor

from moe_pretrain.moe.row_layout import ExpertRowLayout, order_by, sum_rows

EXPERTS, HIDDEN = 5, 3


def make_order(experts_of_token: list[list[int]], routes_per_token: int | None) -> tuple[Tensor, ExpertRowLayout]:
    token, expert = routes_of(experts_of_token)
    counts = torch.bincount(expert, minlength=EXPERTS)
    return order_by(expert, token, len(experts_of_token), routes_per_token, counts)


@pytest.mark.parametrize(("layout", "routes_per_token"), LAYOUTS)
def test_order_by_equals_a_loop(layout: list[list[int]], routes_per_token: int | None) -> None:
    token, expert = routes_of(layout)
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


@pytest.mark.parametrize(("layout", "routes_per_token"), LAYOUTS[:3])
def test_a_layout_is_those_of_its_halves(layout: list[list[int]], routes_per_token: int | None) -> None:
    """Sorted by half and expert, then split, it is what each half's routes give by themselves; padding is in none."""
    half = len(layout) // 2
    token, expert = routes_of(layout)
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
