"""Bytes that training holds on one rank, by part, from the configuration alone.

Weights, gradients and optimizer are DeepSpeed 0.19's as it was measured to allocate them; activations are what the
modules of ``model`` and ``moe`` save for backward. Tests hold both to what a run on a CPU really keeps; what differs on
a GPU is that its norm keeps its input alone. The exchange is counted at its peak, with ``worst_load`` times the mean
number of rows on this rank.
"""

from dataclasses import dataclass
from statistics import fmean

import torch

from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype, EngineConfig
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.parameter_groups import parameter_roles
from moe_pretrain.moe.build import (
    couples_experts,
    dense_width,
    expected_ffn_experts,
    expert_gate,
    expert_width,
    padded_ffn_experts,
)
from moe_pretrain.moe.combine import OrthogonalConfig
from moe_pretrain.moe.experts.activation import SWIGLU
from moe_pretrain.moe.experts.config import MatrixProductConfig
from moe_pretrain.moe.experts.matrix_product import rebuilt_numbers
from moe_pretrain.moe.experts.merged import networks_merged_together
from moe_pretrain.moe.kernels import priced_kernels
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import ExpertShard, float32_parameters, sharded_parameters
from moe_pretrain.schedule.batch_plan import BatchPlan

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
_STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class LocalParameters:
    """Parameters that one rank holds.

    Attributes:
        dense: Replicated on every rank, in the engine's dtype.
        kept: Replicated and always float32: routers.
        expert: This rank's experts.
        largest: The largest tensor.
        moment_bytes: Bytes of the optimizer's moments of the first two.
        expert_moment_bytes: The same of this rank's experts.
        update_bytes: What an update needs beside.
    """

    dense: int
    kept: int
    expert: int
    largest: int
    moment_bytes: int
    expert_moment_bytes: int
    update_bytes: float

    @property
    def count(self) -> int:
        """All of them."""
        return self.dense + self.kept + self.expert

    def owned(self, ranks: int, expert_parallel_size: int) -> float:
        """Elements whose optimizer state is on this rank under ZeRO."""
        return (self.dense + self.kept) / ranks + self.expert * expert_parallel_size / ranks

    def owned_moment_bytes(self, ranks: int, expert_parallel_size: int) -> float:
        """Bytes of the moments of these elements."""
        return self.moment_bytes / ranks + self.expert_moment_bytes * expert_parallel_size / ranks


def local_parameters(config: Config) -> LocalParameters:
    """Count one rank's parameters on a model without storage."""
    with torch.device("meta"):
        model = DecoderLM(config.model, config.router, ExpertShard(0, config.parallel.expert_parallel_size))
    kept = sum(parameter.numel() for parameter in float32_parameters(model))
    of_experts = {id(p) for layer in model.moe_layers() for p in sharded_parameters(layer.experts)}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    expert = sum(sizes[name] for name, parameter in model.named_parameters() if id(parameter) in of_experts)
    moments, roles = {False: 0, True: 0}, parameter_roles(model)
    for name, parameter in model.named_parameters():
        per_element = config.optimizer.state(roles[name]).bytes_per_element
        moments[id(parameter) in of_experts] += per_element * sizes[name]
    dense = sum(sizes.values()) - kept - expert
    update_bytes = config.optimizer.update_bytes(model)
    return LocalParameters(dense, kept, expert, max(sizes.values()), moments[False], moments[True], update_bytes)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: In the engine's dtype; routers in float32.
        optimizer: Moments and, under ZeRO, float32 master weights.
        carried: Gradients that are there when backward begins.
        stale: Those of the micro-batch before, which are there until backward begins.
        gradients: Gradients at their most, while the last micro-batch's are reduced.
        buckets: DeepSpeed's buffer for reducing gradients, there throughout backward.
        copies: Copies of gradients while they are reduced or cast.
        update: What the optimizer makes and drops while it updates.
        activations: What is saved for backward of one micro-batch, the gradients that the loss makes in forward among
            it.
        recomputed: The inside of one block, made again in backward.
        logits: One chunk's logits, and the float32 sum of the head's gradient.
        working: What the backward pass of one MoE layer holds at a time beside what was saved for it.
        exchange: Buffers of one layer's exchange between ranks, at the worst load.
    """

    weights: float
    optimizer: float
    carried: float
    stale: float
    gradients: float
    buckets: float
    copies: float
    update: float
    activations: float
    recomputed: float
    logits: float
    working: float
    exchange: float

    @property
    def total(self) -> float:
        """The peak: where backward begins, or where it ends and activations have given way to gradients."""
        layer = self.recomputed + max(self.working, self.exchange)  # rows travel before and after an expert works
        begins = self.carried + self.activations + max(layer, self.logits + self.stale)
        ends = self.gradients + max(self.copies, self.update)
        return self.weights + self.optimizer + self.buckets + max(begins, ends)


def memory_per_rank(
    config: Config,
    device: str,
    dtype: Dtype,
    plan: BatchPlan,
    ranks: int,
    worst_load: float,
    parameters: LocalParameters | None = None,
) -> Memory:
    """Estimate the peak of a training step on one rank.

    Args:
        config: The run.
        device: ``cuda`` or ``cpu``.
        dtype: The engine's, ``auto`` resolved.
        plan: How the batch is cut over ``ranks``.
        ranks: Number of ranks.
        worst_load: Rows on this rank over the mean, with expert parallelism, >= 1.
        parameters: Those of one rank, where they have been counted.
    """
    parameters = parameters or local_parameters(config)
    owned = parameters.owned(ranks, config.parallel.expert_parallel_size)
    layers = _Layers(config, device, dtype, plan.micro_batch_size, worst_load)
    schemes = layers.schemes
    zero_stage = config.engine.stage(dtype, ranks)
    return Memory(
        weights=weight_bytes(parameters, dtype),
        optimizer=optimizer_bytes(parameters, ranks, config.parallel.expert_parallel_size, zero_stage),
        carried=_carried_bytes(parameters, owned, dtype, zero_stage, plan.accumulation),
        # ``BF16_Optimizer`` clears the last bfloat16 gradients when the next backward begins.
        stale=weight_bytes(parameters, dtype)
        if (dtype, zero_stage) == ("bfloat16", 1) and plan.accumulation > 1
        else 0,
        gradients=_gradient_bytes(parameters, owned, dtype, zero_stage, plan.accumulation),
        buckets=_bucket_bytes(config.engine, dtype, zero_stage),
        copies=_copied_bytes(parameters, dtype, zero_stage),
        update=parameters.update_bytes,
        activations=layers.saved,
        recomputed=layers.recomputed,
        logits=schemes[0].logits,
        working=max(scheme.working for scheme in schemes),
        exchange=max(scheme.exchange for scheme in schemes),
    )


def weight_bytes(parameters: LocalParameters, dtype: Dtype) -> float:
    """Weights as the forward pass reads them."""
    return BYTES[dtype] * (parameters.dense + parameters.expert) + 4 * parameters.kept


def optimizer_bytes(parameters: LocalParameters, ranks: int, expert_parallel_size: int, zero_stage: int) -> float:
    """Moments and, where ZeRO copies them, float32 master weights, of the elements owned by this rank."""
    if zero_stage == 0:
        return parameters.moment_bytes + parameters.expert_moment_bytes
    place = (ranks, expert_parallel_size)
    return 4 * parameters.owned(*place) + parameters.owned_moment_bytes(*place)


def _gradient_bytes(
    parameters: LocalParameters, owned: float, dtype: Dtype, zero_stage: int, accumulation: int
) -> float:
    """Gradients at their most.

    Stage 0 has one float32 gradient. Stage 1 in bfloat16 (DeepSpeed's ``BF16_Optimizer``) keeps whole float32 sums
    beside the last backward's bfloat16 gradients; in float32 whole gradients and their owned part. Stage 2 copies the
    owned part as it comes, as the optimizer wants it and, in float32 with accumulation, as a sum.
    """
    if zero_stage == 0:
        return 4 * parameters.count
    if zero_stage == 1:
        return 4 * parameters.count + (weight_bytes(parameters, dtype) if dtype == "bfloat16" else 4 * owned)
    return owned * (6 if dtype == "bfloat16" else 8 if accumulation == 1 else 12)


def _carried_bytes(
    parameters: LocalParameters, owned: float, dtype: Dtype, zero_stage: int, accumulation: int
) -> float:
    """Gradients that are there when backward begins.

    Sums over the accumulation; at stage 2 also a buffer for the owned part, made with the first gradient; at stage 1 in
    bfloat16 the float32 sums that ``BF16_Optimizer`` never frees.
    """
    if dtype == "bfloat16" and zero_stage == 1:
        return 4 * parameters.count
    sums = 0 if accumulation == 1 else 4 * (owned if zero_stage == 2 else parameters.count)
    return sums + (BYTES[dtype] * owned if zero_stage == 2 else 0)


def _bucket_bytes(engine: EngineConfig, dtype: Dtype, zero_stage: int) -> float:
    """One bucket, whole however small the model; ``BF16_Optimizer`` and stage 0 have none."""
    has_none = zero_stage == 0 or (zero_stage == 1 and dtype == "bfloat16")
    return 0 if has_none else BYTES[dtype] * engine.reduce_bucket_elements


def _copied_bytes(parameters: LocalParameters, dtype: Dtype, zero_stage: int) -> float:
    """Stage 0 reduces up to 500M elements at once, whatever is configured; bfloat16 casts tensor by tensor."""
    if zero_stage == 0:
        return 4 * min(_STAGE_0_BUCKET, max(parameters.dense + parameters.kept, parameters.expert))
    return 4 * parameters.largest if dtype == "bfloat16" else 0


@dataclass(frozen=True)
class Routed:
    """Bytes of one rank's routes in one layer and micro-batch: to the experts, and back."""

    sent_bytes: float
    returned_bytes: float


def routes_of_rank(config: Config, dtype: Dtype, micro_batch_size: int) -> Routed:
    """Routes that one rank sends through one layer's exchange, to all ranks together; the mean over layers."""
    layers = _Layers(config, "cuda", dtype, micro_batch_size, 1.0)
    first = layers.schemes[0]
    if config.router.merges_experts:  # every rank gets every token, and sends back its part of every output
        everywhere = first.expert_parallel * first.tokens * first.row
        return Routed(everywhere, everywhere)
    if len(layers.schemes) == 1:
        return Routed(first.routes * first.message, first.routes * first.routed_row)
    own = [layers.of(layer) for layer in config.model.moe_layers]
    return Routed(
        fmean(scheme.routes * scheme.message for scheme in own),
        fmean(scheme.routes * scheme.routed_row for scheme in own),
    )


class _Layers:
    """Bytes that all layers keep of one micro-batch, each by its scheme."""

    def __init__(self, config: Config, device: str, dtype: Dtype, micro_batch_size: int, worst_load: float):
        self._model, self._router = config.model, config.router
        self._of = {
            id(scheme): _SchemeLayers(config, scheme, device, dtype, micro_batch_size, worst_load)
            for scheme in config.router.parts().values()
        }

    @property
    def schemes(self) -> list["_SchemeLayers"]:
        """One for each scheme that there is."""
        return list(self._of.values())

    def of(self, layer: int) -> "_SchemeLayers":
        """Those of the scheme of a layer; of a dense layer they do not depend on it."""
        if not self._model.moe.is_moe_layer(layer):
            return self.schemes[0]
        return self._of[id(self._router.of_layer(layer))]

    @property
    def saved(self) -> float:
        """Everything between the embedding and the loss that backward needs, without what it makes again."""
        model, any_scheme = self._model, self.schemes[0]
        blocks = sum(
            self.of(layer).block(model.moe.is_moe_layer(layer), model.recompute) for layer in range(model.num_layers)
        )
        return any_scheme.with_ends(blocks)

    @property
    def recomputed(self) -> float:
        """The largest difference that recomputation makes to a block."""
        model = self._model
        kinds = {(self.of(layer), model.moe.is_moe_layer(layer)) for layer in range(model.num_layers)}
        return max(own.block(is_moe, "none") - own.block(is_moe, model.recompute) for own, is_moe in kinds)


class _SchemeLayers:
    """Bytes that a layer keeps of one micro-batch by its scheme, and what is the same for all."""

    def __init__(
        self,
        config: Config,
        router: RouterConfig,
        device: str,
        dtype: Dtype,
        micro_batch_size: int,
        worst_load: float,
    ):
        self.on_cpu = device == "cpu"
        self.kernels = priced_kernels(config.engine.kernels, device)
        self.model, self.router, self.moe = config.model, router, config.model.moe
        self.tokens = micro_batch_size * self.model.sequence_length
        self.size = BYTES[dtype]
        self.expert_parallel = config.parallel.expert_parallel_size
        self.merges = self.router.merges_experts
        self.routes = self.tokens * expected_ffn_experts(self.moe, self.router)
        # Without an exchange, rows are this rank's own routes, on a GPU perhaps with padding.
        own = padded_ffn_experts(self.moe, self.router) if (device, dtype) == ("cuda", "bfloat16") else None
        padded = self.routes if own is None or self.merges else self.tokens * own
        self.rows = self.routes * worst_load if self.expert_parallel > 1 else padded
        self.row = self.size * self.model.hidden_size
        self.routed_size = self.moe.routed_size(self.model.hidden_size)
        self.routed_row = self.size * self.routed_size  # as it travels to an expert
        self.rank = expert_gate(self.moe, self.router) if self.routes else None
        self.passes = self.router.num_passes
        self.compares = bool(self.routes) and isinstance(self.moe.combine, OrthogonalConfig)
        # Rows of the experts' first layers that are run to choose among them, and those that come to this rank.
        self.asked = self.tokens * self.router.scored_experts(self.moe.num_experts)
        self.asked_rows = self.asked * (worst_load if self.expert_parallel > 1 else 1)

    def with_ends(self, blocks: float) -> float:
        """Bytes of ``blocks``, with the rotary table, the last norm and the head."""
        model = self.model
        rotary = self.tokens * 4 * model.attention_head_size
        if self.passes > 1:  # the head's gradient is made in backward, of both passes' hidden states
            return self.passes * (blocks + rotary + self._norm() + self.tokens * self.row)
        head = self.tokens * self.row + self.size * model.vocab_size * model.hidden_size
        return blocks + rotary + self._norm() + head

    @property
    def logits(self) -> float:
        """A chunk of logits and of their gradient, and the float32 sum of the head's gradient.

        On a CPU the chunk is made float32 and its gradient in its place; liger's kernel puts it there too.
        """
        model = self.model
        chunk = min(model.cross_entropy_chunk_tokens, self.tokens)
        each = 4 + (self.size if self.size < 4 else 0) if self.on_cpu else 2 * self.size
        if self.kernels == "liger":
            each = self.size
        if self.passes > 1:  # both passes' probabilities, their ratio and a gradient, of a quarter of the positions
            chunk = min(max(1, model.cross_entropy_chunk_tokens // 4), self.tokens)
            each = 4 + (self.size if self.size < 4 else 0) + 4 * 4
        return 4 * model.vocab_size * model.hidden_size + chunk * model.vocab_size * each

    @property
    def working(self) -> float:
        """Temporaries of the experts' backward pass, or of the backward pass that asks them, and weight gradients.

        All rows are one block on a GPU in bfloat16. Elsewhere each expert's are, and what the block before has left in
        its variables is there until the next has made its own.
        """
        if not self.routes:
            return 0.0
        if self.merges:
            return self._merging()
        width = expert_width(self.moe, self.router, self.model.hidden_size)
        local = self.moe.num_experts // self.expert_parallel
        if self.on_cpu or self.size > 2:
            blocks, widths = local, 11 if self.rank else 8
        else:
            blocks, widths = 1, 6 if self.rank else 4
        block = self.rows / blocks
        experts = (self.rows - block) * self.routed_row + block * (2 * self.routed_row + widths * self.size * width)
        # Gradients of the queries' factors are float32, joined, and summed over a token's experts; what the routed
        # experts had saved is gone by then.
        asking = self.asked_rows * (self.row + 2 * 4 * width) + 2 * self.tokens * 4 * width
        asking -= self.rows * 2 * self.size * width
        weights = 3 * self.size * local * self.routed_size * width
        # The inside of attention is made again when the experts are done, in the room of what they held.
        again = 0.0 if self.model.recompute == "none" else self._attention() - self.tokens * self.row
        return max(0.0, weights + max(experts, asking if self.asked else 0.0) - again)

    @property
    def exchange(self) -> float:
        """Rows packed and sent, rows received and unpacked; those that backward keeps are activations.

        Asking experts for their keys is an exchange of its own, of rows and queries, before the one with the routes.
        """
        if self.expert_parallel == 1 or not self.routes:
            return 0.0
        if self.merges:  # packed and received, for as many as there are ranks; outputs go back as they came
            return 3 * self.expert_parallel * self.tokens * self.row
        asking = (2 * self.asked + self.asked_rows) * (self.row + self._query)
        return max(asking, 2 * self.routes * self.message + self.rows * (self.message + self.routed_row))

    @property
    def message(self) -> float:
        """Bytes of one travelling route: the row, its weight and what the scheme sends along."""
        return self.routed_row + 4 + self._payload

    @property
    def _payload(self) -> float:
        """Bytes of what a scheme sends along with a route."""
        return self.size * self.router.payload_size

    @property
    def _query(self) -> int:
        """Bytes of a token's query, float32, where experts are asked for keys."""
        return 4 * self.router.query_size

    def block(self, is_moe: bool, recompute: str) -> float:
        """One block; ``selective`` drops the inside of attention, ``full`` that of the feed-forward network too."""
        feed_forward = self._moe(recompute) if is_moe and self.routes else self._dense(is_moe, recompute)
        return (self.tokens * self.row if recompute != "none" else self._attention()) + feed_forward

    def _norm(self, width: int | None = None) -> float:
        """Input of a norm and the inverse deviation of its rows; on a CPU in float32, with the normalised rows."""
        width = width or self.model.hidden_size
        return self.tokens * ((8 if self.on_cpu else self.size) * width + 4)

    def _attention(self) -> float:
        """Norm, its output, the projection, rotated queries and keys, the result by head and by token, log-sum-exp.

        On a GPU heads lie in order of tokens, and both results are one.
        """
        model = self.model
        query, key = model.attention_width, model.key_value_width
        results = 2 if self.on_cpu else 1
        heads: float = self.size * (query + 2 * key + query + key + results * query)
        if model.qk_norm != "none":
            heads += self._normed_heads()
        return self._norm() + self.tokens * (self.row + heads + 4 * model.num_heads)

    def _normed_heads(self) -> float:
        """Bytes per token of the norm of queries and keys, whose input is the projection."""
        model = self.model
        rows = model.num_heads + model.num_key_value_heads if model.qk_norm == "head" else 2
        copies = (1 if self.size == 4 else 2) if self.on_cpu else 0
        return 4 * rows + copies * 4 * (model.attention_width + model.key_value_width)

    def _dense(self, is_moe: bool, recompute: str) -> float:
        """Norm, its output, gate and up, the activated gate and the product."""
        if recompute == "full":
            return self.tokens * self.row
        width = dense_width(self.moe, self.router) if is_moe else self.model.ffn_hidden_size
        numbers = self._inner_numbers() if is_moe else 4
        return self._norm() + self.tokens * (self.row + numbers * self.size * width)

    def _moe(self, recompute: str) -> float:
        """Norm, its output, the routes, the experts' pre-activations; under expert parallelism the received rows."""
        kept = self._norm() + self.tokens * self.row + self._routing() + self._asking(recompute) + self._coupling()
        if recompute == "full":
            return kept + self.routes * self._payload
        if self.merges:
            return kept + self._merged_rows() + self._shared()
        width = expert_width(self.moe, self.router, self.model.hidden_size)
        rows = self.rows * (2 * self.size * width + 4)
        if self.expert_parallel > 1:
            rows += self.rows * self.routed_row
        if self.moe.latent_size is not None:
            rows += self._latent()
        if self.compares:
            rows += self._compared()
        if isinstance(self.moe.experts, MatrixProductConfig):
            local = self.moe.num_experts // self.expert_parallel
            rows += self.size * local * rebuilt_numbers(self.moe.experts, self.routed_size, width)
        if self.rank is not None:
            rows += self.rows * self.size * self.rank
        return kept + rows + self._shared()

    def _inner_numbers(self) -> int:
        """Numbers that a dense network keeps per unit: gate, up, SwiGLU's activated gate, and the product."""
        return 4 if self.moe.activation_function == SWIGLU else 3

    def _shared(self) -> float:
        """Shared experts; with a gate its input to the product, the output, and the gate itself."""
        gate = self.row + self.size if self.moe.shared_expert_gate else 0
        return self.tokens * (self._inner_numbers() * self.size * self.moe.shared_width + gate)

    def _latent(self) -> float:
        """Rows of the experts' own width: what they read, unless it has been sent away, and what is mapped back."""
        sent = self.expert_parallel > 1 or self.compares
        normed = self._norm(self.routed_size) if self.moe.latent_norm else 0.0
        return normed + self.tokens * self.routed_row * (1 if sent else 2)

    def _merged_rows(self) -> float:
        """Pre-activations: of all tokens of the group, in this rank's part of the width; and the tokens that came."""
        width = expert_width(self.moe, self.router, self.model.hidden_size)
        came = self.expert_parallel * self.tokens * self.row if self.expert_parallel > 1 else 0.0
        return came + self.tokens * 2 * self.size * width

    def _merging(self) -> float:
        """Experts in the order in which they are merged, their gradients, and some merged networks with theirs."""
        width = expert_width(self.moe, self.router, self.model.hidden_size)
        network = 3 * self.model.hidden_size * width / self.expert_parallel
        segments = (
            self.tokens * self.expert_parallel / (self.router.mean_segment_tokens(self.model.sequence_length) or 1)
        )
        together = min(segments, max(1.0, networks_merged_together(network)))
        experts = self.moe.num_experts * network
        # In float32 the merged networks are what they were made as.
        each = 4 + 4 + (2 * self.size if self.size < 4 else 0)
        # Gradients of the outputs of all tokens that came, and those of the tokens, in parts and joined.
        rows = 3 * self.expert_parallel * self.tokens * self.row
        return experts * (4 + 2 * 4 + self.size) + together * network * each + rows

    def _compared(self) -> float:
        """Outputs of all routes, and without an exchange the rows they were made of; float64 pairs of each token.

        Of the pairs backward needs two or three matrices, of the routes factors, norms and indices.
        """
        outputs = self.routes * self.routed_row * (1 if self.expert_parallel > 1 else 2)
        matrices = 2 if isinstance(self.moe.combine, OrthogonalConfig) and self.moe.combine.form == "symmetric" else 3
        return outputs + self.tokens * 8 * matrices * self.router.mean_experts_per_token**2 + self.routes * 62

    def _routing(self) -> float:
        """Scores and what the losses keep of them, the routes, and what the scheme keeps in float32 for each token."""
        experts = self.moe.kinds.total
        own = self.router.kept_per_token(self.model.hidden_size, experts)
        routes = self.tokens * self.router.mean_experts_per_token
        # Of routes that are as many as they happen to be, a GPU keeps lists as long as they can get.
        most = self.router.most_experts_per_token(experts)
        listed = 0.0 if self.on_cpu or self.merges or most == routes / self.tokens else self.tokens * 8 * 3 * most
        # A token and an expert, or one place in the mask of those that are taken.
        indices = 8 if self.router.fixed_experts_per_token is None and not self.merges else 8 + 8
        # Of zero-computation experts, a column for each expert and one for padding.
        weights = self.tokens * 4 * (experts + 1) if self.moe.kinds.zero_computation else 0
        return self.tokens * 4 * (2 * experts + own) + routes * (indices + 4 + 4) + listed + weights

    def _coupling(self) -> float:
        """Gates of this rank's experts for the rows of the router; the rows' factors, the rows as they go in, norms."""
        if not couples_experts(self.router):
            return 0.0
        experts, hidden = self.moe.num_experts, self.model.hidden_size
        gates = experts // self.expert_parallel * expert_width(self.moe, self.router, hidden)
        inputs = self.row + (self.routed_row if self.moe.latent_size is not None else 0)
        return experts * (self.size * gates + 4 * hidden + inputs + 3 * 4 * experts)

    def _asking(self, recompute: str) -> float:
        """Bytes of asking experts for keys: their first layers, what these are multiplied with, scores, indices.

        Recomputation keeps what came from other ranks.
        """
        if not self.asked:
            return 0.0
        width = expert_width(self.moe, self.router, self.model.hidden_size)
        came = self.asked_rows * (self.row + self._query) if self.expert_parallel > 1 else 0.0
        kept = came + self.asked * (4 + 3 * 8)
        if recompute == "full":
            return kept
        sources = self.asked_rows if self.expert_parallel > 1 else self.tokens
        return kept + sources * 4 * width + self.asked_rows * 2 * self.size * width
