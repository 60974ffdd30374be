"""Attentive gating against its paper (arXiv:2302.14703): the numbers are those of the specification's list.

12, distillation on frozen experts, is in tests/distributed/test_warm_start.py.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.model.size import model_size
from moe_pretrain.moe.experts.factorised import FactorisedExperts
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.routers.attentive import (
    AttentiveConfig,
    AttentiveDenseConfig,
    AttentiveDenseRouter,
    AttentiveFields,
    AttentiveLowRankConfig,
    AttentiveLowRankRouter,
    AttentiveRouter,
)
from moe_pretrain.moe.types import ExpertShard, RoutingContext, float32_parameters

HIDDEN, WIDTH, LOW, KEY, EXPERTS, TOKENS = 12, 10, 6, 4, 5, 14
SHARED: dict[str, Any] = {
    "top_k": 2,
    "key_size": KEY,
    "weights": "selected",
    "load_balance_weight": 0.01,
    "load_balance_level": "micro_batch",
    "router_z_weight": 0.001,
    "similarity_weight": 1.0,
    "importance_weight": 0.2,
}
CONFIGS: dict[str, AttentiveFields] = {
    "dense": AttentiveDenseConfig(name="attentive_dense", **SHARED),
    "two_stage": AttentiveConfig(name="attentive", num_candidates=3, distillation_weight=0.1, **SHARED),
    "low_rank": AttentiveLowRankConfig(name="attentive_low_rank", gate_rank=LOW, **SHARED),
}
FORMS = list(CONFIGS)


def context(tokens: int = TOKENS, padding: int = 0) -> RoutingContext:
    return RoutingContext(torch.arange(tokens) < tokens - padding, torch.arange(tokens), 1, seed=0, step=0)


def build(form: str, **changes: Any) -> MoELayer:
    config = replace(CONFIGS[form], **changes)
    experts: SwiGLUExperts | FactorisedExperts
    if form == "low_rank":
        router: Any = AttentiveLowRankRouter(config, HIDDEN, EXPERTS, 0)
        experts = FactorisedExperts(EXPERTS, HIDDEN, WIDTH, LOW, ExpertShard())
    else:
        router = {"dense": AttentiveDenseRouter, "two_stage": AttentiveRouter}[form](
            config, HIDDEN, EXPERTS, 0, expert_width=WIDTH
        )
        experts = SwiGLUExperts(EXPERTS, HIDDEN, WIDTH, ExpertShard())
    layer = MoELayer(MoEConfig(EXPERTS, WIDTH, 0, 1, 1, 0, None, 1), router, experts, HIDDEN)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(layer.named_parameters()):
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer


def gate_of(layer: MoELayer, hidden: Tensor) -> Tensor:
    """``p [tokens, experts]``, what the layer weighs when all candidates act and weights are full."""
    router, config = layer.router, layer.router.config
    wide = replace(config, weights="full")
    object.__setattr__(wide, "top_k", getattr(config, "num_candidates", EXPERTS))
    router.config = router._fields = wide
    try:
        seen: list[Any] = []
        handle = router.register_forward_hook(lambda module, inputs, routing: seen.append(routing))
        layer(hidden, context(len(hidden)), False)
        handle.remove()
    finally:
        router.config = router._fields = config
    gate = torch.zeros(len(hidden), EXPERTS)
    return gate.index_put((seen[0].token_index, seen[0].expert_index), seen[0].weight)


def inner(layer: MoELayer, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The state that a key is made of, and the activation that enters the last matrix."""
    experts = layer.experts
    if isinstance(experts, FactorisedExperts):
        low = layer.router.down_weight[expert] @ x
        return low, functional.silu(experts.up_weight[expert] @ low) * (experts.in_weight[expert] @ x)
    gate, up = (experts.in_weight[expert] @ x).split(WIDTH)
    state = functional.silu(gate) * up
    return state, state


def loop(layer: MoELayer, hidden: Tensor, num_text: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output and losses, token by token and pair by pair, straight from the formulas."""
    router, config = layer.router, layer.router.config
    outputs, gates, cross_entropies = [], [], []
    for x in hidden:
        candidates = list(range(EXPERTS))
        if isinstance(router, AttentiveRouter):
            linear = [float(row @ x) for row in router.weight]
            candidates = sorted(candidates, key=lambda e: (-linear[e], e))[: config.num_candidates]
        query = router.gate.query_weight @ x
        score = {e: query @ (router.gate.key_weight @ inner(layer, e, x)[0]) / math.sqrt(KEY) for e in candidates}
        total = sum(s.exp() for s in score.values())
        probs = {e: s.exp() / total for e, s in score.items()}
        chosen = sorted(candidates, key=lambda e: (-float(probs[e]), e))[: config.top_k]
        divisor = sum(probs[e] for e in chosen) if config.weights == "selected" else 1.0
        outputs.append(sum(probs[e] / divisor * (layer.experts.out_weight[e] @ inner(layer, e, x)[1]) for e in chosen))
        gates.append(torch.stack([probs.get(e, torch.zeros(())) for e in range(EXPERTS)]))
        if isinstance(router, AttentiveRouter):
            ours = torch.stack([router.weight[e] @ x for e in candidates]).log_softmax(0)
            teacher = torch.stack([probs[e].detach() for e in candidates])
            cross_entropies.append(-(teacher * ours).sum())
    gate = torch.stack(gates[:num_text])
    points = hidden.detach()[:num_text]
    distance = torch.stack([torch.stack([(a - b).square().sum() for b in points]) for a in points])
    same = sum(gate[:, e] @ distance @ gate[:, e] for e in range(EXPERTS)) / EXPERTS / num_text**2
    importance = gate.sum(0)
    aux = {"similarity": same / distance.mean(), "importance": importance.var() / importance.mean() ** 2}
    if cross_entropies:
        aux["distillation"] = sum(cross_entropies[:num_text]) / num_text
    return torch.stack(outputs), aux


@pytest.mark.parametrize("weights,top_k", [("selected", 2), ("full", 1), ("full", 2)])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loop_with_gradients_and_losses(form: str, weights: str, top_k: int) -> None:
    layer = build(form, weights=weights, top_k=top_k)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    inputs = dict(layer.named_parameters()) | {"hidden": hidden}
    direction = torch.randn(TOKENS, HIDDEN)
    output = layer(hidden, context(padding=3), False)
    # The loop in float64: of two float32 sums both would round, each by its processor.
    exact = copy.deepcopy(layer).double()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_inputs = dict(exact.named_parameters()) | {"hidden": exact_hidden}
    expected, aux = loop(exact, exact_hidden, TOKENS - 3)
    torch.testing.assert_close(output.hidden.double(), expected, atol=1e-5, rtol=1e-5)
    results = {"output": (output.hidden * direction).sum(), **{name: output.aux[name] for name in aux}}
    theirs = {"output": (expected * direction).sum(), **aux}
    for name, value in results.items():
        torch.testing.assert_close(value.double(), theirs[name], atol=1e-5, rtol=1e-5)
        options = {"allow_unused": True, "retain_graph": True, "materialize_grads": True}
        gradients = torch.autograd.grad(value, list(inputs.values()), **options)
        for of, left, right in zip(
            inputs, gradients, torch.autograd.grad(theirs[name], list(exact_inputs.values()), **options), strict=True
        ):
            torch.testing.assert_close(
                left.double(), right, atol=1e-5, rtol=2e-4, msg=lambda m, text=f"d {name} / d {of}": f"{text}: {m}"
            )


@pytest.mark.parametrize("what", ["key_weight is zero", "identical experts"])
@pytest.mark.parametrize("form", FORMS)
def test_01_nothing_to_tell_experts_apart_gives_a_uniform_gate(form: str, what: str) -> None:
    layer, hidden = build(form), torch.randn(TOKENS, HIDDEN)
    before = gate_of(layer, hidden)
    with torch.no_grad():
        if what == "identical experts":
            weight = layer.router.down_weight if form == "low_rank" else layer.experts.in_weight
            weight.copy_(weight[:1].expand_as(weight).clone())
        else:
            layer.router.gate.key_weight.zero_()
    gate = gate_of(layer, hidden)
    torch.testing.assert_close(gate, torch.where(before > 0, 1 / (before > 0).sum(1, keepdim=True), 0.0))
    assert not torch.allclose(before, gate, atol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_01_equal_scores_go_to_the_lower_expert(form: str) -> None:
    layer, hidden = build(form), torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        layer.router.gate.key_weight.zero_()
        if form == "two_stage":
            layer.router.weight.copy_(-torch.arange(EXPERTS).float()[:, None] * torch.ones(HIDDEN))
            hidden = -hidden.abs()  # the router of candidates prefers the highest ids
    routed = layer(hidden, context(), False).use.tokens_per_expert.tolist()
    assert routed == ([0, 0, TOKENS, TOKENS, 0] if form == "two_stage" else [TOKENS, TOKENS, 0, 0, 0])


@pytest.mark.parametrize("form", FORMS)
def test_02_order_of_experts_does_not_matter(form: str) -> None:
    layer, hidden = build(form), torch.randn(TOKENS, HIDDEN)
    before, gate = layer(hidden, context(), False), gate_of(layer, hidden)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if ".gate." not in name:  # queries and keys are shared
                parameter.copy_(parameter[order].clone())
    after = layer(hidden, context(), False)
    torch.testing.assert_close(after.hidden, before.hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gate_of(layer, hidden), gate[:, order])
    assert torch.equal(after.use.tokens_per_expert, before.use.tokens_per_expert[order])


@pytest.mark.parametrize("form", FORMS)
def test_03_scores_scale_with_the_root_of_the_key_size(form: str) -> None:
    """Twice the key size by zeros divides logits by the root of 2."""
    layer, wide, hidden = build(form), build(form, key_size=2 * KEY), torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        for (name, target), source in zip(wide.named_parameters(), layer.parameters(), strict=True):
            if ".gate." in name:
                target.copy_(functional.pad(source, (0, 0, 0, KEY)))
            else:
                target.copy_(source)
    narrow, doubled = gate_of(layer, hidden), gate_of(wide, hidden)
    raised = narrow ** (1 / math.sqrt(2))
    torch.testing.assert_close(doubled, raised / raised.sum(1, keepdim=True))


@pytest.mark.parametrize("form", ["dense", "two_stage"])
def test_04_the_same_vector_added_to_all_keys_changes_nothing(form: str) -> None:
    layer, hidden, vector = build(form), torch.randn(TOKENS, HIDDEN), torch.randn(KEY)
    router, service = layer.router, layer._score_routes(False)

    def shifted(given: Tensor, candidates: Tensor, query: Tensor, key_weight: Tensor) -> Tensor:
        return service(given, candidates, query, key_weight) + (query @ vector)[:, None]

    plain, moved = (router(hidden, replace(context(), score_routes=s)) for s in (service, shifted))
    assert torch.equal(plain.expert_index, moved.expert_index)
    torch.testing.assert_close(plain.weight, moved.weight)
    for name, value in plain.aux.items():
        if name != "router_z" or form == "two_stage":  # the z-loss of the dense form is of the scores themselves
            torch.testing.assert_close(moved.aux[name], value)


def test_05_two_stage_with_all_experts_is_dense_and_dense_with_all_is_the_mixture() -> None:
    hidden = torch.randn(TOKENS, HIDDEN)
    dense, two_stage = build("dense"), build("two_stage", num_candidates=EXPERTS)
    two_stage.load_state_dict({**dense.state_dict(), "router.weight": two_stage.router.weight.detach()})
    ours, theirs = two_stage(hidden, context(), False), dense(hidden, context(), False)
    torch.testing.assert_close(ours.hidden, theirs.hidden)
    for name in ("similarity", "importance"):
        torch.testing.assert_close(ours.aux[name], theirs.aux[name])
    full = build("dense", top_k=EXPERTS)
    gate = gate_of(full, hidden)
    torch.testing.assert_close(gate.sum(1), torch.ones(TOKENS))
    outputs = torch.stack(
        [torch.stack([full.experts.out_weight[e] @ inner(full, e, x)[1] for e in range(EXPERTS)]) for x in hidden]
    )
    mixture = (gate[:, :, None] * outputs).sum(1)
    torch.testing.assert_close(full(hidden, context(), False).hidden, mixture, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_06_the_gate_teaches_the_maps_and_the_experts(form: str) -> None:
    """With one token the asked experts are known: they learn through the gate alone, also those not selected."""
    layer, hidden = build(form, weights="full"), torch.randn(1, HIDDEN)
    gate = gate_of(layer, hidden)[0]
    learner = layer.router.down_weight if form == "low_rank" else layer.experts.in_weight
    maps = [layer.router.gate.query_weight, layer.router.gate.key_weight]
    gradients = torch.autograd.grad(gate.square().sum(), [learner, *maps])
    asked = gate > 0
    assert asked.sum() == (3 if form == "two_stage" else EXPERTS)
    for gradient, is_asked in zip(gradients[0], asked, strict=True):
        assert bool(gradient.any()) == bool(is_asked)
    assert all(bool(gradient.any()) for gradient in gradients[1:])


def test_06_the_router_of_candidates_learns_from_distillation_alone() -> None:
    layer, hidden = build("two_stage"), torch.randn(TOKENS, HIDDEN)
    output = layer(hidden, context(), False)
    weight = layer.router.weight
    (from_output,) = torch.autograd.grad(output.hidden.sum(), [weight], retain_graph=True, allow_unused=True)
    assert from_output is None and set(layer.router.without_lm_gradient) == {"weight"}
    others = [layer.router.gate.query_weight, layer.experts.in_weight]
    gradients = torch.autograd.grad(output.aux["distillation"], [weight, *others], allow_unused=True)
    assert gradients[0].any() and gradients[1] is None and gradients[2] is None, "the gate is the teacher"


def test_06_distillation_brings_the_router_of_candidates_to_the_gates_order() -> None:
    layer, hidden = build("two_stage", num_candidates=EXPERTS), torch.randn(4, HIDDEN)
    optimizer = torch.optim.SGD([layer.router.weight], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        layer(hidden, context(4), False).aux["distillation"].backward()
        optimizer.step()
    torch.testing.assert_close((hidden @ layer.router.weight.T).softmax(1), gate_of(layer, hidden), atol=0.02, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_11_one_token_and_no_text(form: str) -> None:
    layer = build(form)
    for hidden, given in ((torch.randn(1, HIDDEN), context(1)), (torch.randn(3, HIDDEN), context(3, padding=3))):
        output = layer(hidden, given, False)
        assert output.hidden.shape == hidden.shape
        total = output.hidden.sum() + sum(output.aux.values())
        gradients = torch.autograd.grad(total, list(layer.parameters()), allow_unused=True, materialize_grads=True)
        assert total.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert output.aux["similarity"] == 0 and output.aux["importance"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_11_no_token_at_all(form: str) -> None:
    """A rank may hold no rows of any candidate; every parameter still gets a gradient, of zero."""
    layer = build(form)
    output = layer(torch.randn(0, HIDDEN, requires_grad=True), context(0), False)
    gradients = torch.autograd.grad(output.hidden.sum(), [*layer.experts.parameters(), *layer.router.gate.parameters()])
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_13_later_tokens_change_nothing_before(form: str) -> None:
    layer, hidden = build(form), torch.randn(TOKENS, HIDDEN)
    changed = hidden.clone()
    changed[8:] += 1
    before, after = layer(hidden, context(), False).hidden, layer(changed, context(), False).hidden
    torch.testing.assert_close(before[:8], after[:8], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[8:], after[8:])


def test_the_maps_of_the_gate_stay_float32() -> None:
    for form in FORMS:
        layer = build(form)
        kept = {id(parameter) for parameter in float32_parameters(layer)}
        names = {name for name, parameter in layer.named_parameters() if id(parameter) in kept}
        gate = {"router.gate.query_weight", "router.gate.key_weight"}
        assert names == (gate | {"router.weight"} if form == "two_stage" else gate)


def test_candidates_count_in_flops_and_active_parameters() -> None:
    """Of the defaults (4 of 8 candidates, 2 selected): 2 experts, and 4 first layers of which 2 go on."""
    sizes = {}
    for name in ("top_k", "attentive", "attentive_dense"):
        config = load([f"router={name}"])
        sizes[name] = model_size(config.model, config.router)
    layers, first = 4, 2 * 128 * 256
    maps = 64 * 128 + 64 * 256
    linear = 8 * 128
    for name, candidates, routers in (("attentive", 4, maps + linear), ("attentive_dense", 8, maps)):
        of, plain = sizes[name], sizes["top_k"]
        more = layers * (routers - linear)
        assert of.routers == layers * routers
        assert of.total_parameters - plain.total_parameters == more
        assert of.active_parameters - plain.active_parameters == more + layers * (candidates - 2) * first
        flops = of.forward_flops_per_token - plain.forward_flops_per_token
        assert flops == 2 * (more + layers * candidates * first)


@pytest.mark.parametrize(
    "router,override,fragment",
    [
        ("attentive", "router.num_candidates=9", "router.num_candidates=9 must be at most model.moe.num_experts=8"),
        ("attentive", "router.num_candidates=2", "router.num_candidates=2 must be more than router.top_k=2"),
        ("attentive", "router.distillation_weight=0", "router.distillation_weight=0 must be positive"),
        ("attentive", "model.moe.gate_rank=16", "model.moe.gate_rank=16 must be null with router=attentive"),
        ("attentive_dense", "router.top_k=9", "router.top_k=9 must be at most model.moe.num_experts=8"),
        ("attentive_dense", "router.top_k=1", "router.weights=selected must be full when router.top_k=1"),
        ("attentive_dense", "router.key_size=0", "router.key_size=0 must be at least 1"),
        ("attentive_dense", "router.similarity_weight=-1", "router.similarity_weight=-1 must not be negative"),
        ("attentive_low_rank", "router.importance_weight=-1", "router.importance_weight=-1 must not be negative"),
        ("attentive_low_rank", "router.gate_rank=0", "router.gate_rank=0 must be at least 1"),
        ("attentive_low_rank", "router.gate_rank=128", "router.gate_rank=128 must be below model.hidden_size=128"),
    ],
)
def test_wrong_values_are_one_line(router: str, override: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([f"router={router}", override])
    assert fragment in str(caught.value) and "\n" not in str(caught.value)
