"""Top-k of the logits, without the noise that training adds."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, empty, gates_of, linear_float32

SCHEMES = ("moce_ir",)


class Router(nn.Module):
    """The ``top_k`` largest logits, weighted by the softmax over all, not renormalised."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.top_k = config.router["top_k"]
        self.weight = empty(config.num_experts, config.hidden_size)

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        logits = linear_float32(hidden, self.weight)
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        return gates_of(chosen, logits.softmax(dim=-1).gather(1, chosen), len(self.weight))
