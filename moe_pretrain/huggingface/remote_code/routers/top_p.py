"""As many experts as it takes to pass a probability mass."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, empty, logits_of, prefix_mask

SCHEMES = ("top_p",)


class Router(nn.Module):
    """Each token takes its most probable experts until their mass exceeds ``threshold``."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.fields = config.router
        self.weight = empty(config.num_experts, config.hidden_size)
        self.logit_bias = empty(config.num_experts) if self.fields["bias"] else None
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        logits = logits_of(self, hidden)
        probs = logits.softmax(dim=-1)
        gates = probs * prefix_mask(probs, logits, self.threshold, self.fields["max_experts"])
        return gates / gates.sum(dim=-1, keepdim=True) if self.fields["weights"] == "renormalised" else gates
