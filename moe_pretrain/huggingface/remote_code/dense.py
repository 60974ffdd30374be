"""The dense feed-forward network of an exported model."""

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import empty


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * (x W_up)) W_out``; ``in_weight`` holds gate and up, in that order."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.in_weight = empty(2 * width, hidden_size)
        self.out_weight = empty(hidden_size, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the network to the last axis."""
        gate, up = nn.functional.linear(hidden, self.in_weight).chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.out_weight)
