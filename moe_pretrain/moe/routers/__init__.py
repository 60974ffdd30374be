"""One file per routing scheme: its configuration and its module."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from moe_pretrain.moe.routers.attention_importance import AttentionImportanceConfig, AttentionImportanceRouter
from moe_pretrain.moe.routers.attentive import (
    AttentiveConfig,
    AttentiveDenseConfig,
    AttentiveDenseRouter,
    AttentiveLowRankConfig,
    AttentiveLowRankRouter,
    AttentiveRouter,
)
from moe_pretrain.moe.routers.autonomy import (
    AutonomyConfig,
    AutonomyExpertChoiceConfig,
    AutonomyExpertChoiceRouter,
    AutonomyRouter,
    AutonomyTopPConfig,
    AutonomyTopPRouter,
)
from moe_pretrain.moe.routers.dense import DenseConfig
from moe_pretrain.moe.routers.expert_choice import ExpertChoiceConfig, ExpertChoiceRouter
from moe_pretrain.moe.routers.expert_threshold import ExpertThresholdRouter, ExpertThresholdRouterConfig
from moe_pretrain.moe.routers.hash import HashConfig, HashRouter
from moe_pretrain.moe.routers.loss_free import LossFreeRouter, LossFreeRouterConfig
from moe_pretrain.moe.routers.quantile import QuantileRouter, QuantileRouterConfig
from moe_pretrain.moe.routers.relu import ReLUConfig, ReLURouter
from moe_pretrain.moe.routers.sinkhorn import SinkhornConfig, SinkhornRouter
from moe_pretrain.moe.routers.top_k import TopKRouter, TopKRouterConfig
from moe_pretrain.moe.routers.top_p import TopPRouter, TopPRouterConfig
from moe_pretrain.moe.types import Router

ShippedRouterConfig = (
    AttentionImportanceConfig
    | AttentiveConfig
    | AttentiveDenseConfig
    | AttentiveLowRankConfig
    | AutonomyConfig
    | AutonomyExpertChoiceConfig
    | AutonomyTopPConfig
    | DenseConfig
    | ExpertChoiceConfig
    | ExpertThresholdRouterConfig
    | HashConfig
    | LossFreeRouterConfig
    | QuantileRouterConfig
    | ReLUConfig
    | SinkhornConfig
    | TopKRouterConfig
    | TopPRouterConfig
)
"""The ``router`` group; its ``name`` says which."""
ROUTERS: dict[str, Callable[..., Router]] = {
    "attention_importance": AttentionImportanceRouter,
    "attentive": AttentiveRouter,
    "attentive_dense": AttentiveDenseRouter,
    "attentive_low_rank": AttentiveLowRankRouter,
    "autonomy": AutonomyRouter,
    "autonomy_expert_choice": AutonomyExpertChoiceRouter,
    "autonomy_top_p": AutonomyTopPRouter,
    "expert_choice": ExpertChoiceRouter,
    "expert_threshold": ExpertThresholdRouter,
    "hash": HashRouter,
    "loss_free": LossFreeRouter,
    "quantile": QuantileRouter,
    "relu": ReLURouter,
    "sinkhorn": SinkhornRouter,
    "top_k": TopKRouter,
    "top_p": TopPRouter,
}
"""Scheme name -> module. A new scheme adds one row here, its configuration above, and one file in ``routers/``."""


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
