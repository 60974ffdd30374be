"""Top-k of scores, or of scores plus a bias that only selection sees."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, LinearRouter, best_first, empty, gates_of, linear_float32

SCHEMES = ("top_k", "loss_free", "quantile")


class Router(LinearRouter):
    """Every token goes to its ``top_k`` best experts; ``expert_bias`` decides with the scores, and weighs nothing."""

    def __init__(self, config: Any, layer: int):
        size, is_plain = config.router["projection_size"], config.router["name"] == "top_k"
        super().__init__(config, layer, size)
        self.projection = None if size is None else empty(size, config.hidden_size)
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", None if is_plain else torch.zeros(config.num_experts))

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        fields = self.fields
        inputs = hidden if self.projection is None else linear_float32(hidden, self.projection)
        logits = self.logits(inputs)
        if fields["score"] == "softmax":
            scores = logits.softmax(dim=-1)
        elif fields["score"] == "sigmoid":
            scores = logits.sigmoid()
        else:
            scores = nn.functional.softplus(logits).clamp(min=1e-20).sqrt()
        ranked = scores if self.expert_bias is None else scores + self.expert_bias
        if fields["num_groups"] > 1:
            ranked = self._within_groups(ranked, logits)
        chosen = best_first(ranked, logits)[:, : fields["top_k"]]
        weight = scores.gather(1, chosen)
        if fields["weights"] == "renormalised":
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return gates_of(chosen, weight * fields["weight_scale"], len(self.weight))

    def _within_groups(self, scores: Tensor, logits: Tensor) -> Tensor:
        """Scores with those of all but the best groups at the bottom; a group counts by its two best experts."""
        groups = self.fields["num_groups"]
        of_group, ties = (
            values.unflatten(1, (groups, -1)).sort(dim=-1, descending=True).values[:, :, :2].sum(dim=-1)
            for values in (scores, logits)
        )
        best = best_first(of_group, ties)[:, : self.fields["groups_per_token"]]
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter(1, best, True)
        return scores.masked_fill(~kept.repeat_interleave(scores.shape[1] // groups, dim=1), -torch.inf)
