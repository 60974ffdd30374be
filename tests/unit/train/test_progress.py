"""Progress of a run: what a checkpoint keeps of it, and what the next attempt takes over."""

import json
import math

import pytest

from moe_pretrain.checkpoint.store import RunIdentity, TrainState
from moe_pretrain.config.load import load
from moe_pretrain.schedule.budget import BudgetMeter
from moe_pretrain.schedule.loss_spikes import Rewind, Rewinds
from moe_pretrain.train.progress import RunProgress

TOKENS_PER_STEP = 100
EXPECTED_FLOPS = 10.0
CONFIG = load(["budget.tokens=3000", "spike.window_steps=3", "spike.deviations=2"])
LOSSES = [3.0, 3.1, 2.9, 3.0, 9.0, 9.1, 3.0, 2.9, 9.0, 3.0]


def progress(*budget: str) -> RunProgress:
    config = load(["budget.tokens=3000", *budget])
    return RunProgress(CONFIG.spike, TOKENS_PER_STEP, BudgetMeter(config.budget, TOKENS_PER_STEP, EXPECTED_FLOPS))


def step(run: RunProgress, loss: float) -> str | None:
    run.advance(2**62 + run.step)
    run.meter.charge(EXPECTED_FLOPS + run.step, 0.5)
    return run.spikes.judge(loss)


def kept(run: RunProgress) -> TrainState:
    """The state of ``run`` as a manifest keeps it."""
    state = run.state(None, RunIdentity(config={"seed": 1}))
    read = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    assert read == state
    return read


def test_a_run_that_stops_after_every_step_goes_on_as_one_that_never_stops() -> None:
    whole, parts = progress(), progress()
    whole.rewinds = parts.rewinds = Rewinds([Rewind(2, 3, 5)])
    spikes = []
    for loss in LOSSES:
        spikes.append(step(whole, loss))
        assert step(parts, loss) == spikes[-1]
        whole.validation_loss = parts.validation_loss = loss
        state, parts = kept(parts), progress()
        parts.restore(state)
        assert parts.saved_step == parts.step == whole.step and parts.data_step == whole.data_step
        assert parts.validation_loss == loss
        assert kept(parts) == kept(whole) == state
    assert [number for number, spike in enumerate(spikes) if spike] == [4, 8]
    assert whole.tokens == 1000 and whole.data_step == 12
    # 10 * 2**62 + 45, as a signed number of 64 bits
    assert whole.token_hash == -(2**63) + 45


def test_spent_flops_go_on_from_what_was_measured_and_end_the_run_at_the_same_step() -> None:
    """Steps cost more than expected: counted as expected from the resume on, the run would be longer."""
    words = ("budget.tokens=null", "budget.flops=11600")
    whole, resumed = progress(*words), progress(*words)
    for _ in range(4):
        step(whole, 3.0)
    resumed.restore(kept(whole))
    by_hand = sum(TOKENS_PER_STEP * (EXPECTED_FLOPS + done) for done in range(1, 5))
    assert resumed.meter.flops == whole.meter.flops == by_hand != 4 * TOKENS_PER_STEP * EXPECTED_FLOPS
    assert resumed.meter.seconds == 2.0
    assert resumed.meter.num_steps == whole.meter.num_steps
    while not resumed.meter.is_over:
        step(resumed, 3.0)
    while not whole.meter.is_over:
        step(whole, 3.0)
    assert resumed.step == whole.step == 8 and resumed.meter.flops == whole.meter.flops


def test_a_finished_step_has_no_validation_yet() -> None:
    run = progress()
    step(run, 3.0)
    run.validation_loss = 2.5
    step(run, 3.0)
    assert run.validation_loss is None and kept(run).validation_loss is None
    run.validation_loss = math.nan
    assert kept(run).validation_loss is None, "JSON has no word for it"


@pytest.mark.parametrize("known,recorded,then", [(2, 1, 2), (1, 2, 2), (0, 2, 2), (2, 0, 2)])
def test_rewinds_that_either_side_knows_of_stay_known(known: int, recorded: int, then: int) -> None:
    taken = [Rewind(8, 9, 10), Rewind(4, 7, 8)]
    before, after = progress(), progress()
    before.rewinds, after.rewinds = Rewinds(taken[:recorded]), Rewinds(taken[:known])
    after.restore(kept(before))
    assert after.rewinds.taken == taken[:then]


def test_a_checkpoint_of_an_earlier_release_counts_as_expected() -> None:
    run = progress()
    run.restore(TrainState.from_json({"step": 4, "token_hash": 7}))
    assert (run.step, run.saved_step, run.tokens, run.data_step, run.token_hash) == (4, 4, 400, 4, 7)
    assert (run.meter.steps, run.meter.flops, run.meter.seconds) == (4, 4000, 0.0)
    assert run.validation_loss is None and run.spikes.state() == progress().spikes.state()
