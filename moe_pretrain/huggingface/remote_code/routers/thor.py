"""An expert for every place in a row, drawn once and for all."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, counter_uniform, gates_of

SCHEMES = ("thor",)


class Router(nn.Module):
    """The place of a token in its row draws its expert, the same in every row; weight 1."""

    float32_parts: list[str] = []

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.num_experts, self.layer = config.num_experts, layer

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        evaluation_stream = 6
        drawn = counter_uniform(facts.place, 1, evaluation_stream, self.layer)
        chosen = (drawn * self.num_experts).long()
        return gates_of(chosen, torch.ones(chosen.shape, device=hidden.device), self.num_experts)
