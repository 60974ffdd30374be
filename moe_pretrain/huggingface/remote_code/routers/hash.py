"""Experts by vocabulary id, from a table."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, empty, gates_of, linear_float32

SCHEMES = ("hash",)


class Router(nn.Module):
    """The experts of a token's id, with equal or learnt weights."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.fields, self.num_experts = config.router, config.num_experts
        is_learnt = self.fields["weights"] == "learned"
        self.weight = empty(config.num_experts, config.hidden_size) if is_learnt else None
        self.table: Tensor
        self.register_buffer("table", torch.zeros(config.vocab_size, self.fields["top_k"], dtype=torch.int64))

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        chosen = self.table[facts.token_ids].long()  # transformers loads it as float32 into a model in bfloat16
        if self.weight is None:
            share = torch.full(chosen.shape, 1 / self.fields["top_k"], device=hidden.device)
        else:
            logits = linear_float32(hidden, self.weight)
            scores = nn.functional.softplus(logits).clamp(min=1e-20).sqrt().gather(1, chosen)
            share = scores / scores.sum(dim=-1, keepdim=True)
        return gates_of(chosen, self.fields["weight_scale"] * share, self.num_experts)
