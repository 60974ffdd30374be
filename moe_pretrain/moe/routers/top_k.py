"""Top-k routing: Switch (k = 1), GShard, Mixtral, OLMoE, DeepSeekMoE."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_pretrain.moe.losses import count_routes, load_balance_loss, router_z_loss
from moe_pretrain.moe.noise import counter_uniform
from moe_pretrain.moe.routers.logits import router_logits
from moe_pretrain.moe.types import BalanceLevel, Router, RouterUse, Routing, RoutingContext, as_count

_JITTER_STREAM = 1


@dataclass(frozen=True)
class TopKRouterConfig:
    """Fields of ``router=top_k``.

    Attributes:
        name: ``top_k``.
        top_k: Experts per token, in [1, num_experts].
        score: How logits become scores: ``softmax`` over all experts, or ``sigmoid`` of each (DeepSeek-V3).
        weights: ``renormalised``: selected scores divided by their sum (Mixtral, GShard); with ``top_k`` 1 the
            weight is then always 1 and the router gets no gradient from the LM loss, so it is refused there.
            ``raw``: scores as they are (Switch, OLMoE).
        jitter: Half width of the multiplicative noise on the router's input in training, in [0, 1).
        load_balance_weight: Coefficient of the load balance loss, >= 0.
        load_balance_level: Tokens over which the share of routes is taken. ``global_batch`` and ``sequence`` do
            not depend on the number of ranks nor the micro-batch size; ``micro_batch`` does.
        router_z_weight: Coefficient of the router z-loss, >= 0.
    """

    name: Literal["top_k"]
    top_k: int
    score: Literal["softmax", "sigmoid"]
    weights: Literal["renormalised", "raw"]
    jitter: float
    load_balance_weight: float
    load_balance_level: BalanceLevel
    router_z_weight: float

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"router.jitter={self.jitter} must be in [0, 1)")
        for field in ("load_balance_weight", "router_z_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"router.{field}={getattr(self, field)} must not be negative")
        if self.top_k == 1 and self.weights == "renormalised":
            raise ValueError(
                "router.weights=renormalised must be raw when router.top_k=1: the weight would always be 1 and the "
                "router would not learn from the LM loss"
            )

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if this router cannot serve ``num_experts`` experts."""
        if self.top_k > num_experts:
            raise ValueError(f"router.top_k={self.top_k} must be at most model.moe.num_experts={num_experts}")

    @property
    def mean_experts_per_token(self) -> float:
        """Expected routes per token, for parameter and FLOP counts."""
        return float(self.top_k)


class TopKRouter(Router):
    """Linear router; every token goes to its ``top_k`` best experts.

    Logits, scores, selection and losses are float32 whatever the engine's dtype. Ties go to the lower expert id
    (a stable sort), so a recomputed or re-sharded run selects the same experts.

    Source:
        Shazeer et al. 2017 (arXiv:1701.06538); Switch (arXiv:2101.03961), eq. 1-2 for ``weights=raw``; Mixtral
        (arXiv:2401.04088), sec. 2.1 for ``renormalised``; DeepSeek-V3 (arXiv:2412.19437), eq. 13-15 for
        ``sigmoid``, whose balance probabilities are the scores divided by their sum (eq. 19).
    """

    causal_in_training = True
    causal_in_evaluation = True

    def __init__(self, config: TopKRouterConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config = config
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the losses in ``Routing.aux``."""
        return {"load_balance": self.config.load_balance_weight, "router_z": self.config.router_z_weight}

    @property
    def needs_global_routes(self) -> bool:
        """Whether training needs ``RoutingContext.sum_over_global_batch``."""
        return self.config.load_balance_level == "global_batch" and self.config.load_balance_weight > 0

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to ``top_k`` experts."""
        config = self.config
        inputs = hidden
        if self.training and config.jitter > 0:
            keys = (context.seed, _JITTER_STREAM, context.step, self.layer)
            noise = counter_uniform(context.token_position, hidden.shape[1], *keys)
            inputs = hidden.float() * (1 + config.jitter * (2 * noise - 1))
        logits = router_logits(inputs, self.weight)
        if config.score == "softmax":
            scores = probs = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid()
            probs = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        # sort, not topk: topk does not say which of two equal experts it takes.
        chosen = scores.detach().sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
        weight = scores.gather(1, chosen)
        if config.weights == "renormalised":
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return self._routing(logits, probs, chosen, weight, context)

    def _routing(
        self, logits: Tensor, probs: Tensor, chosen: Tensor, weight: Tensor, context: RoutingContext
    ) -> Routing:
        """Put the decision, its losses and its statistics together."""
        num_tokens, top_k = chosen.shape
        expert_index = chosen.flatten()
        token_index = torch.arange(num_tokens, device=chosen.device).repeat_interleave(top_k)
        by_sequence = self.config.load_balance_level == "sequence"
        num_groups = context.num_sequences if by_sequence else 1
        tokens_per_group = num_tokens // num_groups
        counts = count_routes(
            expert_index,
            context.token_mask[token_index],
            token_index // tokens_per_group,
            num_groups,
            self.num_experts,
        )
        tokens_per_expert = counts.sum(dim=0)
        balance_counts = counts
        if self.config.load_balance_level == "global_batch" and context.sum_over_global_batch is not None:
            balance_counts = context.sum_over_global_batch(self.layer, tokens_per_expert)[None]
        entropy = -torch.special.xlogy(probs, probs).sum(dim=-1)
        return Routing(
            token_index,
            expert_index,
            weight.flatten(),
            top_k,
            use=RouterUse(
                tokens_per_expert,
                as_count(context.token_mask.sum()),
                as_count((entropy * context.token_mask).sum()),
                tokens_per_expert.new_zeros(()),
            ),
            aux={
                "load_balance": load_balance_loss(probs, balance_counts, context.token_mask),
                "router_z": router_z_loss(logits, context.token_mask),
            },
        )
