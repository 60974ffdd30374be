"""The dense feed-forward network of an exported model."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import empty, gated


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * (x W_up)) W_out``; ``in_weight`` holds gate and up, in that order.

    Shared experts may have another activation, and a gate on their output.
    """

    def __init__(
        self, hidden_size: int, width: int, activation: dict[str, Any] | None = None, has_output_gate: bool = False
    ):
        super().__init__()
        self.activation = activation or {"alpha": 1.0, "offset": 0.0, "limit": None}
        self.in_weight = empty(2 * width, hidden_size)
        self.out_weight = empty(hidden_size, width)
        self.gate_weight = empty(1, hidden_size) if has_output_gate else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the network to the last axis."""
        gate, up = nn.functional.linear(hidden, self.in_weight).chunk(2, dim=-1)
        output = nn.functional.linear(gated(gate, up, self.activation), self.out_weight)
        return output if self.gate_weight is None else output * nn.functional.linear(hidden, self.gate_weight).sigmoid()


def shared_experts_of(config: Any) -> SwiGLU | None:
    """The shared experts of a layer, one network; None where there are none."""
    if not config.shared_expert_width:
        return None
    return SwiGLU(config.hidden_size, config.shared_expert_width, config.activation, config.shared_expert_gate)
