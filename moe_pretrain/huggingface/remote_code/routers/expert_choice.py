"""Expert choice by the causal thresholds that training has left."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, Thresholds, empty, linear_float32

SCHEMES = ("expert_choice",)


class Router(nn.Module):
    """A token goes to every expert with which it scores above that expert's threshold."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.weight = empty(config.num_experts, config.hidden_size)
        self.evaluation = Thresholds(config.num_experts)

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        probs = linear_float32(hidden, self.weight).softmax(dim=-1)
        return probs * (probs > self.evaluation.thresholds)
