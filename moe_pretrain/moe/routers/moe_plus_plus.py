"""MoE++: a router over networks and zero-computation experts that remembers what the layer below decided."""

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from moe_pretrain.moe.host_values import on_device_of
from moe_pretrain.moe.losses import cost_balance_loss
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import (
    balance_counts,
    best_first,
    over_groups,
    router_logits,
    router_use,
    routes_by_group,
)
from moe_pretrain.moe.routers.config import BalanceLevelConfig, FixedCountConfig
from moe_pretrain.moe.types import POOLED_LEVELS, LayerPlace, Routing, RoutingContext

_PROJECTION_PER_EXPERT = 8
"""Width between the two layers of ``projection=two_layer``, for each expert."""


@dataclass(frozen=True, kw_only=True)
class MoEPlusPlusConfig(FixedCountConfig, BalanceLevelConfig):
    """Fields of ``router=moe_plus_plus``, beside that of ``FixedCountConfig``.

    The paper and the released code differ. The paper's form is the default; the code's is
    ``router.projection=two_layer model.moe.experts.input_scale=2``, and what else it can do has an option here.

    Attributes:
        name: ``moe_plus_plus``.
        tau: Routes to a zero-computation expert cost ``tau`` in the balance loss and those to a network 1, so that
            balance gives a network ``tau`` times the routes of a zero-computation expert; > 0. The paper tries 0.1 to
            1 and trains its largest model with 0.75.
        gating_residual: Add a map of the logits of the MoE layer below to the logits.
        projection: ``linear``: logits are a linear map of the input (the paper); ``two_layer``: two, with tanh between,
            8 numbers wide for each expert (the code's default).
        weights: ``zero_dropped``: softmax over all experts, that of a zero expert set to 0, and the chosen ones divided
            by their sum: beside a zero expert the other counts in full, "top-2 degrades to top-1". ``mixtral``: softmax
            over the chosen logits alone, of which a zero expert keeps its share (an option of the code). ``raw``: the
            softmax over all experts, neither dropped nor divided (the paper's eq. 1 as it is printed).
        logit_std: Standard deviation to which a token's logits are brought before the softmax, or None to leave them
            (an option of the code). What the next layer gets is not changed.
        load_balance_weight: Coefficient of the balance loss, the paper's beta, >= 0.
    """

    name: Literal["moe_plus_plus"]
    tau: PositiveFloat
    gating_residual: bool
    projection: Literal["linear", "two_layer"]
    weights: Literal["zero_dropped", "mixtral", "raw"]
    logit_std: PositiveFloat | None
    load_balance_weight: NonNegativeFloat

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == 1 and self.weights != "raw":
            raise ValueError(
                f"router.weights={self.weights} must be raw when router.top_k=1: the weight would not depend on the "
                "router, which would not learn from the LM loss"
            )

    @property
    def carries(self) -> bool:
        """Its logits, with the residual."""
        return self.gating_residual

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """A loss, if it weighs anything."""
        return "loss" if self.load_balance_weight else None

    @property
    def zero_computation_load(self) -> float:
        """``1 / tau``."""
        return 1 / self.tau

    def build_in_place(self, hidden_size: int, place: LayerPlace) -> "MoEPlusPlusRouter":
        """The module of a layer with the experts of ``place``; the lowest has no map of other logits."""
        return MoEPlusPlusRouter(self, hidden_size, place)

    def kept_per_token(self, hidden_size: int, num_experts: int) -> int:
        """Numbers between the two layers, before and after normalisation, the shares that weigh probabilities."""
        inner = _PROJECTION_PER_EXPERT * num_experts if self.projection == "two_layer" else 0
        return inner + num_experts * (self.logit_std is not None)


class MoEPlusPlusRouter(Router):
    """Top-k of ``softmax(G_j)`` with ``G_j = W x_j + W_g G_(j-1)``: logits of the MoE layer below are added, mapped.

    Where the MoE layer below is none of the scheme, or there is none, there is nothing to add and no ``W_g``. Logits
    are carried in float32, with gradient, so the LM loss of a layer reaches the routers below it.

    The loss ``heterogeneous_balance`` is ``sum_i eta_i f_i P_i`` with the share ``f_i`` of tokens that choose expert
    ``i`` (``sum f = top_k``), the mean probability ``P_i``, and ``eta`` 1 for networks and ``tau`` for others. There
    is no factor of the number of experts as in Switch's loss. Nothing is dropped: the paper's capacities are left out.

    Source:
        Jin et al. 2024 (arXiv:2410.07348), eq. 6 for the residual, eq. 7 for the loss. ``two_layer``, ``mixtral`` and
        ``logit_std`` as in the authors' code, and the start of ``W_g`` and of the two layers, that of any linear layer
        there. In training its balance loss is not released; the level of the whole batch is ours.
    """

    causal_in_training = True
    causal_in_evaluation = True
    other_scales = MappingProxyType(
        {"heterogeneous_balance": "sum of eta f P over experts, with sum f = top_k and no factor of their number"}
    )

    def __init__(self, config: MoEPlusPlusConfig, hidden_size: int, place: LayerPlace):
        super().__init__(place.layer)
        kinds = place.kinds
        config.check_num_experts(kinds.total)
        self.config, self.kinds, self.num_experts = config, kinds, kinds.total
        inner = _PROJECTION_PER_EXPERT * kinds.total
        self.projection = nn.Parameter(torch.empty(inner, hidden_size)) if config.projection == "two_layer" else None
        self.weight = nn.Parameter(torch.empty(kinds.total, hidden_size if self.projection is None else inner))
        has_residual = config.gating_residual and not place.is_lowest
        self.residual_weight = nn.Parameter(torch.empty(kinds.total, kinds.total)) if has_residual else None
        like_linear = [name for name in ("projection", "residual_weight") if getattr(self, name) is not None]
        like_linear += ["weight"] if self.projection is not None else []
        self.start_stds = {name: 1 / math.sqrt(3 * getattr(self, name).shape[1]) for name in like_linear}

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficient of the balance loss."""
        return {"heterogeneous_balance": self.config.load_balance_weight}

    @property
    def needs_global_routes(self) -> bool:
        """Whether training needs ``RoutingContext.sum_over_global_batch``."""
        return self.config.load_balance_level in POOLED_LEVELS and self.config.load_balance_weight > 0

    def logits(
        self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext
    ) -> Float[Tensor, "tokens experts"]:
        """Float32 logits, with those of the layer below mapped and added."""
        inputs = hidden if self.projection is None else router_logits(hidden, self.projection).tanh()
        logits = router_logits(inputs, self.weight)
        if self.residual_weight is not None:
            assert context.carried is not None, "the layer below carries its logits"
            logits = logits + router_logits(context.carried, self.residual_weight)
        return logits

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to ``top_k`` experts."""
        config, logits = self.config, self.logits(hidden, context)
        judged = logits
        if config.logit_std is not None:
            variance = logits.var(dim=-1, keepdim=True)
            # Equal logits have no spread to bring anywhere, and the gradient of a root is infinite at 0.
            spread = variance.where(variance > 1e-12, torch.ones_like(variance)).sqrt()
            judged = logits * (config.logit_std / spread)
        probs = judged.softmax(dim=-1)
        chosen = best_first(probs.detach(), judged.detach())[:, : config.top_k]
        if config.weights == "mixtral":
            weight = judged.gather(1, chosen).softmax(dim=-1)
        else:
            weight = probs.gather(1, chosen)
        if config.weights == "zero_dropped":
            zeros = self.kinds.zeros
            weight = weight.masked_fill((chosen >= zeros.start) & (chosen < zeros.stop), 0.0)
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        token_index = torch.arange(len(hidden), device=hidden.device).repeat_interleave(config.top_k)
        routes = chosen.flatten()
        own = routes_by_group(token_index, routes, config.load_balance_level, self.num_experts, context)
        counts = balance_counts(own, config.load_balance_level, self.layer, context)
        cost = torch.ones(self.num_experts, dtype=torch.float64, device=hidden.device)
        cost[self.kinds.ffn :] = config.tau
        if self.balanced_costs:
            cost *= on_device_of(cost, self.balanced_costs)
        return Routing(
            token_index,
            routes,
            weight.flatten(),
            config.top_k,
            use=router_use(over_groups(own), probs.detach(), context),
            aux={"heterogeneous_balance": cost_balance_loss(probs, counts, cost, config.top_k, context.token_mask)},
            carried=logits if config.gating_residual else None,
        )
