"""Random routing: a linear router that is never trained, the control that a learnt one must beat."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.moe.losses import count_routes
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import router_logits, router_use
from moe_pretrain.moe.routers.config import FixedCountConfig
from moe_pretrain.moe.types import Routing, RoutingContext


@dataclass(frozen=True, kw_only=True)
class RandomConfig(FixedCountConfig):
    """Fields of ``router=random``, beside that of ``FixedCountConfig``.

    Attributes:
        name: ``random``.
    """

    name: Literal["random"]

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "RandomRouter":
        """The module of layer ``layer``."""
        return RandomRouter(self, hidden_size, num_experts, layer)


class ControlRouter(Router):
    """Base of the controls: equal weights ``1 / top_k``, no loss, nothing that learns."""

    causal_in_training = True
    causal_in_evaluation = True

    def __init__(self, config: FixedCountConfig, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config, self.num_experts = config, num_experts

    def route(
        self, chosen: Int[Tensor, "tokens slots"], probs: Float[Tensor, "tokens experts"], context: RoutingContext
    ) -> Routing:
        """Equal weights for the ``chosen`` experts; ``probs`` is the distribution whose entropy is reported."""
        top_k, device = self.config.top_k, chosen.device
        token_index = torch.arange(len(chosen), device=device).repeat_interleave(top_k)
        routes = chosen.flatten()
        counts = count_routes(routes, context.token_mask[token_index], torch.zeros_like(routes), 1, self.num_experts)[0]
        weight = torch.full(routes.shape, 1 / top_k, device=device)
        return Routing(token_index, routes, weight, top_k, router_use(counts, probs, context))


class RandomRouter(ControlRouter):
    """A linear router with the weights that a trained one starts with, which no step moves.

    A token goes to the ``top_k`` experts with the largest logits, each with weight ``1 / top_k``; ties go to the lower
    expert id. Tokens that are alike go to the same experts, so experts can specialise, but on parts of the space that
    nobody chose. What a scheme gains by learning to route is its distance from this one. Neither the router nor the
    layers below it have a gradient through the choice, and nothing balances load.

    ``weight [experts, hidden]`` is float32 state rather than a parameter: no optimizer knows it, checkpoints hold it.
    ``model.init`` draws it like the weight of ``router=top_k``, so that with one seed both start with the same choices.

    Source:
        The frozen random router is the usual control, for example in Roller et al. 2021 (arXiv:2106.04426) and Dikkala
        et al. 2023 (arXiv:2310.17963).
    """

    frozen_weights = ("weight",)

    def __init__(self, config: RandomConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, num_experts, layer)
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(num_experts, hidden_size))

    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to the ``top_k`` experts that its hidden state happens to lean to."""
        logits = router_logits(hidden.detach(), self.weight)
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.config.top_k]
        return self.route(chosen, logits.softmax(dim=-1), context)

    def weight_norm(self) -> float:
        """Euclidean norm of the weights, which stays as it was."""
        return math.sqrt(float(self.weight.square().sum()))
