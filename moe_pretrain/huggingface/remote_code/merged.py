"""The layer of an exported model whose experts are merged: one network for each segment of a row."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, empty, gated
from moe_pretrain.huggingface.remote_code.dense import shared_experts_of
from moe_pretrain.huggingface.remote_code.routers.smear import Router


class MergedExperts(nn.Module):
    """Parameters of all experts, the inner width leading; gate and up are the second axis of ``in_weight``."""

    def __init__(self, config: Any):
        super().__init__()
        self.numbers = config.activation
        self.in_weight = empty(config.expert_width, 2, config.num_experts, config.hidden_size)
        self.out_weight = empty(config.expert_width, config.num_experts, config.hidden_size)

    def run(self, hidden: Tensor, mixture: Tensor) -> Tensor:
        """The network with the parameters ``sum_e mixture[e] theta_e``, merged in float32."""
        gate, up = torch.einsum("wgeh,e->gwh", self.in_weight.float(), mixture).to(hidden.dtype)
        out = torch.einsum("weh,e->hw", self.out_weight.float(), mixture).to(hidden.dtype)
        inner = gated(nn.functional.linear(hidden, gate), nn.functional.linear(hidden, up), self.numbers)
        return nn.functional.linear(inner, out)


class MixtureOfExperts(nn.Module):
    """Merged experts, plus shared experts for all; what merges them is kept in the cache as keys of a layer more."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.kept_as = config.num_hidden_layers + sum(not width for width in config.dense_widths[:layer])
        self.router = Router(config, layer)
        self.experts = MergedExperts(config)
        self.shared_experts = shared_experts_of(config)

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Apply the layer to ``hidden [tokens, hidden]``."""
        batch, sequence, _ = facts.visible.shape
        text = facts.visible[:, -1]  # the last position of a row sees all of its text
        if bool((~text & (facts.visible.sum(dim=1) > 1)).any()):
            raise ValueError(
                "this model merges experts by the text of a row: it takes one document in each, not several"
            )
        segment = (text.cumsum(dim=1) - 1).clamp(min=0) // self.router.segment_tokens
        member = (segment[:, None] == torch.arange(int(segment.max()) + 1, device=hidden.device)[:, None]) & text[
            :, None
        ]
        every = self._with_earlier(hidden.view(batch, sequence, -1), facts.cache).double()
        mixture = self.router(member.double() @ every, member.sum(dim=2).double())
        output = torch.zeros_like(hidden)
        own = segment[:, -sequence:] + torch.arange(batch, device=hidden.device)[:, None] * mixture.shape[1]
        for number in own.unique().tolist():
            token = (own.flatten() == number).nonzero().flatten()
            output[token] = self.experts.run(hidden[token], mixture.flatten(0, 1)[number])
        return output if self.shared_experts is None else output + self.shared_experts(hidden)

    def _with_earlier(self, hidden: Tensor, cache: Any) -> Tensor:
        """Hidden states of the new positions behind those that the cache has."""
        if cache is None:
            return hidden
        kind = type(cache.layers[0])
        while len(cache.layers) <= self.kept_as:
            cache.layers.append(kind())
        return cache.update(hidden[:, None], hidden[:, None, :, :0], self.kept_as)[0][:, 0]
