"""SwiGLU experts, two stacked weights."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import empty, gated


class Experts(nn.Module):
    """``(silu(x W_gate) * (x W_up)) W_out`` for each expert; ``in_weight`` holds gate and up, in that order."""

    def __init__(self, config: Any):
        super().__init__()
        self.numbers = config.activation
        self.in_weight = empty(config.num_networks, 2 * config.expert_width, config.expert_input_size)
        self.out_weight = empty(config.num_networks, config.expert_input_size, config.expert_width)

    def activation(self, hidden: Tensor, expert: int) -> Tensor:
        """Inner activation of one expert."""
        gate, up = nn.functional.linear(hidden, self.in_weight[expert]).chunk(2, dim=-1)
        return gated(gate, up, self.numbers)

    def run(self, hidden: Tensor, expert: int, router: Any) -> Tensor:
        """Output of one expert."""
        return nn.functional.linear(self.activation(hidden, expert), self.out_weight[expert])
