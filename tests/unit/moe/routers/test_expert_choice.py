"""Expert choice: the choice against a loop over experts, and the thresholds by which evaluation routes causally."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.builders import context_of, random_batches, step_use, tiny
from helpers.routing import by_token, make_context, refusal
from torch import Tensor

from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.routers.expert_choice import (
    EvaluationThresholds,
    ExpertChoiceConfig,
    ExpertChoiceRouter,
    choose_tokens,
    cutoff_sums,
)
from moe_pretrain.moe.types import ExpertShard, step_uses

TOKENS, HIDDEN, EXPERTS = 20, 8, 5
CONFIG = ExpertChoiceConfig(name="expert_choice", capacity_factor=2.0, threshold_decay=0.9)
PADDING = [0, 6, 7, 13, 19]


def make_router(num_experts: int = EXPERTS, **changes: Any) -> ExpertChoiceRouter:
    router = ExpertChoiceRouter(replace(CONFIG, **changes), HIDDEN, num_experts, layer=3)
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def text_mask(tokens: int, padding: list[int]) -> Tensor:
    return torch.tensor([token not in padding for token in range(tokens)])


def scores_by_hand(router: ExpertChoiceRouter, hidden: Tensor) -> list[list[float]]:
    scores = []
    for row in (hidden.double() @ router.weight.double().t()).tolist():
        total = sum(math.exp(value) for value in row)
        scores.append([math.exp(value) / total for value in row])
    return scores


def chosen_by_hand(
    scores: list[list[float]], padding: list[int], capacity: int
) -> tuple[list[dict[int, float]], list[float]]:
    """Expert -> weight of every token, and the best score of text that each expert leaves."""
    text = [token for token in range(len(scores)) if token not in padding]
    found: list[dict[int, float]] = [{} for _ in scores]
    cutoffs = []
    for expert in range(len(scores[0])):
        ranked = sorted(text, key=lambda token: (-scores[token][expert], token))  # noqa: B023
        for token in ranked[:capacity]:
            found[token][expert] = scores[token][expert]
        cutoffs.append(scores[ranked[capacity]][expert] if capacity < len(ranked) else 0.0)
    return found, cutoffs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [[], PADDING])
@pytest.mark.parametrize(("capacity_factor", "capacities"), [(2.0, (8, 6)), (1.0, (4, 3)), (5.0, (20, 15))])
def test_equals_one_expert_at_a_time(
    capacity_factor: float, capacities: tuple[int, int], padding: list[int], dtype: torch.dtype
) -> None:
    router = make_router(capacity_factor=capacity_factor)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype)
    routing = router(hidden, make_context(TOKENS, token_mask=text_mask(TOKENS, padding)))
    assert routing.weight.dtype == torch.float32 and routing.routes_per_token is None
    capacity = capacities[bool(padding)]
    expected, cutoffs = chosen_by_hand(scores_by_hand(router, hidden), padding, capacity)
    for ours, theirs in zip(by_token(routing, TOKENS), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    tokens = TOKENS - len(padding)
    assert routing.use.tokens_per_expert.tolist() == [capacity] * EXPERTS  # c_e = C
    assert routing.use.tokens == tokens and routing.aux == {}
    assert routing.use.sums is not None and routing.use.sums.dtype == torch.float64
    assert (routing.use.sums / tokens)[:EXPERTS].tolist() == pytest.approx(cutoffs, rel=1e-5)
    if capacity_factor == 2.0:
        assert len({len(token) for token in expected}) > 2  # tokens have any number of experts


@pytest.mark.parametrize(
    ("tokens", "capacity_factor", "capacity"),
    [
        (20, 2.0, 8),
        (19, 2.0, 8),  # 7.6
        (18, 2.0, 7),  # 7.2
        (4, 1.0, 1),  # 0.8
        (2, 1.0, 1),  # 0.4: at least one
        (1, 2.0, 1),
        (1, 5.0, 1),
        (10, 1.25, 2),  # 2.5: a half to the even number
        (14, 1.25, 4),  # 3.5
        (11, 1.1, 2),  # 2.42
        (7, 5.0, 7),
        (0, 2.0, 0),
    ],
)
def test_capacity_is_rounded(tokens: int, capacity_factor: float, capacity: int) -> None:
    """The nearest whole number, at least 1 where there is text; padding does not count."""
    router = make_router(capacity_factor=capacity_factor)
    text = torch.arange(TOKENS) < tokens
    use = router(torch.randn(TOKENS, HIDDEN), make_context(TOKENS, token_mask=text)).use
    assert use.tokens_per_expert.tolist() == [capacity] * EXPERTS
    assert use.sums is not None and use.sums.isfinite().all() and (use.sums >= 0).all()
    assert bool((use.sums[:EXPERTS] == 0).all()) is (capacity == tokens)


def test_ties_go_to_the_earlier_token() -> None:
    router = make_router()
    routing = router(torch.zeros(TOKENS, HIDDEN), make_context(TOKENS, token_mask=text_mask(TOKENS, [1])))
    assert sorted(set(routing.token_index.tolist())) == [0, 2, 3, 4, 5, 6, 7, 8]  # C is 7.6, so 8
    assert routing.expert_index.tolist() == list(range(EXPERTS)) * 8


def test_gradient_of_the_weights() -> None:
    router = make_router()
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    routing = router(hidden, make_context(TOKENS))
    factor = torch.randn(len(routing.weight))
    probs = (hidden @ router.weight.t()).softmax(dim=1)
    expected = (probs[routing.token_index, routing.expert_index] * factor).sum()
    for ours, theirs in zip(
        torch.autograd.grad((routing.weight * factor).sum(), [router.weight, hidden]),
        torch.autograd.grad(expected, [router.weight, hidden]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_padding_takes_no_part(training: bool) -> None:
    router = make_router().train(training)
    hidden = torch.randn(TOKENS, HIDDEN)
    text = text_mask(TOKENS, PADDING)
    loud = torch.where(text[:, None], hidden, 5 * router.weight[2])
    alone = by_token(router(hidden[text], make_context(15)), 15)
    for given in (hidden, loud):
        routing = router(given, make_context(TOKENS, token_mask=text))
        found = by_token(routing, TOKENS)
        assert all(not found[token] for token in PADDING)
        for ours, theirs in zip([found[t] for t in range(TOKENS) if text[t]], alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def suffix_moves_prefix(training: bool) -> bool:
    """Whether replacing the second half of a row changes routes or logits of the first half, in a whole model."""
    config = tiny("router=expert_choice", "packing.isolate_documents=false")
    model = DecoderLM(config.model, config.router, ExpertShard())
    initialise(model, config.seed)
    batch = random_batches(config, 1)[0][0]
    documents, positions = torch.zeros_like(batch.document_ids), torch.arange(12).expand(2, -1)
    output = model(
        batch.input_ids, batch.labels, documents, positions, context_of(replace(batch, document_ids=documents))
    )
    for layer, use in zip(model.moe_layers(), step_uses(output.uses), strict=True):
        layer.router.after_step(use)
    model.train(training)
    first_routes: list[list[dict[int, float]]] = []
    for layer in model.moe_layers():
        layer.router.register_forward_hook(
            lambda module, inputs, routing: first_routes.append(by_token(routing, 24)[:6])
        )
    logits = []
    for later in (batch.input_ids[:, 6:], (batch.input_ids[:, 6:] + 31) % 64):
        ids = torch.cat([batch.input_ids[:, :6], later], dim=1)
        context = context_of(replace(batch, input_ids=ids, document_ids=documents))
        logits.append(model.logits(ids, documents, positions, context))
    assert not torch.allclose(logits[0][:, 6:], logits[1][:, 6:])
    ours, theirs = first_routes[:2], first_routes[2:]
    experts_moved = [[set(t) for t in layer] for layer in ours] != [[set(t) for t in layer] for layer in theirs]
    logits_moved = not torch.allclose(logits[0][:, :6], logits[1][:, :6], rtol=1e-4, atol=1e-5)
    assert experts_moved == logits_moved
    return logits_moved


def test_training_is_not_causal() -> None:
    """The flag is true: if this test fails the scheme is no longer expert choice, and may drop its flag."""
    assert suffix_moves_prefix(training=True)
    assert not make_router().causal_in_training


def test_evaluation_is_causal() -> None:
    assert not suffix_moves_prefix(training=False)
    assert make_router().causal_in_evaluation


def test_evaluation_is_the_rule_of_the_thresholds() -> None:
    """Every expert whose score exceeds its threshold, strictly; whatever else is in the batch."""
    router = make_router().eval()
    hidden = torch.randn(TOKENS, HIDDEN)
    probs = (hidden @ router.weight.t()).softmax(dim=1).detach()
    ordered = probs.sort(dim=0).values
    for expert in range(EXPERTS):
        router.evaluation.thresholds[expert] = ordered[3 * expert + 4 : 3 * expert + 6, expert].mean()
    routing = router(hidden, make_context(TOKENS))
    assert routing.use.tokens_per_expert.tolist() == [TOKENS - (3 * e + 5) for e in range(EXPERTS)]
    assert routing.use.sums is None
    together = by_token(routing, TOKENS)
    limits, scores = router.evaluation.thresholds.tolist(), probs.tolist()
    for token in range(TOKENS):
        assert set(together[token]) == {e for e in range(EXPERTS) if scores[token][e] > limits[e]}
        assert together[token] == pytest.approx({e: scores[token][e] for e in together[token]}, rel=1e-5)
        (alone,) = by_token(router(hidden[token : token + 1], make_context(1)), 1)
        assert alone == pytest.approx(together[token], rel=1e-5)
    router.evaluation.thresholds.fill_(1 / EXPERTS)
    assert len(router(torch.zeros(TOKENS, HIDDEN), make_context(TOKENS)).weight) == 0  # reached, not exceeded


def test_thresholds_before_the_first_step() -> None:
    """A score that is better than even."""
    router = make_router().eval()
    assert router.evaluation.thresholds.tolist() == pytest.approx([1 / EXPERTS] * EXPERTS)
    hidden = torch.randn(TOKENS, HIDDEN)
    probs = (hidden @ router.weight.t()).softmax(dim=1)
    found = by_token(router(hidden, make_context(TOKENS)), TOKENS)
    assert [set(token) for token in found] == [
        {e for e, score in enumerate(row) if score > 1 / EXPERTS} for row in probs.tolist()
    ]
    assert all(found)


def test_after_one_step_evaluation_routes_as_training_did() -> None:
    """The rule "above the cut-off" is exactly what the experts took, and the first step forgets the start."""
    router = make_router(threshold_decay=0.999)
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context(TOKENS))
    router.after_step(step_use(routing.use.tokens_per_expert, TOKENS, routing.use.sums))
    again = router.eval()(hidden, make_context(TOKENS))
    assert again.token_index.tolist() == routing.token_index.tolist()
    assert again.expert_index.tolist() == routing.expert_index.tolist()


def sums_of(cutoffs: Tensor, scores: Tensor, tokens: int) -> Tensor:
    """The sums of a step of ``tokens`` tokens with these cut-offs and, in each expert, moments of these scores."""
    return tokens * torch.cat([cutoffs, scores.mean(dim=0), scores.square().mean(dim=0)])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_thresholds_stand_at_the_debiased_mean_of_the_cutoffs_z_scores(decay: float) -> None:
    """``sum_i decay^(n-i) z_i / sum_i decay^(n-i)`` of the last step's scores; steps without text are none."""
    router = make_router(threshold_decay=decay)
    cutoffs = 1 + torch.rand(12, EXPERTS, dtype=torch.float64)
    scores = torch.rand(12, 50, EXPERTS, dtype=torch.float64) + torch.arange(12)[:, None, None] / 9
    for step, cutoff in enumerate(cutoffs):
        tokens = 0 if step == 5 else 7 * (step + 1)
        router.after_step(step_use([0.0] * EXPERTS, tokens, sums_of(cutoff, scores[step], tokens)))
        assert router.evaluation.thresholds.dtype == torch.float32
    kept = [step for step in range(12) if step != 5]
    mean, spread = scores.mean(dim=1), scores.std(dim=1, correction=0)
    z_scores = ((cutoffs - mean) / spread)[kept]
    factor = torch.tensor([decay ** (len(kept) - 1 - i) for i in range(len(kept))], dtype=torch.float64)
    expected = mean[-1] + spread[-1] * (factor[:, None] * z_scores).sum(dim=0) / factor.sum()
    torch.testing.assert_close(router.evaluation.thresholds.double(), expected, rtol=1e-5, atol=0)
    state = router.state_dict()
    buffers = {"evaluation.thresholds", "evaluation.cutoff_z_scores", "evaluation.z_score_steps"}
    assert set(state) == {"weight"} | buffers
    other = make_router(threshold_decay=decay)
    other.load_state_dict(state)
    for one in (router, other):
        one.after_step(step_use([0.0] * EXPERTS, 4, sums_of(cutoffs[0], scores[0], 4)))
    assert torch.equal(router.evaluation.thresholds, other.evaluation.thresholds)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_evaluation_keeps_up_with_scores_that_grow(decay: float) -> None:
    """Norms whose cut-off goes from 1.19 to 4.91 within 20 steps and then stays: evaluation has training's experts.

    A running mean of the cut-offs themselves gives each token 6 of 8 experts at step 26.
    """
    experts, tokens = 8, 512
    generator = torch.Generator().manual_seed(3)
    thresholds, text = EvaluationThresholds(experts, 0.0, decay), torch.ones(tokens, dtype=torch.bool)
    growth = 1 + 0.1 * torch.rand(experts, generator=generator)
    for step in range(101):
        # From 0.25 spread to 0.4, since distributions change their shape as well.
        scale = (1.19 + (4.91 - 1.19) * min(step, 20) / 20) / 1.19
        spread = 0.25 + 0.15 * min(step, 20) / 20
        scores = scale * growth * (1 + spread * torch.randn(tokens, experts, generator=generator)).clamp(min=0)
        if step in (26, 100):  # before the step, by tokens that the thresholds have not seen
            per_token = float((scores > thresholds.thresholds).sum()) / tokens
            assert per_token == pytest.approx(2.0, abs=0.3), step
        taken, cutoffs = choose_tokens(scores, text, 2.0)
        thresholds.after_step(step_use([0.0] * experts, tokens, cutoff_sums(scores, cutoffs, text)))
        assert float(taken.sum()) / tokens == 2.0
        if step in (0, 2, 10, 26, 100):
            per_token = float((scores > thresholds.thresholds).sum()) / tokens
            assert per_token == pytest.approx(2.0, abs=0.3), step


def test_scores_without_spread_and_experts_that_take_all_have_thresholds() -> None:
    thresholds = EvaluationThresholds(2, 0.5, 0.9)
    text = torch.tensor([True, True, True, False])
    for scores in (torch.full((4, 2), 3.0), torch.rand(4, 2), torch.full((4, 2), 5.0)):
        taken, cutoffs = choose_tokens(scores, text, 1.0)
        thresholds.after_step(step_use([0.0, 0.0], 3, cutoff_sums(scores, cutoffs, text)))
    assert thresholds.thresholds.tolist() == [5.0, 5.0]
    for _ in range(3):
        scores = torch.rand(4, 2) + 0.01
        taken, cutoffs = choose_tokens(scores, text, 2.0)
        thresholds.after_step(step_use([0.0, 0.0], 3, cutoff_sums(scores, cutoffs, text)))
        assert taken[:3].all() and thresholds.thresholds.tolist() == [0.0, 0.0]


def test_cutoffs_of_micro_batches_weigh_by_their_text() -> None:
    router = make_router()
    parts = [(torch.randn(TOKENS, HIDDEN), text_mask(TOKENS, PADDING)), (torch.randn(8, HIDDEN), text_mask(8, []))]
    uses = [router(hidden, make_context(len(hidden), token_mask=mask)).use for hidden, mask in parts]
    router.after_step(step_use([0.0] * EXPERTS, 23, uses[0].sums + uses[1].sums))
    first = chosen_by_hand(scores_by_hand(router, parts[0][0]), PADDING, 6)[1]
    second = chosen_by_hand(scores_by_hand(router, parts[1][0]), [], 3)[1]
    expected = [(15 * a + 8 * b) / 23 for a, b in zip(first, second, strict=True)]
    assert router.evaluation.thresholds.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_forward_moves_nothing(training: bool) -> None:
    router = make_router().train(training)
    for _ in range(2):
        router(torch.randn(TOKENS, HIDDEN), make_context(TOKENS))
    assert (
        router.evaluation.thresholds.tolist() == pytest.approx([1 / EXPERTS] * EXPERTS)
        and router.evaluation.z_score_steps == 0
    )


def test_evaluation_uses_about_as_many_experts_as_training() -> None:
    """Thresholds from many steps, then tokens that were in none of them."""
    router = make_router(threshold_decay=0.99)
    for _ in range(50):
        use = router(torch.randn(2000, HIDDEN), make_context(2000)).use
        router.after_step(step_use(use.tokens_per_expert, 2000, use.sums))
    tokens = 5000
    use = router.eval()(torch.randn(tokens, HIDDEN), make_context(tokens)).use
    assert float(use.tokens_per_expert.sum()) / tokens == pytest.approx(2.0, abs=0.1)
    assert (use.tokens_per_expert / use.tokens_per_expert.mean() - 1).abs().max() < 0.15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity_factor": 0.0}, "router.capacity_factor=0.0 must be positive"),
        ({"capacity_factor": math.nan}, "router.capacity_factor=nan must be finite"),
        ({"capacity_factor": 5.5}, "router.capacity_factor=5.5 must be at most model.moe.num_experts=5"),
        ({"threshold_decay": 1.0}, "router.threshold_decay=1.0 must be below 1"),
        ({"threshold_decay": -0.1}, "router.threshold_decay=-0.1 must not be negative"),
    ],
)
def test_wrong_configurations_get_one_line(changes: dict[str, Any], message: str) -> None:
    complaint = refusal(CONFIG, EXPERTS, **changes)
    assert complaint.startswith(message) and "\n" not in complaint
