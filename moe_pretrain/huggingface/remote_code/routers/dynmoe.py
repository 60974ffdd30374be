"""Experts that take every token that points their way far enough."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, empty, linear_float32

SCHEMES = ("dynmoe",)


class Router(nn.Module):
    """A token goes to the experts in use whose thresholds its cosine passes, else to its best one; equal weights."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.scale = config.router["score_scale"] or 3 * config.hidden_size**0.5
        self.weight = empty(config.num_experts, config.hidden_size)
        self.thresholds = empty(config.num_experts)
        self.in_use: Tensor
        self.register_buffer("in_use", torch.zeros(config.num_experts, dtype=torch.int64))

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        length = torch.linalg.vector_norm(hidden.float(), dim=1, keepdim=True).clamp(min=1e-6)
        cosines = linear_float32(hidden, nn.functional.normalize(self.weight, dim=1)) / length
        used = self.in_use > 0
        taken = ((self.scale * cosines).sigmoid() > (self.scale * self.thresholds).sigmoid()) & used
        best = cosines.masked_fill(~used, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :1]
        best_alone = torch.zeros_like(taken).scatter(1, best, True)
        taken = torch.where(taken.any(dim=1, keepdim=True), taken, best_alone)
        return taken / taken.sum(dim=1, keepdim=True)
