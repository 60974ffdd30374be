"""A checkpoint kept from release 0.1 loads, on other topologies too, and goes on with the loss that it had then.

``tests/data/checkpoint_v1`` was written by ``write_kept`` on 2 ranks with expert parallel 2. It is never rewritten: a
later format gets a folder of its own beside it.
"""

from pathlib import Path

import pytest
import torch
from helpers import checkpoints
from helpers.builders import tiny
from helpers.engines import build_engine, random_batches
from helpers.processes import run_on_ranks

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.store import RunIdentity, TrainState
from moe_pretrain.config.schema import to_values
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.sanity import checksum
from moe_pretrain.train.resume_rules import changes

KEPT = Path(__file__).parents[1] / "data" / "checkpoint_v1"
STEPS = 2
_MODEL = (
    *("router=loss_free", "model.vocab_size=24", "model.num_layers=1", "model.hidden_size=8", "model.num_heads=2"),
    *("model.moe.num_experts=4", "model.moe.expert_hidden_size=6", "model.tie_embeddings=true"),
    *("engine.check_every_steps=0", "router.load_balance_weight=0.1"),
)
# What the engine that wrote it went on with, in float32 on a CPU.
NEXT_LOSSES = [3.305561499162154, 3.278847000815652]
ADAM_STEP = 2.0


def overrides_of(ep: int, stage: int) -> tuple[str, ...]:
    return (*_MODEL, f"parallel.expert_parallel_size={ep}", f"engine.zero_stage={stage}")


def next_losses(engine: TrainEngine) -> list[float]:
    """Losses of the two steps after the checkpoint: the second depends on the moments too."""
    return [engine.step(step, random_batches(engine, step)).loss for step in (STEPS, STEPS + 1)]


def write_kept(folder: str) -> list[float]:
    """How the kept checkpoint was made; the losses after it."""
    config = tiny(*overrides_of(2, 1), micro_batch_size=4)
    engine = build_engine(config)
    for step in range(STEPS):
        engine.step(step, random_batches(engine, step))
    identity = RunIdentity(config=to_values(config), world_size=2)
    state = TrainState(step=STEPS, tokens=STEPS * 192, identity=identity)
    checkpoints.save(engine, Path(folder), state, keep_last=1)
    return next_losses(engine)


def load_kept(ep: int, stage: int) -> tuple[list[float], list[int], float]:
    """Losses of the next steps, checksums of the loaded buffers, and AdamW's step before it."""
    engine = build_engine(tiny(*overrides_of(ep, stage), micro_batch_size=4))
    path, manifest = store.newest(KEPT, pytest.fail)
    store.restore(engine, path, manifest)
    biases = [int(checksum(buffer)) for buffer in engine.model.buffers() if buffer.dtype == torch.float32]
    return next_losses(engine), biases, manifest["adam_step"]


@pytest.mark.parametrize("ranks,ep,stage", [(2, 2, 1), (1, 1, 2), (2, 1, 0)])
@pytest.mark.fast("1-1-2")
def test_a_kept_checkpoint_loads_and_goes_on(ranks: int, ep: int, stage: int):
    results = run_on_ranks(load_kept, ranks, ep, stage)
    for losses, biases, adam_step in results:
        assert losses == pytest.approx(NEXT_LOSSES, rel=1e-6)
        assert biases and any(biases) and biases == results[0][1]
        assert adam_step == ADAM_STEP


THEN = {
    "seed": 0,
    "model": {"hidden_size": 8, "recompute": "none", "num_layers": 2},
    "optimizer": {"learning_rate": 0.1},
    "batch": {"global_batch_tokens": 8},
    "budget": {"tokens": 16},
    "run": {"name": "a"},
}


def changed(**parts: dict) -> dict:
    return {**THEN, **{name: {**THEN[name], **values} for name, values in parts.items()}}


def test_nothing_changed_is_nothing_said():
    assert changes(THEN, changed(run={"name": "b"})) == changes(THEN, THEN)
    assert (changes(THEN, THEN).refused, changes(THEN, THEN).allowed) == ([], [])


def test_every_difference_is_named_and_sorted_by_whether_it_may_be():
    now = changed(
        model={"hidden_size": 16, "num_layers": 3, "recompute": "full"},
        optimizer={"learning_rate": 0.2},
        batch={"global_batch_tokens": 4},
        budget={"tokens": 32},
    )
    found = changes(THEN, now)
    assert found.refused == [
        "batch.global_batch_tokens=4 must stay 8",
        "model.hidden_size=16 must stay 8",
        "model.num_layers=3 must stay 2",
    ]
    assert found.allowed == [
        "budget.tokens=32 (was 16)",
        "model.recompute=full (was none)",
        "optimizer.learning_rate=0.2 (was 0.1)",
    ]


@pytest.mark.parametrize("then,now", [("elastic", "elastic"), ("elastic", "topology"), ("topology", "elastic")])
def test_the_micro_batch_size_must_stay_while_bits_depend_on_it(then: str, now: str):
    before, after = (
        {**THEN, "engine": {"determinism": mode}, "batch": {**THEN["batch"], "micro_batch_size": size}}
        for mode, size in ((then, 2), (now, 4))
    )
    refused = ["batch.micro_batch_size=4 must stay 2"] if (then, now) == ("elastic", "elastic") else []
    assert changes(before, after).refused == refused


def test_fields_of_another_release_do_not_refuse_its_checkpoints():
    then = {**THEN, "model": {**THEN["model"], "old": 1}}
    found = changes(then, changed(model={"new": None}))
    assert found.refused == []
    assert found.allowed == ["model.new=null (not known then)", "model.old (was 1, no longer exists)"]
