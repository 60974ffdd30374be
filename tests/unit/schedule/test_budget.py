"""Budgets: where a run ends, by plain sums, and how the schedule follows what is spent."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest

from moe_pretrain.config.load import load
from moe_pretrain.model.size import model_size
from moe_pretrain.schedule.budget import BudgetConfig, BudgetMeter

OF_TOKENS = load(["budget.tokens=1000"]).budget
OF_FLOPS = replace(OF_TOKENS, tokens=None, flops=1e6)
SCHEDULES = [
    load([f"schedule={name}", "schedule.warmup_steps=4"]).schedule for name in ("cosine", "warmup_stable_decay")
]


@pytest.mark.parametrize(
    ("config", "flops_per_token", "steps"),
    [
        (OF_TOKENS, 1.0, 10),
        (replace(OF_TOKENS, tokens=1001), 1.0, 11),
        (OF_FLOPS, 1000.0, 10),  # 10 steps of 100 tokens spend exactly 1e6
        (replace(OF_FLOPS, flops=1e6 + 1), 1000.0, 11),
        (OF_FLOPS, 1001.0, 10),
        # A budget that float division would round to a step less: 3 * 10**17 + 1 over 10**17.
        (replace(OF_FLOPS, flops=float(3 * 10**17 + 64)), 1e15, 4),
    ],
)
def test_the_last_step_is_the_one_that_reaches_the_budget(config: BudgetConfig, flops_per_token: float, steps: int):
    assert config.planned_steps(100, flops_per_token) == steps
    meter = BudgetMeter(config, 100, flops_per_token)
    for done in range(steps):
        assert (meter.steps, meter.is_over, meter.num_steps) == (done, False, steps)
        meter.charge(flops_per_token, 1.0)
    assert meter.is_over and meter.is_spent and meter.num_steps == steps


def uneven(seed: int) -> list[float]:
    """FLOPs per token that drift and jump, as those of an adaptive scheme may."""
    draw = random.Random(seed)
    trend = draw.uniform(0.2, 3.0)
    return [1000 * draw.uniform(0.8, 1.2) * (1 + (trend - 1) * step / 200) for step in range(400)]


@pytest.mark.parametrize("seed", range(5))
def test_uneven_steps_end_at_the_first_that_reaches_the_budget(seed: int):
    costs, config = uneven(seed), replace(OF_FLOPS, flops=2e7)
    meter, spent, last = BudgetMeter(config, 100, 1000.0), 0, 0
    for cost in costs:
        if spent >= config.flops:
            break
        spent, last = spent + round(100 * cost), last + 1
    while not meter.is_over:
        meter.charge(costs[meter.steps], 0.5)
    assert (meter.steps, meter.flops, meter.seconds) == (last, spent, last * 0.5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def test_the_schedule_follows_the_share_that_is_spent(seed: int, schedule):
    """Its progress is that share to the step; warm-up goes by steps, and the last step is at the schedule's end."""
    costs, config = uneven(seed), replace(OF_FLOPS, flops=2e7)
    meter, factors = BudgetMeter(config, 100, 1000.0), []
    while not meter.is_over:
        if meter.steps:
            share = Fraction(meter.flops) / round(config.flops)
            assert abs(Fraction(meter.steps, meter.num_steps) - share) <= Fraction(1, meter.num_steps)
        factors.append(schedule.factor(meter.steps, meter.num_steps))
        meter.charge(costs[meter.steps], 0.5)
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    # The last step's own cost is not known before it, and the total is a whole number: a step more or less.
    step = schedule.factor(meter.steps - 2, meter.steps) - schedule.floor
    assert factors[-1] == pytest.approx(schedule.floor, abs=step)
    assert all(after <= before + step for before, after in zip(factors[3:], factors[4:], strict=False))


def test_equal_steps_have_the_schedule_of_a_budget_of_tokens():
    flops, tokens = (
        BudgetMeter(replace(OF_FLOPS, flops=1.05e7), 100, 1000.0),
        BudgetMeter(replace(OF_TOKENS, tokens=10500), 100, 1.0),
    )
    while not flops.is_over:
        assert flops.num_steps == tokens.num_steps == 105
        flops.charge(1000.0, 0.1)
        tokens.charge(1000.0, 0.1)
    assert tokens.is_over


def test_a_resume_at_any_step_goes_on_with_the_sum():
    costs, config = uneven(1), replace(OF_FLOPS, flops=2e7, seconds=70.0)
    straight = BudgetMeter(config, 100, 1000.0)
    while not straight.is_over:
        resumed = BudgetMeter(config, 100, 1000.0)
        resumed.restore(straight.steps, straight.flops, straight.seconds)
        assert resumed.num_steps == straight.num_steps
        for meter in (straight, resumed):
            meter.charge(costs[meter.steps], 0.5)
        state = [(each.steps, each.flops, each.seconds, each.is_over, each.num_steps) for each in (straight, resumed)]
        assert state[0] == state[1]
    assert (straight.steps, straight.seconds) == (140, 70.0)


def test_a_checkpoint_that_does_not_say_is_taken_as_expected():
    meter = BudgetMeter(OF_FLOPS, 100, 1000.0)
    meter.restore(4, None, None)
    assert (meter.flops, meter.seconds) == (400_000, 0.0)


def test_seconds_end_a_run_before_its_schedule_and_it_says_so():
    meter = BudgetMeter(replace(OF_TOKENS, seconds=2.0), 100, 1.0)
    for _ in range(3):
        meter.charge(1.0, 0.6)
    assert not meter.is_over and meter.num_steps == 10
    meter.charge(1.0, 0.6)
    assert meter.is_over and meter.is_spent
    assert meter.describe_end() == "after 4 steps: 2.4 s are spent, of budget.seconds=2"


def test_a_budget_below_what_is_spent_is_said_and_the_last_step_may_pass_it():
    for budget, steps, said in (
        (OF_TOKENS, 10, ""),
        (OF_TOKENS, 11, "budget.tokens=1000 is below the 1100 tokens done"),
        (replace(OF_TOKENS, tokens=None, flops=950.0), 10, ""),
        (replace(OF_TOKENS, tokens=None, flops=950.0), 11, "budget.flops=950 is below the 1100 FLOPs spent"),
        (replace(OF_TOKENS, seconds=2.1), 4, ""),
        (replace(OF_TOKENS, seconds=2.1), 5, "budget.seconds=2.1 is below the 3.0 s spent"),
    ):
        meter = BudgetMeter(budget, 100, 1.0)
        meter.restore(steps, steps * 100, steps * 0.6)
        assert meter.describe_excess().startswith(said) and bool(meter.describe_excess()) == bool(said)
    whole = BudgetMeter(replace(OF_TOKENS, seconds=2.5), 100, 1.0)
    for _ in range(10):
        whole.charge(1.0, 0.25)
    assert whole.seconds == 2.5 and whole.describe_end() == "after 10 steps", (
        "a run that reaches its planned end has not been cut"
    )


def test_data_that_ends_ends_the_run_but_spends_no_budget():
    for config in (OF_TOKENS, OF_FLOPS):
        meter = BudgetMeter(config, 100, 1000.0, limit=3)
        for _ in range(3):
            assert not meter.is_over and meter.num_steps == 3
            meter.charge(1000.0, 0.1)
        assert meter.is_over and not meter.is_spent


def test_what_was_not_expected_is_said():
    meter = BudgetMeter(OF_FLOPS, 100, 1000.0)
    meter.charge(1000.0, 1.0)
    assert meter.describe_spending() == "1e+05 FLOPs, 1.0 s in steps"
    meter.charge(1100.0, 1.0)
    assert "+5.00% of the 2e+05 expected" in meter.describe_spending()


@pytest.mark.parametrize("router", ["top_k", "autonomy", "attentive", "dense", "top_p"])
def test_steps_of_a_configuration_are_those_of_its_scheme(router: str):
    config = load([f"router={router}", "budget.tokens=null", "budget.flops=1e13"])
    step = 8192 * model_size(config.model, config.router).training_flops_per_token
    assert (config.num_steps - 1) * step < 1e13 <= config.num_steps * step
    assert config.num_tokens == 8192 * config.num_steps


def test_a_budget_of_tokens_needs_exactly_its_tokens():
    config = load(["budget.tokens=10000"])
    assert (config.num_steps, config.num_tokens) == (2, 10000)
