"""A Llama-style decoder whose feed-forward networks are mixtures of experts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from moe_pretrain.model.attention import Attention, QKNorm, document_mask
from moe_pretrain.model.block import Block, Recompute
from moe_pretrain.model.cross_entropy import chunked_cross_entropy, token_losses, two_pass_losses
from moe_pretrain.model.embedding import embed
from moe_pretrain.model.norms import Norm, ResidualNorm
from moe_pretrain.model.rotary import rotary_table
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.experts.swiglu import SwiGLU, SwiGLUExperts
from moe_pretrain.moe.host_values import on_device_of
from moe_pretrain.moe.kernels import Kernels
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import ExpertShard, MoEOutput, RouterUse, Routing, RoutingContext, mean_use


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder.

    Attributes:
        name: Name of the size, for run names and reports.
        vocab_size: Rows of the embedding; at least the tokenizer's vocabulary.
        sequence_length: Tokens per row.
        num_layers: Blocks.
        hidden_size: Model width.
        num_heads: Query heads.
        num_key_value_heads: Key and value heads; divides ``num_heads``.
        head_size: Size of a head, even; None for ``hidden_size / num_heads``, which must then be whole and even.
        qk_norm: RMSNorm of queries and keys before the rotary positions: ``none``; ``head``: over each head, with one
            weight for all of them (Qwen3); ``whole``: over all heads together (OLMoE, arXiv:2409.02060, sec. 4.2.5).
        ffn_hidden_size: Inner width of dense feed-forward networks (leading layers, dense twins).
        rope_base: Base of the rotary angles.
        norm_epsilon: Epsilon of RMSNorm.
        tie_embeddings: Use the embedding as output head.
        init: Standard deviation of the normal initialisation over widths: ``normal``: ``init_std`` at every width;
            ``width_aware``: ``init_std * sqrt(768 / hidden_size)``. ``mup``: the maximal update parameterisation, which
            scales learning rates too, so that one found at a small shape holds at a large one (arXiv:2203.03466,
            2505.01618, 2508.09752). ``model.init`` and ``model.parameter_groups`` have the tables.
        init_std: Standard deviation of the initialisation, at a width of 768 with ``init=width_aware`` and ``mup``.
        mup_base_width: Width at which ``mup`` scales nothing, >= 1; read by no other ``init``. A rate is meant at this
            width, wherever it was found: small and large model must have the same.
        mup_base_layers: Number of layers at which ``mup`` scales nothing, likewise.
        gate_init: Two maps that stand in the place of one (a factorised gate, a large router, attentive gating's query
            and key): ``variance_preserving``: together as loud as that one; ``paper``: each with the standard
            deviation of any other matrix, as in released code.
        scale_residual_init: Divide the standard deviation of matrices that write into the residual stream by
            ``sqrt(2 * num_layers)`` (GPT-2).
        cross_entropy_chunk_tokens: Positions whose logits exist at a time.
        recompute: Activations made again in backward: ``none``, ``selective`` (attention), ``full``.
        moe: The experts.
    """

    name: str
    vocab_size: PositiveInt
    sequence_length: PositiveInt
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_size: PositiveInt | None
    qk_norm: QKNorm
    ffn_hidden_size: PositiveInt
    rope_base: PositiveFloat
    norm_epsilon: PositiveFloat
    tie_embeddings: bool
    init: Literal["normal", "width_aware", "mup"]
    init_std: PositiveFloat
    mup_base_width: PositiveInt
    mup_base_layers: PositiveInt
    gate_init: Literal["variance_preserving", "paper"]
    scale_residual_init: bool
    cross_entropy_chunk_tokens: PositiveInt
    recompute: Recompute
    moe: MoEConfig

    def __post_init__(self) -> None:
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of model.num_heads={self.num_heads}; "
                f"nearest: {_nearest_multiples(self.hidden_size, self.num_heads)}; or set model.head_size"
            )
        if self.attention_head_size % 2:
            raise ValueError(f"{self.head_size_name} must be even: rotary positions turn pairs")
        if self.init == "mup" and self.gate_init == "paper":
            raise ValueError(
                "model.gate_init=paper must be variance_preserving with model.init=mup, which says how the two factors "
                "of a gate start at every width and rank"
            )
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_key_value_heads={self.num_key_value_heads} must divide model.num_heads={self.num_heads}"
            )

    @property
    def attention_head_size(self) -> int:
        """Size of one attention head, as given or as it follows."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def head_size_name(self) -> str:
        """Field that decides it, with its value, for messages."""
        return f"model.{'head_size' if self.head_size else 'hidden_size/num_heads'}={self.attention_head_size}"

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.attention_head_size

    @property
    def key_value_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_key_value_heads * self.attention_head_size

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers that routing replaces."""
        return [layer for layer in range(self.num_layers) if self.moe.is_moe_layer(layer)]


def _nearest_multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return ", ".join(str(multiple) for multiple in (below, below + divisor) if multiple > 0)


class LMOutput(NamedTuple):
    """Result of one forward pass over a micro-batch.

    A tuple and not a dataclass: DeepSpeed looks for the tensors of an output in tuples, lists and dictionaries, and
    prepares a backward pass (in bfloat16: clears the gradients of the last one) only through hooks on them.

    Attributes:
        loss_sum: Cross-entropy summed over counted positions, nats, float32; of several passes their mean.
        aux: Each aux loss of the routers, unweighted, averaged over MoE layers, those that have it; of two passes also
            ``consistency``, their symmetric KL divergence, the mean over text.
        uses: Statistics of each MoE layer, bottom up; of several passes their mean.
        num_passes: Passes over the micro-batch, whose cross-entropies the objective adds.
    """

    loss_sum: Float[Tensor, ""]
    aux: dict[str, Tensor]
    uses: list[RouterUse]
    num_passes: int = 1


class DecoderLM(nn.Module):
    """Decoder language model; parameters are empty until ``model.init.initialise`` fills them."""

    kernels: Kernels = "torch"

    def __init__(self, config: ModelConfig, router: RouterConfig, shard: ExpertShard):
        super().__init__()
        self.config = config
        self._consistency_weight = router.two_pass_weight
        self._differs_by_layer = len(router.parts()) > 1
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.blocks = nn.ModuleList(
            Block(
                Attention(
                    *(width, config.num_heads, config.num_key_value_heads, config.attention_head_size),
                    *(config.qk_norm, config.norm_epsilon),
                ),
                build_moe_layer(config.moe, router, width, layer, shard, config.norm_epsilon)
                if config.moe.is_moe_layer(layer)
                else SwiGLU(width, config.ffn_hidden_size),
                width,
                config.norm_epsilon,
                config.recompute,
            )
            for layer in range(config.num_layers)
        )
        if not self.embedding.weight.is_meta:  # without storage there is nothing to look up either
            for moe_layer in self.moe_layers():
                moe_layer.router.use_token_counts(torch.ones(config.vocab_size, dtype=torch.int64))
        self.norm = ResidualNorm(width, config.norm_epsilon)
        self.head = None if config.tie_embeddings else nn.Linear(width, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """Output embedding ``[vocab, hidden]``."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def aux_weights(self) -> dict[str, float]:
        """Coefficient of each aux loss of a training step; some routers move theirs between steps."""
        of_layers = [layer.router.aux_weights for layer in self.moe_layers()]
        weights = dict(of_layers[0]) if of_layers else {}
        if self._differs_by_layer:  # of a mean over all MoE layers, in which one without the loss counts as 0
            names = dict.fromkeys(name for own in of_layers for name in own)
            weights = {name: math.fsum(own.get(name, 0.0) for own in of_layers) / len(of_layers) for name in names}
        return weights if self._consistency_weight is None else weights | {"consistency": self._consistency_weight}

    @property
    def evaluation_rule(self) -> str:
        """Rule by which routers decide in evaluation, if it is not that of training; else empty."""
        rules = [layer.router.evaluation_rule for layer in self.moe_layers()]
        return "; ".join(dict.fromkeys(rule for rule in rules if rule))

    def use_kernels(self, kernels: Kernels) -> None:
        """Have the loss, norms, dense networks and experts run as one package's kernels; torch's until then."""
        for module in self.modules():
            if isinstance(module, DecoderLM | Norm | SwiGLU | SwiGLUExperts):
                module.kernels = kernels

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, bottom up."""
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoELayer)]

    def forward(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        labels: Int[Tensor, "batch sequence"],
        document_ids: Int[Tensor, "batch sequence"],
        position_ids: Int[Tensor, "batch sequence"],
        context: RoutingContext,
    ) -> LMOutput:
        """Losses of a micro-batch.

        Args:
            input_ids: Tokens.
            labels: Next tokens, ``IGNORE_INDEX`` where not counted.
            document_ids: Document of each position within its row; runs of equal ids see each other.
            position_ids: Position for the rotary angles.
            context: Handed to the routers.
        """
        num_passes = 1 if self._consistency_weight is None or not self.training else 2
        passes = [
            self._trunk(input_ids, document_ids, position_ids, replace(context, pass_index=index))
            for index in range(num_passes)
        ]
        finals = [hidden.flatten(0, 1) for hidden, _ in passes]
        chunk = self.config.cross_entropy_chunk_tokens
        own_losses = {}
        if num_passes == 1:
            loss_sum = chunked_cross_entropy(finals[0], self.head_weight, labels.flatten(), chunk, self.kernels)
        else:
            text = context.token_mask
            first, second = finals
            loss_sum, apart = two_pass_losses(first, second, self.head_weight, labels.flatten(), text, chunk)
            own_losses["consistency"] = apart / text.sum().clamp(min=1)
        outputs = [output for _, of_pass in passes for output in of_pass]
        aux = self._mean_aux([output.aux for output in outputs])
        uses = [mean_use([output.use for output in of_layer]) for of_layer in zip(*(p[1] for p in passes), strict=True)]
        return LMOutput(loss_sum, aux | own_losses, uses, num_passes)

    def _mean_aux(self, losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Each aux loss over the MoE layers that have it, bottom up in each pass: the mean, weighted by coefficient.

        Times ``aux_weights`` it is the sum over layers of loss times coefficient, over the number of all MoE layers.
        """
        if not self._differs_by_layer:
            return {name: torch.stack([own[name] for own in losses]).mean() for name in (losses[0] if losses else {})}
        weights = [layer.router.aux_weights for layer in self.moe_layers()]
        means = {}
        for name in dict.fromkeys(name for own in losses for name in own):
            values = torch.stack([own[name] for own in losses if name in own])
            own_weights = [own[name] for own in weights if name in own]
            shares = on_device_of(values, own_weights if any(own_weights) else [1.0] * len(own_weights))
            means[name] = (shares * values).sum() / shares.sum()
        return means

    @torch.no_grad()
    def routes(
        self, input_ids: Tensor, document_ids: Tensor, position_ids: Tensor, context: RoutingContext
    ) -> list[RouterUse]:
        """Statistics of a micro-batch without losses: what the global-batch balance level needs ahead."""
        _, outputs = self._trunk(input_ids, document_ids, position_ids, context)
        return [output.use for output in outputs]

    @torch.no_grad()
    def token_losses(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        labels: Int[Tensor, "batch sequence"],
        document_ids: Int[Tensor, "batch sequence"],
        position_ids: Int[Tensor, "batch sequence"],
        context: RoutingContext,
    ) -> Float[Tensor, "batch sequence"]:
        """Cross-entropy of each position, nats, float32, 0 where not counted; arguments as for ``forward``."""
        hidden, _ = self._trunk(input_ids, document_ids, position_ids, context)
        losses = token_losses(
            hidden.flatten(0, 1), self.head_weight, labels.flatten(), self.config.cross_entropy_chunk_tokens
        )
        return losses.view_as(labels)

    @torch.no_grad()
    def logits(
        self, input_ids: Tensor, document_ids: Tensor, position_ids: Tensor, context: RoutingContext
    ) -> Float[Tensor, "batch sequence vocab"]:
        """Next-token logits, float32; for tests, export checks and generation, not for training."""
        hidden = self.final_hidden(input_ids, document_ids, position_ids, context)
        return functional.linear(hidden, self.head_weight).float()

    @torch.no_grad()
    def final_hidden(
        self, input_ids: Tensor, document_ids: Tensor, position_ids: Tensor, context: RoutingContext
    ) -> Float[Tensor, "batch sequence hidden"]:
        """Normed hidden states, of which the head makes logits: for those who want them at few positions."""
        return self._trunk(input_ids, document_ids, position_ids, context)[0]

    def _trunk(
        self, input_ids: Tensor, document_ids: Tensor, position_ids: Tensor, context: RoutingContext
    ) -> tuple[Tensor, list[MoEOutput]]:
        """All blocks and the final norm: normed hidden states, and the MoE layers' outputs."""
        rotary = rotary_table(position_ids, self.config.attention_head_size, self.config.rope_base)
        mask = document_mask(document_ids)
        hidden, delta = embed(input_ids, self.embedding.weight), None
        outputs = []
        for block in self.blocks:
            hidden, delta, output = block(hidden, delta, rotary, mask, context)
            if output is not None:
                outputs.append(output)
                context = replace(context, carried=output.carried)
        return self.norm(hidden, delta)[1], outputs


@contextmanager
def recorded_routings(model: DecoderLM) -> Iterator[list[Routing]]:
    """Record the routers' decisions while this is entered, bottom up in each forward pass."""
    found: list[Routing] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], routing: Routing) -> None:
        found.append(routing.exact())

    handles = [layer.router.register_forward_hook(note) for layer in model.moe_layers()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
