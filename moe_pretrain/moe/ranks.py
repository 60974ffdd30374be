"""Routes by rank: every token takes, say, its second-best expert, whatever its scheme would choose."""

import torch
from torch import Tensor

from moe_pretrain.moe.losses import count_routes
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import best_first, router_use
from moe_pretrain.moe.types import Routing, RoutingContext


def route_by_rank(router: Router, hidden: Tensor, context: RoutingContext) -> Routing:
    """Route every token to the experts of ``context.ranks`` in the scheme's own order.

    Weights are the scheme's gates of these experts, divided by their sum: 1 for a single rank. With the ranks
    ``0 .. top_k - 1`` a scheme with renormalised weights routes as ever.

    Source:
        SCMoE (Shi et al. 2024, arXiv:2405.14507), rank-k routing.

    Raises:
        ValueError: The scheme orders no experts, or has fewer.
    """
    assert context.ranks is not None
    ranks, ranking = torch.tensor(context.ranks, device=hidden.device), router.ranking(hidden, context)
    if ranking is None:
        raise ValueError(f"{type(router).__name__} orders no experts for a token: there is no choice by rank")
    num_experts = ranking.scores.shape[1]
    if max(context.ranks) >= num_experts:
        raise ValueError(f"rank {max(context.ranks) + 1} must be at most the {num_experts} experts of a layer")
    chosen = best_first(ranking.scores, None)[:, ranks]
    weight = ranking.gates.gather(1, chosen)
    weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20) * ranking.scale
    if len(context.ranks) == 1:
        weight = torch.full_like(weight, ranking.scale)  # also where the gate is 0
    token = torch.arange(len(hidden), device=hidden.device).repeat_interleave(len(ranks))
    expert = chosen.flatten()
    groups = torch.zeros_like(expert)
    (counts,) = count_routes(expert, context.token_mask[token], groups, 1, num_experts)
    share = ranking.gates / ranking.gates.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    payload = None if ranking.payload is None else ranking.payload[token, expert]
    use = router_use(counts, share, context)
    return Routing(token, expert, weight.flatten(), len(ranks), use, payload=payload)
