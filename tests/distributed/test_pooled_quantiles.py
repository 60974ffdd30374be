"""Schemes that read a quantile of the global batch: over all micro-batches of all ranks, from one sum of histograms.

Every score that a router saw is recorded on its rank. The state after each step must be what a sort of all of them
gives, within a bin, and not what the ranks' own quantiles average to.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.builders import NUM_STEPS, random_batches, tiny
from helpers.engines import build_engine
from helpers.processes import run_on_ranks
from torch import Tensor

from moe_pretrain.moe.types import RoutingContext
from moe_pretrain.verify.verify import own_micro_batches

EXPERTS, TOP_K, BINS = 4, 2, 1000
DECAY = 0.5
SCHEMES = {
    "quantile": ("router=quantile",),
    "quantile averaged over steps": ("router=quantile", f"router.ema_decay={DECAY}"),
    "expert_threshold": ("router=expert_threshold", f"router.ema_decay={DECAY}"),
    "expert_threshold without a route in the first step": (
        "router=expert_threshold",
        f"router.ema_decay={DECAY}",
        "router.initial_threshold=0.999999",
    ),
}
Run = dict[str, Any]


def _train(scheme: str) -> Run:
    """Three steps of 2 micro-batches on each of 2 ranks, or 4 on one; padding rows fall where they fall."""
    ranks = dist.get_world_size()
    topology = (f"parallel.processes={ranks}", f"parallel.expert_parallel_size={ranks}")
    config = tiny(*SCHEMES[scheme], *topology, rows=8, micro_batch_size=2)
    engine = build_engine(config)
    routers = [layer.router for layer in engine.model.moe_layers()]
    seen: list[list[Tensor]] = [[] for _ in routers]

    def note(router: Any, inputs: tuple[Tensor, RoutingContext]) -> None:
        hidden, context = inputs
        if torch.is_grad_enabled():
            scores = (hidden.detach() @ router.weight.detach().t()).sigmoid()
            seen[routers.index(router)].append(scores[context.token_mask])

    for router in routers:
        router.register_forward_pre_hook(note)
    state = "threshold" if "threshold" in scheme else "expert_bias"
    run: Run = {
        "experts per token": [],
        "scores": [],
        "states": [[getattr(router, state).clone() for router in routers]],
    }
    for step, batches in enumerate(random_batches(config, ranks)):
        result = engine.step(step, own_micro_batches(batches, engine._plan, dist.get_rank()))
        run["experts per token"].append(result.experts_per_token)
        run["scores"].append([torch.cat(of_layer) for of_layer in seen])
        run["states"].append([getattr(router, state).clone() for router in routers])
        for of_layer in seen:
            of_layer.clear()
    return run


def _all() -> dict[str, Run]:
    return {scheme: _train(scheme) for scheme in SCHEMES}


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Run]]:
    """Those of the two ranks, then that of one process with the same global batches."""
    return [*run_on_ranks(_all, 2), *run_on_ranks(_all, 1)]


def next_above(columns: Tensor) -> Tensor:
    """Per expert the ``quota + 1``-th smallest of ``columns [tokens, experts]``, ``quota`` being the share of top-k."""
    quota = int(TOP_K * len(columns) / EXPERTS)
    return columns.double().sort(dim=0).values[quota]


def wanted(scheme: str, scores: Tensor, bias: Tensor) -> Tensor:
    """What a step with these scores asks of the state; the bias before its mean is taken off."""
    if "threshold" in scheme:
        return -next_above(-scores)
    cutoffs = (scores + bias).sort(dim=1, descending=True).values[:, TOP_K : TOP_K + 1]
    return next_above(cutoffs - scores)


def moved(scheme: str, step: int, before: Tensor, target: Tensor) -> Tensor:
    """The state after ``step`` whose ``target`` is given."""
    if "threshold" in scheme:
        return before + (1 - DECAY) / (1 - DECAY ** (step + 1)) * (target - before)
    target = target - target.mean()
    return DECAY * before + (1 - DECAY) * target if "averaged" in scheme else target


def bin_width(scheme: str, before: Tensor) -> float:
    return 1 / BINS if "threshold" in scheme else float(before.max() - before.min() + 2) / BINS


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_is_the_same_on_every_rank_and_on_one(runs: list[dict[str, Run]], scheme: str) -> None:
    first, second, alone = (run[scheme] for run in runs)
    for step in range(NUM_STEPS + 1):
        for layer in (0, 1):
            assert torch.equal(first["states"][step][layer], second["states"][step][layer])
            assert torch.equal(first["states"][step][layer], alone["states"][step][layer])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pooled_over_ranks_and_micro_batches(runs: list[dict[str, Run]], scheme: str) -> None:
    ranks = [run[scheme] for run in runs[:2]]
    apart = 0.0
    for step in range(NUM_STEPS):
        for layer in (0, 1):
            before, after = (ranks[0]["states"][moment][layer] for moment in (step, step + 1))
            own = [rank["scores"][step][layer] for rank in ranks]
            assert len(own[0]) != len(own[1]) or step > 0  # padding, unevenly
            exact = moved(scheme, step, before, wanted(scheme, torch.cat(own), before))
            # A bin of an expert's own, and for a bias at most one of the mean.
            tolerance = 2 * bin_width(scheme, before) + 1e-5
            torch.testing.assert_close(after.double(), exact, rtol=0, atol=tolerance)
            averaged = sum(wanted(scheme, scores, before) for scores in own) / 2
            apart = max(apart, float((moved(scheme, step, before, averaged) - after).abs().max() / tolerance))
    assert apart > 3, "the batches show nothing"


def test_a_step_without_a_route_trains_and_sets_the_thresholds(runs: list[dict[str, Run]]) -> None:
    """The engine checks in every step that every parameter gets a gradient, be it zero."""
    for run in runs:
        nothing, *later = run["expert_threshold without a route in the first step"]["experts per token"]
        assert nothing == 0 and all(1 < mean < 3 for mean in later)
