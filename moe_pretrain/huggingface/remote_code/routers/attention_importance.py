"""DA-MoE: a token's own attention says how many experts it gets, a linear router which."""

import math
from typing import Any

import torch
from torch import Tensor

from moe_pretrain.huggingface.remote_code.common import Facts, LinearRouter, empty, linear_float32

SCHEMES = ("attention_importance",)


class Router(LinearRouter):
    """``clip(ceil(scale * importance * num_experts))`` experts, the most probable ones."""

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        self.num_experts = config.num_experts
        self.scale: Tensor
        self.register_buffer("scale", torch.zeros(()))
        if self.fields["importance"] == "predictor":
            self.predictor_weight = empty(1, config.hidden_size)
            self.predictor_bias = empty(1)

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        logits = self.logits(hidden)
        count = self._num_experts(hidden, facts)
        best = logits.sort(dim=-1, descending=True, stable=True).indices
        rank = best.argsort(dim=-1)  # place of each expert in the order
        gates = logits.softmax(dim=-1) * (rank < count[:, None])
        if self.fields["weights"] == "renormalised":
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return gates

    def _num_experts(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Experts of each token; a little less counts as a whole number, as sums of attention weights round."""
        if self.fields["importance"] == "predictor":
            importance = (linear_float32(hidden, self.predictor_weight)[:, 0] + self.predictor_bias).sigmoid()
        else:
            importance = self._of_attention(facts).flatten()
        if self.fields["complement"]:
            importance = 1 - importance
        wanted = (self.scale * importance * self.num_experts - 1e-5).ceil()
        return wanted.clamp(self.fields["min_experts"], self.fields["max_experts"] or self.num_experts).long()

    def _of_attention(self, facts: Facts) -> Tensor:
        """The statistic of each token's row of attention, a mean over heads, ``[batch, sequence]``."""
        query, visible, name = facts.query, facts.visible, self.fields["importance"]
        key = facts.key.repeat_interleave(query.shape[1] // facts.key.shape[1], dim=1)
        scores = query.float() / math.sqrt(query.shape[-1]) @ key.float().mT
        weights = scores.masked_fill(~visible[:, None], -math.inf).softmax(dim=-1)
        if name == "row_max":
            return weights.amax(dim=-1).mean(dim=1)
        num_keys = visible.sum(dim=-1)
        if name == "entropy":
            entropy = -torch.special.xlogy(weights, weights).sum(dim=-1).mean(dim=1)
            return (1 - entropy / num_keys.clamp(min=2).log()).clamp(min=0)
        position = torch.arange(visible.shape[-1], device=visible.device)
        excluded = position == visible.int().argmax(dim=-1, keepdim=True)  # the first key that is seen
        if self.fields["exclude_self"]:
            excluded = excluded | (position == position[-visible.shape[1] :, None])
        largest = weights.masked_fill(excluded[:, None], 0.0).amax(dim=-1).mean(dim=1)
        uniform = 1 / num_keys
        return ((largest - uniform) / (1 - uniform).clamp(min=1e-6)).clamp(min=0)
