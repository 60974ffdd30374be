"""Mixture-of-experts layers. This is the package's one door: the table of routers and the builder of a layer."""

from collections.abc import Callable

from moe_pretrain.moe.experts.swiglu import SwiGLU
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.routers.dense import DenseConfig
from moe_pretrain.moe.routers.loss_free import LossFreeRouter, LossFreeRouterConfig
from moe_pretrain.moe.routers.top_k import TopKRouter, TopKRouterConfig
from moe_pretrain.moe.routers.top_p import TopPRouter, TopPRouterConfig
from moe_pretrain.moe.types import ExpertShard, Router

RouterConfig = TopKRouterConfig | LossFreeRouterConfig | TopPRouterConfig | DenseConfig
"""The ``router`` group; its ``name`` says which."""

ROUTERS: dict[str, Callable[..., Router]] = {
    "loss_free": LossFreeRouter,
    "top_k": TopKRouter,
    "top_p": TopPRouter,
}
"""Scheme name -> module. A new scheme adds one row here, its configuration above, and one file in ``routers/``."""


def build_moe_layer(
    moe: MoEConfig, router: RouterConfig, hidden_size: int, layer: int, shard: ExpertShard
) -> MoELayer | SwiGLU:
    """Build layer ``layer`` with this rank's experts; parameters are empty until ``model.init`` fills them."""
    if isinstance(router, DenseConfig):
        return SwiGLU(hidden_size, dense_width(moe, router))
    module = ROUTERS[router.name](router, hidden_size, moe.num_experts, layer)
    return MoELayer(moe, module, hidden_size, shard)


def dense_width(moe: MoEConfig, router: DenseConfig) -> int:
    """Inner width of the dense twin: the active routed experts' and the shared experts' together."""
    return router.active_experts * moe.expert_hidden_size + moe.shared_width


def num_routed_experts(moe: MoEConfig, router: RouterConfig) -> int:
    """Experts per MoE layer; 0 when the model has no routing."""
    return 0 if isinstance(router, DenseConfig) else moe.num_experts
