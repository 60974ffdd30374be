"""S-BASE: in training the tokens of a micro-batch are matched to experts by Sinkhorn's algorithm, evenly."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import PositiveInt
from torch import Tensor

from moe_pretrain.moe.routers.base import LinearRouter
from moe_pretrain.moe.routers.config import FixedCountConfig, LinearRouterConfig
from moe_pretrain.moe.types import Routing, RoutingContext


@dataclass(frozen=True, kw_only=True)
class SinkhornConfig(FixedCountConfig, LinearRouterConfig):
    """Fields of ``router=sinkhorn``, beside ``top_k`` and those of ``LinearRouterConfig``.

    Attributes:
        name: ``sinkhorn``.
        score: Weight of a route: ``softmax`` over all experts, or ``sigmoid`` of its own logit (what BASE has with
            ``top_k`` 1); never renormalised.
        iterations: Sinkhorn iterations, >= 1; always as many, so nothing waits for a residual.
    """

    name: Literal["sinkhorn"]
    score: Literal["softmax", "sigmoid"]
    iterations: PositiveInt

    @property
    def evens_load(self) -> None:
        """The plan evens routes, whatever they cost.

        Shares that differ are a plan's column sums, but not what its rows' largest entries come to: where logits are
        close, every token's largest entries are those of the experts with the largest shares.
        """
        return None

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "SinkhornRouter":
        """The module of layer ``layer``."""
        return SinkhornRouter(self, hidden_size, num_experts, layer)


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "tokens experts"], token_mask: Bool[Tensor, "tokens"], iterations: int
) -> Float[Tensor, "tokens experts"]:
    """Logarithm of the transport plan from tokens to experts, ``exp(logits)`` scaled to uniform marginals.

    Each iteration scales the rows, then the columns, so every expert's column sums to ``1 / experts``, and the
    rows come close to ``1 / text tokens``. Logarithms take the place of subtracting the maximum before ``exp``: no
    spread of the logits makes a column vanish.

    Args:
        logits: float32.
        token_mask: True for text tokens; the others have no share of the marginals, and their rows mean nothing.
        iterations: Iterations, whatever the residual.

    Returns:
        The logarithm, float32, no gradient; finite, also without any text. No host synchronisation takes place.

    Source:
        Sinkhorn-Knopp as used by S-BASE (Clark et al. 2022, arXiv:2202.01169). Deviation: a fixed number of iterations
        instead of a tolerance.
    """
    is_text = token_mask[:, None]
    column = logits.new_zeros(logits.shape[1])
    row = logits.new_zeros(logits.shape[0])
    for _ in range(iterations):
        row = -(logits + column).logsumexp(dim=1)
        mass = (logits + row[:, None]).masked_fill(~is_text, -math.inf).logsumexp(dim=0)
        column = -torch.where(token_mask.any(), mass, 0.0)
    return logits + row[:, None] + column - math.log(logits.shape[1])


class SinkhornRouter(LinearRouter):
    """Linear router; in training a token takes its ``top_k`` largest entries of the Sinkhorn plan.

    In a row of the plan experts rank by ``logit + column scale``: the scale is a bias per expert that makes the load
    even, solved anew for every micro-batch. No gradient passes through it; weights are the scores of the
    logits alone. The tokens of a micro-batch compete, later ones and other sequences too, so training is not causal and
    depends on the micro-batch's size. Padding takes no part. Evaluation is plain top-k of the logits, causal, and not
    balanced. What is even is the plan, in which a token is spread over experts; the load is the number of its largest
    entries, and tokens that are alike have theirs at the same experts, so load is near even rather than even.

    Source:
        S-BASE (Clark et al. 2022, arXiv:2202.01169) after BASE (Lewis et al. 2021, arXiv:2103.16716), which solves the
        assignment by auction. Neither has a balance loss: its weight is 0 by default.
    """

    causal_in_training = False
    evaluation_rule = "plain top-k of the logits; in training top-k of the Sinkhorn plan"

    def __init__(self, config: SinkhornConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer)
        config.check_num_experts(num_experts)
        self.config = config

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to ``top_k`` experts."""
        config, num_tokens = self.config, len(hidden)
        logits = self.logits(hidden, context)
        probs = logits.softmax(dim=-1)
        scores = probs if config.score == "softmax" else logits.sigmoid()
        ranked = logits.detach()
        if self.training:
            ranked = sinkhorn(ranked, context.token_mask, config.iterations)
        chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
        token_index = torch.arange(num_tokens, device=hidden.device).repeat_interleave(config.top_k)
        weight = scores.gather(1, chosen).flatten()
        return self.route(logits, probs, token_index, chosen.flatten(), weight, config.top_k, context)
