"""FLOPs of a token by part, and bytes that a rank sends in a step; from the configuration alone."""

import math

import torch

from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.model.size import ModelSize
from moe_pretrain.moe.build import build_router
from moe_pretrain.plan.activations import routes_of_rank
from moe_pretrain.plan.local_parameters import BYTES, LocalParameters, local_parameters
from moe_pretrain.schedule.batch_plan import BatchPlan

FROZEN, MEASURED = "routers that nothing trains", "attention that a router measures"
"""Parts without a backward."""
MERGED, REBUILT = "merging of experts", "rebuilding of experts"
COUPLED = "coupling of experts and router"
COMPARED = "expert outputs that are compared"
"""Part whose backward costs as much as its forward."""
GRADIENTS, WEIGHTS = "gradients, all-reduce in float32", "weights, all-gather"
ROUTES = "tokens to experts and back"


def flops_by_part(size: ModelSize) -> dict[str, float]:
    """Forward FLOPs of one token by part; they sum to ``forward_flops_per_token``."""
    parts = {
        "attention projections": 2.0 * size.attention,
        "attention scores": size.attention_score_flops,
        "dense networks and shared experts": 2.0 * size.dense_ffn,
        "routers": 2.0 * size.router_matmul,
        MERGED: size.merging_flops_per_token,
        REBUILT: size.rebuilding_flops_per_token,
        COUPLED: size.coupling_flops_per_token,
        FROZEN: 2.0 * size.frozen_routers,
        "routed experts": 2.0 * size.active_experts,
        "constant experts": 2.0 * size.constant_experts,
        "experts that are only asked": 2.0 * size.scoring,
        MEASURED: size.attention_statistic_flops,
        COMPARED: size.combine_flops,
        "output head": 2.0 * size.head_matmul,
    }
    assert math.isclose(sum(parts.values()), size.forward_flops_per_token)
    return parts


def extra_forward(config: Config, size: ModelSize, plan: BatchPlan) -> float:
    """FLOPs per token beyond the model's: recomputation, and the pass that counts routes ahead under accumulation."""
    parts = flops_by_part(size)
    attention = parts["attention projections"] + parts["attention scores"]
    names = ("routed experts", "constant experts", "experts that are only asked", "dense networks and shared experts")
    networks = sum(parts[name] for name in (*names, COMPARED, REBUILT))
    again = {"none": 0.0, "selective": attention, "full": attention + networks}[config.model.recompute]
    ahead = size.forward_flops_per_token - parts["output head"] if _counts_ahead(config, plan) else 0.0
    # The logits of two passes are made again in backward.
    logits = parts["output head"] if size.num_passes > 1 else 0.0
    merged_again = parts[MERGED] * (2 if config.model.recompute == "full" else 1)
    return size.num_passes * (again + logits) + merged_again + ahead


def _counts_ahead(config: Config, plan: BatchPlan) -> bool:
    if plan.accumulation == 1 or config.router.dense_experts:
        return False
    model, router = config.model, config.router
    with torch.device("meta"):
        return any(
            router.of_layer(layer).balance_level != "last_step"
            and build_router(model.moe, router, model.hidden_size, layer).needs_global_routes
            for layer in router.twin_layers(model.moe_layers)
        )


def exchange_passes(config: Config, plan: BatchPlan) -> tuple[int, int]:
    """Times that a micro-batch's tokens go to experts and back: in forward passes, however often, and in backward."""
    passes = config.router.num_passes
    return passes * (1 + (config.model.recompute == "full")) + _counts_ahead(config, plan), passes


def traffic(
    config: Config, dtype: Dtype, plan: BatchPlan, parameters: LocalParameters | None = None
) -> dict[str, float]:
    """Bytes that one rank sends in a step, with ring algorithms and an even load.

    ``parameters`` are those of one rank, where they have been counted.
    """
    ranks, expert_parallel = config.parallel.processes, config.parallel.expert_parallel_size
    parameters = parameters or local_parameters(config)
    copies = ranks // expert_parallel  # of each expert
    dense = parameters.dense + parameters.kept
    shared = {ranks: dense, copies: 0}
    shared[copies] += parameters.expert
    ring = {count: (count - 1) / count * elements for count, elements in shared.items()}
    stage = config.engine.stage(dtype, ranks)
    weights = BYTES[dtype] * sum(ring.values()) if stage else 0.0
    # DeepSpeed's stage 2 reduces the gradients of every micro-batch.
    reductions = plan.accumulation if stage == 2 else 1
    routed = routes_of_rank(config, dtype, plan.micro_batch_size)
    passes = sum(exchange_passes(config, plan))
    layers = 0 if config.router.dense_experts else len(config.model.moe_layers)
    one_way = (expert_parallel - 1) / expert_parallel * (routed.sent_bytes + routed.returned_bytes)
    return {
        GRADIENTS: reductions * 2 * 4 * sum(ring.values()),
        WEIGHTS: weights,
        ROUTES: passes * layers * plan.accumulation * one_way,
    }
