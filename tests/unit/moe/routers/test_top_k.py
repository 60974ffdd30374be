"""The top-k router against one token at a time in plain Python."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.routing import PLAIN_TOP_K, refusal
from reference.papers import pruning
from torch import Tensor

from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.routers.base import router_logits
from moe_pretrain.moe.routers.top_k import TopKRouter
from moe_pretrain.moe.types import Routing, RoutingContext

TOKENS, SEQUENCES, HIDDEN, EXPERTS = 12, 3, 8, 5


def make_router(layer: int = 3, **changes: Any) -> TopKRouter:
    router = TopKRouter(replace(PLAIN_TOP_K, **changes), HIDDEN, EXPERTS, layer)
    torch.nn.init.normal_(router.weight)
    return router


def make_context(first: int = 0, tokens: int = TOKENS, sequences: int = SEQUENCES, **changes: Any) -> RoutingContext:
    position = torch.arange(first, first + tokens)
    mask = torch.ones(tokens, dtype=torch.bool)
    return replace(RoutingContext(mask, position, sequences, seed=11, step=4), **changes)


def route_by_hand(logits: list[float], top_k: int, score: str, weights: str) -> list[tuple[int, float]]:
    """Experts of one token with their weights, best first; of equal ones the lower id."""
    if score == "softmax":
        total = sum(math.exp(logit) for logit in logits)
        scores = [math.exp(logit) / total for logit in logits]
    elif score == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        scores = [math.sqrt(math.log1p(math.exp(logit))) for logit in logits]
    best = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))[:top_k]
    divisor = sum(scores[expert] for expert in best) if weights == "renormalised" else 1.0
    return [(expert, scores[expert] / divisor) for expert in best]


@pytest.mark.parametrize(
    ("weights", "top_k"), [("raw", 1), ("raw", 2), ("raw", 5), ("renormalised", 2), ("renormalised", 5)]
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_equals_one_token_at_a_time(score: str, weights: str, top_k: int) -> None:
    router = make_router(score=score, weights=weights, top_k=top_k)
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context())
    logits = (hidden.double() @ router.weight.double().t()).tolist()
    expected = [pair for token in logits for pair in route_by_hand(token, top_k, score, weights)]
    assert routing.token_index.tolist() == [token for token in range(TOKENS) for _ in range(top_k)]
    assert routing.expert_index.tolist() == [expert for expert, _ in expected]
    assert routing.weight.dtype == torch.float32
    torch.testing.assert_close(routing.weight, torch.tensor([weight for _, weight in expected]))
    assert routing.routes_per_token == top_k


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_groups_limit_where_experts_come_from(score: str) -> None:
    """DeepSeek-V3: the groups with the largest sums of their two best scores, then the best experts in them."""
    config = replace(PLAIN_TOP_K, score=score, top_k=3, num_groups=4, groups_per_token=2)
    router = TopKRouter(config, HIDDEN, 12, 0)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(60, HIDDEN)
    chosen = router(hidden, make_context(tokens=60)).expert_index.view(60, 3)
    free = TopKRouter(replace(config, num_groups=1, groups_per_token=1), HIDDEN, 12, 0)
    free.load_state_dict(router.state_dict())
    unlimited = free(hidden, make_context(tokens=60)).expert_index.view(60, 3)
    changed = 0
    for token, experts in enumerate(chosen.tolist()):
        logits = (router.weight @ hidden[token]).tolist()
        scores = dict(route_by_hand(logits, 12, score, "raw"))
        best = sorted(range(4), key=lambda g: -sum(sorted(scores[e] for e in range(3 * g, 3 * g + 3))[-2:]))[:2]
        allowed = [expert for expert in range(12) if expert // 3 in best]
        assert experts == sorted(allowed, key=lambda expert: -scores[expert])[:3]
        changed += experts != unlimited[token].tolist()
    assert changed > 5


def test_weight_scale_is_a_factor_of_the_weights_alone() -> None:
    hidden, router = torch.randn(TOKENS, HIDDEN), make_router()
    scaled = make_router(weight_scale=2.5)
    scaled.load_state_dict(router.state_dict())
    plain, ours = router(hidden, make_context()), scaled(hidden, make_context())
    torch.testing.assert_close(ours.weight, 2.5 * plain.weight)
    assert torch.equal(ours.expert_index, plain.expert_index)
    assert torch.equal(ours.aux["load_balance"], plain.aux["load_balance"])


def test_large_router_is_two_maps_in_a_row() -> None:
    """Configuration 4 of Autonomy-of-Experts: 768 -> 1012 -> 8 has about the parameters of eight down projections."""
    router = make_router(projection_size=7)
    torch.nn.init.normal_(router.projection)
    hidden = torch.randn(TOKENS, HIDDEN)
    one_map = make_router()
    one_map.weight.data = router.weight.data @ router.projection.data
    ours, expected = router(hidden, make_context()), one_map(hidden, make_context())
    assert torch.equal(ours.expert_index, expected.expert_index)
    torch.testing.assert_close(ours.weight, expected.weight)
    large = TopKRouter(replace(PLAIN_TOP_K, projection_size=1012), 768, 8, 0)
    assert sum(parameter.numel() for parameter in large.parameters()) == 785_312


def test_sqrt_softplus_has_finite_gradients_where_it_underflows() -> None:
    router = make_router(score="sqrt_softplus")
    hidden = (torch.randn(TOKENS, HIDDEN) * 1e4).requires_grad_()
    routing = router(hidden, make_context())
    gradients = torch.autograd.grad(routing.weight[::2].sum(), [hidden, router.weight])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_ties_go_to_the_lower_id() -> None:
    router = make_router(top_k=3)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[4, 0] = 1.0
    hidden = torch.ones(TOKENS, HIDDEN)
    routing = router(hidden, make_context())
    assert routing.expert_index.view(TOKENS, 3).tolist() == [[4, 0, 1]] * TOKENS


def test_decides_in_float32_whatever_comes_in() -> None:
    """In bfloat16 the logits 1 and 1 + 2**-12 would tie and expert 0 would win."""
    router = make_router(top_k=1, weights="raw")
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0], router.weight[1, 0] = 1.0, 1.0 + 2**-12
    routing = router(torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16), make_context())
    assert routing.expert_index.tolist() == [1] * TOKENS
    assert routing.weight.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in routing.aux.values())


@pytest.mark.parametrize("weights", ["renormalised", "raw"])
def test_weights_give_the_router_a_gradient(weights: str) -> None:
    router = make_router(weights=weights)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    factor = torch.randn(TOKENS * 2)
    grads = torch.autograd.grad((router(hidden, make_context()).weight * factor).sum(), [router.weight, hidden])
    probs = (hidden @ router.weight.t()).softmax(1)
    weight = probs.topk(2).values
    if weights == "renormalised":
        weight = weight / weight.sum(1, keepdim=True)
    expected = torch.autograd.grad((weight.flatten() * factor).sum(), [router.weight, hidden])
    for value, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(value, reference)


def test_jitter_is_the_stated_noise_and_only_in_training() -> None:
    router, plain = make_router(jitter=0.3), make_router()
    plain.weight = router.weight
    hidden = torch.randn(TOKENS, HIDDEN)
    assert torch.equal(router.eval()(hidden, make_context()).weight, plain(hidden, make_context()).weight)
    noise = counter_uniform(torch.arange(TOKENS), HIDDEN, 11, 1, 4, 3)
    noisy = plain(hidden * (0.7 + 0.6 * noise), make_context())
    jittered = router.train()(hidden, make_context())
    torch.testing.assert_close(jittered.weight, noisy.weight)
    assert not torch.allclose(jittered.weight, plain(hidden, make_context()).weight, rtol=1e-3)


def test_jitter_does_not_depend_on_the_cut_but_on_seed_step_and_layer() -> None:
    router = make_router(jitter=0.3)
    hidden = torch.randn(TOKENS, HIDDEN)
    whole = router(hidden, make_context()).weight
    parts = [router(hidden[i : i + 4], make_context(i, 4, 1)).weight for i in range(0, TOKENS, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    other_layer = make_router(layer=4, jitter=0.3)
    other_layer.weight = router.weight
    for changed in (
        router(hidden, make_context(seed=12)),
        router(hidden, make_context(step=5)),
        other_layer(hidden, make_context()),
    ):
        assert not torch.allclose(changed.weight, whole, rtol=1e-3)


def use_by_hand(routing: Routing, probs: Tensor, mask: Tensor) -> tuple[list[int], float]:
    load = [0] * EXPERTS
    for token, expert in zip(routing.token_index.tolist(), routing.expert_index.tolist(), strict=True):
        load[expert] += int(mask[token])
    entropy = -sum(p * math.log(p) for token in range(TOKENS) if mask[token] for p in probs[token].tolist())
    return load, entropy


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_statistics_count_text_only(score: str) -> None:
    router = make_router(score=score)
    hidden = torch.randn(TOKENS, HIDDEN)
    mask = torch.arange(TOKENS) % 3 > 0
    routing = router(hidden, make_context(token_mask=mask))
    logits = (hidden @ router.weight.t()).detach()
    scores = {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), "sqrt_softplus": logits.exp().log1p().sqrt()}[
        score
    ]
    load, entropy = use_by_hand(routing, scores / scores.sum(1, keepdim=True), mask)
    use = routing.use
    assert use.tokens_per_expert.tolist() == load
    assert use.tokens.item() == 8 and use.dropped_routes.item() == 0
    assert use.router_entropy.item() == pytest.approx(entropy, rel=1e-5)
    assert not any(t.requires_grad for t in (use.tokens_per_expert, use.tokens, use.router_entropy))
    assert len(routing.expert_index) == TOKENS * 2  # padding is routed, or rows would depend on the data


def test_balance_level_decides_the_groups() -> None:
    """One expert per sequence: even over the batch, collapsed within each; the global level believes its callback."""
    hidden = torch.eye(HIDDEN)[torch.arange(TOKENS) // 4] * 50
    losses = {}
    for level in ("micro_batch", "sequence", "global_batch"):
        router = make_router(top_k=1, weights="raw", load_balance_level=level)
        with torch.no_grad():
            router.weight.copy_(torch.eye(EXPERTS, HIDDEN))
        seen: list[tuple[int, list[float]]] = []

        def everything_to_an_idle_expert(layer: int, counts: Tensor, seen: list = seen) -> Tensor:
            seen.append((layer, counts.tolist()))
            return torch.tensor([0, 0, 0, 12.0, 0], dtype=torch.float64)

        routing = router(hidden, make_context(sum_over_global_batch=everything_to_an_idle_expert))
        losses[level] = routing.aux["load_balance"].item()
        assert seen == ([(3, [4, 4, 4, 0, 0])] if level == "global_batch" else [])
    assert losses == pytest.approx({"micro_batch": 5 / 3, "sequence": 5.0, "global_batch": 0.0}, abs=1e-6)


def test_global_level_without_a_callback_is_the_micro_batch() -> None:
    """Evaluation has no global batch."""
    router = make_router(load_balance_level="global_batch")
    other = make_router()
    other.weight = router.weight
    hidden = torch.randn(TOKENS, HIDDEN)
    values = [r(hidden, make_context()).aux["load_balance"] for r in (router, other)]
    assert torch.equal(*values)
    assert router.needs_global_routes and not other.needs_global_routes
    assert not make_router(load_balance_level="global_batch", load_balance_weight=0.0).needs_global_routes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "router.top_k=0 must be at least 1"),
        ({"jitter": 1.0}, "router.jitter=1.0 must be below 1"),
        ({"jitter": -0.1}, "router.jitter=-0.1 must not be negative"),
        ({"load_balance_weight": -1.0}, "router.load_balance_weight=-1.0 must not be negative"),
        ({"router_z_weight": -1.0}, "router.router_z_weight=-1.0 must not be negative"),
        ({"top_k": 1}, "router.weights=renormalised must be raw when router.top_k=1"),
        ({"weight_scale": 0.0}, "router.weight_scale=0.0 must be positive"),
        ({"num_groups": 2}, "router.num_groups=2 must divide model.moe.num_experts=5"),
        ({"num_groups": 5, "groups_per_token": 6}, "router.groups_per_token=6 must be at most router.num_groups=5"),
        ({"num_groups": 5}, "router.top_k=2 must be at most 1, the experts of router.groups_per_token=1 groups"),
        ({"projection_size": 0}, "router.projection_size=0 must be at least 1"),
        ({"top_k": 6}, "router.top_k=6 must be at most model.moe.num_experts=5"),
    ],
)
def test_wrong_configurations_get_one_line(changes: dict[str, Any], message: str) -> None:
    complaint = refusal(PLAIN_TOP_K, EXPERTS, **changes)
    assert complaint.startswith(message) and "\n" not in complaint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_keep_the_input_as_it_came(dtype: torch.dtype) -> None:
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(EXPERTS, HIDDEN, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits = router_logits(hidden, weight)
    assert {t.data_ptr() for t in saved} == {hidden.data_ptr(), weight.data_ptr()}
    upstream = torch.randn(TOKENS, EXPERTS)
    expected = hidden.float() @ weight.t()
    torch.testing.assert_close(logits, expected)
    for value, reference in zip(
        torch.autograd.grad(logits, [hidden, weight], upstream),
        torch.autograd.grad(expected, [hidden, weight], upstream),
        strict=True,
    ):
        assert value.dtype == reference.dtype
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_entropy_of_seer_is_that_of_text_tokens(score: str):
    """SEER-MoE's regulariser; with a bias of another scheme it would be left out, as the scores are without."""
    router, hidden = make_router(entropy_weight=0.1, score=score), torch.randn(TOKENS, HIDDEN)
    mask = torch.arange(TOKENS) < 9
    routing = router(hidden, make_context(token_mask=mask))
    logits = hidden[mask].double() @ router.weight.double().T
    if score == "sigmoid":  # a distribution whose softmax is that of the divided scores
        logits = logits.sigmoid().log()
    expected = pruning.router_entropy(logits, range(EXPERTS))
    assert routing.aux["entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert router.aux_weights["entropy"] == 0.1 and "entropy" not in make_router().aux_weights
    with torch.no_grad():
        (gradient,) = torch.autograd.grad(routing.aux["entropy"], router.weight)
        router.weight -= 0.1 * gradient
    assert router(hidden, make_context(token_mask=mask)).aux["entropy"] < routing.aux["entropy"]
