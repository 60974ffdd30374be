"""Expert threshold routing against one token at a time in plain Python; related.md 11.14 lists what must hold.

That ranks and micro-batches pool their histograms is shown on ranks, in ``tests/distributed/test_pooled_quantiles.py``.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.builders import step_use, tiny
from helpers.routing import refusal
from torch import Tensor

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.layer import MoEConfig
from moe_pretrain.moe.routers.expert_threshold import ExpertThresholdRouter, ExpertThresholdRouterConfig
from moe_pretrain.moe.types import ExpertShard, Routing, RoutingContext

TOKENS, HIDDEN, EXPERTS = 60, 8, 5
CONFIG = ExpertThresholdRouterConfig(
    name="expert_threshold",
    target_experts=2.0,
    initial_threshold=0.55,
    ema_decay=0.9,
    num_bins=1000,
    warmup_steps=0,
)
THRESHOLD = [0.9, 0.4, 0.65, 0.55, 0.7]


def make_router(num_experts: int = EXPERTS, **changes: Any) -> ExpertThresholdRouter:
    router = ExpertThresholdRouter(replace(CONFIG, **changes), HIDDEN, num_experts, layer=3)
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def uneven_router(**changes: Any) -> ExpertThresholdRouter:
    router = make_router(**changes)
    router.threshold.copy_(torch.tensor(THRESHOLD))
    return router


def make_context(tokens: int = TOKENS, mask: Tensor | None = None, step: int = 4) -> RoutingContext:
    mask = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    return RoutingContext(mask, torch.arange(tokens), 1, seed=11, step=step)


def move(router: ExpertThresholdRouter, routing: Routing) -> None:
    use = routing.use
    router.after_step(step_use(use.tokens_per_expert, int(use.tokens), use.sums))


def scores_by_hand(router: ExpertThresholdRouter, hidden: Tensor) -> list[list[float]]:
    logits = (hidden.double() @ router.weight.detach().double().t()).tolist()
    return [[1 / (1 + math.exp(-logit)) for logit in row] for row in logits]


def cutoff_by_hand(router: ExpertThresholdRouter, hidden: Tensor) -> list[float]:
    """The (quota + 1)-th largest score of each expert."""
    quota = int(router.config.target_experts * len(hidden) / router.num_experts)
    return [sorted(column, reverse=True)[quota] for column in zip(*scores_by_hand(router, hidden), strict=True)]


def counts(routing: Routing, tokens: int = TOKENS) -> Tensor:
    return torch.bincount(routing.token_index, minlength=tokens)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_one_token_at_a_time(dtype: torch.dtype, training: bool) -> None:
    tokens = 300
    router = uneven_router().train(training)
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    routing = router(hidden, make_context(tokens))
    expected = [
        (token, expert, score)
        for token, row in enumerate(scores_by_hand(router, hidden))
        for expert, score in enumerate(row)
        if score > THRESHOLD[expert]
    ]
    token_index, expert_index, weight = zip(*expected, strict=True)
    assert routing.token_index.tolist() == list(token_index) and routing.expert_index.tolist() == list(expert_index)
    torch.testing.assert_close(routing.weight, torch.tensor(weight))
    assert routing.weight.dtype == torch.float32 and routing.routes_per_token is None
    assert set(counts(routing, tokens).tolist()) >= {0, 1, 2, 3}  # the point of the scheme


def test_strict_at_the_threshold() -> None:
    """Equal logits give 0.5 exactly: a threshold of 0.5 takes none, one below takes all."""
    router = make_router(initial_threshold=0.5)
    with torch.no_grad():
        router.weight.zero_()
    assert len(router(torch.randn(TOKENS, HIDDEN), make_context()).weight) == 0
    router.threshold.fill_(math.nextafter(0.5, 0.0) - 1e-7)
    assert counts(router(torch.randn(TOKENS, HIDDEN), make_context())).tolist() == [EXPERTS] * TOKENS


def test_starts_at_the_stated_threshold() -> None:
    router = make_router(initial_threshold=0.7)
    assert router.threshold.tolist() == pytest.approx([0.7] * EXPERTS)
    hidden = torch.randn(TOKENS, HIDDEN)
    taken = sum(score > 0.7 for row in scores_by_hand(router, hidden) for score in row)
    assert len(router(hidden, make_context()).weight) == taken > 0


def test_a_token_alone_is_routed_as_among_others() -> None:
    """In training and evaluation: routes depend on the token and the thresholds, on nothing else of the batch."""
    router = uneven_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    for training in (True, False):
        together = router.train(training)(hidden, make_context())
        alone = [router(hidden[token : token + 1], make_context(1)) for token in range(TOKENS)]
        assert torch.equal(together.expert_index, torch.cat([routing.expert_index for routing in alone]))
        torch.testing.assert_close(together.weight, torch.cat([routing.weight for routing in alone]))


def test_gradients_are_those_of_the_scores_and_thresholds_have_none() -> None:
    router = uneven_router()
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    routing = router(hidden, make_context())
    factor = torch.randn(len(routing.weight))
    grads = torch.autograd.grad((routing.weight * factor).sum(), [router.weight, hidden])
    scores = (hidden @ router.weight.t()).sigmoid()[routing.token_index, routing.expert_index]
    expected = torch.autograd.grad((scores * factor).sum(), [router.weight, hidden])
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert not (router.threshold.requires_grad or routing.use.sums.requires_grad)
    assert router.aux_weights == {} == routing.aux and not router.needs_global_routes


@pytest.mark.parametrize("shared_experts", [0, 1])
@pytest.mark.parametrize("threshold", [0.65, 0.9999])
def test_a_token_without_a_route_gets_nothing_from_routed_experts(threshold: float, shared_experts: int) -> None:
    """Its output is exactly that of the shared experts; at 0.9999 no token of the batch has a route."""
    config = replace(CONFIG, initial_threshold=threshold)
    layer = build_moe_layer(MoEConfig(EXPERTS, 12, shared_experts, 10, 1, 0, None, 8), config, HIDDEN, 3, ExpertShard())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    output = layer(hidden, make_context(), False).hidden
    alone = counts(layer.router(hidden, make_context())) == 0
    assert alone.all() if threshold > 0.99 else 0 < alone.sum() < TOKENS
    expected = layer.shared_experts(hidden) if shared_experts else torch.zeros(TOKENS, HIDDEN)
    assert torch.equal(output[alone], expected[alone])
    assert not (output[~alone] == expected[~alone]).all(dim=1).any()
    output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if not shared_experts:
        assert not hidden.grad[alone].any()


@pytest.mark.parametrize("bins", [1000, 20_000])
@pytest.mark.parametrize("target", [1.0, 2.0, 4.5])
def test_first_update_sets_the_quantile(target: float, bins: int) -> None:
    """Whatever the initial threshold and the decay; within one bin of the sort."""
    router = make_router(target_experts=target, num_bins=bins, initial_threshold=0.99, ema_decay=0.99)
    hidden = torch.randn(TOKENS, HIDDEN)
    routing = router(hidden, make_context())
    assert routing.use.sums.shape == (router.num_sums,) == (EXPERTS * bins + 1,)
    move(router, routing)
    assert router.threshold.tolist() == pytest.approx(cutoff_by_hand(router, hidden), abs=1 / bins + 1e-6)
    if bins > 1000:  # no two scores share a bin
        assert router(hidden, make_context()).use.tokens_per_expert.tolist() == [target * TOKENS / EXPERTS] * EXPERTS


def test_average_is_debiased() -> None:
    """After n updates: the mean of the quantiles with weights decay ** age, the initial threshold forgotten."""
    router = make_router(num_bins=100_000)
    cutoffs = []
    for updates in range(1, 6):
        hidden = torch.randn(TOKENS, HIDDEN) + updates / 3
        move(router, router(hidden, make_context()))
        cutoffs.append(torch.tensor(cutoff_by_hand(router, hidden), dtype=torch.float64))
        ages = [0.9 ** (updates - 1 - index) for index in range(updates)]
        expected = sum(age * cutoff for age, cutoff in zip(ages, cutoffs, strict=True)) / sum(ages)
        assert router.threshold.tolist() == pytest.approx(expected.tolist(), abs=2e-5)
    assert router.threshold.dtype == router.ema_weight.dtype == torch.float32
    assert float(router.ema_weight) == pytest.approx(1 - 0.9**5)


def test_no_memory_at_decay_zero() -> None:
    router = make_router(ema_decay=0.0)
    for shift in (1.0, -1.0):
        hidden = torch.randn(TOKENS, HIDDEN) + shift
        move(router, router(hidden, make_context()))
    assert router.threshold.tolist() == pytest.approx(cutoff_by_hand(router, hidden), abs=0.0011)


def test_all_experts_as_target_take_every_token() -> None:
    router = make_router(target_experts=5.0)
    hidden = torch.randn(TOKENS, HIDDEN)
    move(router, router(hidden, make_context()))
    assert router.threshold.tolist() == [0.0] * EXPERTS
    assert counts(router(hidden, make_context())).tolist() == [EXPERTS] * TOKENS


@pytest.mark.parametrize("target", [0.5, 2.0, 3.5])
def test_mean_experts_per_token_comes_to_the_target(target: float) -> None:
    """Fresh batches of one distribution; experts that everybody or nobody likes get their share, too."""
    tokens = 1000
    router = make_router(target_experts=target)
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([4.0, 2.0, 0.0, -1.0, -3.0])
    first, means, loads = 0.0, [], []
    for step in range(60):
        hidden = torch.randn(tokens, HIDDEN)
        hidden[:, 0] = 1.0
        routing = router(hidden, make_context(tokens))
        first = first or len(routing.weight) / tokens
        if step >= 30:
            means.append(len(routing.weight) / tokens)
            loads.append(routing.use.tokens_per_expert)
        move(router, routing)
    assert abs(first - target) > 0.3  # it had to move
    assert sum(means) / 30 == pytest.approx(target, rel=0.02)
    assert (sum(loads) / 30).tolist() == pytest.approx([target * tokens / EXPERTS] * EXPERTS, rel=0.05)


def test_cut_of_the_global_batch_and_padding_do_not_matter() -> None:
    hidden, mask = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS) < 0.7
    router = uneven_router()
    whole = router(hidden[mask], make_context(int(mask.sum()))).use
    for cuts in ([60], [30, 30], [1, 9, 50]):
        parts = zip(hidden.split(cuts), mask.split(cuts), strict=True)
        uses = [router(part, make_context(len(part), own)).use for part, own in parts]
        for name in ("sums", "tokens_per_expert", "tokens", "router_entropy"):
            torch.testing.assert_close(sum(getattr(use, name) for use in uses), getattr(whole, name), rtol=1e-5, atol=0)
        assert torch.equal(sum(use.sums for use in uses), whole.sums)


def test_statistics_of_text() -> None:
    """Entropy of the scores over their sum; tokens without a route are counted and logged as a share."""
    mask = torch.arange(TOKENS) % 3 != 0
    router = uneven_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    use = router(hidden, make_context(mask=mask)).use
    entropy, alone = 0.0, 0
    for row in (row for row, is_text in zip(scores_by_hand(router, hidden), mask.tolist(), strict=True) if is_text):
        entropy -= sum(score / sum(row) * math.log(score / sum(row)) for score in row)
        alone += not any(score > threshold for score, threshold in zip(row, THRESHOLD, strict=True))
    assert float(use.router_entropy) == pytest.approx(entropy, rel=1e-5) and use.tokens == 40
    assert use.sums[-1] == alone > 0
    metrics = router.metrics(step_use(use.tokens_per_expert, 40, use.sums))
    assert metrics == pytest.approx({"unrouted_share": alone / 40, "threshold_mean": sum(THRESHOLD) / EXPERTS})


def test_only_after_step_moves_and_evaluation_counts_nothing() -> None:
    router = uneven_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    assert router(hidden, make_context()).use.sums is not None
    assert router.eval()(hidden, make_context()).use.sums is None
    router.train()
    move(router, router(hidden, make_context(mask=torch.zeros(TOKENS, dtype=torch.bool))))  # a step without text
    assert router.threshold.tolist() == torch.tensor(THRESHOLD).tolist() and router.ema_weight == 0


def test_state_survives() -> None:
    """A loaded router goes on exactly as the saved one: the debiasing is part of the state."""
    router, loaded = make_router(), make_router()
    hidden = torch.randn(TOKENS, HIDDEN)
    for _ in range(3):
        move(router, router(hidden, make_context()))
    loaded.load_state_dict(router.state_dict())
    other = torch.randn(TOKENS, HIDDEN) + 1
    for one in (router, loaded):
        move(one, one(other, make_context()))
    assert torch.equal(router.threshold, loaded.threshold) and torch.equal(router.ema_weight, loaded.ema_weight)


@pytest.mark.parametrize("target", [2.0, 1.3])
def test_warmup_lets_experts_choose(target: float) -> None:
    """Each takes its best texts, the share rounded, of equal tokens the earlier; padding is never taken."""
    router = uneven_router(warmup_steps=3, target_experts=target)
    mask = torch.arange(TOKENS) % 4 != 0
    hidden = torch.randn(TOKENS, HIDDEN)
    hidden[30:] = hidden[:30]
    hidden[~mask] *= 20  # would be the best
    scores = (hidden @ router.weight.t()).sigmoid()
    routing = router(hidden, make_context(mask=mask, step=2))
    share = round(target * 45 / EXPERTS)
    for expert in range(EXPERTS):
        texts = [token for token in range(TOKENS) if mask[token]]
        best = sorted(texts, key=lambda token: -float(scores[token, expert]))[:share]
        assert sorted(best) == routing.token_index[routing.expert_index == expert].tolist()
    assert torch.equal(routing.weight, scores[routing.token_index, routing.expert_index])
    assert routing.use.tokens_per_expert.tolist() == [share] * EXPERTS


def test_warmup_ends_and_is_for_training_alone() -> None:
    router = uneven_router(warmup_steps=3)
    hidden = torch.randn(TOKENS, HIDDEN)
    chosen, after = (router(hidden, make_context(step=step)) for step in (2, 3))
    evaluated = router.eval()(hidden, make_context(step=0))
    assert torch.equal(after.expert_index, evaluated.expert_index)
    assert not torch.equal(chosen.use.tokens_per_expert, after.use.tokens_per_expert)
    # Thresholds learn from the same scores either way.
    assert torch.equal(chosen.use.sums[:-1], after.use.sums[:-1])


def test_causal_exactly_without_warmup() -> None:
    assert make_router().causal_in_training and make_router().causal_in_evaluation
    assert not make_router(warmup_steps=1).causal_in_training and make_router(warmup_steps=1).causal_in_evaluation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_experts": 0.0}, "router.target_experts=0.0 must be positive"),
        ({"target_experts": 5.5}, "router.target_experts=5.5 must be at most model.moe.num_experts=5"),
        ({"initial_threshold": 0.0}, "router.initial_threshold=0.0 must be positive"),
        ({"initial_threshold": 1.0}, "router.initial_threshold=1.0 must be below 1"),
        ({"ema_decay": 1.0}, "router.ema_decay=1.0 must be below 1"),
        ({"num_bins": 1}, "router.num_bins=1 must be at least 2"),
        ({"warmup_steps": -1}, "router.warmup_steps=-1 must not be negative"),
    ],
)
def test_wrong_configurations_get_one_line(changes: dict[str, Any], message: str) -> None:
    complaint = refusal(CONFIG, EXPERTS, **changes)
    assert complaint.startswith(message) and "\n" not in complaint


@pytest.mark.parametrize("override", ["router.target_experts=9", "router.warmup_steps=0.5", "router.top_k=2"])
def test_wrong_override_gets_one_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny("router=expert_threshold", override)
    assert override.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)
