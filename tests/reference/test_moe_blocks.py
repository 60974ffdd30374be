"""Our MoE layer with copied weights equals the blocks of transformers: OLMoE, Qwen3-MoE and DeepSeek-V3."""

import pytest
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moe_pretrain.config.load import load
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.types import ExpertShard, RoutingContext

HIDDEN, WIDTH, EXPERTS, TOKENS = 32, 24, 8, 40


def olmoe():
    config = modeling_olmoe.OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=False
    )
    return modeling_olmoe.OlmoeSparseMoeBlock(config), ["router.top_k=3", "router.weights=raw"]


def qwen3():
    config = modeling_qwen3_moe.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=True
    )
    return modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config), ["router.top_k=3"]


def deepseek_v3():
    config = modeling_deepseek_v3.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=2,
        n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    words = ["router.top_k=2", "router.score=sigmoid", "router.weight_scale=2.5", "router.num_groups=4"]
    words += ["router.groups_per_token=2", "model.moe.num_shared_experts=1", "model.ffn_hidden_size=24"]
    return modeling_deepseek_v3.DeepseekV3MoE(config), words


@pytest.mark.parametrize("make", [olmoe, qwen3, deepseek_v3])
def test_outputs_and_gradients_equal_those_of_the_block(make):
    torch.manual_seed(0)
    theirs, words = make()
    config = load(
        [
            *("model.num_layers=1", f"model.hidden_size={HIDDEN}", "model.num_heads=4", "model.vocab_size=300"),
            *(
                f"model.moe.num_experts={EXPERTS}",
                f"model.moe.expert_hidden_size={WIDTH}",
                "model.init_std=0.2",
                *words,
            ),
        ]
    )
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed=1)
    (ours,) = model.moe_layers()
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    pairs = {
        "gate.weight": "router.weight",
        "experts.gate_up_proj": "experts.in_weight",
        "experts.down_proj": "experts.out_weight",
    }
    if make is deepseek_v3:
        pairs["shared_experts.down_proj.weight"] = "shared_experts.out_weight"
    with torch.no_grad():
        for them, us in pairs.items():
            other[them].copy_(own[us].view_as(other[them]))
        if make is deepseek_v3:
            for name, part in zip(("gate", "up"), own["shared_experts.in_weight"].chunk(2), strict=True):
                other[f"shared_experts.{name}_proj.weight"].copy_(part)
            theirs.gate.e_score_correction_bias.zero_()
    hidden = torch.randn(TOKENS, HIDDEN)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    context = RoutingContext(torch.ones(TOKENS, dtype=torch.bool), torch.arange(TOKENS), 1, seed=0, step=0)
    found = ours(inputs[0], context, False).hidden
    expected = theirs(inputs[1][None])
    expected = (expected[0] if isinstance(expected, tuple) else expected)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    weights = torch.randn(TOKENS, HIDDEN)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-4, rtol=1e-4)
    for them, us in pairs.items():
        torch.testing.assert_close(
            own[us].grad.view_as(other[them]), other[them].grad, atol=2e-4, rtol=1e-3, msg=lambda m, us=us: f"{us}: {m}"
        )
