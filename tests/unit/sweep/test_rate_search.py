"""The search's rule on curves whose best rate is known."""

import math
from collections.abc import Callable

import pytest

from moe_pretrain.sweep.rate_search import Search, Setting, best_rate, next_rates

START = 0.004


def rates_of(curve: Callable[[float], float], trials: int, factor: float = 2.0) -> list[float]:
    """Rates in the order in which the rule asks for them."""
    losses: dict[float, float] = {}
    while len(losses) < trials:
        for rate in next_rates(losses, START, factor):
            assert rate not in losses
            losses[rate] = curve(rate)
    return list(losses)


def parabola(best: float) -> Callable[[float], float]:
    return lambda rate: 3 + math.log(rate / best) ** 2


@pytest.mark.parametrize(
    "curve,expected",
    [
        (lambda rate: -rate, [0.002, 0.004, 0.008, 0.016, 0.032, 0.064]),
        (lambda rate: rate, [0.002, 0.004, 0.008, 0.001, 0.0005, 0.00025]),
        # At the start: the better neighbour's gap, then the wider one.
        (parabola(0.0041), [0.002, 0.004, 0.008, 0.00565685, 0.00282843, 0.00475683]),
        (parabola(0.0039), [0.002, 0.004, 0.008, 0.00282843, 0.00565685, 0.00336359]),
        # Extended once, then closed in on.
        (parabola(0.009), [0.002, 0.004, 0.008, 0.016, 0.0113137, 0.00565685]),
        # Of equal losses the lower rate is the best, and of equal gaps with equal ends the lower is halved.
        (lambda rate: 3.0, [0.002, 0.004, 0.008, 0.001, 0.0005, 0.00025]),
        (lambda rate: 3.0 + (rate != 0.004), [0.002, 0.004, 0.008, 0.00282843, 0.00565685, 0.00336359]),
    ],
    ids=["falls", "rises", "best a little above", "best a little below", "best beyond", "flat", "equal neighbours"],
)
def test_the_next_rate_is_the_rules(curve: Callable[[float], float], expected: list[float]):
    assert rates_of(curve, 6) == expected


@pytest.mark.parametrize("lost", [math.inf, math.nan, -math.inf])
def test_a_diverged_trial_is_worse_than_every_other(lost: float):
    """It is neither the best nor gone beyond: the search goes on below it."""
    above = lambda rate: lost if rate > 0.005 else -rate  # noqa: E731 - a curve as the others
    assert rates_of(above, 5) == [0.002, 0.004, 0.008, 0.00282843, 0.00565685]
    assert rates_of(lambda rate: lost, 5) == [0.002, 0.004, 0.008, 0.001, 0.0005]
    assert best_rate({0.002: lost, 0.004: 9.0}) == 0.004


@pytest.mark.parametrize("best", [0.0005, 0.003, 0.004, 0.05])
@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0])
def test_the_best_of_a_convex_curve_is_closed_in_on(best: float, factor: float):
    rates = rates_of(parabola(best), 20, factor)
    found = min(rates, key=parabola(best))
    assert abs(math.log(found / best)) < 0.02


def searched(search: Search, loss: Callable[[Setting], float]) -> dict[Setting, float]:
    losses: dict[Setting, float] = {}
    while settings := search.next(losses):
        assert not set(settings) & losses.keys()
        losses |= {setting: loss(setting) for setting in settings}
    return losses


ALSO = (("router.weight", ("0.1", "0.3")),)


def test_further_fields_are_tried_at_the_best_rate_within_the_trials():
    def loss(setting: Setting) -> float:
        return parabola(0.009)(float(setting[0][1])) - (0.5 if setting[1:] == (("router.weight", "0.3"),) else 0)

    search = Search("rate", START, 2.0, 7, ALSO)
    losses = searched(search, loss)
    base = ("rate", "0.008")
    assert list(losses)[5:] == [(base, ("router.weight", "0.1")), (base, ("router.weight", "0.3"))]
    assert search.choose(losses) == (base, ("router.weight", "0.3")) and not search.is_at_edge(losses)
    assert len(searched(Search("rate", START, 2.0, 7), loss)) == len(losses) == 7, "equal budgets"


def test_a_second_field_starts_from_the_best_of_the_first():
    fields = (*ALSO, ("other", ("5",)))
    losses = searched(Search("rate", START, 2.0, 6, fields), lambda setting: -float(len(setting)))
    assert list(losses)[-1] == (("rate", "0.002"), ("router.weight", "0.1"), ("other", "5"))


def test_without_a_finite_loss_all_trials_look_for_a_rate_that_has_one():
    search = Search("rate", START, 2.0, 6, ALSO)
    losses = searched(search, lambda setting: math.inf)
    assert len(losses) == 6 and all(len(setting) == 1 for setting in losses)
    assert search.choose(losses) is None
    first_finite = searched(search, lambda setting: 3.0 if float(setting[0][1]) < 0.0006 else math.inf)
    assert len(first_finite) == 6 and search.choose(first_finite) == (("rate", "0.0005"),), "and never more than asked"


def test_the_edge_is_of_the_rates_alone():
    search = Search("rate", START, 2.0, 4)
    assert search.is_at_edge(searched(search, lambda setting: -float(setting[0][1])))
    assert not search.is_at_edge(searched(search, lambda setting: parabola(START)(float(setting[0][1]))))


def test_an_earlier_state_asks_for_the_same():
    """A search that was killed goes on as if it had not been: its rule knows nothing but the losses."""
    search = Search("rate", START, 2.0, 7, ALSO)
    losses = searched(search, lambda setting: parabola(0.01)(float(setting[0][1])))
    order = list(losses)
    for made in range(3, 7):
        asked = search.next({setting: losses[setting] for setting in order[:made]})
        assert asked == order[made : made + len(asked)] and asked
