"""Autonomy-of-Experts: experts rank themselves by the norm of their first activation."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, Thresholds, empty, prefix_mask

SCHEMES = ("autonomy", "autonomy_top_p", "autonomy_expert_choice")


class Router(nn.Module):
    """Scores are ``||x W_down||``; the largest, a mass of their softmax, or those above a threshold are taken."""

    float32_parts = ["router.evaluation"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.fields, self.num_experts = config.router, config.num_experts
        self.down_weight = empty(config.num_experts, config.gate_rank, config.hidden_size)
        chooses = self.fields["name"] == "autonomy_expert_choice"
        self.evaluation = Thresholds(config.num_experts) if chooses else None

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        low = nn.functional.linear(hidden, self.down_weight.flatten(0, 1)).unflatten(1, (self.num_experts, -1))
        norms = torch.linalg.vector_norm(low.float(), dim=-1)
        probs = norms.softmax(dim=-1)
        if self.evaluation is not None:
            taken = norms > self.evaluation.thresholds
        elif self.fields["name"] == "autonomy":
            best = norms.sort(dim=-1, descending=True, stable=True).indices[:, : self.fields["top_k"]]
            taken = torch.zeros_like(norms, dtype=torch.bool).scatter(1, best, True)
        else:
            taken = prefix_mask(probs, norms, self.fields["threshold"], self.fields["max_experts"])
        if self.fields["weights"] == "selected":
            probs = norms.masked_fill(~taken, torch.finfo(norms.dtype).min).softmax(dim=-1)
        return probs * taken
