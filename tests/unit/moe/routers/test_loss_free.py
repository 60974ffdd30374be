"""The loss-free router: what its bias does, and what it must not do (known defect C22).

That the engine moves the bias once per step from counts over all ranks, keeps it float32 in bfloat16 and saves it is
shown on ranks, in ``tests/distributed/test_router_state.py``.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from helpers.builders import step_use, tiny
from helpers.routing import PLAIN_TOP_K, refusal
from torch import Tensor

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.moe.routers.loss_free import LossFreeRouter, LossFreeRouterConfig
from moe_pretrain.moe.routers.top_k import TopKRouter, TopKRouterConfig
from moe_pretrain.moe.types import Routing, RoutingContext

TOKENS, HIDDEN, EXPERTS = 12, 8, 5
CONFIG = LossFreeRouterConfig(
    **{**asdict(PLAIN_TOP_K), "name": "loss_free", "score": "sigmoid", "load_balance_weight": 0.0},
    bias_update_rate=0.01,
)
BIAS = [0.3, -0.2, 0.0, 0.15, -0.4]


def make_router(bias: list[float] | None = None, **changes: Any) -> LossFreeRouter:
    router = LossFreeRouter(replace(CONFIG, **changes), HIDDEN, EXPERTS, layer=3)
    torch.nn.init.normal_(router.weight, std=0.5)
    if bias is not None:
        router.expert_bias.copy_(torch.tensor(bias))
    return router


def plain_twin(router: LossFreeRouter) -> TopKRouter:
    """The top-k router with the same weight and no bias."""
    options = {name: value for name, value in vars(router.config).items() if name != "bias_update_rate"}
    twin = TopKRouter(TopKRouterConfig(**{**options, "name": "top_k"}), HIDDEN, EXPERTS, 3)
    twin.weight = router.weight
    return twin


def make_context(tokens: int = TOKENS) -> RoutingContext:
    return RoutingContext(torch.ones(tokens, dtype=torch.bool), torch.arange(tokens), 1, seed=11, step=4)


def scores_of(router: TopKRouter, hidden: Tensor) -> Tensor:
    logits = hidden @ router.weight.t()
    return logits.softmax(1) if router.config.score == "softmax" else logits.sigmoid()


def experts(routing: Routing) -> list[list[int]]:
    return routing.expert_index.view(-1, 2).tolist()


@pytest.mark.parametrize("weights", ["raw", "renormalised"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_selects_and_scores_weigh(score: str, weights: str) -> None:
    tokens = 50
    router = make_router(BIAS, score=score, weights=weights)
    hidden = torch.randn(tokens, HIDDEN)
    routing = router(hidden, make_context(tokens))
    expected_experts, expected_weights = [], []
    for row in (hidden.double() @ router.weight.double().t()).tolist():
        total = sum(math.exp(logit) for logit in row)
        scores = [math.exp(logit) / total if score == "softmax" else 1 / (1 + math.exp(-logit)) for logit in row]
        best = sorted(range(EXPERTS), key=lambda e: -(scores[e] + BIAS[e]))[:2]
        divisor = sum(scores[e] for e in best) if weights == "renormalised" else 1.0
        expected_experts.append(best)
        expected_weights += [scores[e] / divisor for e in best]
    assert experts(routing) == expected_experts
    torch.testing.assert_close(routing.weight, torch.tensor(expected_weights))
    assert expected_experts != experts(plain_twin(router)(hidden, make_context(tokens)))  # the bias did something


@pytest.mark.parametrize("weights", ["raw", "renormalised"])
def test_huge_bias_always_selects_and_never_weighs(weights: str) -> None:
    hidden = torch.randn(TOKENS, HIDDEN)
    router = make_router([0, 0, 1000.0, 0, 0], weights=weights)
    routing = router(hidden, make_context())
    best = torch.tensor(experts(routing))
    assert (best[:, 0] == 2).all() and (best[:, 1] != 2).all()
    weight = scores_of(router, hidden).gather(1, best)
    if weights == "renormalised":
        weight = weight / weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.weight, weight.flatten())


def test_starts_at_zero_as_top_k() -> None:
    router = make_router()
    assert router.expert_bias.tolist() == [0.0] * EXPERTS and router.expert_bias.dtype == torch.float32
    hidden = torch.randn(TOKENS, HIDDEN)
    ours, theirs = (r(hidden, make_context()) for r in (router, plain_twin(router)))
    assert torch.equal(ours.expert_index, theirs.expert_index) and torch.equal(ours.weight, theirs.weight)


def test_equal_biases_change_nothing() -> None:
    hidden = torch.randn(TOKENS, HIDDEN)
    router = make_router(BIAS)
    before = router(hidden, make_context())
    router.expert_bias.add_(0.7)
    after = router(hidden, make_context())
    assert torch.equal(before.expert_index, after.expert_index) and torch.equal(before.weight, after.weight)


def test_losses_and_entropy_know_no_bias() -> None:
    """The balance loss sees the biased routes, but the unbiased probabilities; z-loss and entropy see no bias."""
    hidden = torch.randn(TOKENS, HIDDEN)
    router = make_router([0, 0, 0, 1000.0, 500.0])
    ours, theirs = (r(hidden, make_context()) for r in (router, plain_twin(router)))
    assert torch.equal(ours.aux["router_z"], theirs.aux["router_z"])
    assert torch.equal(ours.use.router_entropy, theirs.use.router_entropy)
    assert ours.use.tokens_per_expert.tolist() == [0, 0, 0, TOKENS, TOKENS]
    scores = scores_of(router, hidden)
    probs = (scores / scores.sum(dim=1, keepdim=True)).mean(dim=0)
    torch.testing.assert_close(ours.aux["load_balance"], EXPERTS * (probs[3] + probs[4]) / 2)


def test_gradients_are_those_of_the_scores_and_the_bias_has_none() -> None:
    router = make_router(BIAS)
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context())
    factor = torch.randn(TOKENS * 2)
    (grad,) = torch.autograd.grad((routing.weight * factor).sum(), router.weight)
    weight = scores_of(router, hidden).gather(1, routing.expert_index.view(TOKENS, 2))
    weight = (weight / weight.sum(dim=1, keepdim=True)).flatten()
    (expected,) = torch.autograd.grad((weight * factor).sum(), router.weight)
    torch.testing.assert_close(grad, expected)
    assert not router.expert_bias.requires_grad
    assert [name for name, _ in router.named_parameters()] == ["weight"]  # no optimizer, no decay
    assert torch.equal(router.state_dict()["expert_bias"], torch.tensor(BIAS))


@pytest.mark.parametrize(
    ("load", "signs"),
    [
        ([10, 2, 6, 6, 6], [-1, 1, 0, 0, 0]),  # by the sign alone, not by how far
        ([30, 0, 0, 0, 0], [-1, 1, 1, 1, 1]),
        ([7, 7, 7, 7, 8], [1, 1, 1, 1, -1]),  # 7.2 on average
        ([3, 3, 3, 3, 3], [0, 0, 0, 0, 0]),
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ],
)
def test_sign_rule_by_hand(load: list[int], signs: list[int]) -> None:
    router = make_router(BIAS)
    router.after_step(step_use(load, sum(load) // 2))
    assert router.expert_bias.dtype == torch.float32
    torch.testing.assert_close(
        router.expert_bias, torch.tensor([b + 0.01 * s for b, s in zip(BIAS, signs, strict=True)]), rtol=0, atol=1e-7
    )


def test_small_steps_are_not_lost() -> None:
    """In bfloat16 a bias of 1 would not feel a step of 0.001."""
    router = make_router([1.0] * EXPERTS, bias_update_rate=0.001)
    for _ in range(10):
        router.after_step(step_use([5.0, 0, 0, 0, 0], 5))
    torch.testing.assert_close(router.expert_bias, torch.tensor([0.99, 1.01, 1.01, 1.01, 1.01]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_forward_moves_nothing(training: bool) -> None:
    """Neither evaluation nor a micro-batch: only ``after_step`` does. Evaluation routes as training does."""
    router = make_router(BIAS).train(training)
    hidden = torch.randn(TOKENS, HIDDEN)
    routings = [router(hidden, make_context()) for _ in range(3)]
    routings[0].weight.sum().backward()
    assert router.expert_bias.tolist() == torch.tensor(BIAS).tolist()
    assert all(torch.equal(routing.expert_index, routings[0].expert_index) for routing in routings)
    assert torch.equal(router.train(not training)(hidden, make_context()).expert_index, routings[0].expert_index)


def test_zero_rate_never_moves() -> None:
    router = make_router(bias_update_rate=0.0)
    router.after_step(step_use([5.0, 0, 0, 0, 0], 5))
    assert router.expert_bias.tolist() == [0.0] * EXPERTS


def test_imbalanced_router_comes_to_balance() -> None:
    """A router that prefers two experts; the paper's MaxVio (most over mean load, less 1) falls from its bound."""
    tokens = 400
    router = make_router()
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([4.0, 3.0, 0.0, 0.0, -1.0])
    violations, losers = [], []
    for _ in range(200):
        hidden = torch.randn(tokens, HIDDEN)
        hidden[:, 0] = 1.0
        use = router(hidden, make_context(tokens)).use
        violations.append(float(use.tokens_per_expert.max() / use.tokens_per_expert.mean()) - 1)
        losers.append(float(use.tokens_per_expert[4]))
        router.after_step(step_use(use.tokens_per_expert, int(use.tokens)))
    assert violations[0] > 1.0 and losers[0] < tokens / 20
    assert sum(violations[-30:]) / 30 < 0.2 and min(losers[-30:]) > tokens / 4
    assert router.expert_bias.argsort().tolist()[:2] == [0, 1] and router.expert_bias.argmax() == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias_update_rate": -0.1}, "router.bias_update_rate=-0.1 must not be negative"),
        ({"top_k": 0}, "router.top_k=0 must be at least 1"),
        ({"top_k": 6}, "router.top_k=6 must be at most model.moe.num_experts=5"),
        ({"load_balance_weight": -1.0}, "router.load_balance_weight=-1.0 must not be negative"),
    ],
)
def test_wrong_configurations_get_one_line(changes: dict[str, Any], message: str) -> None:
    complaint = refusal(CONFIG, EXPERTS, **changes)
    assert complaint.startswith(message) and "\n" not in complaint


def test_wrong_override_gets_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny("router=loss_free", "router.bias_update_rate=-1")
    assert "router.bias_update_rate=-1" in str(caught.value) and "\n" not in str(caught.value)


def test_groups_are_closed_to_a_token_by_more_than_a_low_score():
    """Biased scores may be below zero: an expert outside of the token's groups must lose to those too."""
    experts, config = 8, replace(CONFIG, num_groups=4, groups_per_token=2, top_k=4)
    router = LossFreeRouter(config, HIDDEN, experts, layer=3)
    torch.nn.init.normal_(router.weight, std=0.5)
    router.expert_bias.copy_(torch.linspace(-2.0, -1.2, experts))
    hidden = torch.randn(TOKENS, HIDDEN)
    chosen = router(hidden, make_context()).expert_index.view(TOKENS, 4)
    biased = (hidden @ router.weight.t()).sigmoid() + router.expert_bias
    assert (biased < 0).all()
    for token in range(TOKENS):
        sums = [float(biased[token, first : first + 2].sum()) for first in range(0, experts, 2)]
        groups = sorted(range(4), key=lambda group: -sums[group])[:2]
        allowed = [expert for group in groups for expert in (2 * group, 2 * group + 1)]
        expected = sorted(allowed, key=lambda expert: -float(biased[token, expert]))
        assert chosen[token].tolist() == expected
