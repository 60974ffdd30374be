"""Small contexts for routers, and their decisions as plain numbers."""

import copy
import functools
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_pretrain.config.compose import compose_values
from moe_pretrain.config.load import load
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.config.validate import validate
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.routers import RouterConfig
from moe_pretrain.moe.routers.top_k import TopKRouterConfig
from moe_pretrain.moe.types import ExpertShard, Routing, RoutingContext

PLAIN_TOP_K = TopKRouterConfig(
    name="top_k",
    top_k=2,
    score="softmax",
    weights="renormalised",
    weight_scale=1.0,
    num_groups=1,
    groups_per_token=1,
    projection_size=None,
    jitter=0.0,
    load_balance_weight=0.01,
    load_balance_level="micro_batch",
    router_z_weight=0.001,
)
"""Top-k with the losses of its own micro-batch, from which other configurations are changed."""

# Experts of each token's routes; expert 3 is in none of them.
FIXED = [[4, 0], [1, 4], [0, 1], [4, 2], [0, 4], [2, 1], [1, 0]]
RAGGED = [[4], [], [0, 1, 4], [4, 2], [], [1], [0, 4]]
LAYOUTS = [
    pytest.param(FIXED, 2, id="fixed"),
    pytest.param(FIXED, None, id="fixed, not told"),
    pytest.param(RAGGED, None, id="ragged"),
    pytest.param([[], [], []], None, id="no routes"),
    pytest.param([], None, id="no tokens"),
]


def make_context(tokens: int, sequences: int = 1, **changes: Any) -> RoutingContext:
    """``tokens`` tokens of text in ``sequences`` sequences."""
    mask = torch.ones(tokens, dtype=torch.bool)
    return replace(RoutingContext(mask, torch.arange(tokens), sequences, seed=11, step=4), **changes)


def moe_layer_of(*overrides: str) -> MoELayer:
    """The first MoE layer of the model that ``overrides`` configure, initialised."""
    config = load(overrides)
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed=1)
    return model.moe_layers()[0]


def by_token(routing: Routing, tokens: int) -> list[dict[int, float]]:
    """Expert -> weight of every token; a (token, expert) pair must occur once, tokens ascending."""
    assert routing.token_index.tolist() == sorted(routing.token_index.tolist())
    found: list[dict[int, float]] = [{} for _ in range(tokens)]
    for token, expert, weight in zip(
        routing.token_index.tolist(), routing.expert_index.tolist(), routing.weight.tolist(), strict=True
    ):
        assert expert not in found[token]
        found[token][expert] = weight
    return found


def experts_only(num_experts: int, width: int) -> MoEConfig:
    """A layer of routed experts and nothing else."""
    return MoEConfig(
        num_experts=num_experts,
        expert_hidden_size=width,
        num_shared_experts=0,
        shared_expert_hidden_size=1,
        every_k_layers=1,
        num_leading_dense_layers=0,
        gate_rank=None,
        expert_width_multiple=8,
    )


def refusal(config: RouterConfig, num_experts: int, **changes: Any) -> str:
    """The complaint about a run whose router is ``config`` with ``changes``, in a model of ``num_experts``."""
    values = copy.deepcopy(_values())
    values["router"] = asdict(config) | changes  # type: ignore[call-overload]  # every scheme is a dataclass
    values["model"]["moe"]["num_experts"] = num_experts
    with pytest.raises(ConfigError) as caught:
        validate(values)
    return str(caught.value)


@functools.cache
def _values() -> dict[str, Any]:
    return compose_values([])


def routes_of(experts_of_token: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token and expert of each route, token-major."""
    pairs = [(token, expert) for token, experts in enumerate(experts_of_token) for expert in experts]
    flat = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return flat[:, 0], flat[:, 1]
