"""Uniform routing: every expert gets the same number of tokens whatever they are; a control and a benchmark's mode."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.routers.config import FixedCountConfig
from moe_pretrain.moe.routers.random import ControlRouter
from moe_pretrain.moe.types import Routing, RoutingContext

DEAL_STREAM = 4


@dataclass(frozen=True, kw_only=True)
class UniformConfig(FixedCountConfig):
    """Fields of ``router=uniform``, beside that of ``FixedCountConfig``.

    Attributes:
        name: ``uniform``.
    """

    name: Literal["uniform"]

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "UniformRouter":
        """The module of layer ``layer``."""
        return UniformRouter(self, num_experts, layer)


class UniformRouter(ControlRouter):
    """Experts dealt out evenly by a token's place in its row, each with weight ``1 / top_k``.

    A row is cut in blocks of ``num_experts`` tokens. Each block has a shuffled circle of all experts, a hash of block
    and layer, and its ``i``-th token takes the ``top_k`` experts of the circle from place ``i`` on. So in every block
    each expert has exactly ``top_k`` routes, and the load is even to the route wherever the length of a row is a
    multiple of ``num_experts``; elsewhere the last, shorter block has some experts less often than others, the same
    ones in each row.

    Nothing is looked at but the place, so it is causal, the same in training and evaluation, and knows no seed. There
    are no weights, no losses, and no router to compute: what a step costs with it is what the experts cost at perfect
    balance. As a control it shows what experts are worth that cannot choose by content.
    """

    def __init__(self, config: UniformConfig, num_experts: int, layer: int):
        super().__init__(config, num_experts, layer)

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Deal the experts out."""
        experts, num_tokens, device = self.num_experts, len(hidden), hidden.device
        first, length = context.first_place, num_tokens // context.num_sequences
        place = torch.arange(first, first + length, device=device)
        blocks = torch.arange(first // experts, -(-(first + length) // experts), device=device)
        circles = counter_uniform(blocks, experts, DEAL_STREAM, self.layer).sort(dim=1, stable=True).indices
        slot = (place[:, None] + torch.arange(self.config.top_k, device=device)) % experts
        chosen = circles[place // experts - first // experts].gather(1, slot).repeat(context.num_sequences, 1)
        # Every expert is as likely as any other.
        probs = torch.full((num_tokens, experts), 1 / experts, device=device)
        return self.route(chosen, probs, context)
