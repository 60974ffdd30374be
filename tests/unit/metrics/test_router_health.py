"""Dead experts and collapsed routers are warned of by name, once, and only when they are."""

import pytest
import torch

from moe_pretrain.metrics.router_health import RouterHealth, effective_experts

RATIO = 1.25
EVEN = [10.0, 10.0, 10.0, 10.0, 10.0, 10.0]
ONE_DEAD = [12.0, 12.0, 0.0, 12.0, 12.0, 12.0]
TWO_USED = [30.0, 30.0, 0.0, 0.0, 0.0, 0.0]


def warnings_of(*steps: list[list[float]], window: int = 1, tokens: int = 30) -> list[list[tuple[str, str]]]:
    health = RouterHealth([1, 3], window, RATIO)
    return [health.update(torch.tensor(step, dtype=torch.float64), tokens) for step in steps]


def test_an_even_load_is_well():
    assert warnings_of([EVEN, EVEN]) == [[]]


def test_a_dead_expert_is_named_once_with_its_layer():
    first, second, well, again = warnings_of([EVEN, ONE_DEAD], [EVEN, ONE_DEAD], [EVEN, EVEN], [EVEN, ONE_DEAD])
    assert [name for name, _ in first] == ["dead_experts"]
    assert "layer 3" in first[0][1] and "expert 2 of 6" in first[0][1]
    assert second == [] and well == [] and again == first


def test_a_collapsed_router_is_named():
    (found,) = warnings_of([TWO_USED, EVEN])
    names = dict(found)
    assert set(names) == {"dead_experts", "collapsed_router"}
    assert "layer 1" in names["collapsed_router"] and "2.0 of 6 experts" in names["collapsed_router"]


def load_worth(experts: float) -> list[float]:
    """Load of six experts with the entropy of so many evenly used ones: one expert more loaded than the others."""
    low, high = 1 / 6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        worth = effective_experts(torch.tensor([middle, *[(1 - middle) / 5] * 5], dtype=torch.float64))
        low, high = (middle, high) if worth > experts else (low, middle)
    return [60 * low, *[60 * (1 - low) / 5] * 5]


@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("ratio", [1.25, 1.5])
@pytest.mark.parametrize("side,is_collapsed", [(0.99, True), (1.01, False)])
def test_a_router_collapses_at_the_ratio_of_the_configuration(per_token, ratio, side, is_collapsed):
    health = RouterHealth([0], 1, ratio)
    load = torch.tensor([load_worth(side * ratio * per_token)], dtype=torch.float64)
    names = [name for name, _ in health.update(load, 60 // per_token)]
    assert names == ["collapsed_router"] * is_collapsed


def test_the_window_is_judged_as_a_whole():
    """An expert that gets a token in any step of the window is alive."""
    other = [0.0, 12.0, 12.0, 12.0, 12.0, 12.0]
    assert warnings_of([EVEN, ONE_DEAD], [EVEN, other], window=2) == [[], []]


def test_slots_without_an_expert_are_no_dead_ones():
    """DynMoE: two of six slots are free; a third that was free at the end of any step of the window has no say yet."""
    some = [10.0, 20.0, 0.0, 30.0, 0.0, 0.0]

    def named(*steps: list[bool]) -> list[tuple[str, str]]:
        health = RouterHealth([0], len(steps), RATIO)
        for free in steps:
            found = health.update(torch.tensor([some], dtype=torch.float64), 60, [torch.tensor(free)])
        return found

    free = [False, False, True, False, True, True]
    came = [False, False, True, False, True, False]
    assert named(free, free) == named(free, came) == named(came, free) == []
    ((name, message),) = named(came, came)
    assert name == "dead_experts" and "expert 5 of 4" in message


def test_all_experts_in_use_for_every_token_are_no_collapse():
    health, free = RouterHealth([0], 1, RATIO), torch.tensor([False, False, True, True])
    assert health.update(torch.tensor([[30.0, 30.0, 0.0, 0.0]]).double(), 30, [free]) == []
    both = health.update(torch.tensor([[30.0, 30.0, 0.0, 0.0]]).double(), 30)
    assert [name for name, _ in both] == ["dead_experts", "collapsed_router"]


def test_a_scheme_that_uses_every_expert_for_every_token_is_well():
    assert warnings_of([[30.0] * 6, [30.0] * 6]) == [[]]


def test_a_dense_model_has_no_routers():
    assert RouterHealth([], 1, RATIO).update(torch.zeros(0, 0), 10) == []


@pytest.mark.parametrize("load,expected", [(EVEN, 6.0), (TWO_USED, 2.0), ([5.0, 0.0], 1.0)])
def test_effective_experts(load: list[float], expected: float):
    assert effective_experts(torch.tensor(load)) == pytest.approx(expected)
