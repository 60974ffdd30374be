"""transformers' mixture-of-experts decoders beside ours: the same sizes, and weights copied from one to the other."""

import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_pretrain.config.schema import Config

WORDS: dict[str, tuple[str, ...]] = {
    "mixtral": (),
    "olmoe": ("model.qk_norm=whole", "router.weights=raw"),
    "qwen3_moe": ("model.qk_norm=head", "model.head_size=12"),
}
"""What makes ours one of them, beside ``router=top_k``."""


def build(kind: str, config: Config) -> PreTrainedModel:
    """The decoder ``kind`` of transformers in the sizes of ``config``, which has its ``WORDS``."""
    model = config.model
    shape = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "num_experts_per_tok": config.router.top_k,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "pad_token_id": None,  # a default of 1 would leave that token without gradient
        "attn_implementation": "eager",
    }
    experts, width = model.moe.num_experts, model.moe.expert_hidden_size
    if kind == "mixtral":
        own = MixtralConfig(**shape, num_local_experts=experts, intermediate_size=width, sliding_window=None)
        return MixtralForCausalLM(own)
    if kind == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**shape, num_experts=experts, intermediate_size=width))
    shape |= {"num_experts": experts, "moe_intermediate_size": width, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, head_dim=model.attention_head_size))


def in_their_names(ours: dict[str, Tensor], theirs: nn.Module) -> dict[str, Tensor]:
    """Our weights, or their gradients, by name under the names that they have in ``theirs``.

    Query, key and value are rows of one matrix of ours.
    """
    found = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    sizes = {name: len(parameter) for name, parameter in theirs.named_parameters()}
    for i in range(theirs.config.num_hidden_layers):
        them, us = f"model.layers.{i}", f"blocks.{i}"
        found |= {
            f"{them}.input_layernorm.weight": ours[f"{us}.attention_norm.weight"],
            f"{them}.post_attention_layernorm.weight": ours[f"{us}.feed_forward_norm.weight"],
            f"{them}.self_attn.o_proj.weight": ours[f"{us}.attention.out_weight"],
            f"{them}.mlp.gate.weight": ours[f"{us}.feed_forward.router.weight"],
            f"{them}.mlp.experts.gate_up_proj": ours[f"{us}.feed_forward.experts.in_weight"],
            f"{them}.mlp.experts.down_proj": ours[f"{us}.feed_forward.experts.out_weight"],
        }
        if f"{us}.attention.query_norm.weight" in ours:
            found[f"{them}.self_attn.q_norm.weight"] = ours[f"{us}.attention.query_norm.weight"]
            found[f"{them}.self_attn.k_norm.weight"] = ours[f"{us}.attention.key_norm.weight"]
        names = [f"{them}.self_attn.{name}_proj.weight" for name in "qkv"]
        parts = ours[f"{us}.attention.qkv_weight"].split([sizes[name] for name in names])
        found |= dict(zip(names, parts, strict=True))
    return found


@torch.no_grad()
def copy_weights(ours: nn.Module, theirs: PreTrainedModel) -> None:
    """Give ``theirs`` all weights of our decoder."""
    weights = in_their_names(dict(ours.named_parameters()), theirs)
    parameters = dict(theirs.named_parameters())
    assert weights.keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
