"""Mixture-of-experts layers: routers, dispatch, experts and combine. Torch only; the exchange is handed in.

The door for authors of a routing scheme: ``from moe_pretrain.moe import BalancedRouter, BalancedRouterConfig, ...``.
"""

from moe_pretrain.moe.losses import count_routes, load_balance_loss, router_z_loss
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import (
    BalancedRouter,
    LinearRouter,
    balance_counts,
    router_logits,
    router_use,
    routes_by_group,
)
from moe_pretrain.moe.routers.config import (
    BalancedRouterConfig,
    FixedCountConfig,
    LinearRouterConfig,
    RouterConfig,
    check_within_experts,
)
from moe_pretrain.moe.types import BalanceLevel, RouterUse, Routing, RoutingContext, StepUse

__all__ = [
    "BalanceLevel",
    "BalancedRouter",
    "BalancedRouterConfig",
    "FixedCountConfig",
    "LinearRouter",
    "LinearRouterConfig",
    "Router",
    "RouterConfig",
    "RouterUse",
    "Routing",
    "RoutingContext",
    "StepUse",
    "balance_counts",
    "check_within_experts",
    "count_routes",
    "load_balance_loss",
    "router_logits",
    "router_use",
    "router_z_loss",
    "routes_by_group",
]
