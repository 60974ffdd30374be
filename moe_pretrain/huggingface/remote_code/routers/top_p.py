"""As many experts as it takes to pass a probability mass."""

from typing import Any

import torch
from torch import Tensor

from moe_pretrain.huggingface.remote_code.common import Facts, LinearRouter, prefix_mask

SCHEMES = ("top_p",)


class Router(LinearRouter):
    """Each token takes its most probable experts until their mass exceeds ``threshold``."""

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        logits = self.logits(hidden)
        probs = logits.softmax(dim=-1)
        gates = probs * prefix_mask(probs, logits, self.threshold, self.fields["max_experts"])
        return gates / gates.sum(dim=-1, keepdim=True) if self.fields["weights"] == "renormalised" else gates
