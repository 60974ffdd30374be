"""Autonomy-of-Experts against its paper (arXiv:2501.13074): the numbers are those of the specification's list."""

import dataclasses
import math

import pytest
import torch
from helpers.builders import step_use
from torch import Tensor
from torch.nn import functional

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.experts.factorised import FactorisedExperts, factorised_width
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.routers.autonomy import (
    AutonomyConfig,
    AutonomyExpertChoiceConfig,
    AutonomyExpertChoiceRouter,
    AutonomyRouter,
    AutonomyTopPConfig,
    AutonomyTopPRouter,
)
from moe_pretrain.moe.types import ExpertShard, RoutingContext

HIDDEN, LOW, WIDTH, EXPERTS, TOKENS = 12, 4, 10, 5, 14
CONFIG = AutonomyConfig(
    name="autonomy",
    top_k=2,
    gate_rank=LOW,
    weights="selected",
    gate_activation="travels",
    load_balance_weight=0.02,
    load_balance_level="micro_batch",
    router_z_weight=0.0,
)


def context(tokens: int = TOKENS) -> RoutingContext:
    return RoutingContext(torch.ones(tokens, dtype=torch.bool), torch.arange(tokens), 1, seed=0, step=0)


def build(low: int = LOW, width: int = WIDTH, **changes: object) -> MoELayer:
    config = dataclasses.replace(CONFIG, **{"gate_rank": low, **changes})
    router = AutonomyRouter(config, HIDDEN, EXPERTS, layer=0)
    experts = FactorisedExperts(EXPERTS, HIDDEN, width, low, ExpertShard())
    layer = MoELayer(MoEConfig(EXPERTS, width, 0, 1, 1, 0, None, 1), router, experts, HIDDEN)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def apply(layer: MoELayer, hidden: Tensor) -> Tensor:
    return layer(hidden, context(len(hidden)), False).hidden


def loop(layer: MoELayer, hidden: Tensor) -> Tensor:
    """Algorithm 2, token by token."""
    config, down = layer.router.config, layer.router.down_weight
    rows = []
    for x in hidden:
        low = [w @ x for w in down]
        norms = torch.stack([c.square().sum().sqrt() for c in low])
        chosen = sorted(range(EXPERTS), key=lambda e: (-float(norms[e]), e))[: config.top_k]
        full = norms.softmax(0)
        selected = norms[chosen].softmax(0) if config.weights == "selected" else full[chosen]
        outputs = []
        for e in chosen:
            gate = functional.silu(layer.experts.up_weight[e] @ low[e])
            outputs.append(layer.experts.out_weight[e] @ (gate * (layer.experts.in_weight[e] @ x)))
        rows.append(sum(p * y for p, y in zip(selected, outputs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("weights", ["selected", "full"])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_02_03_layer_equals_the_algorithm_with_gradients(weights: str, top_k: int):
    layer, hidden = build(weights=weights, top_k=top_k), torch.randn(TOKENS, HIDDEN, requires_grad=True)
    inputs = [hidden, *layer.parameters()]
    direction = torch.randn(TOKENS, HIDDEN)
    ours, expected = apply(layer, hidden), loop(layer, hidden)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for name, left, right in zip(
        ["hidden", *(n for n, _ in layer.named_parameters())],
        torch.autograd.grad(ours, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_01_identity_up_projection_is_a_plain_swiglu_expert():
    layer, hidden = build(low=WIDTH), torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        layer.experts.up_weight.copy_(torch.eye(WIDTH).expand(EXPERTS, -1, -1))
    routing = layer.router(hidden, context())
    expected = torch.zeros(TOKENS, HIDDEN)
    for t, e, w in zip(routing.token_index, routing.expert_index, routing.weight, strict=True):
        gate, up = layer.router.down_weight[e] @ hidden[t], layer.experts.in_weight[e] @ hidden[t]
        expected[t] += w.detach() * (layer.experts.out_weight[e] @ (functional.silu(gate) * up)).detach()
    torch.testing.assert_close(apply(layer, hidden).detach(), expected, atol=1e-5, rtol=1e-5)


def test_04_rotating_the_low_rank_space_changes_nothing_and_scaling_changes_routing():
    layer, hidden = build(), torch.randn(TOKENS, HIDDEN)
    before, weight = apply(layer, hidden), layer.router(hidden, context()).weight
    rotation = torch.linalg.qr(torch.randn(LOW, LOW))[0]
    with torch.no_grad():
        layer.router.down_weight.copy_(rotation.T @ layer.router.down_weight)
        layer.experts.up_weight.copy_(layer.experts.up_weight @ rotation)
    torch.testing.assert_close(apply(layer, hidden), before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layer.router.down_weight.mul_(2)
        layer.experts.up_weight.div_(2)
    assert not torch.allclose(layer.router(hidden, context()).weight, weight)


def test_05_sign_of_the_input_does_not_matter_to_the_ranking():
    layer, hidden = build(), torch.randn(TOKENS, HIDDEN)
    left, right = layer.router(hidden, context()), layer.router(-hidden, context())
    assert torch.equal(left.expert_index, right.expert_index) and torch.equal(left.weight, right.weight)


@pytest.mark.parametrize(
    "weights,with_aux,reached", [("selected", False, False), ("full", False, True), ("selected", True, True)]
)
def test_06_who_gets_gradient(weights: str, with_aux: bool, reached: bool):
    """One token, so the unselected experts are known."""
    layer, hidden = build(weights=weights), torch.randn(1, HIDDEN)
    output = layer(hidden, context(1), False)
    loss = (output.hidden * torch.randn(HIDDEN)).sum() + (output.aux["load_balance"] if with_aux else 0)
    loss.backward()
    chosen = layer.router(hidden, context(1)).expert_index
    unselected = [e for e in range(EXPERTS) if e not in chosen]
    assert all(bool(layer.router.down_weight.grad[e].abs().sum() > 0) == reached for e in unselected)
    assert all(bool(layer.router.down_weight.grad[e].abs().sum() > 0) for e in chosen)


def test_07_sums_of_weights():
    hidden = torch.randn(TOKENS, HIDDEN)
    selected, full = (build(weights=w).router(hidden, context()).weight.view(TOKENS, 2) for w in ("selected", "full"))
    torch.testing.assert_close(selected.sum(1), torch.ones(TOKENS))
    assert bool((full.sum(1) < 1).all())
    torch.testing.assert_close(full / full.sum(1, keepdim=True), selected)


@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_08_identical_experts_act_as_one(top_k: int):
    layer, hidden = build(top_k=top_k), torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    single = build(top_k=1)
    single.load_state_dict(layer.state_dict())
    torch.testing.assert_close(apply(layer, hidden), apply(single, hidden), atol=1e-5, rtol=1e-5)


def test_09_order_of_experts_and_tokens_does_not_matter():
    layer, hidden = build(), torch.randn(TOKENS, HIDDEN)
    before = apply(layer, hidden)
    tokens = torch.randperm(TOKENS)
    torch.testing.assert_close(apply(layer, hidden[tokens]), before[tokens], atol=1e-5, rtol=1e-5)
    experts = torch.randperm(EXPERTS)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[experts].clone())
    torch.testing.assert_close(apply(layer, hidden), before, atol=1e-5, rtol=1e-5)


def test_10_a_zero_token_is_finite():
    layer, hidden = build(), torch.zeros(3, HIDDEN, requires_grad=True)
    output = layer(hidden, context(3), False)
    (output.hidden.sum() + output.aux["load_balance"]).backward()
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


@pytest.mark.parametrize("low,width", [(64, 4392.96), (128, 4194.46), (256, 3840), (512, 3264)])
def test_11_width_of_equation_5(low: int, width: float):
    config = dataclasses.replace(CONFIG, gate_rank=low)
    assert factorised_width(768, 3072, config.gate_rank, 1) == round(width)
    assert factorised_width(768, 3072, config.gate_rank, 64) % 64 == 0


def test_11_parameters_equal_the_baselines():
    assert factorised_width(1280, 5120, 400, 1) == 6469  # the paper prints 6,470
    ours, baseline = (
        model_size(config.model, config.router)
        for config in (load(["model=700m", "router=autonomy", "router.gate_rank=256"]), load(["model=700m"]))
    )
    # W_down counts as the router; with it the experts have the baseline's size exactly at this rank.
    assert ours.experts + ours.routers == baseline.experts


def test_12_balance_loss_is_one_when_even():
    layer = build()
    with torch.no_grad():
        layer.router.down_weight.zero_()
    aux = layer.router(torch.randn(TOKENS, HIDDEN), context()).aux["load_balance"]
    torch.testing.assert_close(aux, torch.tensor(1.0))  # theirs is top_k; see the docstring


def test_13_norms_at_initialisation():
    words = ["model.hidden_size=256", "model.num_heads=4", "router.gate_rank=64"]
    config = load(["router=autonomy", *words, "model.init=normal", "model.gate_init=paper"])
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed=0)
    hidden = functional.rms_norm(torch.randn(512, 256), (256,))
    norms = (hidden @ model.moe_layers()[0].router.down_weight.flatten(0, 1).T).view(512, -1, 64).norm(dim=-1)
    assert norms.mean().item() == pytest.approx(0.02 * math.sqrt(256 * 64), rel=0.02)


def test_14_later_tokens_change_nothing_before():
    layer, hidden = build(), torch.randn(TOKENS, HIDDEN)
    changed = hidden.clone()
    changed[8:] += 1
    before, after = apply(layer, hidden), apply(layer, changed)
    torch.testing.assert_close(before[:8], after[:8], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[8:], after[8:])


def test_15_the_norm_is_on_the_low_rank_activation_itself():
    layer, hidden = build(), torch.randn(TOKENS, HIDDEN)
    before = layer.router(hidden, context())
    with torch.no_grad():
        layer.experts.up_weight.mul_(10)
    assert torch.equal(layer.router(hidden, context()).weight, before.weight)
    padded = build(low=2 * LOW)
    with torch.no_grad():
        padded.router.down_weight.zero_()
        padded.router.down_weight[:, :LOW] = layer.router.down_weight
    after = padded.router(hidden, context())
    assert torch.equal(after.expert_index, before.expert_index)
    torch.testing.assert_close(after.weight, before.weight)


@pytest.mark.parametrize(
    "override,fragment",
    [
        ("router.gate_rank=128", "router.gate_rank=128 must be below model.hidden_size=128"),
        ("router.top_k=9", "router.top_k=9 must be at most"),
        ("router.gate_rank=0", "router.gate_rank=0 must be at least 1"),
    ],
)
def test_wrong_values_are_one_line(override: str, fragment: str):
    with pytest.raises(ConfigError) as caught:
        load(["router=autonomy", override])
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["selected", "full"])
def test_recomputed_activations_give_the_same_layer(weights: str):
    """Layout B: the experts' rank computes ``x W_down`` again; gradients through both uses of ``W_down`` sum."""
    travelling, recomputing = (build(weights=weights, gate_activation=how) for how in ("travels", "recomputed"))
    hidden, direction = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(TOKENS, HIDDEN)
    assert recomputing.router(hidden, context()).payload is None
    results = []
    for layer in (travelling, recomputing):
        output = apply(layer, hidden)
        results.append((output, *torch.autograd.grad(output, [hidden, *layer.parameters()], direction)))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["selected", "full"])
def test_top_p_takes_the_shortest_prefix_that_passes_the_threshold(weights: str):
    config = AutonomyTopPConfig(
        name="autonomy_top_p",
        gate_rank=LOW,
        weights=weights,
        gate_activation="travels",
        threshold=0.6,
        dynamic_weight=1e-4,
        max_experts=None,
        expected_experts=2.0,
        load_balance_weight=0.02,
        load_balance_level="micro_batch",
        router_z_weight=0.0,
    )
    router = AutonomyTopPRouter(config, HIDDEN, EXPERTS, layer=0)
    torch.nn.init.normal_(router.down_weight, std=0.3)
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, context())
    entropy, numbers = 0.0, set()
    for token in range(TOKENS):
        norms = [float((w @ hidden[token]).norm()) for w in router.down_weight]
        total = sum(math.exp(n) for n in norms)
        probs = [math.exp(n) / total for n in norms]
        entropy -= sum(p * math.log(p) for p in probs) / TOKENS
        taken, mass = [], 0.0
        for expert in sorted(range(EXPERTS), key=lambda e: -probs[e]):
            taken.append(expert)
            mass += probs[expert]
            if mass > 0.6:
                break
        own = routing.token_index == token
        assert sorted(taken) == routing.expert_index[own].tolist()
        divisor = mass if weights == "selected" else 1.0
        torch.testing.assert_close(routing.weight[own], torch.tensor([probs[e] / divisor for e in sorted(taken)]))
        torch.testing.assert_close(routing.payload[own], router.down_weight[sorted(taken)] @ hidden[token])
        numbers.add(len(taken))
    assert len(numbers) > 1
    assert routing.aux["dynamic"].item() == pytest.approx(entropy, rel=1e-5)
    assert router.aux_weights["dynamic"] == 1e-4


def test_control_keeps_the_router_and_factorises_the_gate():
    """Configuration 3 of table 2: the experts' own ``W_down``, in the expert group, and a router's choice."""
    config = load(["router=top_k", "model.moe.gate_rank=16"])
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, seed=0)
    layer = model.moe_layers()[0]
    experts = layer.experts
    assert "router.weight" in dict(layer.named_parameters()) and experts.down_weight.shape == (8, 16, 128)
    hidden = torch.randn(TOKENS, 128)
    routing = layer.router(hidden, context())
    expected = torch.zeros(TOKENS, 128)
    for t, e, w in zip(routing.token_index, routing.expert_index, routing.weight.detach(), strict=True):
        gate = experts.up_weight[e] @ (experts.down_weight[e] @ hidden[t])
        value = experts.in_weight[e] @ hidden[t]
        expected[t] += w * (experts.out_weight[e] @ (functional.silu(gate) * value)).detach()
    torch.testing.assert_close(apply(layer, hidden).detach(), expected, atol=1e-6, rtol=1e-4)
    assert model_size(config.model, config.router).total_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["router=autonomy", "model.moe.gate_rank=8"], "model.moe.gate_rank=8 must be null with router=autonomy"),
        (["router=top_k", "model.moe.gate_rank=128"], "model.moe.gate_rank=128 must be below model.hidden_size=128"),
        (["router=autonomy", "router.gate_rank=128"], "router.gate_rank=128 must be below model.hidden_size=128"),
        (["router=autonomy", "router.gate_rank=0"], "router.gate_rank=0 must be at least 1"),
        (["router=autonomy_top_p", "router.threshold=0"], "router.threshold=0 must be positive"),
        (["router=autonomy_top_p", "router.max_experts=9"], "router.max_experts=9 must be at most"),
    ],
)
def test_wrong_gates_get_one_line(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_experts_choose_equal_numbers_and_evaluation_goes_by_thresholds():
    config = AutonomyExpertChoiceConfig(
        name="autonomy_expert_choice",
        gate_rank=LOW,
        weights="selected",
        gate_activation="travels",
        capacity_factor=2.0,
        threshold_decay=0.0,
        load_balance_weight=0.0,
        load_balance_level="micro_batch",
        router_z_weight=0.0,
    )
    router = AutonomyExpertChoiceRouter(config, HIDDEN, EXPERTS, layer=0)
    torch.nn.init.normal_(router.down_weight)
    hidden = torch.randn(20, HIDDEN)
    norms = torch.stack([(hidden @ w.T).norm(dim=1) for w in router.down_weight], dim=1).detach()
    routing = router(hidden, context(20))
    for expert in range(EXPERTS):
        taken = routing.token_index[routing.expert_index == expert].tolist()
        assert taken == sorted(norms[:, expert].argsort(descending=True)[:8].tolist())  # 2 * 20 / 5 tokens
    for token in set(routing.token_index.tolist()):
        own = routing.token_index == token
        torch.testing.assert_close(routing.weight[own], norms[token, routing.expert_index[own]].softmax(0))
    router.after_step(step_use(routing.use.tokens_per_expert, 20, routing.use.sums))
    router.eval()
    # The cut-off is the best norm not taken, so on the same batch thresholds take what the experts took.
    assert torch.equal(router(hidden, context(20)).expert_index, routing.expert_index)
    alone = router(hidden[3:4], context(1))
    assert torch.equal(alone.expert_index, routing.expert_index[routing.token_index == 3])
