"""THOR: experts drawn at random, and two passes over every micro-batch that are to predict the same."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat
from torch import Tensor

from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.losses import count_routes
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import router_use
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import Routing, RoutingContext

DRAW_STREAM, EVALUATION_STREAM = 5, 6


@dataclass(frozen=True, kw_only=True)
class ThorConfig(RouterConfig):
    """Fields of ``router=thor``.

    Attributes:
        name: ``thor``.
        draw: Tokens that share a draw in training: each ``token`` has its own; all of a ``sequence`` (a row); or all
            of the global ``batch``, as in the released code, whose draw is one for each layer and rank. With ``batch``
            one expert of a layer gets every token of a pass, and under expert parallelism one rank all of the work.
        consistency_weight: alpha, coefficient of the symmetric KL divergence between the two passes, >= 0.
    """

    name: Literal["thor"]
    draw: Literal["token", "sequence", "batch"]
    consistency_weight: NonNegativeFloat

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "ThorRouter":
        """The module of layer ``layer``."""
        return ThorRouter(self, num_experts, layer)

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if there is nothing to draw from."""
        if num_experts < 2:
            raise ValueError(
                f"model.moe.num_experts={num_experts} must be at least 2 for router=thor: two passes through the same "
                "expert are one"
            )

    @property
    def mean_experts_per_token(self) -> float:
        """One in each pass."""
        return 1.0

    @property
    def fixed_experts_per_token(self) -> int:
        """One in each pass."""
        return 1

    @property
    def two_pass_weight(self) -> float:
        """``consistency_weight``."""
        return self.consistency_weight


class ThorRouter(Router):
    """One expert for every token, drawn uniformly, with weight 1: no parameters, no router to compute, no balance loss.

    A draw is a hash of (seed, step, layer, pass, place in the run), so it is the same on any topology, in every
    recomputation, and another one in the second pass over the same micro-batch. The loss is ``CE(p1) + CE(p2) + alpha *
    mean_t KL_sym``, see ``model.cross_entropy.two_pass_losses``. A load is ``tokens / num_experts`` but for chance.

    In evaluation a token's place in its row draws its expert, the same in every row, whatever seed and step: a loss is
    then a number of the model, and one text has the same loss in any batch. The paper draws anew for each input.

    Source:
        Zuo et al. 2022 (arXiv:2110.04260), equations 4 to 6, for translation. alpha = 5 is that of the released IWSLT
        script. Without dropout, as models here are, the two passes differ in experts alone; the paper's differ in
        dropout too.
    """

    causal_in_training = True
    causal_in_evaluation = True
    evaluation_rule = "the expert of a token is drawn by its place in the row, in one pass"

    def __init__(self, config: ThorConfig, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config, self.num_experts = config, num_experts

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Draw an expert for every token."""
        num_tokens, device = len(hidden), hidden.device
        expert = self._draw(context)
        token = torch.arange(num_tokens, device=device)
        counts = count_routes(expert, context.token_mask, torch.zeros_like(token), 1, self.num_experts)[0]
        # Any expert is as likely as any other.
        probs = torch.full((num_tokens, self.num_experts), 1 / self.num_experts, device=device)
        return Routing(token, expert, torch.ones(num_tokens, device=device), 1, router_use(counts, probs, context))

    def _draw(self, context: RoutingContext) -> Int[Tensor, "tokens"]:
        rows = context.token_position.view(context.num_sequences, -1)
        keys: tuple[int, ...]
        if self.training:
            keys = (context.seed, DRAW_STREAM, context.step, self.layer, context.pass_index)
            shared = {"token": rows, "sequence": rows[:, :1], "batch": torch.zeros_like(rows[:, :1])}[self.config.draw]
        else:
            keys = (EVALUATION_STREAM, self.layer)
            shared = (context.first_place + torch.arange(rows.shape[1], device=rows.device)).expand_as(rows)
        drawn = counter_uniform(shared.flatten(), 1, *keys).view_as(shared)
        return (drawn * self.num_experts).long().expand_as(rows).flatten()
