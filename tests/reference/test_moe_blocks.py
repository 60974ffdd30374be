"""Our MoE layer with copied weights equals transformers' blocks: OLMoE, Qwen3-MoE, DeepSeek-V3 and V4, ERNIE 4.5.

Not ours, and set aside in the blocks: the limit of the SwiGLU's inputs of DeepSeek-V4, and ERNIE's floor under the sum
of weights, 1e-12, which no sum reaches. V4 looks experts up in its first layers only; our ``hash`` does in all.
"""

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moe_pretrain.config.load import load
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.types import ExpertShard, RoutingContext

HIDDEN, WIDTH, EXPERTS, TOKENS, VOCABULARY = 32, 24, 8, 40, 300
SHARED = ["model.moe.num_shared_experts=1", f"model.moe.shared_expert_hidden_size={WIDTH}"]


def olmoe():
    config = modeling_olmoe.OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=False
    )
    return modeling_olmoe.OlmoeSparseMoeBlock(config), ["router=top_k", "router.top_k=3", "router.weights=raw"]


def qwen3():
    config = modeling_qwen3_moe.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=True
    )
    return modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config), ["router=top_k", "router.top_k=3"]


def deepseek_v3():
    config = modeling_deepseek_v3.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=2,
        n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    words = ["router=loss_free", "router.score=sigmoid", "router.weight_scale=2.5", "router.num_groups=4"]
    return modeling_deepseek_v3.DeepseekV3MoE(config), [*words, "router.groups_per_token=2", *SHARED]


def _deepseek_v4(kind: str) -> nn.Module:
    return modeling_deepseek_v4.DeepseekV4SparseMoeBlock(
        modeling_deepseek_v4.DeepseekV4Config(
            hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=3,
            routed_scaling_factor=1.5, vocab_size=VOCABULARY, num_hidden_layers=1, swiglu_limit=float("inf"),
            layer_types=["heavily_compressed_attention"], mlp_layer_types=[kind],
        ),
        layer_idx=0,
    )  # fmt: skip


def deepseek_v4():
    words = ["router=loss_free", "router.top_k=3", "router.score=sqrt_softplus", "router.weight_scale=1.5"]
    return _deepseek_v4("moe"), [*words, *SHARED]


def deepseek_v4_hash():
    words = ["router=hash", "router.top_k=3", "router.weights=learned", "router.weight_scale=1.5"]
    return _deepseek_v4("hash_moe"), [*words, *SHARED]


def ernie():
    config = modeling_ernie4_5_moe.Ernie4_5_MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, moe_num_experts=EXPERTS, moe_k=3, moe_num_shared_experts=1
    )
    words = ["router=loss_free", "router.top_k=3", "router.score=softmax", *SHARED]
    return modeling_ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock(config), words


@pytest.mark.parametrize("make", [olmoe, qwen3, deepseek_v3, deepseek_v4, deepseek_v4_hash, ernie])
def test_outputs_and_gradients_equal_those_of_the_block(make):
    torch.manual_seed(0)
    theirs, words = make()
    config = load(
        [
            *("model.num_layers=1", f"model.hidden_size={HIDDEN}", "model.num_heads=4", "model.ffn_hidden_size=24"),
            *(f"model.vocab_size={VOCABULARY}", f"model.moe.num_experts={EXPERTS}", "model.init_std=0.2"),
            *(f"model.moe.expert_hidden_size={WIDTH}", *words),
        ]
    )
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed=1)
    (ours,) = model.moe_layers()
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    pairs = {
        "gate.weight": [own["router.weight"]],
        "experts.gate_up_proj": [own["experts.in_weight"]],
        "experts.down_proj": [own["experts.out_weight"]],
    }
    if ours.shared_experts is not None:
        # Their gate and up are the two halves of one matrix of ours.
        pairs["shared_experts.down_proj.weight"] = [own["shared_experts.out_weight"]]
        for half, name in enumerate(("gate", "up")):
            pairs[f"shared_experts.{name}_proj.weight"] = [own["shared_experts.in_weight"], half]
    assert {name for name, parameter in other.items() if parameter.requires_grad} == pairs.keys()

    def of_ours(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(2)[pairs[name][1]] if len(pairs[name]) > 1 else tensor.view_as(other[name])

    ids = torch.randint(0, VOCABULARY, (TOKENS,))
    arguments = {}
    with torch.no_grad():
        for name, (weight, *_) in pairs.items():
            other[name].copy_(of_ours(name, weight))
        if words[0] == "router=loss_free":
            # Large enough to change the choice of most tokens; it must not enter the weights.
            bias = torch.rand(EXPERTS) * (0.3 if "router.score=softmax" in words else 1.0)
            ours.router.expert_bias.copy_(bias)
            statics = theirs.gate.moe_statics if make is ernie else theirs.gate
            statics.e_score_correction_bias.copy_(bias.view_as(statics.e_score_correction_bias))
        if words[0] == "router=hash":
            ours.router.use_token_counts(torch.arange(1, VOCABULARY + 1))
            theirs.gate.tid2eid.copy_(ours.router.table)
            arguments["input_ids"] = ids[None]
    hidden = torch.randn(TOKENS, HIDDEN)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    context = RoutingContext(
        torch.ones(TOKENS, dtype=torch.bool), torch.arange(TOKENS), 1, seed=0, step=0, token_ids=ids
    )
    found = ours(inputs[0], context, False).hidden
    expected = theirs(inputs[1][None], **arguments)
    expected = (expected[0] if isinstance(expected, tuple) else expected)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    weights = torch.randn(TOKENS, HIDDEN)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-4, rtol=1e-4)
    for name, (weight, *_) in pairs.items():
        torch.testing.assert_close(
            of_ours(name, weight.grad), other[name].grad, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )
    if words[0] == "router=loss_free":
        with torch.no_grad():
            ours.router.expert_bias.zero_()
            assert not torch.allclose(ours(hidden, context, False).hidden, found, atol=1e-2)  # the bias did choose
