"""Experts by the clusters of random features of the hidden states."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, best_first, gates_of, linear_float32

SCHEMES = ("k_means",)


class Router(nn.Module):
    """The nearest centroids, or the largest outputs of a map that was fitted to the clusters, plus a bias."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.fields, experts, features = config.router, config.num_experts, config.router["num_features"]
        self.projection: Tensor
        self.register_buffer("projection", torch.zeros(features, config.hidden_size))
        self.centroids: Tensor
        self.register_buffer("centroids", torch.zeros(experts, features))
        self.expert_bias: Tensor
        self.register_buffer("expert_bias", torch.zeros(experts))
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        fits = self.fields["rule"] == "least_squares"
        self.fitted_map: Tensor | None
        self.register_buffer("fitted_map", torch.zeros(experts, features + 1) if fits else None)

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        fields = self.fields
        normed = nn.functional.rms_norm(hidden.float(), hidden.shape[1:], eps=1e-6)
        features = linear_float32(normed, nn.functional.normalize(self.projection, dim=1))
        products = linear_float32(features, self.centroids)
        nearness = (2 * products - self.centroids.square().sum(dim=1)) / fields["num_features"]
        scores = nearness
        if self.fitted_map is not None:
            mapped = linear_float32(nn.functional.pad(features, (0, 1), value=1.0), self.fitted_map)
            scores = torch.where(self.steps >= fields["refit_every_steps"], mapped, nearness)
        chosen = best_first(scores + self.expert_bias, scores)[:, : fields["top_k"]]
        weight = (nearness / fields["temperature"]).gather(1, chosen).softmax(dim=-1)
        return gates_of(chosen, weight, len(self.centroids))
