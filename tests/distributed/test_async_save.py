"""A save written behind holds the state of the moment it was begun, and training does not wait for the disk."""

import threading
from pathlib import Path

import pytest
import torch
from helpers import checkpoints
from helpers.builders import tiny
from helpers.engines import build_engine, random_batches
from helpers.processes import run_on_ranks

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.store import TrainState
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.intervals import WEIGHT, pieces

POLICY = checkpoints.policy(keep_last=5, asynchronous=True)
OVERRIDES = ("parallel.expert_parallel_size=2", "engine.check_every_steps=0", "router=loss_free")


def snapshot(engine: TrainEngine) -> dict[str, torch.Tensor]:
    state = {name: value.detach().clone() for name, value in engine.model.state_dict().items()}
    for piece in pieces(engine):
        state |= {f"{kind} {piece.name}": value.clone() for kind, value in piece.arrays().items() if kind != WEIGHT}
    return state


def train_behind_a_slow_disk(folder: str) -> tuple[int, list[str]]:
    """Steps taken while the first save was held up, and what the loaded checkpoint differs in from its moment."""
    engine = build_engine(tiny(*OVERRIDES))
    engine.step(0, random_batches(engine, 0))
    saver = store.Saver(engine, Path(folder), POLICY, 60.0)
    expected = snapshot(engine)
    disk_is_free = threading.Event()
    saver.save(TrainState(step=1), before_commit=disk_is_free.wait)
    steps = 0
    for step in range(1, 4):
        assert saver.take(wait=False) is None
        engine.step(step, random_batches(engine, step))
        steps += 1
    assert store.newest(Path(folder), pytest.fail) is None
    torch.distributed.barrier()  # all have looked
    with pytest.raises(AssertionError, match="was not taken"):
        saver.save(TrainState(step=4))
    disk_is_free.set()
    outcome = saver.take(wait=True)
    assert outcome.path is not None and outcome.problem is None and saver.take(wait=True) is None
    changed = [name for name, value in snapshot(engine).items() if not torch.equal(value, expected[name])]
    assert len(changed) > len(expected) / 2, "training went on meanwhile"
    store.restore(engine, *store.newest(Path(folder), pytest.fail))
    loaded = snapshot(engine)
    return steps, [name for name, value in loaded.items() if not torch.equal(value, expected[name])]


@pytest.mark.slow
def test_the_state_of_the_moment_is_saved_while_training_goes_on(tmp_path: Path):
    assert run_on_ranks(train_behind_a_slow_disk, 2, str(tmp_path)) == [(3, []), (3, [])]


def fail_behind(folder: str) -> str:
    engine = build_engine(tiny("engine.check_every_steps=0"))
    saver = store.Saver(engine, Path(folder), POLICY, 60.0)

    def broken() -> None:
        raise ZeroDivisionError("a mistake in the program")

    saver.save(TrainState(step=1), before_commit=broken)
    try:
        saver.take(wait=True)
    except ZeroDivisionError as error:
        return str(error)
    return "nothing"


def test_a_mistake_in_the_writing_thread_is_raised_in_the_main_one(tmp_path: Path):
    assert run_on_ranks(fail_behind, 1, str(tmp_path)) == ["a mistake in the program"]
