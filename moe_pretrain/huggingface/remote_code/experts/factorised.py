"""SwiGLU experts whose gate is the product of two factors."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import empty, gated


class Experts(nn.Module):
    """``(silu(x W_down W_up) * (x W_in)) W_out``; ``W_down`` is the router's where it ranks experts by it."""

    def __init__(self, config: Any):
        super().__init__()
        self.numbers = config.activation
        num, width, hidden, rank = config.num_networks, config.expert_width, config.hidden_size, config.gate_rank
        self.down_weight = empty(num, rank, hidden) if config.experts_own_down else None
        self.up_weight = empty(num, width, rank)
        self.in_weight = empty(num, width, hidden)
        self.out_weight = empty(num, hidden, width)

    def run(self, hidden: Tensor, expert: int, router: Any) -> Tensor:
        """Output of one expert."""
        down = router.down_weight if self.down_weight is None else self.down_weight
        gate = nn.functional.linear(nn.functional.linear(hidden, down[expert]), self.up_weight[expert])
        inner = gated(gate, nn.functional.linear(hidden, self.in_weight[expert]), self.numbers)
        return nn.functional.linear(inner, self.out_weight[expert])
