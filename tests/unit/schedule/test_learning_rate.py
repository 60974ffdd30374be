"""Schedules that do not fit their run are refused or said before it starts."""

import pytest

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import check_warm_up, preflight
from moe_pretrain.schedule.learning_rate import (
    CosineScheduleConfig,
    WarmupStableDecayScheduleConfig,
    describe_last_rate,
)


@pytest.mark.parametrize("warmup, fraction", [(250, 0.9), (31, 0.9), (300, 0.01), (1, 1.0)])
def test_parts_that_overlap_are_refused(warmup, fraction):
    schedule = WarmupStableDecayScheduleConfig("warmup_stable_decay", warmup, fraction, 0.0)
    with pytest.raises(ValueError, match=rf"^schedule.warmup_steps={warmup} and schedule.decay_fraction={fraction} "):
        schedule.check(300)


@pytest.mark.parametrize("warmup, fraction", [(30, 0.9), (0, 1.0), (300, 0.0), (1, 0.997)])
def test_parts_that_fit_never_fall_in_a_step(warmup, fraction):
    schedule = WarmupStableDecayScheduleConfig("warmup_stable_decay", warmup, fraction, 0.0)
    assert schedule.check(300) == ""
    factors = [schedule.factor(step, 300) for step in range(300)]
    decay = round(300 * fraction)
    assert all(a - b < 1.001 / max(1, decay) for a, b in zip(factors, factors[1:], strict=False))


def test_a_warm_up_that_does_not_end_is_refused():
    for schedule in (
        CosineScheduleConfig("cosine", 500, 0.1),
        WarmupStableDecayScheduleConfig("warmup_stable_decay", 500, 0.0, 0.1),
    ):
        assert "schedule.warmup_steps=500 must be at most the run's 20 steps" in schedule.check(20)
        assert f"only rise to {schedule.factor(19, 20):.1%} of" in schedule.check(20)
        assert schedule.check(500) == ""


def test_a_run_of_steps_whose_warm_up_does_not_end_does_not_start(tmp_path):
    words = ["schedule.warmup_steps=301", "run.name=long", f"run.output_dir={tmp_path}"]
    config = load(words)
    with pytest.raises(ValueError, match=r"^schedule.warmup_steps=301 must be at most the run's 300 steps: "):
        check_warm_up(config, preflight(config, 1))
    of_flops = load([*words, "budget.tokens=null", "budget.flops=1e13"])
    check_warm_up(of_flops, preflight(of_flops, 1))  # whose number of steps is an estimate
    (tmp_path / "long" / "checkpoints").mkdir(parents=True)
    check_warm_up(config, preflight(config, 1))  # an earlier release began it


def test_a_run_with_overlapping_parts_does_not_start():
    config = load(["schedule=warmup_stable_decay", "schedule.warmup_steps=250", "schedule.decay_fraction=0.9"])
    with pytest.raises(ValueError, match="must fit into the run's 300 steps: at most 30 steps of warm-up"):
        preflight(config, 1)


@pytest.mark.parametrize(
    "words,steps,num_steps,last",
    [
        (["schedule=cosine", "schedule.warmup_steps=2"], 10, 10, None),
        (["schedule=cosine", "schedule.warmup_steps=2", "schedule.floor=1"], 4, 10, None),
        (["schedule=cosine", "schedule.warmup_steps=2"], 9, 10, "13.4%"),
        (["schedule=cosine", "schedule.warmup_steps=10"], 10, 10, "100.0%"),
        (["schedule=cosine", "schedule.warmup_steps=20"], 10, 10, "50.0%"),
        (["schedule=warmup_stable_decay", "schedule.warmup_steps=2"], 10, 10, None),
        (["schedule=warmup_stable_decay", "schedule.warmup_steps=2"], 9, 10, "100.0%"),
        (["schedule=warmup_stable_decay", "schedule.warmup_steps=2", "schedule.decay_fraction=0"], 9, 10, None),
        (["schedule=cosine", "schedule.warmup_steps=2"], 0, 10, None),
    ],
)
def test_a_rate_that_is_not_at_its_end_is_said(words: list[str], steps: int, num_steps: int, last: str | None):
    said = describe_last_rate(load(words).schedule, steps, num_steps)
    assert bool(said) == (last is not None)
    if last is not None:
        assert f"at step {steps} of {num_steps}, NOT AT ITS END: the last rate is {last} of the peak" in said
