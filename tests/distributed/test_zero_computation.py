"""Checkpoints of MoE++: its dense experts beside sharded ones, and the maps between layers, on other topologies."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import checkpoints
from helpers.builders import random_batches, tiny
from helpers.engines import build_engine
from helpers.processes import run_on_ranks
from torch import Tensor

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.store import TrainState
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.intervals import pieces
from moe_pretrain.verify.verify import own_micro_batches

Arrays = dict[tuple[str, str], dict[int, Tensor]]


def _engine(overrides: list[str]) -> TrainEngine:
    ranks = dist.get_world_size()
    words = ("router=moe_plus_plus", f"parallel.processes={ranks}", *overrides)
    return build_engine(tiny(*words, rows=8, micro_batch_size=2))


def _arrays(engine: TrainEngine) -> Arrays:
    """Elements that this rank's optimizer owns, by array and place in it."""
    return {
        (piece.name, kind): {piece.start: values.clone()}
        for piece in pieces(engine)
        for kind, values in piece.arrays().items()
    }


def _train(overrides: list[str], folder: str) -> Arrays:
    engine = _engine(overrides)
    config = tiny("router=moe_plus_plus", f"parallel.processes={dist.get_world_size()}", rows=8, micro_batch_size=2)
    for step, batches in enumerate(random_batches(config, dist.get_world_size())):
        engine.step(step, own_micro_batches(batches, engine._plan, dist.get_rank()))
    checkpoints.save(engine, Path(folder), TrainState(step=3), keep_last=1)
    return _arrays(engine)


def _restore(overrides: list[str], folder: str) -> Arrays:
    engine = _engine(overrides)
    path, manifest = store.newest(Path(folder), pytest.fail)
    store.restore(engine, path, manifest)
    return _arrays(engine)


def _whole(ranks: list[Arrays]) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], dict[int, Tensor]] = {}
    for arrays in ranks:
        for key, parts in arrays.items():
            found.setdefault(key, {}).update(parts)
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in found.items()}


OTHERS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "copies of the experts": (2, ["engine.zero_stage=2"]),
    "stage 0": (2, ["parallel.expert_parallel_size=2", "engine.zero_stage=0"]),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    folder = str(tmp_path_factory.mktemp("run"))
    return folder, run_on_ranks(_train, 2, ["parallel.expert_parallel_size=2"], folder)


@pytest.mark.parametrize("other", OTHERS)
def test_another_topology_holds_the_same_bits(trained: tuple[str, list[Any]], other: str) -> None:
    folder, ranks = trained
    number, overrides = OTHERS[other]
    ours, theirs = _whole(ranks), _whole(run_on_ranks(_restore, number, overrides, folder))
    assert any("zero_computation" in name for name, _ in ours) and any("residual_weight" in name for name, _ in ours)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
        assert value.any(), key
