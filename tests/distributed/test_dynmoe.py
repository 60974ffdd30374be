"""Experts that come into use in training: the same on every topology, in master weights and moments, and saved."""

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
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.expert_start import start_expert
from moe_pretrain.engine.intervals import global_shape, pieces
from moe_pretrain.moe.counter_noise import start_noise
from moe_pretrain.moe.types import ExpertStart
from moe_pretrain.verify.verify import own_micro_batches

SLOT, NOISE, KEY = 2, 0.1, 7
SOURCES = torch.tensor([True, True, False, True])
WORDS = ("router=dynmoe", "router.initial_experts=2", "router.idle_steps=1", "router.record_steps=2")
"""The first window is of steps 1 and 2, so that an expert is added after step 2."""
Arrays = dict[str, dict[str, Tensor]]


def _config(*overrides: str) -> Config:
    ranks = dist.get_world_size()
    return tiny(*WORDS, f"parallel.processes={ranks}", *overrides, rows=8, micro_batch_size=2)


def _arrays(engine: TrainEngine) -> Arrays:
    """Weights and moments of every parameter over all experts, from what each rank's optimizer owns."""
    own = [
        (piece.name, kind, piece.start, values.clone())
        for piece in pieces(engine)
        for kind, values in piece.arrays().items()
    ]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    found: Arrays = {}
    for name, parameter in engine.model.named_parameters():
        shape = global_shape(engine, parameter)
        found[name] = {}
        for other, kind, start, values in (part for rank in everywhere for part in rank):
            if other == name:
                whole = found[name].setdefault(kind, torch.full(shape, torch.nan).flatten())
                whole[start : start + len(values)] = values
        found[name] = {kind: values.view(shape) for kind, values in found[name].items()}
    return found


def _step(engine: TrainEngine, config: Config, step: int) -> None:
    batches = random_batches(config, dist.get_world_size())[step]
    engine.step(step, own_micro_batches(batches, engine._plan, dist.get_rank()))


def _edit(overrides: list[str]) -> tuple[Arrays, Arrays, dict[str, Tensor]]:
    """What an engine holds before and after an expert's start, and its model's own weights then."""
    config = _config("router.idle_steps=100", *overrides)
    engine = build_engine(config)
    _step(engine, config, 0)
    before = _arrays(engine)
    layer = engine.model.moe_layers()[0]
    start_expert(engine, layer, ExpertStart(SLOT, ("weight", "thresholds"), SOURCES, NOISE, KEY))
    after = _arrays(engine)
    weights = {name: p.detach().clone() for name, p in layer.router.named_parameters()}
    slots = list(layer.experts.expert_ids)
    if SLOT in slots:
        weights |= {f"experts.{n}": p.detach()[slots.index(SLOT)].clone() for n, p in layer.experts.named_parameters()}
    return before, after, weights


PLACES = {
    "one rank": (1, ["engine.zero_stage=1"]),
    "ZeRO 0": (2, ["parallel.expert_parallel_size=2", "engine.zero_stage=0"]),
    "ZeRO 1": (2, ["parallel.expert_parallel_size=2", "engine.zero_stage=1"]),
    "ZeRO 2, experts on every rank": (2, ["engine.zero_stage=2"]),
    "bfloat16": (2, ["parallel.expert_parallel_size=2", "engine.zero_stage=1", "engine.dtype=bfloat16"]),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_new_experts_weights_reach_the_masters_and_its_moments_are_forgotten(place: str) -> None:
    ranks, overrides = PLACES[place]
    results = run_on_ranks(_edit, ranks, overrides)
    before, after, _ = results[0]
    prefix, changed = "blocks.0.feed_forward.", set()
    for number, name in enumerate(("in_weight", "out_weight")):
        own, was = after[f"{prefix}experts.{name}"], before[f"{prefix}experts.{name}"]["weight"]
        if "dtype=bfloat16" in overrides[-1]:
            was = was.bfloat16().float()  # the mean is of the weights that the forward pass has
        mean = was[SOURCES].mean(dim=0)
        noise = start_noise(mean.shape, 0, KEY, 0, number)
        expected = mean + NOISE * mean.square().mean().sqrt() * noise
        torch.testing.assert_close(own["weight"][SLOT], expected, atol=1e-6, rtol=1e-6)
        for _, _, weights in results:
            if f"experts.{name}" in weights:
                held = weights[f"experts.{name}"]
                torch.testing.assert_close(held, own["weight"][SLOT].to(held.dtype), atol=0, rtol=0)
        changed.add(f"{prefix}experts.{name}")
    changed |= {f"{prefix}router.weight", f"{prefix}router.thresholds"}
    for name, kinds in after.items():
        for kind, values in kinds.items():
            assert values.isfinite().all(), "a part of the array is nowhere"
            others = [row for row in range(len(values)) if row != SLOT or name not in changed]
            assert torch.equal(values[others], before[name][kind][others]), (name, kind)
            if name in changed and kind != "weight":
                assert not values[SLOT].any(), (name, kind)
    moments = before[f"{prefix}experts.in_weight"]["exp_avg"][[0, 1]]
    assert moments.any(), "without moments there is nothing to forget"


def _run(overrides: list[str], folder: str | None) -> dict[str, Any]:
    """Two steps, a checkpoint right after an expert has come, and one step more."""
    config = _config(*overrides)
    engine = build_engine(config)
    for step in range(2):
        _step(engine, config, step)
    if folder is not None:
        checkpoints.save(engine, Path(folder), TrainState(step=2), keep_last=1)
    found = {"buffers": _buffers(engine), "arrays": _arrays(engine)}
    _step(engine, config, 2)
    return found | {"next": _arrays(engine), "next buffers": _buffers(engine)}


def _resume(overrides: list[str], folder: str) -> dict[str, Any]:
    config = _config(*overrides)
    engine = build_engine(config)
    path, manifest = store.newest(Path(folder), pytest.fail)
    store.restore(engine, path, manifest)
    found = {"buffers": _buffers(engine), "arrays": _arrays(engine)}
    _step(engine, config, 2)
    return found | {"next": _arrays(engine), "next buffers": _buffers(engine)}


def _buffers(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in engine.model.named_buffers()}


EXPERT_PARALLEL = ["parallel.expert_parallel_size=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Each rank's result, of runs and of what goes on from the first one's checkpoint."""
    folder = str(tmp_path_factory.mktemp("run"))
    return {
        "expert parallel": run_on_ranks(_run, 2, EXPERT_PARALLEL, folder),
        "data parallel": run_on_ranks(_run, 2, [], None),
        "one rank": run_on_ranks(_run, 1, [], None),
        "recomputed": run_on_ranks(_run, 2, [*EXPERT_PARALLEL, "model.recompute=full"], None),
        "resumed": run_on_ranks(_resume, 2, EXPERT_PARALLEL, folder),
        "resumed with copies": run_on_ranks(_resume, 2, ["engine.zero_stage=2"], folder),
        "resumed on one": run_on_ranks(_resume, 1, [], folder),
    }


def _same_bits(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            _same_bits(value, right[name])
        else:
            assert torch.equal(value, right[name]), name


def test_an_expert_came_on_every_rank_alike(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Ranks have different text; by their own records they would come apart."""
    first, second = runs["data parallel"]
    in_use = [value.tolist() for name, value in first["buffers"].items() if name.endswith("in_use")]
    assert [1, 1, 1, 0] in in_use, in_use
    for name in ("buffers", "arrays", "next buffers", "next"):
        _same_bits(first[name], second[name])
    for other in ("expert parallel", "one rank", "recomputed"):
        for key in ("buffers", "next buffers"):
            for name, value in first[key].items():
                torch.testing.assert_close(runs[other][0][key][name], value, atol=2e-5, rtol=2e-5)
        for name, kinds in first["next"].items():
            torch.testing.assert_close(runs[other][0]["next"][name]["weight"], kinds["weight"], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("resumed", ["resumed", "resumed with copies", "resumed on one"])
def test_a_checkpoint_right_after_it_came_is_the_run_bit_for_bit(
    runs: dict[str, list[dict[str, Any]]], resumed: str
) -> None:
    trained = runs["expert parallel"][0]
    for rank in runs[resumed]:
        _same_bits(trained["buffers"], rank["buffers"])
        _same_bits(trained["arrays"], rank["arrays"])
    if resumed == "resumed":
        _same_bits(trained["next"], runs[resumed][0]["next"])
