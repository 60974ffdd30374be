"""Schemes whose decision or loss depends, or might, on how the batch is cut: two ranks with two micro-batches each.

Where tokens of a micro-batch compete the oracle competes in the same cuts; the losses' levels are those of the engine.
"""

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
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.types import Routing
from moe_pretrain.parallel.mesh import build_mesh
from moe_pretrain.verify.oracle import Oracle
from moe_pretrain.verify.verify import build_engine as build_recorded_engine
from moe_pretrain.verify.verify import compare, own_micro_batches, record, verify

LOUD = "router.initial_sparsity_weight=0.3"  # so that a wrong loss shows in the gradients
HEAVY = "router.load_balance_weight=0.5"
CASES = [
    ("router=top_k", HEAVY, "router.load_balance_level=last_step"),
    ("router=autonomy_top_p", HEAVY, "router.load_balance_level=last_step", "router.gate_rank=8"),
    ("router=expert_choice",),
    ("router=expert_choice", "router.capacity_factor=1.3", "engine.zero_stage=2"),
    ("router=relu", LOUD, "router.load_balance_level=global_batch", "engine.zero_stage=2"),
    ("router=relu", LOUD, "router.load_balance_level=last_step"),
    ("router=relu", LOUD, "router.load_balance_level=sequence"),
    ("router=relu", LOUD, "router.load_balance_level=micro_batch"),
    ("router=sinkhorn", "router.load_balance_level=global_batch"),
    ("router=sinkhorn", "router.load_balance_level=sequence", "engine.zero_stage=2"),
    (  # of each layer its own level, own sums and own rule of cutting
        *("router=by_layer", "model.num_layers=5"),
        "router.layers={0:{router:top_k,load_balance_level:last_step,load_balance_weight:0.5},1:hash,2:expert_choice,"
        "rest:{router:loss_free,top_k:3,load_balance_level:global_batch,load_balance_weight:0.3}}",
    ),
    ("router=sinkhorn", "router.load_balance_level=micro_batch", "router.score=sigmoid", "router.top_k=1"),
]
DECAY = 0.9


def _config(*overrides: str) -> Config:
    """Two micro-batches per step on each of 2 ranks, or four on one; padding, unevenly."""
    ranks = dist.get_world_size()
    topology = (f"parallel.processes={ranks}", f"parallel.expert_parallel_size={ranks}")
    return tiny(*topology, *overrides, rows=8, micro_batch_size=2)


def _verify(cases: list[tuple[str, ...]]) -> list[list[str]]:
    results = []
    for case in cases:
        said: list[str] = []
        config = _config(*case)
        plan = plan_run(config, dist.get_world_size(), ("cpu", "float32"))
        code = verify(config, plan, said.append)
        results.append([str(code), *said])
    return results


@pytest.fixture(scope="module")
def verified() -> dict[tuple[str, ...], list[list[str]]]:
    ranks = run_on_ranks(_verify, 2, CASES)
    return {case: [rank[index] for rank in ranks] for index, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.slow
def test_equals_the_oracle(verified: dict[tuple[str, ...], list[list[str]]], case: tuple[str, ...]) -> None:
    for code, *said in verified[case]:
        assert code == "0", "\n".join(said)
        assert said[0].startswith("2 ranks, expert parallel 2, ZeRO") and "2 micro-batches" in said[0]


def _close_all_gates_of_one_layer(model: DecoderLM) -> None:
    with torch.no_grad():
        model.moe_layers()[0].router.weight.zero_()


def _train_without_routes() -> list[str]:
    """What differs from the oracle where one layer has not a single route on any rank."""
    config = _config("router=relu", LOUD)
    mesh = build_mesh(config.parallel, "cpu")
    plan = plan_run(config, mesh.world_size, ("cpu", "float32"))
    engine = build_recorded_engine(config, plan, mesh, _close_all_gates_of_one_layer)
    steps = random_batches(config, dist.get_world_size())
    run = [record(engine, i, own_micro_batches(step, engine._plan, mesh.rank)) for i, step in enumerate(steps)]
    expected = mesh.on_main(lambda: Oracle(config, 3, change_model=_close_all_gates_of_one_layer).run(steps))
    assert all(step.tokens_per_expert[0].sum() == 0 < step.tokens_per_expert[1].sum() for step in run)
    return [str(row) for row in compare(run, expected, "float32") if not row.is_same]


def test_a_layer_without_routes_equals_the_oracle() -> None:
    """No rank sends or receives a row there, and training goes on."""
    assert run_on_ranks(_train_without_routes, 2) == [[], []]


def _thresholds(folder: str) -> dict[str, Any]:
    """Three steps: buffers after each, and every micro-batch's ``cutoff_sums``, of this rank."""
    config = _config("router=expert_choice", f"router.threshold_decay={DECAY}")
    engine = build_engine(config)
    sums: list[Tensor] = []
    for layer in engine.model.moe_layers():
        layer.router.register_forward_hook(
            lambda module, inputs, routing: sums.append(_sums_of(routing)) if module.training else None
        )
    states, tokens = [], []
    steps = random_batches(config, dist.get_world_size())
    for step, batches in enumerate(steps):
        result = engine.step(step, own_micro_batches(batches, engine._plan, dist.get_rank()))
        tokens.append(result.tokens)
        states.append({name: buffer.clone() for name, buffer in engine.model.named_buffers()})
    engine.evaluate(own_micro_batches(steps[0], engine._plan, dist.get_rank()))
    evaluated = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    if dist.get_world_size() == 2:
        checkpoints.save(engine, Path(folder), TrainState(step=3), keep_last=1)
    other = build_engine(config)
    path, manifest = store.newest(Path(folder), pytest.fail)
    store.restore(other, path, manifest)
    own = torch.stack(sums).view(len(steps), -1, 2, 3, 4)  # [steps, micro-batches, layers, sums, experts]
    restored = {name: buffer.clone() for name, buffer in other.model.named_buffers()}
    later = ("cutoff_z_scores", "z_score_steps")
    of_before = [each for each in manifest["intervals"] if not each["tensor"].endswith(later)]
    missing = store.restore(other, path, {**manifest, "intervals": of_before})
    older = dict(other.model.named_buffers())
    with pytest.raises(store.CheckpointError, match="covers 0 of 4 elements of buffer of [^\n]*thresholds"):
        no_buffers = [each for each in of_before if each["kind"] != "buffer"]
        store.restore(other, path, {**manifest, "intervals": no_buffers})
    return {
        "states": states,
        "evaluated": evaluated,
        "restored": restored,
        "older": older,
        "missing": missing,
        "own": own,
        "tokens": tokens,
    }


def _sums_of(routing: Routing) -> Tensor:
    assert routing.use.sums is not None
    return routing.use.sums.clone()


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two ranks, then one that restores what they saved."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return [*run_on_ranks(_thresholds, 2, folder), *run_on_ranks(_thresholds, 1, folder)]


def test_thresholds_are_the_same_on_every_rank(runs: list[dict[str, Any]]) -> None:
    first, second, alone = runs
    for ours, theirs, single in zip(first["states"], second["states"], alone["states"], strict=True):
        assert len(ours) == 6  # three buffers in two layers
        assert same_bits(ours, theirs)
        for name, value in ours.items():
            torch.testing.assert_close(value, single[name], rtol=1e-4, atol=0)


def _expected_thresholds(sums: Tensor, tokens: list[int]) -> Tensor:
    """``[layers, experts]`` after the steps with these sums ``[steps, layers, 3, experts]``."""
    cutoff, mean, square = (sums / torch.tensor(tokens, dtype=torch.float64)[:, None, None, None]).unbind(dim=2)
    spread = (square - mean.square()).sqrt()
    weights = torch.tensor([DECAY**2, DECAY, 1.0], dtype=torch.float64)
    z_score = (weights[:, None, None] * (cutoff - mean) / spread).sum(dim=0) / weights.sum()
    return mean[-1] + spread[-1] * z_score


def test_thresholds_move_by_the_cutoffs_of_all_micro_batches(runs: list[dict[str, Any]]) -> None:
    first, second, _ = runs
    assert first["own"].shape == second["own"].shape == (3, 2, 2, 3, 4)
    expected = _expected_thresholds((first["own"] + second["own"]).sum(dim=1), first["tokens"])
    own = _expected_thresholds(2 * first["own"].sum(dim=1), first["tokens"])
    for layer in (0, 1):
        thresholds = first["states"][-1][f"blocks.{layer}.feed_forward.router.evaluation.thresholds"].double()
        torch.testing.assert_close(thresholds, expected[layer], rtol=1e-5, atol=0)
        assert (thresholds - own[layer]).abs().max() > 1e-3, "one rank would do"


def test_a_checkpoint_of_before_the_z_scores_keeps_its_thresholds(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        for name, value in run["restored"].items():
            if name.endswith("thresholds"):
                assert torch.equal(run["older"][name], value) and value.min() > 0
            else:
                assert (run["older"][name] == 0).all() and value.abs().max() > 0
        assert sorted(run["missing"]) == sorted(name for name in run["restored"] if not name.endswith("thresholds"))


def test_thresholds_are_saved_and_evaluation_moves_nothing(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert same_bits(run["evaluated"], run["states"][-1])
        assert same_bits(run["restored"], runs[0]["states"][-1])  # on two ranks, and from two to one
