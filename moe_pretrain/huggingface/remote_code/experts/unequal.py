"""SwiGLU experts of several widths, two stacked weights for each width."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import empty, gated


class Stack(nn.Module):
    """Experts of one width; ``in_weight`` holds gate and up, in that order."""

    def __init__(self, num: int, hidden_size: int, width: int, activation: dict[str, Any]):
        super().__init__()
        self.numbers = activation
        self.in_weight = empty(num, 2 * width, hidden_size)
        self.out_weight = empty(num, hidden_size, width)

    def run(self, hidden: Tensor, member: int) -> Tensor:
        """Output of one of them."""
        gate, up = nn.functional.linear(hidden, self.in_weight[member]).chunk(2, dim=-1)
        return nn.functional.linear(gated(gate, up, self.numbers), self.out_weight[member])


class Experts(nn.Module):
    """``(silu(x W_gate) * (x W_up)) W_out`` for each expert, whose width is its own."""

    def __init__(self, config: Any):
        super().__init__()
        widths = config.expert_widths
        kinds = sorted(set(widths))
        self.classes = nn.ModuleList(
            Stack(widths.count(width), config.expert_input_size, width, config.activation) for width in kinds
        )
        self.places = [(kinds.index(width), widths[:expert].count(width)) for expert, width in enumerate(widths)]

    def run(self, hidden: Tensor, expert: int, router: Any) -> Tensor:
        """Output of one expert."""
        kind, member = self.places[expert]
        stack = self.classes[kind]
        assert isinstance(stack, Stack)
        return stack.run(hidden, member)
