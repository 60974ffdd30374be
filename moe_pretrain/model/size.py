"""Parameters and FLOPs of a configuration, counted without building the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moe_pretrain.model.decoder import ModelConfig
from moe_pretrain.moe.build import (
    build_router,
    couples_experts,
    dense_width,
    expected_ffn_experts,
    expert_gate,
    expert_width,
)
from moe_pretrain.moe.combine import pair_product_flops
from moe_pretrain.moe.experts.config import MatrixProductConfig
from moe_pretrain.moe.experts.matrix_product import core_parameters, rebuild_flops
from moe_pretrain.moe.routers.config import RouterConfig


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts by part, and the FLOPs of one training token.

    ``total_parameters`` and ``active_parameters`` count both embeddings when they are untied.

    Attributes:
        embedding: Input embedding.
        head: Output embedding; 0 when tied.
        attention: All attention layers.
        norms: All norms.
        dense_ffn: Dense feed-forward networks, shared experts, and the maps to and from the experts' own width.
        routers: Matrices of all routers.
        router_vectors: Their vectors, which no product has.
        frozen_routers: Weights of all routers that nothing trains; no parameters, and no backward.
        experts: All routed experts that are networks.
        constant_experts: Zero-computation experts with parameters; every token passes their maps.
        active_experts: Routed experts that one token uses, expected over tokens.
        experts_per_route: Routed experts that one token would use with one route per layer.
        scoring: First layers of the experts that one token runs to be routed, selected or not.
        unselected: Those of them that no route of the token goes on with.
        attention_score_flops: Forward FLOPs per token of ``QK`` and ``AV`` with a causal mask over a full row.
        attention_statistic_flops: Forward FLOPs per token of the second ``QK`` that a router's statistic of attention
            takes; it has no backward.
        combine_flops: Forward FLOPs per token of comparing its expert outputs with each other, where ``combine`` does;
            backward costs as many.
        stored_per_route: Parameters of the experts that one token would use with one route per layer; as many as
            ``experts_per_route`` unless these are rebuilt from fewer.
        shared_cores: Parameters that all experts of a layer share, of all layers.
        rebuild_flops: Forward FLOPs of rebuilding all experts of all layers.
        coupling_flops: Forward FLOPs of running the router's rows through the gates of all experts of all layers.
        rebuilds_per_token: Times that these two happen, over tokens: all ranks of a group together once a micro-batch.
        merge_flops: Forward FLOPs of merging one network's experts in all layers, the router's decision included; 0 for
            schemes that send tokens to experts.
        merges_per_token: Merged networks over tokens: 1 over the tokens that share one.
        num_passes: Passes over every token in training.
        head_matmul: Parameters of the head's product: those of ``head``, or of the tied embedding.
        update_flops_per_token: A token's share of the optimizer's matrix products in a step.
    """

    embedding: int
    head: int
    attention: int
    norms: int
    dense_ffn: int
    routers: int
    router_vectors: int
    frozen_routers: int
    experts: int
    constant_experts: int
    active_experts: float
    experts_per_route: int
    scoring: int
    unselected: float
    attention_score_flops: float
    attention_statistic_flops: float
    combine_flops: float
    stored_per_route: int
    shared_cores: int
    rebuild_flops: float
    coupling_flops: float
    rebuilds_per_token: float
    merge_flops: float
    merges_per_token: float
    num_passes: int
    head_matmul: int
    update_flops_per_token: float = 0.0

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self._backbone + self.experts

    @property
    def active_parameters(self) -> float:
        """Parameters that one token uses: all but the experts it does not visit."""
        stored = self.stored_per_route / self.experts_per_route if self.experts_per_route else 1.0
        experts = self.shared_cores + self.active_experts * stored
        return self.embedding + self.head + self._backbone + experts + self.unselected

    @property
    def forward_flops_per_token(self) -> float:
        """FLOPs of one token's forward pass: 2 per matrix entry each time it is used, plus the attention scores."""
        matrices = self.attention + self.dense_ffn + self.active_experts + self.head_matmul
        matrices += self.constant_experts
        matrices += self.scoring + self.router_matmul + self.frozen_routers
        others = self.attention_score_flops + self.attention_statistic_flops + self.combine_flops
        others += self.merging_flops_per_token + self.rebuilding_flops_per_token + self.coupling_flops_per_token
        return 2.0 * matrices + others

    @property
    def router_matmul(self) -> int:
        """Parameters of routers that multiply every token; those that merge experts multiply means of tokens."""
        return 0 if self.merge_flops else self.routers

    @property
    def rebuilding_flops_per_token(self) -> float:
        """A token's share of rebuilding the experts' matrices, forward."""
        return self.rebuild_flops * self.rebuilds_per_token

    @property
    def coupling_flops_per_token(self) -> float:
        """A token's share of the loss that couples experts and router, forward."""
        return self.coupling_flops * self.rebuilds_per_token

    @property
    def merging_flops_per_token(self) -> float:
        """A token's share of the merging of the networks that it uses, forward."""
        return self.merge_flops * self.merges_per_token

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward, 3 times what is differentiated, in every pass over the token; and the update.

        Recomputation is not counted (model FLOPs).
        """
        forward_only = self.attention_statistic_flops + 2.0 * self.frozen_routers
        model = self.num_passes * (3.0 * self.forward_flops_per_token - 2.0 * forward_only - self.combine_flops)
        return model + self.update_flops_per_token

    def with_experts_per_token(self, routes: float) -> "ModelSize":
        """The same model with ``routes`` networks per token and layer: what an adaptive scheme was measured to use."""
        planned = self.active_experts / self.experts_per_route if self.experts_per_route else 0.0
        combining = self.combine_flops * (routes / planned) ** 2 if planned else 0.0
        return replace(self, active_experts=routes * self.experts_per_route, combine_flops=combining)

    def with_tokens_per_merge(self, tokens: float) -> "ModelSize":
        """The same model with ``tokens`` tokens for each merged network: what a run was measured to have."""
        return replace(self, merges_per_token=1 / tokens)

    def in_micro_batches(self, tokens: int, expert_parallel_size: int) -> "ModelSize":
        """The same model where each rank of a group rebuilds its experts once for ``tokens`` tokens of its own."""
        return replace(self, rebuilds_per_token=1 / (tokens * expert_parallel_size))

    @property
    def _backbone(self) -> int:
        return self.attention + self.norms + self.dense_ffn + self.routers + self.router_vectors + self.constant_experts


def model_size(config: ModelConfig, router: RouterConfig) -> ModelSize:
    """Count ``config`` with ``router``. Equal to the built module's count (a test holds it to that).

    Source:
        The FLOP convention of PaLM (arXiv:2204.02311), appendix B, with the causal half of the attention scores.
    """
    width, moe = config.hidden_size, config.moe
    num_moe = len(config.moe_layers)
    num_dense = config.num_layers - num_moe
    dense_ffn = num_dense * 3 * width * config.ffn_hidden_size
    routed, latent_norms = moe.routed_size(width), 0
    routers = vectors = frozen = experts = constants = expert = first_layers = stored = cores = 0
    statistic_flops = combining = merging = rebuilding = coupling = 0.0
    own = [router.of_layer(layer) for layer in config.moe_layers]
    routes = [0.0 if scheme.dense_experts else expected_ffn_experts(moe, scheme) for scheme in own]
    if router.dense_experts:
        dense_ffn += num_moe * 3 * width * dense_width(moe, router)
    else:
        rank, inner = expert_gate(moe, router), expert_width(moe, router, width)
        expert = 3 * routed * inner if rank is None else 2 * width * inner + rank * inner
        dense_ffn += num_moe * width * (3 * moe.shared_width + moe.shared_expert_gate)
        if moe.latent_size is not None:
            dense_ffn += num_moe * 2 * width * routed
            latent_norms = num_moe * routed * moe.latent_norm
        if rank is not None and moe.gate_rank is not None:
            expert += rank * width
        # Autonomy-of-Experts' down projections are among them: every token passes all of them, so all are active.
        with torch.device("meta"):
            modules = [build_router(moe, router, width, layer) for layer in config.moe_layers]
        sizes = [(parameter.ndim, parameter.numel()) for module in modules for parameter in module.parameters()]
        routers = sum(size for ndim, size in sizes if ndim >= 2)
        vectors = sum(size for ndim, size in sizes if ndim < 2)
        frozen = sum(module.get_buffer(name).numel() for module in modules for name in module.frozen_weights)
        measuring = sum(module.attention_statistic is not None for module in modules)
        statistic_flops = 1.0 * measuring * config.sequence_length * config.attention_width
        constants = num_moe * moe.kinds.constant * 3 * width
        experts, stored = num_moe * moe.num_experts * expert, expert
        if isinstance(moe.experts, MatrixProductConfig):
            cores, stored = core_parameters(moe.experts, routed, inner)
            experts = num_moe * (cores + moe.num_experts * stored)
            rebuilding = num_moe * moe.num_experts * rebuild_flops(moe.experts, routed, inner)
        if coupled := sum(couples_experts(scheme) for scheme in own):
            mapped = width * routed if moe.latent_size is not None else 0
            coupling = 2.0 * coupled * moe.num_experts * (moe.num_experts * routed * inner + mapped)
        combining = sum(pair_product_flops(moe.combine, routed, of_layer) for of_layer in routes)
        if router.merges_experts:
            # Every expert's parameters times its share, and every expert's logit.
            merging = 2.0 * num_moe * moe.num_experts * (expert + width)
        first_layers = 2 * width * inner
    scored = [scheme.scored_experts(moe.num_experts) for scheme in own]
    attention, key_value = config.attention_width, config.key_value_width
    normed = {"none": 0, "head": 2 * config.attention_head_size, "whole": attention + key_value}[config.qk_norm]
    embedding = config.vocab_size * width
    return ModelSize(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        attention=config.num_layers * 2 * width * (attention + key_value),
        norms=(2 * config.num_layers + 1) * width + config.num_layers * normed + latent_norms,
        dense_ffn=dense_ffn,
        routers=routers,
        router_vectors=vectors,
        frozen_routers=frozen,
        experts=experts,
        constant_experts=constants,
        active_experts=_sum(routes) * expert,
        experts_per_route=num_moe * expert,
        scoring=sum(scored) * first_layers,
        unselected=_sum([max(0.0, asked - used) for asked, used in zip(scored, routes, strict=True)]) * first_layers,
        attention_score_flops=2.0 * config.num_layers * config.sequence_length * attention,
        attention_statistic_flops=statistic_flops,
        combine_flops=combining,
        stored_per_route=num_moe * stored,
        shared_cores=num_moe * cores,
        rebuild_flops=rebuilding,
        coupling_flops=coupling,
        rebuilds_per_token=1 / config.sequence_length,
        merge_flops=merging,
        merges_per_token=1 / (router.mean_segment_tokens(config.sequence_length) or math.inf),
        num_passes=router.num_passes,
        head_matmul=embedding,
    )


def mean_ffn_experts(config: ModelConfig, router: RouterConfig) -> float:
    """Feed-forward experts that a token is expected to use in a MoE layer, on average over these; 0 without any."""
    own = [expected_ffn_experts(config.moe, router.of_layer(layer)) for layer in config.moe_layers]
    return _sum(own) / len(own) if own else 0.0


def _sum(values: Sequence[float]) -> float:
    """Sum that is a product where all are equal, to the bit."""
    return values[0] * len(values) if len(set(values)) == 1 else math.fsum(values)
