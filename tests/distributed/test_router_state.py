"""Router state without a gradient (a bias, a threshold): the same on every rank and topology, and saved with the run.

One start of two processes and one of one process make all runs; every test then looks at its own results. Batches are
those of ``verify``, with padding rows, so ranks and micro-batches have different numbers of tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import checkpoints
from helpers.builders import NUM_STEPS, random_batches, tiny
from helpers.engines import build_engine
from helpers.processes import run_on_ranks
from torch import Tensor

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.store import TrainState
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.engine import StepResult, TrainEngine
from moe_pretrain.moe.types import MoEOutput, StepUse
from moe_pretrain.verify.verify import own_micro_batches

pytestmark = pytest.mark.slow  # test_pooled_quantiles.py has its kind in the fast set

# The level last_step has state of its own: the layer's last routes.
GLOBAL = "router.load_balance_level=global_batch"
SCHEMES = {
    "loss_free": ("router=loss_free",),
    # As many experts as there are on average: a rank by itself, or a layer, would now and then move the other way.
    "relu": ("router=relu", GLOBAL, "router.target_experts=2.1", "router.initial_sparsity_weight=0.01"),
    # From 0.7 the mean is close to the target, so that a rank by itself would now and then move the other way.
    "top_p": (
        "router=top_p",
        GLOBAL,
        "router.threshold=0.7",
        "router.target_experts=2.5",
        "router.controller_rate=0.01",
    ),
    # What these make of their histograms is in test_pooled_quantiles.py.
    "quantile": ("router=quantile",),
    "expert_threshold": ("router=expert_threshold",),
    "by_layer": ("router=by_layer", "router.layers={0:expert_threshold,1:loss_free}"),
}
COUNTED = ("loss_free", "relu", "top_p")
"""Schemes whose state follows from the routes alone."""
STATE = {"loss_free": "expert_bias", "relu": "sparsity_weight", "top_p": "threshold"}
RATE = 0.001  # of the bias, as shipped
Run = dict[str, Any]


# What the ranks do.


def _config(scheme: str, *overrides: str) -> Config:
    """2 micro-batches per step on each of 2 ranks, or 4 on one; 4 experts, two layers."""
    ranks = dist.get_world_size()
    topology = (f"parallel.processes={ranks}", f"parallel.expert_parallel_size={ranks}")
    return tiny(*SCHEMES[scheme], *topology, *overrides, rows=8, micro_batch_size=2)


def _state(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in engine.model.named_buffers()}


def _watch_updates(engine: TrainEngine) -> list[tuple[int, list[float], int]]:
    """(layer, routes, tokens) of every update of a router from here on."""
    calls: list[tuple[int, list[float], int]] = []
    for layer in engine.model.moe_layers():

        def noting(use: StepUse, router: Any = layer.router) -> None:
            calls.append((router.layer, use.tokens_per_expert.tolist(), use.tokens))
            type(router).after_step(router, use)

        layer.router.after_step = noting
    return calls


def _watch_routes(engine: TrainEngine) -> list[Tensor]:
    """Routes of each forward pass with gradients, ``[experts]``, layers in turn; of this rank alone."""
    seen: list[Tensor] = []

    def note(module: Any, inputs: Any, output: MoEOutput) -> None:
        if torch.is_grad_enabled():
            seen.append(output.use.tokens_per_expert)

    for layer in engine.model.moe_layers():
        layer.register_forward_hook(note)
    return seen


def _train(config: Config, folder: Path | None = None) -> Run:
    """Three steps, then an evaluation, then a checkpoint."""
    engine = build_engine(config)
    steps = random_batches(config, dist.get_world_size())
    run: Run = {"start": _state(engine), "states": []}
    run["updates"], routes = _watch_updates(engine), _watch_routes(engine)
    results: list[StepResult] = []
    for step, batches in enumerate(steps):
        results.append(engine.step(step, own_micro_batches(batches, engine._plan, dist.get_rank())))
        run["states"].append(_state(engine))
    num_layers = len(engine.model.moe_layers())
    # [steps, layers, experts] of this rank alone
    run["own routes"] = torch.stack(routes).view(NUM_STEPS, -1, num_layers, 4).sum(dim=1)
    run["micro-batches"] = len(routes) // (NUM_STEPS * num_layers)
    run["own text"] = [
        sum(int((b.document_ids >= 0).sum()) for b in own_micro_batches(batches, engine._plan, dist.get_rank()))
        for batches in steps
    ]
    run["loss"] = [result.loss for result in results]
    engine.evaluate(own_micro_batches(steps[0], engine._plan, dist.get_rank()))
    run["after evaluation"] = _state(engine)
    if folder is not None:
        checkpoints.save(engine, folder, TrainState(step=NUM_STEPS), keep_last=1)
    return run


def _restore(config: Config, folder: Path) -> dict[str, Tensor]:
    engine = build_engine(config)
    path, manifest = store.newest(folder, pytest.fail)
    store.restore(engine, path, manifest)
    return _state(engine)


def _on_two_ranks(folder: str) -> Run:
    out: Run = {}
    for scheme in SCHEMES:
        out[scheme] = _train(_config(scheme), Path(folder) / scheme)
        out[f"{scheme} restored"] = _restore(_config(scheme), Path(folder) / scheme)
        out[f"{scheme} recompute"] = _train(_config(scheme, "model.recompute=full"))
        bfloat16 = _config(scheme, "engine.dtype=bfloat16")
        out[f"{scheme} bfloat16"] = _train(bfloat16, Path(folder) / f"{scheme} bfloat16")
        out[f"{scheme} bfloat16 restored"] = _restore(bfloat16, Path(folder) / f"{scheme} bfloat16")
    return out


def _on_one_rank(folder: str) -> Run:
    out: Run = {}
    for scheme in SCHEMES:
        out[scheme] = _train(_config(scheme))
        out[f"{scheme} restored"] = _restore(_config(scheme), Path(folder) / scheme)
    return out


# The tests.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Run]]:
    """Runs by name, those of the two ranks and then that of one rank where it was made."""
    folder = str(tmp_path_factory.mktemp("runs"))
    results = [*run_on_ranks(_on_two_ranks, 2, folder), *run_on_ranks(_on_one_rank, 1, folder)]
    return lambda name: [result[name] for result in results if name in result]


Runs = Callable[[str], list[Run]]


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys() and len(left) in (2, 3, 4)  # of both layers
    for name, value in left.items():
        assert value.dtype == right[name].dtype == torch.float32, name
        assert torch.equal(value, right[name]), (name, value, right[name])


def signs(routes: Tensor) -> Tensor:
    """The bias's direction per layer and expert."""
    return torch.sign(routes.mean(dim=-1, keepdim=True) - routes)


def moved_by_hand(scheme: str, routes: Tensor, tokens: list[int]) -> list[list[float]]:
    """State of each layer after the steps whose ``routes [steps, layers, experts]`` and text tokens are given."""
    if scheme == "loss_free":
        return (RATE * signs(routes).sum(dim=0)).tolist()
    means = routes.sum(dim=-1) / torch.tensor(tokens)[:, None]
    if scheme == "relu":
        weight = 0.01 * 1.2 ** torch.sign(means.mean(dim=1) - 2.1).sum()
        return [[float(weight)]] * 2  # one for both layers
    return (0.7 + 0.01 * torch.sign(2.5 - means).sum(dim=0))[:, None].tolist()


def last(run: Run, scheme: str) -> list[list[float]]:
    state = run["states"][-1]
    names = [f"blocks.{layer}.feed_forward.router.{STATE[scheme]}" for layer in (0, 1)]
    assert sorted(state) == names
    return [state[name].view(-1).tolist() for name in names]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_is_the_same_on_every_rank_and_on_one(runs: Runs, scheme: str) -> None:
    first, second, alone = runs(scheme)
    for step in range(NUM_STEPS):
        assert_same_bits(first["states"][step], second["states"][step])
        assert_same_bits(first["states"][step], alone["states"][step])
    assert (first["micro-batches"], alone["micro-batches"]) == (2, 4)
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-5)  # and so is everything it steers


def check_moves(runs: Runs, scheme: str) -> None:
    """One update per layer and step, from counts over ranks and micro-batches; by those of a rank it would differ."""
    ranks = runs(scheme)[:2]
    routes = ranks[0]["own routes"] + ranks[1]["own routes"]
    text = [sum(own) for own in zip(ranks[0]["own text"], ranks[1]["own text"], strict=True)]
    updates = [(layer, routes[step, layer].tolist(), text[step]) for step in range(NUM_STEPS) for layer in (0, 1)]
    by_hand = moved_by_hand(scheme, routes, text)
    for run in runs(scheme):
        assert run["updates"] == updates
        for ours, theirs in zip(last(run, scheme), by_hand, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
        assert last(run, scheme) != [value.view(-1).tolist() for value in run["start"].values()]
    for rank in ranks:
        own = moved_by_hand(scheme, rank["own routes"], rank["own text"])
        assert torch.tensor(own).sub(torch.tensor(by_hand)).abs().max() > RATE / 2, "the batches show nothing"
    assert text[0] not in (96, 2 * ranks[0]["own text"][0])  # padding, unevenly


def test_top_p_moves_once_per_step_by_global_counts(runs: Runs) -> None:
    check_moves(runs, "top_p")


def test_relu_moves_once_per_step_by_global_counts(runs: Runs) -> None:
    check_moves(runs, "relu")


def test_c22_bias_moves_once_per_step_by_global_counts(runs: Runs) -> None:
    check_moves(runs, "loss_free")
    assert all(value.tolist() == [0.0] * 4 for run in runs("loss_free") for value in run["start"].values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_c22_evaluation_moves_nothing(runs: Runs, scheme: str) -> None:
    for run in [*runs(scheme), *runs(f"{scheme} recompute"), *runs(f"{scheme} bfloat16")]:
        assert_same_bits(run["states"][-1], run["after evaluation"])
        assert len(run["updates"]) == 2 * NUM_STEPS


@pytest.mark.parametrize("scheme", SCHEMES)
def test_recompute_gives_the_same_state(runs: Runs, scheme: str) -> None:
    for run, recomputed in zip(runs(scheme)[:2], runs(f"{scheme} recompute"), strict=True):
        assert run["updates"] == recomputed["updates"]
        assert_same_bits(run["states"][-1], recomputed["states"][-1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_c22_state_is_saved_bit_for_bit(runs: Runs, scheme: str) -> None:
    """On two ranks, and from two to one; in bfloat16 too."""
    trained, restored = runs(scheme)[0]["states"][-1], runs(f"{scheme} restored")
    assert len(restored) == 3
    for state in restored:
        assert_same_bits(trained, state)
    for run, state in zip(runs(f"{scheme} bfloat16"), runs(f"{scheme} bfloat16 restored"), strict=True):
        assert_same_bits(run["states"][-1], state)


@pytest.mark.parametrize("scheme", COUNTED)
def test_c22_state_is_float32_in_a_bfloat16_engine(runs: Runs, scheme: str) -> None:
    """Three steps of 0.001, or 0.01 from 0.7, are numbers that bfloat16 does not have."""
    ranks = runs(f"{scheme} bfloat16")
    for step in range(NUM_STEPS):
        assert_same_bits(ranks[0]["states"][step], ranks[1]["states"][step])
    routes = ranks[0]["own routes"] + ranks[1]["own routes"]
    text = [sum(own) for own in zip(ranks[0]["own text"], ranks[1]["own text"], strict=True)]
    exact = torch.tensor(moved_by_hand(scheme, routes, text))
    torch.testing.assert_close(torch.tensor(last(ranks[0], scheme)), exact, rtol=0, atol=1e-7)
    assert not torch.allclose(exact.bfloat16().float(), exact, rtol=0, atol=1e-7)
