"""Attention importance (DA-MoE): a token's own attention decides how many experts it gets."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.moe.route_list import list_routes
from moe_pretrain.moe.routers.base import LinearRouter, router_logits
from moe_pretrain.moe.routers.config import Fraction, LimitedCountConfig, LinearRouterConfig, check_within_experts
from moe_pretrain.moe.types import AttentionStatistic, Routing, RoutingContext, StepUse

ROUNDING = 1e-5
"""Experts by which ``scale * importance * num_experts`` may pass a whole number before it counts as more.

Uniform attention over 5 keys has weights whose mean over 7 heads rounds to a little more than 1/5, and must still give
1 of 5 experts.
"""
LARGEST_SCALE = 1e4
"""The controller keeps the scale below this and above its inverse, so an importance of 0 stays 0."""


@dataclass(frozen=True, kw_only=True)
class AttentionImportanceConfig(LimitedCountConfig, LinearRouterConfig):
    """Fields of ``router=attention_importance``, beside those of ``LinearRouterConfig``.

    Attributes:
        name: ``attention_importance``.
        importance: What makes a token important, from its own block's attention
            (``model/attention_statistic.py`` has the formulas):
            ``row_max``: its largest attention weight. Sees earlier tokens only. The first token of a document
            has 1 and so gets all experts, and tokens with few keys get many.
            ``corrected_row_max``: that without the document's first key, as a share of the way from uniform
            attention to all on one key; 0 for the first token. Sees earlier tokens only.
            ``entropy``: 1 - entropy / ln(number of keys). Sees earlier tokens only.
            ``predictor``: what a linear head on the token expects ``received`` to be. The head's target looks ahead and
            has no gradient; routing uses the head alone, so neither training nor evaluation leaks.
            ``received``: mean weight that later tokens give it. **A token's experts then depend on later tokens**: the
            loss may fall through that side channel, and generation cannot compute it.
        exclude_self: ``corrected_row_max`` leaves out the token's weight on itself, too. Only there.
        complement: ``entropy`` gives 1 minus its value, so that spread attention gets more experts. Only there.
        predictor_loss_weight: Coefficient of the head's squared error; positive with ``predictor``, else 0.
        allow_non_causal: Must be true with ``received``, and with nothing else.
        weights: ``raw``: probabilities over all experts; ``renormalised``: divided by those of the chosen.
        scale: Factor ``c`` of ``importance * num_experts``, > 0; where the controller starts.
        min_experts: Fewest experts of a token, >= 1.
        max_experts: Most experts of a token, >= min_experts, or None for all.
        target_experts: Mean experts per token that a controller holds by moving the scale after each step, or None
            for a fixed scale.
        controller_rate: Part by which the controller moves the scale per step, below 1; positive with a target, else 0.
        expected_experts: Experts per token assumed where sizes are counted before a run; a run's FLOPs use
            what it measures.
    """

    name: Literal["attention_importance"]
    importance: Literal["row_max", "corrected_row_max", "predictor", "entropy", "received"]
    exclude_self: bool
    complement: bool
    predictor_loss_weight: NonNegativeFloat
    allow_non_causal: bool
    weights: Literal["raw", "renormalised"]
    scale: Annotated[float, Field(ge=1 / LARGEST_SCALE, le=LARGEST_SCALE)]
    min_experts: PositiveInt
    max_experts: int | None
    target_experts: float | None
    controller_rate: Fraction
    expected_experts: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, importance in (("exclude_self", "corrected_row_max"), ("complement", "entropy")):
            if getattr(self, field) and self.importance != importance:
                raise ValueError(
                    f"router.{field}=true must be false when router.importance={self.importance}: "
                    f"only {importance} has it"
                )
        if self.allow_non_causal != (self.importance == "received"):
            needed, why = (
                ("true", "a token's experts then depend on later tokens, in training and in evaluation")
                if self.importance == "received"
                else ("false", "it looks at no later token")
            )
            raise ValueError(
                f"router.allow_non_causal={str(self.allow_non_causal).lower()} must be {needed} when "
                f"router.importance={self.importance}: {why}"
            )
        if (self.predictor_loss_weight > 0) != (self.importance == "predictor"):
            needed = "positive" if self.importance == "predictor" else "0"
            raise ValueError(
                f"router.predictor_loss_weight={self.predictor_loss_weight} must be {needed} when "
                f"router.importance={self.importance}: it trains the predictor's head"
            )
        self._check_counts()

    def _check_counts(self) -> None:
        for field in ("max_experts", "target_experts", "expected_experts"):
            value = getattr(self, field)
            if value is not None and value < self.min_experts:
                raise ValueError(f"router.{field}={value} must be at least router.min_experts={self.min_experts}")
        for field in ("target_experts", "expected_experts"):
            value = getattr(self, field)
            if value is not None and self.max_experts is not None and value > self.max_experts:
                raise ValueError(f"router.{field}={value} must be at most router.max_experts={self.max_experts}")
        if self.max_experts == 1 and self.weights == "renormalised":
            raise ValueError(
                "router.weights=renormalised must be raw when router.max_experts=1: the weight would always be 1 and "
                "the router would not learn from the LM loss"
            )
        if self.target_experts is None and self.controller_rate != 0:
            raise ValueError(
                f"router.controller_rate={self.controller_rate} must be 0 when router.target_experts is not set: "
                "there is nothing to control"
            )
        if self.target_experts is not None and self.controller_rate == 0:
            raise ValueError(
                f"router.controller_rate={self.controller_rate} must be positive when "
                f"router.target_experts={self.target_experts}: it is the part by which the scale moves"
            )

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        check_within_experts(self, num_experts, "min_experts", "max_experts", "target_experts", "expected_experts")

    @property
    def mean_experts_per_token(self) -> float:
        """Expected routes per token, for parameter and FLOP counts."""
        return self.expected_experts

    @property
    def attention_statistic(self) -> AttentionStatistic:
        """Statistic that the block's attention must measure."""
        if self.importance == "predictor":
            return "received"
        if self.importance == "corrected_row_max" and self.exclude_self:
            return "corrected_row_max_without_self"
        return self.importance

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "AttentionImportanceRouter":
        """The module of layer ``layer``."""
        return AttentionImportanceRouter(self, hidden_size, num_experts, layer)


class AttentionImportanceRouter(LinearRouter):
    """A token's importance says how many experts it gets, a linear router which.

    Token ``t`` goes to its ``K[t] = clip(ceil(scale * importance[t] * num_experts), min, max)`` most probable experts.
    ``K`` has no gradient, and attention gets none from it; the router learns through its probabilities, which are the
    routes' weights. Padding has the fewest experts. With ``target_experts`` the scale of every layer is multiplied or
    divided by ``1 + controller_rate`` after each step: from past steps only, since a quantile of the batch at hand
    would make a token's experts depend on later tokens.

    Losses: ``load_balance``, ``router_z`` and, with ``importance=predictor``, ``importance``, the mean squared error of
    ``sigmoid(predictor(x))`` over text tokens. Neither its target nor its input passes a gradient on, so it trains the
    predictor and nothing else.

    Source:
        DA-MoE (arXiv:2409.06669): ``K = ceil(s E)`` with ``s`` the mean over heads of the largest attention weight,
        as two secondary texts transcribe it; the paper's own text was not available. There the importance is
        described as influence on other tokens, which is ``received``: another mechanism. Assumptions: weights are
        raw probabilities, the balance loss is Switch's (weight 0.01), attention is causal and that of the same
        block. ``corrected_row_max``, ``predictor``, ``entropy``, the limits and the scale are ours.
    """

    def __init__(self, config: AttentionImportanceConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer)
        config.check_num_experts(num_experts)
        self.config = config
        self.attention_statistic = config.attention_statistic
        self.causal_in_training = self.causal_in_evaluation = not config.allow_non_causal
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(config.scale))
        if config.importance == "predictor":
            self.predictor_weight = nn.Parameter(torch.empty(1, hidden_size))
            self.predictor_bias = nn.Parameter(torch.empty(1))
            why = "the number of experts, which is all it decides, has no gradient; its own loss trains it"
            self.without_lm_gradient = MappingProxyType(dict.fromkeys(("predictor_weight", "predictor_bias"), why))
            held = "the router's input is held constant: the loss trains the predictor alone"
            self.gradients_by_design = {**self.gradients_by_design, "importance": held}

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        own = {"importance": self.config.predictor_loss_weight} if self.config.importance == "predictor" else {}
        return {**super().aux_weights, **own}

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to as many experts as its attention says."""
        statistic, text = context.attention, context.token_mask
        assert statistic is not None, f"the block must measure {self.attention_statistic}"
        logits = self.logits(hidden, context)
        probs = logits.softmax(dim=-1)
        predicted = self._predict(hidden) if self.config.importance == "predictor" else None
        count = self.num_experts_of(statistic if predicted is None else predicted.detach(), text)
        best = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.config.max_experts]
        taken = torch.arange(best.shape[1], device=best.device) < count[:, None]
        routes = list_routes(taken, taken.numel())
        scores = probs.gather(1, best)
        if self.config.weights == "renormalised":
            scores = scores / (scores * taken).sum(dim=-1, keepdim=True).clamp(min=1e-20)
        best = functional.pad(best, (0, 1), value=self.num_experts)  # the expert of padding
        weight, number = routes.take(scores), routes.num_routes
        routing = self.route(
            logits, probs, routes.token, best[routes.token, routes.slot], weight, None, context, num_routes=number
        )
        if predicted is not None:
            error = (predicted - statistic).square() * text
            routing.aux["importance"] = error.sum() / text.sum().clamp(min=1)
        return routing

    def num_experts_of(
        self, importance: Float[Tensor, "tokens"], text: Bool[Tensor, "tokens"]
    ) -> Int[Tensor, "tokens"]:
        """``K`` of each token."""
        if self.config.complement:
            importance = 1 - importance
        wanted = (self.scale * importance * text * self.num_experts - ROUNDING).ceil()
        return wanted.clamp(self.config.min_experts, self.config.max_experts or self.num_experts).long()

    def _predict(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens"]:
        return (router_logits(hidden.detach(), self.predictor_weight)[:, 0] + self.predictor_bias).sigmoid()

    def after_step(self, use: StepUse) -> None:
        """Move the scale towards ``target_experts`` per token."""
        if self.config.target_experts is None:
            return
        mean = float(use.tokens_per_expert.sum()) / max(use.tokens, 1)
        direction = (self.config.target_experts > mean) - (self.config.target_experts < mean)
        self.scale *= (1 + self.config.controller_rate) ** direction
        self.scale.clamp_(min=1 / LARGEST_SCALE, max=LARGEST_SCALE)
