"""The Sinkhorn router: its plan against loops in double precision, its choice, and what evaluation may not know."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.routing import by_token, make_context, refusal
from torch import Tensor

from moe_pretrain.config.load import load
from moe_pretrain.moe.routers.sinkhorn import SinkhornConfig, SinkhornRouter, sinkhorn
from moe_pretrain.moe.routers.top_k import TopKRouter, TopKRouterConfig

TOKENS, HIDDEN, EXPERTS = 12, 8, 5
SHIPPED = load(["router=sinkhorn"]).router
assert isinstance(SHIPPED, SinkhornConfig)
CONFIG = replace(SHIPPED, iterations=6)


def make_router(num_experts: int = EXPERTS, **changes: Any) -> SinkhornRouter:
    router = SinkhornRouter(replace(CONFIG, **changes), HIDDEN, num_experts, layer=3)
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def top_k_twin(router: SinkhornRouter) -> TopKRouter:
    options = {name: value for name, value in vars(router.config).items() if name != "iterations"}
    plain = {"name": "top_k", "weights": "raw", "weight_scale": 1.0}
    plain |= {"num_groups": 1, "groups_per_token": 1, "projection_size": None}
    twin = TopKRouter(TopKRouterConfig(**{**options, **plain}), HIDDEN, EXPERTS, 3)
    twin.weight = router.weight
    return twin


def text_mask(tokens: int, padding: list[int]) -> Tensor:
    return torch.tensor([token not in padding for token in range(tokens)])


def plan_by_hand(logits: list[list[float]], iterations: int) -> list[list[float]]:
    """Rows and columns of ``exp(z - max)`` scaled in turn to ``1 / tokens`` and ``1 / experts``."""
    largest = max(max(row) for row in logits)
    plan = [[math.exp(value - largest) for value in row] for row in logits]
    tokens, num_experts = len(plan), len(plan[0])
    for _ in range(iterations):
        plan = [[value / sum(row) / tokens for value in row] for row in plan]
        columns = [sum(row[expert] for row in plan) for expert in range(num_experts)]
        plan = [[row[expert] / columns[expert] / num_experts for expert in range(num_experts)] for row in plan]
    return plan


@pytest.mark.parametrize("padding", [[], [0, 5, 11]])
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_plan_equals_loops(iterations: int, padding: list[int]) -> None:
    logits = torch.randn(TOKENS, EXPERTS) * 2
    text = text_mask(TOKENS, padding)
    plan = sinkhorn(logits, text, iterations).exp()
    expected = torch.tensor(plan_by_hand(logits[text].tolist(), iterations))
    torch.testing.assert_close(plan[text], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("tokens", "num_experts"), [(48, 8), (512, 8), (512, 64), (40, 3)])
def test_marginals_are_uniform_after_the_shipped_iterations(tokens: int, num_experts: int) -> None:
    """To 1e-3 of themselves, for logits of variance 1 with a bias per expert of variance 1, and padding."""
    logits = torch.randn(tokens, num_experts) + torch.randn(num_experts)
    text = torch.arange(tokens) % 7 != 2
    plan = sinkhorn(logits, text, SHIPPED.iterations).exp()[text]
    assert ((plan.sum(dim=0) * num_experts - 1).abs() < 1e-3).all()
    assert ((plan.sum(dim=1) * text.sum() - 1).abs() < 1e-3).all()


@pytest.mark.parametrize("spread", [1e-4, 300.0, 1e4])
def test_plan_is_finite_for_any_spread(spread: float) -> None:
    """``exp`` of the logits less their maximum would be 0 in whole columns."""
    logits = torch.randn(TOKENS, EXPERTS) * spread
    logits[:, 2] -= 2 * spread
    plan = sinkhorn(logits, text_mask(TOKENS, [3]), SHIPPED.iterations)
    assert plan.isfinite().all() and not plan.requires_grad
    columns = plan.exp()[text_mask(TOKENS, [3])].sum(dim=0)
    torch.testing.assert_close(columns, torch.full((EXPERTS,), 1 / EXPERTS), rtol=1e-2, atol=0)


def test_without_text_the_plan_is_finite() -> None:
    assert sinkhorn(torch.randn(TOKENS, EXPERTS), text_mask(TOKENS, list(range(TOKENS))), 5).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("score", "top_k"), [("softmax", 2), ("sigmoid", 1), ("sigmoid", 3)])
def test_equals_the_plan_by_hand(score: str, top_k: int, training: bool) -> None:
    """Each text token takes its largest entries of the plan; in evaluation its largest logits."""
    tokens, padding = 60, [4, 17, 59]
    router = make_router(score=score, top_k=top_k).train(training)
    hidden = torch.randn(tokens, HIDDEN)
    text = text_mask(tokens, padding)
    found = by_token(router(hidden, make_context(tokens, token_mask=text)), tokens)
    logits = (hidden.double() @ router.weight.double().t()).tolist()
    own = [token for token in range(tokens) if token not in padding]
    plan = plan_by_hand([logits[token] for token in own], CONFIG.iterations)
    moved = 0
    for token, entries in zip(own, plan, strict=True):
        row = logits[token]
        ranked = sorted(range(EXPERTS), key=lambda e: (-(entries if training else row)[e], e))  # noqa: B023
        total = sum(math.exp(value) for value in row)
        weights = [math.exp(z) / total if score == "softmax" else 1 / (1 + math.exp(-z)) for z in row]
        assert found[token] == pytest.approx({e: weights[e] for e in ranked[:top_k]}, rel=1e-4)
        moved += set(found[token]) != set(sorted(range(EXPERTS), key=lambda e: -row[e])[:top_k])
    assert (moved > 5) is training
    assert all(len(found[token]) == top_k for token in padding)


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_is_even_on_random_logits(top_k: int) -> None:
    """Within 10% where plain top-k has an expert with half as much again as its share."""
    tokens, num_experts = 4096, HIDDEN - 1
    router = make_router(num_experts, top_k=top_k, iterations=SHIPPED.iterations)
    with torch.no_grad():
        router.weight[:, 0] = torch.randn(num_experts)
        router.weight[:, 1:] = torch.eye(num_experts)
    hidden = torch.randn(tokens, HIDDEN)
    hidden[:, 0] = 1.0
    for training in (True, False):
        counts = router.train(training)(hidden, make_context(tokens)).use.tokens_per_expert
        spread = float((counts * num_experts / (tokens * top_k) - 1).abs().max())
        assert spread < 0.1 if training else spread > 0.5


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_is_that_of_the_scores(score: str) -> None:
    """The plan has none: with the choice given, weights are plain scores of the logits."""
    router = make_router(score=score)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    routing = router(hidden, make_context(TOKENS))
    factor = torch.randn(TOKENS * 2)
    logits = hidden @ router.weight.t()
    scores = logits.softmax(dim=1) if score == "softmax" else logits.sigmoid()
    expected = (scores[routing.token_index, routing.expert_index] * factor).sum()
    for ours, theirs in zip(
        torch.autograd.grad((routing.weight * factor).sum(), [router.weight, hidden]),
        torch.autograd.grad(expected, [router.weight, hidden]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_training_is_not_causal_and_says_so() -> None:
    """Later tokens take experts away from earlier ones."""
    router = make_router().train()
    hidden = torch.randn(TOKENS, HIDDEN)
    other = torch.cat([hidden[:6], hidden[:1].repeat(6, 1) * 3])
    ours, theirs = (by_token(router(h, make_context(TOKENS)), TOKENS)[:6] for h in (hidden, other))
    assert [set(token) for token in ours] != [set(token) for token in theirs]
    assert not router.causal_in_training and router.causal_in_evaluation


def test_evaluation_is_plain_top_k_of_each_token() -> None:
    router = make_router().eval()
    hidden = torch.randn(TOKENS, HIDDEN)
    together = router(hidden, make_context(TOKENS))
    plain = top_k_twin(router)(hidden, make_context(TOKENS))
    assert torch.equal(together.expert_index, plain.expert_index) and torch.equal(together.weight, plain.weight)
    for token in range(TOKENS):
        (alone,) = by_token(router(hidden[token : token + 1], make_context(1)), 1)
        assert alone == pytest.approx(by_token(together, TOKENS)[token], rel=1e-5)


def test_padding_takes_no_part() -> None:
    """Text is matched as if padding were not there, whatever stands in it."""
    router = make_router().train()
    hidden = torch.randn(40, HIDDEN)
    text = torch.arange(40) % 4 != 1
    loud = torch.where(text[:, None], hidden, 5 * hidden[3])  # it would fill the experts of token 3
    alone = by_token(router(hidden[text], make_context(30)), 30)
    for given in (hidden, loud):
        routing = router(given, make_context(40, token_mask=text))
        found = by_token(routing, 40)
        for ours, theirs in zip([found[t] for t in range(40) if text[t]], alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert routing.use.tokens == 30 and routing.use.tokens_per_expert.sum() == 60
    everything = by_token(router(loud, make_context(40)), 40)
    assert [set(everything[t]) for t in range(40) if text[t]] != [set(token) for token in alone]


def test_ties_go_to_the_lower_expert() -> None:
    router = make_router()
    routing = router(torch.zeros(TOKENS, HIDDEN), make_context(TOKENS))
    assert routing.expert_index.tolist() == [0, 1] * TOKENS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "router.top_k=0 must be at least 1"),
        ({"iterations": 0}, "router.iterations=0 must be at least 1"),
        ({"top_k": 6}, "router.top_k=6 must be at most model.moe.num_experts=5"),
        ({"jitter": 1.0}, "router.jitter=1.0 must be below 1"),
        ({"load_balance_weight": -1.0}, "router.load_balance_weight=-1.0 must not be negative"),
    ],
)
def test_wrong_configurations_get_one_line(changes: dict[str, Any], message: str) -> None:
    complaint = refusal(CONFIG, EXPERTS, **changes)
    assert complaint.startswith(message) and "\n" not in complaint
