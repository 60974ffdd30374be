"""Experts dealt out by the place of a token in its row."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, counter_uniform, gates_of

SCHEMES = ("uniform",)
_DEAL_STREAM = 4


class Router(nn.Module):
    """Token ``i`` of a block of ``num_experts`` takes the experts from place ``i`` of the block's circle on."""

    float32_parts: list[str] = []

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.layer, self.top_k, self.num_experts = layer, config.router["top_k"], config.num_experts

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        experts, place = self.num_experts, facts.place
        noise = counter_uniform(place // experts, experts, _DEAL_STREAM, self.layer)
        circles = noise.sort(dim=1, stable=True).indices
        slot = (place[:, None] + torch.arange(self.top_k, device=place.device)) % experts
        chosen = circles.gather(1, slot)
        return gates_of(chosen, torch.full(chosen.shape, 1 / self.top_k, device=place.device), experts)
