"""The mixture-of-experts layer of an exported model."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.combine.sum import combine
from moe_pretrain.huggingface.remote_code.common import Facts, empty
from moe_pretrain.huggingface.remote_code.dense import shared_experts_of
from moe_pretrain.huggingface.remote_code.experts.swiglu import Experts
from moe_pretrain.huggingface.remote_code.routers.top_k import Router


class LatentMaps(nn.Module):
    """Maps to the experts' own width and, of what they return, back; with a norm before where they have one."""

    def __init__(self, config: Any):
        super().__init__()
        self.in_weight = empty(config.latent_size, config.hidden_size)
        self.out_weight = empty(config.hidden_size, config.latent_size)
        self.norm_weight = empty(config.latent_size) if config.latent_norm else None
        self.epsilon = config.rms_norm_eps

    def narrow(self, hidden: Tensor) -> Tensor:
        """Rows for the experts to read."""
        return nn.functional.linear(hidden, self.in_weight)

    def widen(self, combined: Tensor) -> Tensor:
        """The layer's output."""
        if self.norm_weight is not None:
            combined = nn.functional.rms_norm(combined, self.norm_weight.shape, self.norm_weight, self.epsilon)
        return nn.functional.linear(combined, self.out_weight)


class MixtureOfExperts(nn.Module):
    """Routed experts, each for the tokens that it has a gate for, plus shared experts for all."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.router = Router(config, layer)
        self.experts = Experts(config)
        self.form = config.combine_form
        self.latent = LatentMaps(config) if config.latent_size else None
        self.shared_experts = shared_experts_of(config)

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Apply the layer to ``hidden [tokens, hidden]``."""
        gates = self.router(hidden, facts)
        inputs = hidden if self.latent is None else self.latent.narrow(hidden)
        output = combine(inputs, gates, lambda rows, expert: self.experts.run(rows, expert, self.router), self.form)
        if self.latent is not None:
            output = self.latent.widen(output)
        return output if self.shared_experts is None else output + self.shared_experts(hidden)
