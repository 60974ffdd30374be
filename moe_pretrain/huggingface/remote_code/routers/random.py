"""The largest logits of a map that was never trained."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, gates_of, linear_float32

SCHEMES = ("random",)


class Router(nn.Module):
    """Equal weights for the ``top_k`` experts with the largest logits."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.top_k = config.router["top_k"]
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(config.num_experts, config.hidden_size))

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        logits = linear_float32(hidden, self.weight)
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        return gates_of(chosen, torch.full(chosen.shape, 1 / self.top_k, device=hidden.device), len(self.weight))
