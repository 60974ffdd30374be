"""Bytes that one rank's layers keep of a micro-batch for backward, and send to each other.

The exchange is counted at its peak, with ``worst_load`` times the mean number of rows on this rank.
"""

from dataclasses import dataclass
from statistics import fmean

from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype
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
from moe_pretrain.plan.local_parameters import BYTES


@dataclass(frozen=True)
class Routed:
    """Bytes of one rank's routes in one layer and micro-batch: to the experts, and back."""

    sent_bytes: float
    returned_bytes: float


def routes_of_rank(config: Config, dtype: Dtype, micro_batch_size: int) -> Routed:
    """Routes that one rank sends through one layer's exchange, to all ranks together; the mean over layers."""
    layers = Layers(config, "cuda", dtype, micro_batch_size, 1.0)
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


class Layers:
    """Bytes that all layers keep of one micro-batch, each by its scheme."""

    def __init__(self, config: Config, device: str, dtype: Dtype, micro_batch_size: int, worst_load: float):
        self._model, self._router = config.model, config.router
        self._of = {
            id(scheme): SchemeLayers(config, scheme, device, dtype, micro_batch_size, worst_load)
            for scheme in config.router.parts().values()
        }

    @property
    def schemes(self) -> list["SchemeLayers"]:
        """One for each scheme that there is."""
        return list(self._of.values())

    def of(self, layer: int) -> "SchemeLayers":
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


class SchemeLayers:
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

    def _norm(self) -> float:
        """Bytes that a norm of the residual stream keeps: the sum, and the inverse deviation of its rows."""
        return self.tokens * (self.row + 4)

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
        # On a CPU ``rms_norm`` keeps float32 rows, those that are normalised too.
        kept = (8 if self.on_cpu else self.size) * self.routed_size + 4
        normed = self.tokens * kept if self.moe.latent_norm else 0.0
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
