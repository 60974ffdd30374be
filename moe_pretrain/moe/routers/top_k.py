"""Top-k routing: Switch (k = 1), GShard, Mixtral, OLMoE, DeepSeekMoE."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional

from moe_pretrain.moe.compiled import one_kernel_on_cuda
from moe_pretrain.moe.losses import entropy_loss
from moe_pretrain.moe.routers.base import LinearRouter, best_first
from moe_pretrain.moe.routers.config import FixedCountConfig, LinearRouterConfig
from moe_pretrain.moe.types import ExpertRanking, Routing, RoutingContext, StepUse

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]


@dataclass(frozen=True, kw_only=True)
class TopKRouterConfig(FixedCountConfig, LinearRouterConfig):
    """Fields of ``router=top_k``, beside ``top_k`` and those of ``LinearRouterConfig``.

    Attributes:
        name: ``top_k``.
        score: How logits become scores: ``softmax`` over all experts, ``sigmoid`` of each (DeepSeek-V3), or
            ``sqrt_softplus`` of each (DeepSeek-V4).
        weights: ``renormalised``: selected scores divided by their sum (Mixtral, GShard); with ``top_k`` 1 the
            weight is then always 1 and the router gets no gradient from the LM loss, so it is refused there.
            ``raw``: scores as they are (Switch, OLMoE).
        weight_scale: Factor of all weights, > 0 (DeepSeek-V3: 2.5).
        num_groups: Groups of neighbouring experts for group-limited selection, a divisor of num_experts; 1 for none.
        groups_per_token: Groups that a token's experts may come from, in [1, num_groups] (DeepSeek-V3: 4 of 8).
        projection_size: Width between two linear maps that make the logits, or None for one map. It is the "large
            router" control of Autonomy-of-Experts: no non-linearity, only more parameters.
        entropy_weight: Coefficient of the mean entropy of the distribution over experts, >= 0; what SEER-MoE
            (arXiv:2404.05089) tunes a pruned model with.
    """

    name: Literal["top_k"]
    score: Score
    weights: Literal["renormalised", "raw"]
    weight_scale: PositiveFloat
    num_groups: PositiveInt
    groups_per_token: PositiveInt
    projection_size: PositiveInt | None
    entropy_weight: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups_per_token > self.num_groups:
            raise ValueError(
                f"router.groups_per_token={self.groups_per_token} must be at most router.num_groups={self.num_groups}"
            )
        if self.top_k == 1 and self.weights == "renormalised":
            raise ValueError(
                "router.weights=renormalised must be raw when router.top_k=1: the weight would always be 1 and the "
                "router would not learn from the LM loss"
            )

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        super().check_num_experts(num_experts)
        if num_experts % self.num_groups:
            raise ValueError(f"router.num_groups={self.num_groups} must divide model.moe.num_experts={num_experts}")
        reachable = num_experts // self.num_groups * self.groups_per_token
        if self.top_k > reachable:
            raise ValueError(
                f"router.top_k={self.top_k} must be at most {reachable}, the experts of "
                f"router.groups_per_token={self.groups_per_token} groups"
            )

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "TopKRouter":
        """The module of layer ``layer``."""
        return TopKRouter(self, hidden_size, num_experts, layer)

    def kept_per_token(self, hidden_size: int, num_experts: int) -> int:
        """Beside noise: the numbers between the two maps, and what the entropy is made of."""
        of_entropy = 2 * num_experts if self.entropy_weight else 0
        return super().kept_per_token(hidden_size, num_experts) + (self.projection_size or 0) + of_entropy


class TopKRouter(LinearRouter):
    """Linear router; every token goes to its ``top_k`` best experts.

    Logits, scores, selection and losses are float32 whatever the engine's dtype. Selection orders logits where scores
    saturate; ties go to the lower expert id (stable), so a recomputed or re-sharded run selects the same experts.

    Source:
        Shazeer et al. 2017 (arXiv:1701.06538); Switch (arXiv:2101.03961), eq. 1-2 for ``weights=raw``; Mixtral
        (arXiv:2401.04088), sec. 2.1 for ``renormalised``; DeepSeek-V3 (arXiv:2412.19437), eq. 13-15 for
        ``sigmoid``, whose balance probabilities are the scores divided by their sum (eq. 19), and sec. 2.1.2 for
        group-limited selection: a group's score is the sum of its two best experts'. The large router:
        Lv et al. 2025 (arXiv:2501.13074), configuration 4 of table 2.
    """

    def __init__(self, config: TopKRouterConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer, config.projection_size)
        config.check_num_experts(num_experts)
        self.config = config

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to ``top_k`` experts."""
        config = self.config
        logits = self.logits(hidden, context)
        scores = scores_of(logits, config.score)
        probs = scores if config.score == "softmax" else scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        chosen = self.select(scores.detach(), logits.detach())
        weight = _route_weights(scores, chosen, config.weights == "renormalised", config.weight_scale)
        token_index, expert_index = _flat_routes(chosen)
        return self.route(
            logits,
            probs,
            token_index,
            expert_index,
            weight.flatten(),
            config.top_k,
            context,
            sums=self.sums(scores.detach(), context),
        )

    def select(
        self, scores: Float[Tensor, "tokens experts"], logits: Float[Tensor, "tokens experts"]
    ) -> Int[Tensor, "tokens slots"]:
        """The ``top_k`` experts of each token by score, best first; ``logits`` decide between equal scores."""
        if self.config.num_groups > 1:
            scores = self._within_groups(scores, logits)
        return best_first(scores, logits)[:, : self.config.top_k]

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        weight = self.config.entropy_weight
        return super().aux_weights | ({"entropy": weight} if weight else {})

    def own_losses(self, probs: Float[Tensor, "tokens experts"], context: RoutingContext) -> dict[str, Tensor]:
        """The entropy where it is asked for, beside those of every linear router."""
        own = {"entropy": entropy_loss(probs, context.token_mask)} if self.config.entropy_weight else {}
        return super().own_losses(probs, context) | own

    def ranking(self, hidden: Tensor, context: RoutingContext) -> ExpertRanking | None:
        """Experts as selection orders them, groups aside."""
        logits = self.logits(hidden, context)
        return ExpertRanking(logits, scores_of(logits, self.config.score), self.config.weight_scale)

    def sums(self, scores: Float[Tensor, "tokens experts"], context: RoutingContext) -> Float[Tensor, "sums"] | None:
        """Scheme's own entries of ``RouterUse.sums``; nothing here."""
        return None

    def _within_groups(
        self, scores: Float[Tensor, "tokens experts"], logits: Float[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        """Scores with those of all but the best groups at the bottom."""
        config = self.config
        of_group, ties = (
            values.unflatten(1, (config.num_groups, -1)).sort(dim=-1, descending=True).values[:, :, :2].sum(dim=-1)
            for values in (scores, logits)
        )
        best = best_first(of_group, ties)[:, : config.groups_per_token]
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter(1, best, True)
        return scores.masked_fill(~kept.repeat_interleave(scores.shape[1] // config.num_groups, dim=1), -torch.inf)


class BiasedTopKRouter(TopKRouter):
    """Top-k of ``score + expert_bias``, weighted by the score alone; the base of schemes that move the bias.

    The bias has no gradient, is float32 and saved with the run.
    """

    def __init__(self, config: TopKRouterConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer)
        self.expert_bias: Tensor
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    def select(
        self, scores: Float[Tensor, "tokens experts"], logits: Float[Tensor, "tokens experts"]
    ) -> Int[Tensor, "tokens slots"]:
        """The best ``top_k`` by biased score."""
        return super().select(scores + self.expert_bias, logits)

    def ranking(self, hidden: Tensor, context: RoutingContext) -> ExpertRanking | None:
        """Experts by biased score, weighted by the score alone."""
        scores = scores_of(self.logits(hidden, context), self.config.score)
        return ExpertRanking(scores + self.expert_bias, scores, self.config.weight_scale)

    def metrics(self, use: StepUse) -> dict[str, float]:
        """Spread of the experts' biases, in units of the score."""
        return {"expert_bias_range": float(self.expert_bias.max() - self.expert_bias.min())}


@one_kernel_on_cuda
def _route_weights(
    scores: Float[Tensor, "tokens experts"],
    chosen: Int[Tensor, "tokens slots"],
    is_renormalised: bool,
    scale: float,
) -> Float[Tensor, "tokens slots"]:
    weight = scores.gather(1, chosen)
    if is_renormalised:
        weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return weight * scale


@one_kernel_on_cuda
def _flat_routes(chosen: Int[Tensor, "tokens slots"]) -> tuple[Int[Tensor, "routes"], Int[Tensor, "routes"]]:
    """Token and expert of each route."""
    token_index = torch.arange(len(chosen), device=chosen.device).repeat_interleave(chosen.shape[1])
    return token_index, chosen.flatten()


def scores_of(logits: Float[Tensor, "tokens experts"], score: Score) -> Float[Tensor, "tokens experts"]:
    """Scores in (0, 1), or above 0 for ``sqrt_softplus``."""
    if score == "softmax":
        return logits.softmax(dim=-1)
    if score == "sigmoid":
        return logits.sigmoid()
    # Clamped: where softplus underflows to 0, the gradient of the root would be infinite.
    return functional.softplus(logits).clamp(min=1e-20).sqrt()
