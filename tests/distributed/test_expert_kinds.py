"""Checkpoints of experts that are no single stack, on other topologies: MoE++'s dense ones, those of several widths."""

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

SCHEMES = {
    "moe_plus_plus": ("router=moe_plus_plus",),
    "unequal": ("experts=unequal", "model.moe.experts.pattern=[1,3]"),
}
PARTS = {"moe_plus_plus": ("zero_computation", "residual_weight"), "unequal": ("classes.0.", "classes.1.")}
Arrays = dict[tuple[str, str], dict[int, Tensor]]


def _engine(scheme: str, overrides: list[str]) -> TrainEngine:
    ranks = dist.get_world_size()
    words = (*SCHEMES[scheme], f"parallel.processes={ranks}", *overrides)
    return build_engine(tiny(*words, rows=8, micro_batch_size=2))


def _arrays(engine: TrainEngine) -> Arrays:
    """Elements that this rank's optimizer owns, by array and place in it."""
    return {
        (piece.name, kind): {piece.start: values.clone()}
        for piece in pieces(engine)
        for kind, values in piece.arrays().items()
    }


def _train(scheme: str, overrides: list[str], folder: str) -> Arrays:
    engine = _engine(scheme, overrides)
    config = tiny(*SCHEMES[scheme], f"parallel.processes={dist.get_world_size()}", rows=8, micro_batch_size=2)
    for step, batches in enumerate(random_batches(config, dist.get_world_size())):
        engine.step(step, own_micro_batches(batches, engine._plan, dist.get_rank()))
    checkpoints.save(engine, Path(folder), TrainState(step=3), keep_last=1)
    return _arrays(engine)


def _restore(scheme: str, overrides: list[str], folder: str) -> Arrays:
    engine = _engine(scheme, overrides)
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


@pytest.fixture(scope="module", params=SCHEMES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[Any]]:
    folder = str(tmp_path_factory.mktemp("run"))
    expert_parallel = ["parallel.expert_parallel_size=2"]
    return request.param, folder, run_on_ranks(_train, 2, request.param, expert_parallel, folder)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.fast("one rank")
def test_another_topology_holds_the_same_bits(trained: tuple[str, str, list[Any]], other: str) -> None:
    scheme, folder, ranks = trained
    number, overrides = OTHERS[other]
    ours, theirs = _whole(ranks), _whole(run_on_ranks(_restore, number, scheme, overrides, folder))
    assert all(any(part in name for name, _ in ours) for part in PARTS[scheme])
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
        assert value.any(), key
