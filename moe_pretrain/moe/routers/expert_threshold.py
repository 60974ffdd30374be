"""Expert threshold routing: an expert takes every token whose score exceeds the expert's running quantile."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from moe_pretrain.moe.losses import count_routes
from moe_pretrain.moe.route_list import list_routes
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import even_load, router_logits, router_use
from moe_pretrain.moe.routers.config import Fraction, TargetCountConfig
from moe_pretrain.moe.routers.expert_choice import choose_tokens
from moe_pretrain.moe.routers.pooled_quantile import NumBins, count_in_bins, value_at
from moe_pretrain.moe.types import ExpertRanking, Routing, RoutingContext, StepUse, as_count


@dataclass(frozen=True, kw_only=True)
class ExpertThresholdRouterConfig(TargetCountConfig):
    """Fields of ``router=expert_threshold``, beside ``target_experts``, which the thresholds aim at.

    Attributes:
        name: ``expert_threshold``.
        initial_threshold: Every expert's threshold before the first update, a score in (0, 1). Scores start near 0.5,
            so from 0.5 down the first step sends each token to half of the experts and more.
        ema_decay: How much of the average of past quantiles stays at each step, in [0, 1).
        num_bins: Bins of the histogram of scores per expert, >= 2. Each layer sums ``num_experts * num_bins + 1``
            float64 numbers over ranks once per step.
        warmup_steps: First steps in which experts choose tokens in training instead, >= 0. The paper has 4000. Then
            training is not causal, and the certificate says so.
    """

    name: Literal["expert_threshold"]
    initial_threshold: Annotated[float, Field(gt=0, lt=1)]
    ema_decay: Fraction
    num_bins: NumBins
    warmup_steps: NonNegativeInt

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """The quantiles' quotas."""
        return "quotas"

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "ExpertThresholdRouter":
        """The module of layer ``layer``."""
        return ExpertThresholdRouter(self, hidden_size, num_experts, layer)


class ExpertThresholdRouter(Router):
    """Expert ``e`` takes token ``t`` if ``sigmoid(z_te) > threshold_e``; the weight is the sigmoid itself.

    ``threshold_e`` is an average over steps of the score that ``target_experts / num_experts`` of the global batch's
    tokens exceed (see ``pooled_quantile``), debiased, so the first step sets it. Where experts differ in cost, that
    share is as the inverse of the cost. A token's routes depend on nothing but
    the token, in training and evaluation alike; it may have none, and then only shared experts (the paper has one:
    ``model.moe.num_shared_experts=1``) and the residual carry it. No losses: the thresholds balance.

    While a young router's scores drift faster than the average follows, tokens may for some steps have many more or
    fewer experts than ``target_experts``, up to all and none. With ``warmup_steps`` each expert takes its
    ``target_experts / num_experts`` best of the micro-batch's text tokens in the first steps of training, for which
    tokens compete. Evaluation goes by the thresholds even then.

    Source:
        Expert Threshold routing (Sun et al. 2026, arXiv:2603.11535), from its abstract and summaries, which do not
        state the average's decay: that and the initial threshold are ours. Deviations: the quantile is that of the
        pooled global batch, not a mean of cutoffs of its parts; the warm-up is off by default.
    """

    causal_in_evaluation = True

    def __init__(self, config: ExpertThresholdRouterConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config = config
        self.num_experts = num_experts
        self.causal_in_training = config.warmup_steps == 0
        if config.warmup_steps:
            self.evaluation_rule = f"thresholds; in the first {config.warmup_steps} steps of training experts choose"
        self.num_sums = num_experts * config.num_bins + 1
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.threshold: Tensor
        self.register_buffer("threshold", torch.full((num_experts,), config.initial_threshold))
        # 1 - decay ** updates: the weight of all quantiles in the average, by which it is debiased.
        self.ema_weight: Tensor
        self.register_buffer("ema_weight", torch.zeros(()))
        self.buffer_ranges = {"ema_weight": (0.0, 1.0)}

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to the experts that want it."""
        logits = router_logits(hidden, self.weight)
        scores = logits.sigmoid()
        seen, text = scores.detach(), context.token_mask
        if self.training and context.step < self.config.warmup_steps:
            taken, _ = choose_tokens(*(seen, text, self.config.target_experts, logits.detach(), self.balanced_costs))
        else:
            taken = seen > self.threshold
        routes = list_routes(taken, taken.numel())
        groups = torch.zeros_like(routes.token)
        (tokens_per_expert,) = count_routes(routes.slot, text[routes.token], groups, 1, self.num_experts)
        probs = seen / seen.sum(dim=1, keepdim=True).clamp(min=1e-20)
        use = router_use(tokens_per_expert, probs, context, self._sums(seen, taken, text) if self.training else None)
        weight = routes.take(scores)
        return Routing(routes.token, routes.slot, weight, None, use, num_routes=routes.num_routes)

    def ranking(self, hidden: Tensor, context: RoutingContext) -> ExpertRanking | None:
        """Experts by their logits, whatever their thresholds."""
        logits = router_logits(hidden, self.weight)
        return ExpertRanking(logits, logits.sigmoid())

    def _sums(
        self, scores: Float[Tensor, "tokens experts"], taken: Bool[Tensor, "tokens experts"], text: Tensor
    ) -> Float[Tensor, "sums"]:
        """The histogram of every expert's negative scores, and the number of text tokens without a route."""
        counts = count_in_bins(-scores, -1.0, 0.0, self.config.num_bins, text)
        alone = as_count((text & ~taken.any(dim=1)).sum())
        return torch.cat([counts.flatten(), alone[None]])

    def after_step(self, use: StepUse) -> None:
        """Average the quantile of this step's scores into the thresholds."""
        if use.tokens == 0:
            return
        counts = use.sums[:-1].view(self.num_experts, self.config.num_bins)
        quota = even_load(counts.sum(dim=1) * self.config.target_experts, self.num_experts, self.balanced_costs)
        cutoff = -value_at(counts, -1.0, 0.0, quota).to(self.threshold)
        fresh = 1 - self.config.ema_decay
        self.ema_weight.lerp_(torch.ones_like(self.ema_weight), fresh)
        self.threshold.lerp_(cutoff, fresh / self.ema_weight)

    def metrics(self, use: StepUse) -> dict[str, float]:
        """Share of text tokens that no routed expert took, and the mean threshold."""
        return {
            "unrouted_share": float(use.sums[-1]) / max(use.tokens, 1),
            "threshold_mean": float(self.threshold.mean()),
        }
