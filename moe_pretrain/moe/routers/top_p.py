"""Dynamic (top-p) routing: harder tokens get more experts."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn import functional

from moe_pretrain.moe.losses import entropy_loss
from moe_pretrain.moe.route_list import list_routes
from moe_pretrain.moe.routers.base import LinearRouter
from moe_pretrain.moe.routers.config import (
    LimitedCountConfig,
    LinearRouterConfig,
    MeanExperts,
    ProbabilityMass,
    check_within_experts,
)
from moe_pretrain.moe.types import Routing, RoutingContext, StepUse


@dataclass(frozen=True, kw_only=True)
class TopPRouterConfig(LimitedCountConfig, LinearRouterConfig):
    """Fields of ``router=top_p``, beside those of ``LinearRouterConfig`` and ``max_experts`` (the paper has no limit).

    Attributes:
        name: ``top_p``.
        threshold: Probability mass that the chosen experts must exceed, in (0, 1]; 1 takes all experts.
        weights: ``raw``: the probabilities themselves, as in the paper; ``renormalised``: divided by their sum.
        dynamic_weight: Coefficient of the dynamic loss, the mean entropy of the distribution, >= 0.
        target_experts: Mean experts per token that a controller holds by moving the threshold after each step, or
            None for a fixed threshold (the paper's).
        controller_rate: How far the controller moves the threshold per step; positive with a target, else 0.
        expected_experts: Experts per token assumed where sizes are counted before a run; a run's FLOPs use
            what it measures.
    """

    name: Literal["top_p"]
    threshold: ProbabilityMass
    weights: Literal["raw", "renormalised"]
    dynamic_weight: NonNegativeFloat
    target_experts: MeanExperts | None
    controller_rate: NonNegativeFloat
    expected_experts: MeanExperts

    def __post_init__(self) -> None:
        super().__post_init__()
        # A controller needs a target that it can reach and a rate; one without the other would do nothing.
        if self.target_experts is None:
            if self.controller_rate > 0:
                raise ValueError(
                    f"router.controller_rate={self.controller_rate} must be 0 when router.target_experts is not set: "
                    "there is nothing to control"
                )
            return
        if self.controller_rate == 0:
            raise ValueError(
                f"router.controller_rate={self.controller_rate} must be positive when "
                f"router.target_experts={self.target_experts}: the threshold would not move"
            )
        if self.max_experts is not None and self.target_experts > self.max_experts:
            raise ValueError(
                f"router.target_experts={self.target_experts} must be at most router.max_experts={self.max_experts}"
            )

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        check_within_experts(self, num_experts, "max_experts", "target_experts", "expected_experts")

    @property
    def mean_experts_per_token(self) -> float:
        """Expected routes per token, for parameter and FLOP counts."""
        return self.expected_experts

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "TopPRouter":
        """The module of layer ``layer``."""
        return TopPRouter(self, hidden_size, num_experts, layer)


def top_p_mask(
    probs: Float[Tensor, "tokens experts"],
    threshold: Tensor | float,
    max_experts: int | None,
    logits: Float[Tensor, "tokens experts"],
) -> Bool[Tensor, "tokens experts"]:
    """Experts that each token takes: the shortest prefix of its ordered probabilities with mass above ``threshold``.

    Args:
        probs: Rows sum to 1; no gradient.
        threshold: In (0, 1]; at 1 all experts are taken.
        max_experts: Most experts of one token, or None.
        logits: Those of ``probs``: they order experts, also where probabilities are 0.
    """
    expert = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = probs.gather(1, expert)
    # Mass before each expert: it is taken while that has not passed the threshold. Shifted, not the sum minus the
    # expert's own: that difference rounds to either side of a tie.
    before = functional.pad(ordered.cumsum(dim=-1)[:, :-1], (1, 0))
    taken = (before <= threshold) | (threshold >= 1)
    if max_experts is not None:
        taken[:, max_experts:] = False
    return torch.zeros_like(taken).scatter(1, expert, taken)


class TopPRouter(LinearRouter):
    """Each token takes its most probable experts until their mass exceeds the threshold.

    With probabilities sorted downwards, the number of experts is ``t = min{k : P_(1) + ... + P_(k) > threshold}``
    (strict, as in the authors' code; it differs from ``>=`` only at exact ties), and the output is
    ``sum_i P_i E_i(x)`` with the raw probabilities. Gradients reach every row of the router through the
    softmax; ``t`` itself has none.

    Losses: ``load_balance`` and ``dynamic``, the mean over tokens of ``-sum_i P_i ln P_i`` over all experts, which
    pushes towards few experts.

    Source:
        Huang et al. 2024 (arXiv:2403.07652), eq. 3-6; threshold 0.4, weights 1e-2 and 1e-4. Deviations: the balance
        loss divides by routes, not tokens (see ``load_balance_loss``), so its pressure does not grow with ``t``;
        ``max_experts`` and the controller are ours and off by default.
    """

    def __init__(self, config: TopPRouterConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer)
        config.check_num_experts(num_experts)
        self.config = config
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(config.threshold))

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        return {**super().aux_weights, "dynamic": self.config.dynamic_weight}

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to as many experts as its distribution is wide."""
        logits = self.logits(hidden, context)
        probs = logits.softmax(dim=-1)
        taken = top_p_mask(probs.detach(), self.threshold, self.config.max_experts, logits.detach())
        routes = list_routes(taken, len(taken) * (self.config.max_experts or self.num_experts))
        scores = probs
        if self.config.weights == "renormalised":
            # Sums over the row, not index_add over routes: on a GPU that adds in any order.
            scores = probs / (probs * taken).sum(dim=-1, keepdim=True)
        weight, number = routes.take(scores), routes.num_routes
        routing = self.route(logits, probs, routes.token, routes.slot, weight, None, context, num_routes=number)
        routing.aux["dynamic"] = entropy_loss(probs, context.token_mask)
        return routing

    def after_step(self, use: StepUse) -> None:
        """Move the threshold towards ``target_experts`` per token."""
        if self.config.target_experts is None:
            return
        mean = float(use.tokens_per_expert.sum()) / max(use.tokens, 1)
        direction = (self.config.target_experts > mean) - (self.config.target_experts < mean)
        self.threshold += self.config.controller_rate * direction
        self.threshold.clamp_(min=0.0, max=1.0)
