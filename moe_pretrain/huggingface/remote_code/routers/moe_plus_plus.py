"""Top-k of logits to which those of the layer below are added, mapped."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, best_first, empty, gates_of, linear_float32

SCHEMES = ("moe_plus_plus",)


class Router(nn.Module):
    """Every token goes to its ``top_k`` best experts, of which the last ones of the list return nothing."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.fields, self.zeros, experts = config.router, config.num_zero_experts, config.num_experts
        inner = 8 * experts if self.fields["projection"] == "two_layer" else None
        self.projection = None if inner is None else empty(inner, config.hidden_size)
        self.weight = empty(experts, inner or config.hidden_size)
        # Of a model with several schemes its own fields say so.
        is_lowest = self.fields.get("is_lowest", all(config.dense_widths[:layer]))
        self.residual_weight = empty(experts, experts) if self.fields["gating_residual"] and not is_lowest else None

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        fields = self.fields
        inputs = hidden if self.projection is None else linear_float32(hidden, self.projection).tanh()
        logits = linear_float32(inputs, self.weight)
        if self.residual_weight is not None:
            logits = logits + linear_float32(facts.carried[-1], self.residual_weight)
        facts.carried.append(logits)
        if fields["logit_std"] is not None:
            variance = logits.var(dim=-1, keepdim=True)
            logits = logits * (fields["logit_std"] / variance.where(variance > 1e-12, torch.ones_like(variance)).sqrt())
        probs = logits.softmax(dim=-1)
        chosen = best_first(probs, logits)[:, : fields["top_k"]]
        weight = logits.gather(1, chosen).softmax(dim=-1) if fields["weights"] == "mixtral" else probs.gather(1, chosen)
        if fields["weights"] == "zero_dropped":
            weight = weight.masked_fill(chosen >= probs.shape[1] - self.zeros, 0.0)
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return gates_of(chosen, weight, probs.shape[1])
