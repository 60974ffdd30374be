"""Experts that take every token above their running quantile."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, empty, linear_float32

SCHEMES = ("expert_threshold",)


class Router(nn.Module):
    """Sigmoid scores; an expert takes what exceeds its threshold."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.weight = empty(config.num_experts, config.hidden_size)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(config.num_experts))

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        scores = linear_float32(hidden, self.weight).sigmoid()
        return scores * (scores > self.threshold)
