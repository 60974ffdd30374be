"""Mixture-of-experts layers. This is the package's one door: the table of routers and the builder of a layer."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from moe_pretrain.moe.experts.autonomy import AutonomyExperts
from moe_pretrain.moe.experts.swiglu import SwiGLU, SwiGLUExperts
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.routers.attention_importance import AttentionImportanceConfig, AttentionImportanceRouter
from moe_pretrain.moe.routers.autonomy import AutonomyConfig, AutonomyRouter
from moe_pretrain.moe.routers.dense import DenseConfig
from moe_pretrain.moe.routers.loss_free import LossFreeRouter, LossFreeRouterConfig
from moe_pretrain.moe.routers.top_k import TopKRouter, TopKRouterConfig
from moe_pretrain.moe.routers.top_p import TopPRouter, TopPRouterConfig
from moe_pretrain.moe.types import ExpertShard, Router

ShippedRouterConfig = (
    AttentionImportanceConfig
    | AutonomyConfig
    | DenseConfig
    | LossFreeRouterConfig
    | TopKRouterConfig
    | TopPRouterConfig
)
"""The ``router`` group; its ``name`` says which."""


@runtime_checkable
class RouterFileConfig(Protocol):
    """Configuration of a scheme in a user's own file (``router_file=``): a frozen dataclass with these, and its fields.

    Attributes:
        name: What the scheme is called in run names and reports.
        mean_experts_per_token: Expected routes per token, for parameter and FLOP counts.
    """

    name: str
    mean_experts_per_token: float

    def check_num_experts(self, num_experts: int) -> None:
        """Raise ``ValueError`` if the scheme cannot serve ``num_experts`` experts."""

    def build(self, hidden_size: int, num_experts: int, layer: int) -> Router:
        """The module that routes in layer ``layer``."""


RouterConfig = ShippedRouterConfig | RouterFileConfig

ROUTERS: dict[str, Callable[..., Router]] = {
    "attention_importance": AttentionImportanceRouter,
    "autonomy": AutonomyRouter,
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
    if isinstance(router, RouterFileConfig):
        module = router.build(hidden_size, moe.num_experts, layer)
    else:
        module = ROUTERS[router.name](router, hidden_size, moe.num_experts, layer)
    if isinstance(router, AutonomyConfig):
        width = router.expert_width(hidden_size, moe.expert_hidden_size)
        experts = AutonomyExperts(moe.num_experts, hidden_size, width, router.low_size, shard)
        return MoELayer(moe, module, experts, hidden_size)
    return MoELayer(
        moe, module, SwiGLUExperts(moe.num_experts, hidden_size, moe.expert_hidden_size, shard), hidden_size
    )


def dense_width(moe: MoEConfig, router: DenseConfig) -> int:
    """Inner width of the dense twin: the active routed experts' and the shared experts' together."""
    return router.active_experts * moe.expert_hidden_size + moe.shared_width


def num_routed_experts(moe: MoEConfig, router: RouterConfig) -> int:
    """Experts per MoE layer; 0 when the model has no routing."""
    return 0 if isinstance(router, DenseConfig) else moe.num_experts
