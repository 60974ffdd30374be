"""Experts merged for each segment, by the one before it."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import empty

SCHEMES = ("lory",)


class Router(nn.Module):
    """``softmax(mean W^T)`` over the segment before; the first one by a learnt prior, or evenly."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.segment_tokens = config.router["segment_tokens"]
        self.weight = empty(config.num_experts, config.hidden_size)
        self.prior = empty(config.num_experts) if config.router["first_segment"] == "prior" else None

    def forward(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Share of each expert in the network of each segment, of sums and numbers of the segments' own tokens."""
        means = (sums / counts.clamp(min=1)[:, :, None]).float()
        own = nn.functional.linear(means, self.weight.float()).softmax(dim=-1)
        experts = len(self.weight)
        even = torch.full((experts,), 1 / experts, device=sums.device)
        first = even if self.prior is None else self.prior.float().softmax(dim=-1)
        return torch.cat([first.expand(len(sums), 1, experts), own[:, :-1]], dim=1)
