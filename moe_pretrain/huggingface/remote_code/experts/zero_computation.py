"""Experts that are no networks, after those that are: constants, copies, and some that return nothing."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import empty, linear_float32
from moe_pretrain.huggingface.remote_code.experts.swiglu import Experts

Networks = Experts


class ConstantExpert(nn.Module):
    """``a x + b v`` with ``(a, b) = softmax(mix_weight x)``."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mix_weight = empty(2, hidden_size)
        self.value = empty(hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Output of the expert."""
        mix = linear_float32(hidden, self.mix_weight).softmax(dim=-1)
        return mix[:, :1] * hidden + mix[:, 1:] * self.value


class Experts(Networks):  # type: ignore[no-redef]  # in an export the networks' class stands above, under this name
    """Networks, constants, copies and zeros, in the order of their ids."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.num_networks, self.num_copies = config.num_networks, config.num_copy_experts
        self.input_scale = config.expert_input_scale
        self.constants = nn.ModuleList(ConstantExpert(config.hidden_size) for _ in range(config.num_constant_experts))

    def run(self, hidden: Tensor, expert: int, router: Any) -> Tensor:
        """Output of one expert."""
        hidden = hidden if self.input_scale == 1 else hidden * self.input_scale
        place = expert - self.num_networks
        if place < 0:
            return super().run(hidden, expert, router)
        if place < len(self.constants):
            return self.constants[place](hidden)
        return hidden if place < len(self.constants) + self.num_copies else torch.zeros_like(hidden)
