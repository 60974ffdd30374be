"""ReLU gates."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, empty, linear_float32

SCHEMES = ("relu",)


class Router(nn.Module):
    """A token goes to every expert whose gate is open."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.weight = empty(config.num_experts, config.hidden_size)

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        return linear_float32(hidden, self.weight).relu()
