"""Attentive gating: a token asks the experts' own hidden states which of them suit it."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, empty, gates_of, linear_float32

SCHEMES = ("attentive", "attentive_dense", "attentive_low_rank")


class QueryKey(nn.Module):
    """The two maps of the gate."""

    def __init__(self, key_size: int, hidden_size: int, inner_size: int):
        super().__init__()
        self.query_weight = empty(key_size, hidden_size)
        self.key_weight = empty(key_size, inner_size)


class Router(nn.Module):
    """Scores are ``q . k_e / sqrt(key_size)``, the key from the expert's hidden state for this very token."""

    float32_parts = ["router.gate", "router.weight"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.fields, self.num_experts = config.router, config.num_experts
        is_low, has_linear = self.fields["name"] == "attentive_low_rank", self.fields["name"] == "attentive"
        inner = config.gate_rank if is_low else config.expert_width
        self.gate = QueryKey(self.fields["key_size"], config.hidden_size, inner)
        self.weight = empty(config.num_experts, config.hidden_size) if has_linear else None
        self.down_weight = empty(config.num_experts, config.gate_rank, config.hidden_size) if is_low else None

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        fields = self.fields
        candidates = self._candidates(hidden)
        factor = linear_float32(hidden, self.gate.query_weight) @ self.gate.key_weight
        scores = self._of_all(hidden, factor, facts.experts).gather(1, candidates) / fields["key_size"] ** 0.5
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, : fields["top_k"]]
        if fields["weights"] == "selected":
            weight = scores.gather(1, chosen).softmax(dim=-1)
        else:
            weight = scores.softmax(dim=-1).gather(1, chosen)
        return gates_of(candidates.gather(1, chosen), weight, self.num_experts)

    def _candidates(self, hidden: Tensor) -> Tensor:
        """Experts that are asked, ascending in each row."""
        if self.weight is None:
            return torch.arange(self.num_experts, device=hidden.device).expand(len(hidden), -1)
        logits = linear_float32(hidden, self.weight)
        best = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.fields["num_candidates"]]
        return best.sort(dim=-1).values

    def _of_all(self, hidden: Tensor, factor: Tensor, experts: Any) -> Tensor:
        """Unscaled scores of all experts; clear rather than fast, as candidates are not gathered."""
        if self.down_weight is not None:
            low = nn.functional.linear(hidden, self.down_weight.flatten(0, 1)).unflatten(1, (self.num_experts, -1))
            return (low.float() * factor[:, None]).sum(dim=-1)
        columns = [
            (factor * experts.activation(hidden, expert).float()).sum(dim=-1) for expert in range(self.num_experts)
        ]
        return torch.stack(columns, dim=1)
