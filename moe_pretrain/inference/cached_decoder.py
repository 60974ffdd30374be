"""A decoder that keeps keys and values, so that a new token costs one position and not the whole text."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.model.attention import Attention
from moe_pretrain.model.attention_statistic import attention_statistic
from moe_pretrain.model.block import Block
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.embedding import embed
from moe_pretrain.model.rotary import rotary_table
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.merged_layer import MergedLayer
from moe_pretrain.moe.types import AttentionStatistic, RoutingContext


def check_generates(model: DecoderLM, name: str) -> str | None:
    """The rule by which the routers decide here, where it is not that of training.

    Args:
        model: The model.
        name: Name of its scheme.

    Raises:
        ConfigError: The scheme cannot generate text.
    """
    routers = [layer.router for layer in model.moe_layers()]
    if not all(router.causal_in_evaluation for router in routers):
        raise ConfigError(
            f"router={name} cannot generate: a token's experts depend on later tokens, which do not exist yet"
        )
    if any(layer.router.reads_earlier_tokens and not isinstance(layer, MergedLayer) for layer in model.moe_layers()):
        raise ConfigError(
            f"router={name} cannot generate: a new token's experts are chosen by hidden states of earlier tokens, "
            "which are kept for schemes that merge experts only"
        )
    return model.evaluation_rule or None


class CachedDecoder:
    """A model in evaluation with the keys and values of all positions that it has been fed.

    Of schemes that merge experts it keeps the inputs of their layers too. The logits are those of the model on the
    whole text. Each sequence of the batch is one document from its start.

    Args:
        model: In evaluation.
        batch: Sequences.
        capacity: Most positions of a sequence.
        ranks: Ranks of the experts that every token takes; None for the scheme's own choice.
    """

    def __init__(self, model: DecoderLM, batch: int, capacity: int, ranks: tuple[int, ...] | None = None):
        config, weight = model.config, model.embedding.weight
        self._model, self._ranks, self._seen = model, ranks, 0
        shape = (2, config.num_layers, batch, config.num_key_value_heads, capacity, config.attention_head_size)
        self._cache = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        merged = [layer.router.layer for layer in model.moe_layers() if isinstance(layer, MergedLayer)]
        if merged and ranks is not None:
            raise ValueError("experts are merged: there is no second-best one")
        self._inputs = {layer: weight.new_empty(batch, capacity, config.hidden_size) for layer in merged}

    @torch.no_grad()
    def feed(self, ids: Int[Tensor, "batch new"]) -> Float[Tensor, "batch new vocab"]:
        """Append ``ids`` to the sequences; next-token logits of each of them, float32."""
        model, (batch, new) = self._model, ids.shape
        assert not model.training and self._seen + new <= self._cache.shape[4]
        place = torch.arange(self._seen, self._seen + new, device=ids.device).expand(batch, -1)
        rotary = rotary_table(place, model.config.attention_head_size, model.config.rope_base)
        hidden = embed(ids, model.embedding.weight)
        carried: Tensor | None = None
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            hidden, carried = self._block(block, layer, hidden, rotary, place, ids, carried)
        self._seen += new
        return functional.linear(model.norm(hidden, None)[1], model.head_weight).float()

    def _block(
        self,
        block: Block,
        layer: int,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        place: Tensor,
        ids: Tensor,
        carried: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states after the block, and what the router of the next MoE layer gets from those below."""
        feed_forward = block.feed_forward
        wanted = feed_forward.router.attention_statistic if isinstance(feed_forward, MoELayer) else None
        hidden, normed = block.attention_norm(hidden, None)
        attended, statistic = self._attend(block.attention, layer, normed, rotary, wanted)
        hidden, normed = block.feed_forward_norm(hidden, attended)
        if not isinstance(feed_forward, MoELayer):
            return hidden + feed_forward(normed), carried
        if isinstance(feed_forward, MergedLayer):
            kept, end = self._inputs[layer], self._seen + hidden.shape[1]
            kept[:, self._seen : end] = normed
            return hidden + feed_forward.go_on(kept[:, : self._seen], normed), None
        context = RoutingContext(
            token_mask=torch.ones(ids.numel(), dtype=torch.bool, device=ids.device),
            token_position=place.flatten(),
            num_sequences=len(ids),
            seed=0,
            step=0,
            token_ids=ids.flatten(),
            first_place=self._seen,
            ranks=self._ranks,
            attention=None if statistic is None else statistic.flatten(),
            carried=carried,
        )
        output = feed_forward(normed.flatten(0, 1), context, False)
        return hidden + output.hidden.view_as(hidden), output.carried

    def _attend(
        self,
        attention: Attention,
        layer: int,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        wanted: AttentionStatistic | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over all positions so far, and the statistic that the router wants."""
        query, key, value = attention.project(hidden, rotary)
        end = self._seen + query.shape[2]
        self._cache[0, layer, :, :, self._seen : end] = key
        self._cache[1, layer, :, :, self._seen : end] = value
        key, value = self._cache[0, layer, :, :, :end], self._cache[1, layer, :, :, :end]
        visible = None
        if query.shape[2] > 1:  # a single query sees every key
            position = torch.arange(end, device=hidden.device)
            visible = position <= position[self._seen :, None]
        is_grouped = query.shape[1] != key.shape[1]
        attended = functional.scaled_dot_product_attention(query, key, value, visible, enable_gqa=is_grouped)
        output = functional.linear(attended.transpose(1, 2).flatten(2), attention.out_weight)
        if wanted is None:
            return output, None
        if wanted == "received":  # target of a loss that nobody reads here, and later tokens are not there
            return output, torch.zeros(hidden.shape[:2], device=hidden.device)
        first_key = torch.zeros(query.shape[0], query.shape[2], dtype=torch.int64, device=hidden.device)
        return output, attention_statistic(wanted, query, key, first_key)
