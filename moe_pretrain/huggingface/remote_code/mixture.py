"""The mixture-of-experts layer of an exported model."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.combine.sum import combine
from moe_pretrain.huggingface.remote_code.common import Facts
from moe_pretrain.huggingface.remote_code.dense import shared_experts_of
from moe_pretrain.huggingface.remote_code.experts.swiglu import Experts
from moe_pretrain.huggingface.remote_code.routers.top_k import Router


class MixtureOfExperts(nn.Module):
    """Routed experts, each for the tokens that it has a gate for, plus shared experts for all."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.router = Router(config, layer)
        self.experts = Experts(config)
        self.form = config.combine_form
        self.shared_experts = shared_experts_of(config)

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Apply the layer to ``hidden [tokens, hidden]``."""
        gates = self.router(hidden, facts)
        output = combine(hidden, gates, lambda rows, expert: self.experts.run(rows, expert, self.router), self.form)
        return output if self.shared_experts is None else output + self.shared_experts(hidden)
