"""MoCE-IR's gate: the best expert of logits with noise, balanced by two losses of what experts cost."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from moe_pretrain.moe.counter_noise import counter_normal
from moe_pretrain.moe.losses import count_routes, importance_loss, load_loss
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import best_first, router_logits, router_use
from moe_pretrain.moe.routers.config import FixedCountConfig
from moe_pretrain.moe.types import ExpertRanking, Routing, RoutingContext

NOISE_STREAM = 11


@dataclass(frozen=True, kw_only=True)
class MoCEIRConfig(FixedCountConfig):
    """Fields of ``router=moce_ir``, beside that of ``FixedCountConfig``.

    Attributes:
        name: ``moce_ir``.
        load_balance_weight: Coefficient of the two losses' mean, >= 0.
    """

    name: Literal["moce_ir"]
    load_balance_weight: NonNegativeFloat

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """A loss, if it weighs anything."""
        return "loss" if self.load_balance_weight else None

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "MoCEIRRouter":
        """The module of layer ``layer``."""
        return MoCEIRRouter(self, hidden_size, num_experts, layer)

    def kept_per_token(self, hidden_size: int, num_experts: int) -> int:
        """Logits with noise, and how far those without are from the chosen one's."""
        return 2 * num_experts


class MoCEIRRouter(Router):
    """Top-k of ``z + n`` with ``z = W x`` and normal noise ``n`` of deviation ``1 / num_experts``, in training.

    The weight of a route is the softmax of ``z + n`` over all experts, not renormalised. Evaluation has no noise.

    Two losses with half of ``load_balance_weight`` each, both squared coefficients of variation over experts:
    ``importance``, of ``cost_e sum_t softmax(z_t)_e``, and ``load``, of the tokens that an expert would get if noise
    were drawn anew. Costs multiply importance alone, as published: one loss draws experts to the inverse of their cost,
    the other to equal numbers of tokens. ``model.moe.experts.balance=routes`` is the gate without its complexity bias.
    Both are statistics of the micro-batch. Noise is a hash of (seed, step, layer, place in the run).

    Source:
        Zamfir et al. 2024 (arXiv:2411.18466), sec. 3.2, for images, and its code; weight 0.01 as there. Deviations: a
        token has the place of an image, so ``z`` is of the token's hidden state; the original's pooled features and
        those of the image's spectrum are left out, and windows that grow with the expert. The code draws noise in
        evaluation too. Its options to divide costs by the largest or the smallest are one: a coefficient of variation
        does not see a factor. Widths double from one expert to the next, as in ``[1, 2, 4, 8]``, for which
        ``model.moe.expert_hidden_size`` must be a multiple of 15; the pattern by default has the smallest twice.
    """

    causal_in_training = True
    causal_in_evaluation = True
    evaluation_rule = "top-k of the logits without noise"
    losses_depend_on_cut = True

    def __init__(self, config: MoCEIRConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config, self.num_experts = config, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficients of the two losses."""
        half = self.config.load_balance_weight / 2
        return {"importance": half, "load": half}

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to ``top_k`` experts."""
        top_k, text = self.config.top_k, context.token_mask
        logits = router_logits(hidden, self.weight)
        std, noisy = 1 / self.num_experts, logits
        if self.training:
            keys = (context.seed, NOISE_STREAM, context.step, self.layer)
            noisy = logits + std * counter_normal(context.token_position, self.num_experts, *keys)
        chosen = best_first(noisy.detach(), None)[:, :top_k]
        threshold = noisy.gather(1, chosen[:, -1:])[:, 0]
        probs = logits.softmax(dim=-1)
        token_index = torch.arange(len(hidden), device=hidden.device).repeat_interleave(top_k)
        routes = chosen.flatten()
        (counts,) = count_routes(routes, text[token_index], torch.zeros_like(routes), 1, self.num_experts)
        return Routing(
            token_index,
            routes,
            noisy.softmax(dim=-1).gather(1, chosen).flatten(),
            top_k,
            use=router_use(counts, probs, context),
            aux={
                "importance": importance_loss(probs, text, self.balanced_costs),
                "load": load_loss(logits, threshold, std, text),
            },
        )

    def ranking(self, hidden: Tensor, context: RoutingContext) -> ExpertRanking | None:
        """Experts by their logits without noise."""
        logits = router_logits(hidden, self.weight)
        return ExpertRanking(logits, logits.softmax(dim=-1))
