"""Cost of the parts of one MoE layer in a forward pass: counted from the configuration; ``moe.parts`` times them.

Routes are charged by the number that a run was measured to have, so adaptive schemes pay for what they use. Bytes are
what a part reads and writes in memory, or for the exchange what one rank sends and gets back.
"""

from collections.abc import Mapping

from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.model.size import ModelSize, mean_ffn_experts
from moe_pretrain.plan.activations import routes_of_rank
from moe_pretrain.plan.local_parameters import BYTES

Cost = dict[str, dict[str, float]]
"""Part -> ``flops_per_token``, ``flops_per_route``, ``bytes_per_token``, ``bytes_per_route``; what is missing is 0."""


def layer_cost(config: Config, dtype: Dtype, size: ModelSize) -> Cost:
    """The parts of one MoE layer, forward, on average over layers whose schemes differ; empty without one.

    ``router`` holds all that is run to decide: its own products, those of experts that it asks, and a statistic of the
    attention. ``permute`` copies rows into expert order, ``combine`` reads the experts' rows and sums them per token.
    """
    layers = len(config.model.moe_layers)
    if not layers or config.router.dense_experts:
        return {}
    moe, hidden = config.model.moe, config.model.hidden_size
    row = BYTES[dtype] * moe.routed_size(hidden)
    mapped = 2 * hidden * moe.latent_size if moe.latent_size else 0
    ranks = config.parallel.expert_parallel_size
    one_row = routes_of_rank(config, dtype, 1)  # of the expected number of routes
    routes = config.model.sequence_length * mean_ffn_experts(config.model, config.router)
    asked = 2.0 * (size.router_matmul + size.frozen_routers + size.scoring) + size.attention_statistic_flops
    asked += size.coupling_flops_per_token
    return {
        "router": {"flops_per_token": asked / layers},
        "permute": {"bytes_per_route": 2.0 * row},
        "exchange": {
            "bytes_per_route": (ranks - 1) / ranks * (one_row.sent_bytes + one_row.returned_bytes) / routes,
        },
        "experts": {
            "flops_per_route": 2.0 * size.experts_per_route / layers,
            "flops_per_token": (2.0 * size.constant_experts + size.merging_flops_per_token) / layers + 2.0 * mapped,
        },
        "shared experts": {"flops_per_token": 2.0 * hidden * (3 * moe.shared_width + moe.shared_expert_gate)},
        "combine": {
            "bytes_per_route": 1.0 * row,
            "bytes_per_token": 1.0 * row,
            "flops_per_token": size.combine_flops / layers,
        },
    }


def per_token(cost: Mapping[str, Mapping[str, float]], experts_per_token: float) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes of each part for one token that has ``experts_per_token`` routes."""

    def total(part: Mapping[str, float], unit: str) -> float:
        return part.get(f"{unit}_per_token", 0.0) + experts_per_token * part.get(f"{unit}_per_route", 0.0)

    return {name: (total(part, "flops"), total(part, "bytes")) for name, part in cost.items()}
