"""K-means routing: clusters of the hidden states instead of a learnt gate."""

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional

from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.losses import count_routes
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.base import best_first, even_load, router_logits, router_use
from moe_pretrain.moe.routers.config import FixedCountConfig, Fraction
from moe_pretrain.moe.types import Routing, RoutingContext, StepUse

SPLIT_STREAM = 8
_SPLIT = 0.1
"""Half width of the noise that parts a split cluster, in units of a feature's standard deviation."""


@dataclass(frozen=True, kw_only=True)
class KMeansConfig(FixedCountConfig):
    """Fields of ``router=k_means``, beside that of ``FixedCountConfig``.

    Attributes:
        name: ``k_means``.
        rule: ``nearest``: the experts of the nearest centroids; ``least_squares``: those of the largest outputs of a
            linear map that is fitted to the clusters, as MixER's gate is.
        num_features: Size of the frozen random projection in which clusters are found.
        temperature: Of the softmax over distances that weights the experts of a token; a distance is the mean squared
            difference of a feature, which has variance 1.
        decay: Share of the running counts and sums that stays at each step, in [0, 1).
        bias_update_rate: Distance by which an expert's bias moves per step towards even load, >= 0.
        dead_share: A cluster with less than this share of the mean number of tokens gets half of the largest one, in
            [0, 1).
        refit_every_steps: Steps between two fits of ``rule=least_squares``; before the first the nearest decide.
        ridge: Added to the diagonal of the fit's Gram matrix, > 0.
    """

    name: Literal["k_means"]
    rule: Literal["nearest", "least_squares"]
    num_features: PositiveInt
    temperature: PositiveFloat
    decay: Fraction
    bias_update_rate: NonNegativeFloat
    dead_share: Fraction
    refit_every_steps: PositiveInt
    ridge: PositiveFloat

    @property
    def evens_load(self) -> Literal["loss", "quotas"] | None:
        """The bias, if it moves."""
        return "quotas" if self.bias_update_rate else None

    def build(self, hidden_size: int, num_experts: int, layer: int) -> "KMeansRouter":
        """The module of layer ``layer``."""
        return KMeansRouter(self, hidden_size, num_experts, layer)


class KMeansRouter(Router):
    """Online K-means on frozen random features of the router's input; a cluster is an expert. Nothing has a gradient.

    The features of a token are ``u = P rms_norm(x)``, with the rows of ``P [features, hidden]`` of unit length, so that
    each has variance 1. The distance of expert ``e`` is ``mean((u - C_e)^2)``. A token takes the ``top_k`` experts with
    the largest ``score + bias``: the score is minus the distance, or the linear map's output. With one expert the
    weight is 1; with more it is the softmax of ``-distance / temperature`` over those that are taken.

    After every step counts ``n_e`` and sums ``S_e`` of the features of each cluster's tokens, over the global batch, go
    into exponential means that are free of the bias to their start, and ``C_e = S_e / n_e``. A token counts for the
    cluster of its first expert (for ``least_squares`` for the nearest one). The smallest cluster, if it is dead, takes
    half of the largest one, a little apart. ``least_squares`` solves ``(G + ridge I) W = [S; n]`` in float64, with the
    Gram matrix ``G`` of ``[u; 1]``: the map from features to the one-hot of their cluster. The bias moves as in
    ``loss_free``, since K-means alone balances nothing.

    All state is float32 buffers, the same on every rank.

    Source:
        MixER (arXiv:2502.05335): K-means and least squares for a gate without gradient. Its unit is an environment
        with a learnt context, and experts are matched to clusters by a table of all experts' losses; for tokens of a
        language model the features, the running sums, the match by identity and the bias are ours.
    """

    causal_in_training = True
    causal_in_evaluation = True
    gradients_by_design = MappingProxyType({"weight": "clusters are of constants: no loss moves what decides"})

    def __init__(self, config: KMeansConfig, hidden_size: int, num_experts: int, layer: int):
        super().__init__(layer)
        config.check_num_experts(num_experts)
        self.config, self.num_experts = config, num_experts
        features = config.num_features
        fits = config.rule == "least_squares"
        self.frozen_weights = ("projection", "centroids", *(("fitted_map",) if fits else ()))
        self.num_sums = num_experts * (1 + features) + (features + 1) ** 2 * fits
        self.projection: Tensor
        self.centroids: Tensor
        self.expert_bias: Tensor
        self.cluster_share: Tensor
        self.feature_sums: Tensor
        self.steps: Tensor
        self.movement: Tensor
        self.register_buffer("projection", torch.zeros(features, hidden_size))
        self.register_buffer("centroids", torch.zeros(num_experts, features))
        self.register_buffer("expert_bias", torch.zeros(num_experts))
        self.register_buffer("cluster_share", torch.zeros(num_experts))
        self.register_buffer("feature_sums", torch.zeros(num_experts, features))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("movement", torch.zeros(()))
        if fits:
            self.fitted_map: Tensor
            self.gram: Tensor
            self.register_buffer("fitted_map", torch.zeros(num_experts, features + 1))
            self.register_buffer("gram", torch.zeros(features + 1, features + 1))

    @torch.no_grad()
    def forward(self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext) -> Routing:
        """Route every token to the experts of its clusters."""
        config, text = self.config, context.token_mask
        features = self.features(hidden)
        nearness = -self.distances(features)
        scores = nearness
        if config.rule == "least_squares":
            mapped = router_logits(functional.pad(features, (0, 1), value=1.0), self.fitted_map)
            scores = torch.where(self.steps >= config.refit_every_steps, mapped, nearness)
        chosen = best_first(scores + self.expert_bias, scores)[:, : config.top_k]
        logits = nearness / config.temperature
        weight = logits.gather(1, chosen).softmax(dim=-1)
        token_index = torch.arange(len(hidden), device=hidden.device).repeat_interleave(config.top_k)
        routes = chosen.flatten()
        groups = torch.zeros_like(routes)
        (counts,) = count_routes(routes, text[token_index], groups, 1, self.num_experts)
        sums = None
        if self.training:
            cluster = chosen[:, 0] if config.rule == "nearest" else best_first(nearness, None)[:, 0]
            sums = self._sums(features, cluster, text)
        use = router_use(counts, logits.softmax(dim=-1), context, sums)
        return Routing(token_index, routes, weight.flatten(), config.top_k, use)

    def features(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens features"]:
        """Float32 features of variance 1, without gradient."""
        normed = functional.rms_norm(hidden.detach().float(), hidden.shape[1:], eps=1e-6)
        return router_logits(normed, functional.normalize(self.projection, dim=1))

    def distances(self, features: Float[Tensor, "tokens features"]) -> Float[Tensor, "tokens experts"]:
        """Mean squared difference of each token's features to each centroid, less the token's own mean square."""
        products = router_logits(features, self.centroids)
        return (self.centroids.square().sum(dim=1) - 2 * products) / self.config.num_features

    def _sums(self, features: Float[Tensor, "tokens features"], cluster: Tensor, text: Tensor) -> Float[Tensor, "sums"]:
        """Counts and feature sums of each cluster, and for the fit the Gram matrix; text only, float64."""
        seen = functional.pad(features, (0, 1), value=1.0).double() * text[:, None]
        # Not ``one_hot``, which reads the largest index on the host.
        member = (cluster[:, None] == torch.arange(self.num_experts, device=cluster.device)).double()
        by_cluster = member.T @ seen
        parts = [by_cluster[:, -1], by_cluster[:, :-1].flatten()]
        if self.config.rule == "least_squares":
            parts.append((seen.T @ seen).flatten())
        return torch.cat(parts)

    def after_step(self, use: StepUse) -> None:
        """Move the clusters by the step's sums, then the bias by its load."""
        if use.tokens == 0:
            return
        config, experts, features = self.config, self.num_experts, self.config.num_features
        sizes = [experts, experts * features, self.num_sums - experts * (1 + features)]
        counts, sums, gram = (use.sums / use.tokens).split(sizes)
        self.steps += 1
        # What the first of n steps of an exponential mean weighs, over what all n weigh: 1 in the first step.
        rate = (1 - config.decay) / (1 - config.decay ** self.steps.double())
        share = self.cluster_share.double().lerp(counts, rate)
        total = self.feature_sums.double().lerp(sums.view(experts, features), rate)
        before = self.centroids.clone()
        self.centroids.copy_(torch.where(share[:, None] > 0, total / share[:, None], self.centroids.double()))
        self.movement.copy_((self.centroids - before).square().mean().sqrt())
        routes = use.tokens_per_expert
        below = torch.sign(even_load(routes.sum(), experts, self.balanced_costs) - routes)
        self.expert_bias += config.bias_update_rate * below.to(self.expert_bias)
        if config.rule == "least_squares":
            pooled = self.gram.double().lerp(gram.view_as(self.gram), rate)
            self.gram.copy_(pooled)
            # Solved in every step, so that no step waits for the host to know whether it is due.
            due = self.steps % config.refit_every_steps == 0
            ridge = config.ridge * torch.eye(features + 1, dtype=torch.float64, device=share.device)
            fitted = torch.linalg.solve(pooled + ridge, torch.cat([total.T, share[None]]))
            self.fitted_map.copy_(torch.where(due, fitted.T, self.fitted_map.double()))
        self._split_largest_if_one_is_dead(share, total)
        self.cluster_share.copy_(share)
        self.feature_sums.copy_(total)

    def _split_largest_if_one_is_dead(self, share: Tensor, total: Tensor) -> None:
        """Give the smallest cluster half of the largest one; in place, without a host synchronisation."""
        smallest, largest = share.argmin(), share.argmax()
        is_dead = share[smallest] < self.config.dead_share / self.num_experts
        noise = counter_uniform(self.steps[None], self.config.num_features, SPLIT_STREAM, self.layer)[0]
        apart = self.centroids[largest] + _SPLIT * (2 * noise - 1)
        half = share[largest] / 2
        for values, new in (
            (self.centroids, apart),
            (self.expert_bias, self.expert_bias[largest]),
            (share, half),
            (total, half * apart.double()),
        ):
            values[smallest] = torch.where(is_dead, new.to(values), values[smallest])
        share[largest] = torch.where(is_dead, half, share[largest])
        total[largest] = torch.where(is_dead, total[largest] / 2, total[largest])

    def metrics(self, use: StepUse) -> dict[str, float]:
        """Movement of the centroids in the step, the smallest cluster's share of text tokens, and the biases' range."""
        return {
            "centroid_movement": float(self.movement),
            "smallest_cluster_share": float(self.cluster_share.min()),
            "expert_bias_range": float(self.expert_bias.max() - self.expert_bias.min()),
        }

    def weight_norm(self) -> float:
        """Euclidean norm of the centroids."""
        return math.sqrt(float(self.centroids.square().sum()))
