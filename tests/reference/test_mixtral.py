"""Our decoder with copied weights equals transformers' Mixtral: an implementation we did not write."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_pretrain.config.load import load
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.types import ExpertShard, RoutingContext


def test_logits_and_gradients_equal_mixtral():
    config = load(
        [
            "model.vocab_size=300",
            "model.sequence_length=16",
            "model.num_layers=2",
            "model.hidden_size=32",
            "model.num_heads=4",
            "model.num_key_value_heads=2",
            "model.moe.num_experts=4",
            "model.moe.expert_hidden_size=24",
            "model.tie_embeddings=false",
            "model.init=normal",
            "model.init_std=0.2",
        ]
    )
    ours = DecoderLM(config.model, config.router, ExpertShard())
    initialise(ours, seed=1)
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            rms_norm_eps=config.model.norm_epsilon,
            rope_theta=config.model.rope_base,
            sliding_window=None,
            attn_implementation="eager",
        )
    )
    # Our name of each parameter of theirs; query, key and value are rows of one matrix of ours.
    pairs = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    }
    for i in range(2):
        them, us = f"model.layers.{i}", f"blocks.{i}"
        pairs |= {
            f"{them}.input_layernorm.weight": f"{us}.attention_norm.weight",
            f"{them}.post_attention_layernorm.weight": f"{us}.feed_forward_norm.weight",
            f"{them}.self_attn.o_proj.weight": f"{us}.attention.out_weight",
            f"{them}.mlp.gate.weight": f"{us}.feed_forward.router.weight",
            f"{them}.mlp.experts.gate_up_proj": f"{us}.feed_forward.experts.in_weight",
            f"{them}.mlp.experts.down_proj": f"{us}.feed_forward.experts.out_weight",
        }
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    with torch.no_grad():
        for them, us in pairs.items():
            other[them].copy_(own[us])
        for i in range(2):
            parts = own[f"blocks.{i}.attention.qkv_weight"].split([32, 16, 16])
            for name, part in zip("qkv", parts, strict=True):
                other[f"model.layers.{i}.self_attn.{name}_proj.weight"].copy_(part)

    ids = torch.randint(0, 300, (2, 16))
    zeros, positions = torch.zeros_like(ids), torch.arange(16).expand(2, 16)
    context = RoutingContext(torch.ones(32, dtype=torch.bool), torch.arange(32), 2, seed=0, step=0)
    expected = theirs(ids).logits
    torch.testing.assert_close(ours.logits(ids, zeros, positions, context), expected.detach(), atol=2e-4, rtol=1e-4)

    loss_sum = ours(ids, ids, zeros, positions, context).loss_sum
    loss_sum.backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), ids.flatten(), reduction="sum").backward()
    for them, us in pairs.items():
        torch.testing.assert_close(
            own[us].grad, other[them].grad, atol=1e-3, rtol=1e-3, msg=lambda m, us=us: f"{us}: {m}"
        )
