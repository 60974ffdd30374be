"""Loss-free balancing: a bias per expert that only selection sees, moved after every step."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat

from moe_pretrain.moe.routers.base import even_load
from moe_pretrain.moe.routers.top_k import BiasedTopKRouter, TopKRouterConfig
from moe_pretrain.moe.types import StepUse


@dataclass(frozen=True, kw_only=True)
class LossFreeRouterConfig(TopKRouterConfig):
    """Fields of ``router=loss_free``: those of ``top_k``, and the bias.

    Attributes:
        name: ``loss_free``.
        bias_update_rate: How far an expert's bias moves per step, in units of the score, >= 0.
    """

    name: Literal["loss_free"]  # type: ignore[assignment]  # a variant of its own in the union of routers
    bias_update_rate: NonNegativeFloat

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """The bias, if it moves; else a loss, if it weighs anything."""
        return "quotas" if self.bias_update_rate else super().evens_load

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "LossFreeRouter":
        """The module of layer ``layer``."""
        return LossFreeRouter(self, hidden_size, num_experts, layer)


class LossFreeRouter(BiasedTopKRouter):
    """Top-k of ``score + expert_bias``, weighted by the score alone.

    After each optimizer step ``expert_bias += bias_update_rate * sign(mean load - load)``, with the load of the
    whole global batch in training. Where experts differ in cost, the mean's place is taken by the load at which all
    cost the same together. The bias has no gradient, is float32, is not used in weights, does not move in
    evaluation, and is saved with the run (defect C22). A sequence-level balance loss may be added, as
    DeepSeek-V3 does, by ``load_balance_level=sequence`` and a small ``load_balance_weight``.

    Source:
        Wang et al. 2024 (arXiv:2408.15664), algorithm 1 with the sign rule; DeepSeek-V3 (arXiv:2412.19437), eq. 16.
    """

    def __init__(self, config: LossFreeRouterConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(config, hidden_size, num_experts, layer)
        self._bias_update_rate = config.bias_update_rate

    def after_step(self, use: StepUse) -> None:
        """Raise the bias of experts below their even load and lower it above."""
        routes = use.tokens_per_expert
        below = torch.sign(even_load(routes.sum(), self.num_experts, self.balanced_costs) - routes)
        self.expert_bias += self._bias_update_rate * below.to(self.expert_bias)
