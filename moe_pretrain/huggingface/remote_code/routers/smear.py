"""Experts merged for each segment, by the mean of all that comes before it."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import empty

SCHEMES = ("smear",)


class Router(nn.Module):
    """``softmax(LN(mean) LN(W)^T + b)`` over the tokens before a segment, ``softmax(b)`` where there are none."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.gain = config.router["router_gain"]
        self.segment_tokens = config.router["evaluation_segment_tokens"]
        self.weight = empty(config.num_experts, config.hidden_size)
        self.bias = empty(config.num_experts)

    def forward(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Share of each expert in the network of each segment, of sums and numbers of the segments' own tokens."""
        before, tokens = sums.cumsum(dim=1) - sums, counts.cumsum(dim=1) - counts
        means = (before / tokens.clamp(min=1)[:, :, None]).float()
        size = (sums.shape[-1],)
        rows = nn.functional.layer_norm(self.weight.float(), size) * self.gain
        logits = nn.functional.linear(nn.functional.layer_norm(means, size), rows, self.bias.float())
        return logits.softmax(dim=-1)
