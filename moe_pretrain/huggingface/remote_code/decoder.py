"""The decoder of an exported model as transformers knows models: configuration, key-value cache, generation."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from moe_pretrain.huggingface.remote_code.common import Facts, empty
from moe_pretrain.huggingface.remote_code.dense import SwiGLU
from moe_pretrain.huggingface.remote_code.mixture import MixtureOfExperts, Router

# Its name in the output of a model, and among the arguments of ``forward``, has changed within transformers 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MoePretrainConfig(PretrainedConfig):
    """Shape of the decoder, and its routing scheme as it was configured."""

    model_type = "moe_pretrain"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        vocab_size: int = 0,
        hidden_size: int = 0,
        num_hidden_layers: int = 0,
        num_attention_heads: int = 1,
        num_key_value_heads: int = 1,
        head_dim: int | None = None,
        qk_norm: str = "none",
        max_position_embeddings: int = 0,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        dense_widths: list[int] | None = None,
        num_experts: int = 0,
        num_networks: int = 0,
        num_constant_experts: int = 0,
        num_copy_experts: int = 0,
        num_zero_experts: int = 0,
        expert_input_scale: float = 1.0,
        expert_width: int = 0,
        expert_widths: list[int] | None = None,
        core_shapes: dict[str, list[list[int]]] | None = None,
        combine_form: str | None = None,
        shared_expert_width: int = 0,
        shared_expert_gate: bool = False,
        activation: dict[str, Any] | None = None,
        gate_rank: int | None = None,
        latent_size: int | None = None,
        latent_norm: bool = False,
        experts_own_down: bool = False,
        router: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.qk_norm = qk_norm  # head: each head by itself; whole: all heads together
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.dense_widths = dense_widths or []  # inner width of each layer's dense network; 0 where it has experts
        self.num_experts = num_experts  # of all kinds: networks, then constants, copies and zeros
        self.num_networks = num_networks
        self.num_constant_experts = num_constant_experts
        self.num_copy_experts = num_copy_experts
        self.num_zero_experts = num_zero_experts
        self.expert_input_scale = expert_input_scale
        self.expert_width = expert_width
        self.expert_widths = expert_widths or []  # of each expert, where they differ
        self.core_shapes = core_shapes or {}
        self.combine_form = combine_form
        self.shared_expert_width = shared_expert_width
        self.shared_expert_gate = shared_expert_gate
        self.activation = activation  # of experts, routed and shared
        self.gate_rank = gate_rank
        self.latent_size = latent_size
        self.latent_norm = latent_norm  # of what experts of that width return
        self.expert_input_size = latent_size or hidden_size
        self.experts_own_down = experts_own_down
        self.router = router or {}
        super().__init__(**kwargs)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x ** 2) + epsilon) * weight`` over the last axis."""

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__()
        self.weight = empty(hidden_size)
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise."""
        return nn.functional.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.epsilon)


class Attention(nn.Module):
    """Grouped-query attention; ``qkv_weight`` holds query, key and value rows in that order."""

    def __init__(self, config: MoePretrainConfig, layer: int):
        super().__init__()
        self.layer, self.head_size = layer, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.sizes = [heads * self.head_size, kv_heads * self.head_size, kv_heads * self.head_size]
        self.qkv_weight = empty(sum(self.sizes), config.hidden_size)
        self.out_weight = empty(config.hidden_size, self.sizes[0])
        self.norms_heads = config.qk_norm == "head"
        self.query_norm, self.key_norm = (
            None
            if config.qk_norm == "none"
            else RMSNorm(self.head_size if self.norms_heads else width, config.rms_norm_eps)
            for width in self.sizes[:2]
        )

    def by_head(self, projected: Tensor, norm: RMSNorm | None) -> Tensor:
        """Heads ``[batch, heads, sequence, head]``, normed if so configured."""
        if norm is not None and not self.norms_heads:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_size))
        if norm is not None and self.norms_heads:
            heads = norm(heads)
        return heads.transpose(1, 2)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New hidden states, the queries, and the keys with those of the cache."""
        query, key, value = nn.functional.linear(hidden, self.qkv_weight).split(self.sizes, dim=-1)
        query = rotate(self.by_head(query, self.query_norm), rotary)
        key, value = rotate(self.by_head(key, self.key_norm), rotary), self.by_head(value, None)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible[:, None], enable_gqa=query.shape[1] != key.shape[1]
        )
        return nn.functional.linear(attended.transpose(1, 2).flatten(2), self.out_weight), query, key


def rotate(heads: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions of pairs ``(i, i + head / 2)``, in float32."""
    cosine, sine = table
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(heads.dtype)


class Block(nn.Module):
    """``h = h + attention(norm(h)); h = h + feed_forward(norm(h))``."""

    def __init__(self, config: MoePretrainConfig, layer: int):
        super().__init__()
        width = config.dense_widths[layer]
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = SwiGLU(config.hidden_size, width) if width else MixtureOfExperts(config, layer)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor,
        cache: Any,
        ids: Tensor,
        place: Tensor,
        carried: list[Tensor],
    ) -> Tensor:
        """New hidden states ``[batch, sequence, hidden]``; routers may add to ``carried`` for those above."""
        attended, query, key = self.attention(self.attention_norm(hidden), rotary, visible, cache)
        hidden = hidden + attended
        normed = self.feed_forward_norm(hidden)
        if isinstance(self.feed_forward, SwiGLU):
            return hidden + self.feed_forward(normed)
        facts = Facts(ids.flatten(), place.flatten(), query, key, visible, self.feed_forward.experts, cache, carried)
        return hidden + self.feed_forward(normed.flatten(0, 1), facts).view_as(hidden)


class MoePretrainForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its output head."""

    config_class = MoePretrainConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]
    # A router rounded to bfloat16 makes ties and sends tokens to other experts.
    _keep_in_fp32_modules_strict = Router.float32_parts
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config: MoePretrainConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.head

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every weight is in the checkpoint."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits; arguments as of every causal language model in transformers."""
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        if cache is not None and any("Static" in type(layer).__name__ for layer in cache.layers):
            raise ValueError("this model needs a cache that grows: DynamicCache, the default")
        seen = 0 if cache is None else cache.get_seq_length()
        batch, sequence = input_ids.shape
        place = torch.arange(seen, seen + sequence, device=input_ids.device).expand(batch, -1)
        visible = torch.arange(seen + sequence, device=input_ids.device) <= place[:, :, None]
        if attention_mask is not None:
            is_text = attention_mask.bool()
            padded = (is_text.cumsum(dim=1) - 1).clamp(min=0)[:, -sequence:]
            place = padded if position_ids is None else place
            # A position that sees nothing would be NaN: padding sees itself.
            itself = torch.arange(seen + sequence, device=input_ids.device) == torch.arange(
                seen, seen + sequence, device=input_ids.device
            ).unsqueeze(-1)
            visible = visible & is_text[:, None, :] | itself
        if position_ids is not None:
            place = position_ids.expand(batch, -1)
            if attention_mask is None and cache is None:  # documents packed one behind the other do not see each other
                document = (place.diff(prepend=place[:, :1] - 1) != 1).cumsum(dim=1)
                visible = visible & (document[:, :, None] == document[:, None])
        rotary = self._rotary_table(place)
        hidden, carried = self.embedding(input_ids), list[Tensor]()
        for block in self.blocks:
            hidden = block(hidden, rotary, visible, cache, input_ids, place, carried)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.norm(hidden[:, kept]))
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _rotary_table(self, place: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.head_dim
        exponent = torch.arange(0, size, 2, device=place.device, dtype=torch.float32) / size
        angle = place[:, None, :, None].float() * self.config.rope_theta**-exponent
        return angle.cos(), angle.sin()
