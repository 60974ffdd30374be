"""Our MoE layer with copied weights equals transformers' blocks, from OLMoE to DeepSeek-V4, gpt-oss and Nemotron-H.

Not ours, and set aside in the blocks: the biases of gpt-oss's experts, which are 0 here, and ERNIE's floor under the
sum of weights, 1e-12, which no sum reaches. Nemotron-H's networks, which have no gate, give way to DeepSeek-V3's. V4
looks experts up in its first layers only: ``router=by_layer``.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.laguna import modeling_laguna
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_next import modeling_qwen3_next

from moe_pretrain.config.load import load
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.types import ExpertShard, RoutingContext

HIDDEN, WIDTH, EXPERTS, TOKENS, VOCABULARY = 32, 24, 8, 40, 300
LATENT = 20
LIMIT = 0.8
"""Bound of gates and ups, some of which it cuts off on either side."""
BOUNDED = f"model.moe.activation_limit={LIMIT}"
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


def _deepseek_v4(*kinds: str) -> list[nn.Module]:
    config = modeling_deepseek_v4.DeepseekV4Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=3,
        routed_scaling_factor=1.5, vocab_size=VOCABULARY, num_hidden_layers=len(kinds), swiglu_limit=LIMIT,
        layer_types=["heavily_compressed_attention"] * len(kinds), mlp_layer_types=list(kinds),
    )  # fmt: skip
    return [modeling_deepseek_v4.DeepseekV4SparseMoeBlock(config, layer_idx=layer) for layer in range(len(kinds))]


def deepseek_v4():
    words = ["router=loss_free", "router.top_k=3", "router.score=sqrt_softplus", "router.weight_scale=1.5"]
    return _deepseek_v4("moe")[0], [*words, *SHARED, BOUNDED]


def deepseek_v4_hash():
    words = ["router=hash", "router.top_k=3", "router.weights=learned", "router.weight_scale=1.5"]
    return _deepseek_v4("hash_moe")[0], [*words, *SHARED, BOUNDED]


def ernie():
    config = modeling_ernie4_5_moe.Ernie4_5_MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, moe_num_experts=EXPERTS, moe_k=3, moe_num_shared_experts=1
    )
    words = ["router=loss_free", "router.top_k=3", "router.score=softmax", *SHARED]
    return modeling_ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock(config), words


def laguna():
    config = modeling_laguna.LagunaConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=WIDTH, num_experts=EXPERTS,
        num_experts_per_tok=3, moe_router_logit_softcapping=1.5, moe_routed_scaling_factor=1.5,
    )  # fmt: skip
    words = ["router=loss_free", "router.top_k=3", "router.logit_cap=1.5", "router.weight_scale=1.5", *SHARED]
    return modeling_laguna.LagunaSparseMoeBlock(config), words


def gpt_oss():
    config = modeling_gpt_oss.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=3,
        swiglu_limit=LIMIT,
    )  # fmt: skip
    theirs = modeling_gpt_oss.GptOssMLP(config)
    for bias in (theirs.experts.gate_up_proj_bias, theirs.experts.down_proj_bias):
        nn.init.zeros_(bias.requires_grad_(False))
    return theirs, ["router=top_k", "router.top_k=3", "router.bias=true", "model.moe.activation=gpt_oss", BOUNDED]


def qwen3_next():
    config = modeling_qwen3_next.Qwen3NextConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=WIDTH, num_experts=EXPERTS,
        num_experts_per_tok=3, num_hidden_layers=1,
    )  # fmt: skip
    words = ["router=top_k", "router.top_k=3", "model.moe.shared_expert_gate=true", *SHARED]
    return modeling_qwen3_next.Qwen3NextSparseMoeBlock(config), words


def nemotron_h():
    config = modeling_nemotron_h.NemotronHConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, moe_shared_expert_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS, num_experts_per_tok=3, n_group=2, topk_group=1, routed_scaling_factor=2.5,
        norm_topk_prob=True, moe_latent_size=LATENT,
    )  # fmt: skip
    theirs = modeling_nemotron_h.NemotronHMoE(config)
    networks = modeling_deepseek_v3.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, hidden_act="silu"
    )
    theirs.shared_experts = modeling_deepseek_v3.DeepseekV3MLP(networks, WIDTH)
    networks.hidden_size = LATENT
    theirs.experts = modeling_deepseek_v3.DeepseekV3Experts(networks)
    words = ["router=loss_free", "router.top_k=3", "router.score=sigmoid", "router.weight_scale=2.5", *SHARED]
    return theirs, [*words, "router.num_groups=2", "router.groups_per_token=1", f"model.moe.latent_size={LATENT}"]


def _interleaved(gate_and_up: torch.Tensor) -> torch.Tensor:
    """``[experts, 2 * width, hidden]``, halves, as gpt-oss has it: ``[experts, hidden, 2 * width]``, in turn."""
    return gate_and_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).mT


def _pairs(own: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> dict[str, tuple[str, Callable]]:
    """Of each of their parameters, the name of ours and what makes theirs of it; of gradients likewise."""
    gate = next(name.rpartition(".")[0] for name in other if name in ("gate.weight", "router.weight"))
    is_interleaved = "experts.gate_up_proj_bias" in other
    found: dict[str, tuple[str, Callable]] = {
        f"{gate}.weight": ("router.weight", lambda weight: weight),
        "experts.gate_up_proj": ("experts.in_weight", _interleaved if is_interleaved else lambda weight: weight),
        "experts.down_proj": ("experts.out_weight", lambda weight: weight.mT if is_interleaved else weight),
    }
    if "router.logit_bias" in own:
        found[f"{gate}.bias"] = ("router.logit_bias", lambda weight: weight)
    if "shared_experts.out_weight" in own:
        shared = next(name.partition(".")[0] for name in other if name.startswith("shared_expert"))
        found[f"{shared}.down_proj.weight"] = ("shared_experts.out_weight", lambda weight: weight)
        for half, name in enumerate(("gate", "up")):  # halves of one matrix of ours
            found[f"{shared}.{name}_proj.weight"] = ("shared_experts.in_weight", lambda w, half=half: w.chunk(2)[half])
    if "latent.in_weight" in own:
        found["fc1_latent_proj.weight"] = ("latent.in_weight", lambda weight: weight)
        found["fc2_latent_proj.weight"] = ("latent.out_weight", lambda weight: weight)
    if "shared_experts.gate_weight" in own:
        found["shared_expert_gate.weight"] = ("shared_experts.gate_weight", lambda weight: weight)
    return found


def _ours(*words: str) -> list[MoELayer]:
    """Our layers, with their initial weights."""
    config = load(
        [
            *(f"model.hidden_size={HIDDEN}", "model.num_heads=4", "model.ffn_hidden_size=24"),
            *(f"model.vocab_size={VOCABULARY}", f"model.moe.num_experts={EXPERTS}", "model.init_std=0.2"),
            *(f"model.moe.expert_hidden_size={WIDTH}", *words),
        ]
    )
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed=1)
    return model.moe_layers()


CASES = [olmoe, qwen3, deepseek_v3, deepseek_v4, deepseek_v4_hash, ernie, laguna, gpt_oss, qwen3_next, nemotron_h]


@pytest.mark.parametrize("make", CASES)
def test_outputs_and_gradients_equal_those_of_the_block(make):
    torch.manual_seed(0)
    theirs, words = make()
    (ours,) = _ours("model.num_layers=1", *words)
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    pairs = _pairs(own, other)
    assert {name for name, parameter in other.items() if parameter.requires_grad} == pairs.keys()

    ids = torch.randint(0, VOCABULARY, (TOKENS,))
    arguments = {}
    with torch.no_grad():
        if "router.logit_bias" in own:  # starts at 0
            own["router.logit_bias"].normal_()
        for name, (source, as_theirs) in pairs.items():
            other[name].copy_(as_theirs(own[source]).view_as(other[name]))
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
    for name, (source, as_theirs) in pairs.items():
        found_grad = as_theirs(own[source].grad).view_as(other[name])
        torch.testing.assert_close(
            found_grad, other[name].grad, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )
    if words[0] == "router=loss_free":
        with torch.no_grad():
            ours.router.expert_bias.zero_()
            assert not torch.allclose(ours(hidden, context, False).hidden, found, atol=1e-2)  # the bias did choose


def test_hash_layers_below_others_equal_deepseek_v4s():
    """Three residual layers, two that look experts up and one balanced by a bias, with gradients through all."""
    torch.manual_seed(0)
    theirs = _deepseek_v4("hash_moe", "hash_moe", "moe")
    ours = _ours(
        *("model.num_layers=3", "router=by_layer", *SHARED, BOUNDED),
        "router.layers={0-1:{router:hash,top_k:3,weights:learned,weight_scale:1.5},"
        "rest:{router:loss_free,top_k:3,score:sqrt_softplus,weight_scale:1.5}}",
    )
    ids = torch.randint(0, VOCABULARY, (TOKENS,))
    context = RoutingContext(
        torch.ones(TOKENS, dtype=torch.bool), torch.arange(TOKENS), 1, seed=0, step=0, token_ids=ids
    )
    hidden = torch.randn(TOKENS, HIDDEN)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    found, expected = inputs
    for layer, block in zip(ours, theirs, strict=True):
        own, other = dict(layer.named_parameters()), dict(block.named_parameters())
        with torch.no_grad():
            for name, (source, as_theirs) in _pairs(own, other).items():
                other[name].copy_(as_theirs(own[source]).view_as(other[name]))
            if layer is ours[-1]:
                layer.router.expert_bias.uniform_()
                block.gate.e_score_correction_bias.copy_(layer.router.expert_bias)
            else:
                layer.router.use_token_counts(torch.arange(1, VOCABULARY + 1))
                block.gate.tid2eid.copy_(layer.router.table)
        found = found + layer(found, context, False).hidden
        expected = expected + block(expected[None], input_ids=ids[None])[0]
    assert not torch.equal(ours[0].router.table, ours[1].router.table)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
    weights = torch.randn(TOKENS, HIDDEN)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-4, rtol=1e-3)
    for layer, block in zip(ours, theirs, strict=True):
        own, other = dict(layer.named_parameters()), dict(block.named_parameters())
        for name, (source, as_theirs) in _pairs(own, other).items():
            gradient = as_theirs(own[source].grad).view_as(other[name])
            torch.testing.assert_close(gradient, other[name].grad, atol=5e-4, rtol=1e-3, msg=name)
