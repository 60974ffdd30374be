"""ReMoE: the gates are ReLUs, so an expert is used where its gate is open, and an adaptive L1 norm closes gates."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from moe_pretrain.moe.losses import sparsity_loss
from moe_pretrain.moe.route_list import list_routes
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import balance_counts, over_groups, router_logits, router_use, routes_by_group
from moe_pretrain.moe.routers.config import BalanceLevelConfig, TargetCountConfig
from moe_pretrain.moe.types import (
    POOLED_LEVELS,
    ExpertRanking,
    Routing,
    RoutingContext,
    StepUse,
    as_count,
)


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(TargetCountConfig, BalanceLevelConfig):
    """Fields of ``router=relu``, beside ``target_experts`` (the paper's k), to which the coefficient steers all layers.

    Attributes:
        name: ``relu``.
        initial_sparsity_weight: Coefficient of the sparsity loss in the first step (the paper's lambda_0), > 0.
        sparsity_weight_factor: Factor by which the coefficient moves after each step (the paper's alpha), > 1.
        load_balance_level: That of the sparsity loss, see ``BalanceLevelConfig``; the authors' code has
            ``micro_batch``. At ``last_step`` the routes of the step before are divided by this step's text tokens.
    """

    name: Literal["relu"]
    initial_sparsity_weight: PositiveFloat
    sparsity_weight_factor: Annotated[float, Field(gt=1)]

    @property
    def whole_model_reason(self) -> str:
        """Its coefficient is one for all layers."""
        return "moves one coefficient by the experts per token of all layers"

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """The sparsity loss, which counts busy experts more."""
        return "loss"

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "ReLURouter":
        """The module of layer ``layer``."""
        return ReLURouter(self, hidden_size, num_experts, layer)


class ReLURouter(Router):
    """Gates ``relu(hidden @ weight.T)``; a token goes to every expert whose gate is open, weighted by the gate itself.

    The output is continuous in the router's parameters: a route appears and disappears with weight 0. A token may have
    no expert at all; then the routed experts add nothing to it.

    The loss ``sparsity`` is an L1 norm of the gates, weighted by each expert's share of the routes (see
    ``sparsity_loss``), so it makes gates sparse and load even at once. Its coefficient is state, not configuration:
    after each step ``sparsity_weight *= factor ** sign((1 - target / experts) - sparsity)``, with the mean share of
    closed gates over all layers, micro-batches and ranks. So it is the same in every layer and on every rank.

    Memory: in the first hundred or so steps, until the coefficient has grown from 1e-8, about half of all gates are
    open. Plan memory for ``num_experts / 2`` experts per token, with ``model.recompute=full`` if need be, or start from
    a larger ``initial_sparsity_weight``.

    Source:
        Wang et al. 2024 (arXiv:2412.14711), the ReLU router and its adaptive load-balancing L1 regularisation;
        lambda_0 1e-8 and factor 1.2. Where the sparsity is exactly the target, the coefficient stays, as in the
        paper's formula with sign(0) = 0; the authors' code divides it. Deviations: the loss is a mean over layers, as
        in the paper and as all losses here (their code sums layers; the coefficient makes up for it); the router
        starts with the model's own standard deviation (their code: 0.01); the coefficient stops at the
        smallest normal float32, from which it can still grow.
    """

    causal_in_training = True
    causal_in_evaluation = True

    def __init__(self, config: ReLUConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config = config
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.sparsity_weight: Tensor
        self.register_buffer("sparsity_weight", torch.tensor(config.initial_sparsity_weight))
        self.buffer_ranges = {"sparsity_weight": (0.0, math.inf)}

    @property
    def aux_weights(self) -> dict[str, float]:
        """The adaptive coefficient; one number per step leaves the device here."""
        return {"sparsity": float(self.sparsity_weight)}

    @property
    def needs_global_routes(self) -> bool:
        """Whether training needs ``RoutingContext.sum_over_global_batch``."""
        return self.config.load_balance_level in POOLED_LEVELS

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to the experts whose gates are open."""
        config = self.config
        gates = router_logits(hidden, self.weight).relu()
        routes = list_routes(gates.detach() > 0, gates.numel())
        level = config.load_balance_level
        own = routes_by_group(routes.token, routes.slot, level, self.num_experts, context)
        counts = balance_counts(own, level, self.layer, context)
        tokens = self._group_tokens(len(own), context)
        # The entropy that is reported is that of the gates' shares; 0 for a token without experts.
        shares = gates.detach() / gates.detach().sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return Routing(
            routes.token,
            routes.slot,
            routes.take(gates),
            routes_per_token=None,
            use=router_use(over_groups(own), shares, context),
            aux={
                "sparsity": sparsity_loss(
                    *(gates, counts, tokens, config.target_experts, context.token_mask, self.balanced_costs)
                )
            },
            num_routes=routes.num_routes,
        )

    def ranking(self, hidden: Tensor, context: RoutingContext) -> ExpertRanking | None:
        """Experts by their logits, also those whose gate is closed."""
        logits = router_logits(hidden, self.weight)
        return ExpertRanking(logits, logits.relu())

    def _group_tokens(self, num_groups: int, context: RoutingContext) -> Float[Tensor, "groups"]:
        """Text tokens of each group over which the share of routes is taken."""
        tokens = as_count(context.token_mask.view(num_groups, -1).sum(dim=1))
        if self.config.load_balance_level in POOLED_LEVELS and context.global_tokens is not None:
            return tokens.new_full((1,), context.global_tokens)
        return tokens

    def after_step(self, use: StepUse) -> None:
        """Raise the coefficient while more than ``target_experts`` gates per token are open, lower it below."""
        # The sign of (1 - target / experts) - sparsity, without its rounding.
        direction = (use.experts_per_token > self.config.target_experts) - (
            use.experts_per_token < self.config.target_experts
        )
        self.sparsity_weight *= self.config.sparsity_weight_factor**direction
        self.sparsity_weight.clamp_(min=torch.finfo(torch.float32).tiny)
